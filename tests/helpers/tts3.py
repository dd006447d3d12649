"""The golden values of Higgs TTS 3, and copies of their checkpoint that a test may change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from higgstune.batch.collate import PaddedCollator, pack
from higgstune.families import load_family, read_layout
from higgstune.families.base import Batching
from higgstune.families.higgs_tts_3.golden import Golden
from higgstune.model.load import load_tokenizer

FOLDER = Path(__file__).parents[3] / "shared" / "golden" / "higgs_tts_3"
BASE = FOLDER / "checkpoint"
NEEDED = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs golden values at ../shared/golden/higgs_tts_3")


def golden(folder: Path = FOLDER) -> Golden:
    """The values with their checkpoint."""
    layout = read_layout(folder / "checkpoint")
    family = load_family(layout.family)
    config = family.read_config(layout.folder)
    tokenizer = load_tokenizer(layout.folder, family, config)
    return Golden(folder, layout, tokenizer, Batching(PaddedCollator.of(family.spec(config)), pack))


def copy_base(folder: Path, *, licensed: bool = True) -> Path:
    """The golden checkpoint with its codec's configuration and, as in the release, LICENSE and NOTICE."""
    shutil.copytree(BASE, folder)
    shutil.copyfile(FOLDER / "codec_config.json", folder / "codec_config.json")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)  # the values may be read-only
    if licensed:
        (folder / "LICENSE").write_text("The licence.\n")
        (folder / "NOTICE").write_text("The notice.\n")
    return folder


def change_config(folder: Path, section: str, **values: Any) -> None:
    """Set keys of a section of config.json; None removes one."""
    written = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        written[section].pop(key, None)
        if value is not None:
            written[section][key] = value
    (folder / "config.json").write_text(json.dumps(written))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint with one weight file."""
    return load_file(folder / "model.safetensors")


def store(folder: Path, state: dict[str, Tensor]) -> None:
    """Write the only weight file anew."""
    save_file({key: value.clone() for key, value in state.items()}, folder / "model.safetensors")
