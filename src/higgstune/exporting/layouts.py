"""Write a model as a checkpoint's folder in one of three layouts: weights, config, tokenizer, licences."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from higgstune.checkpoint_files import read_json
from higgstune.codec import CODEC_FOLDER
from higgstune.codec.whisper_encoder import WhisperTower
from higgstune.errors import WorkError
from higgstune.families import load_family
from higgstune.families.base import Layout
from higgstune.families.sampling import GENERATION_CONFIG, GENERATION_NAMES, Sampling, base_sampling
from higgstune.files import new_folder

LayoutName = Literal["native", "extended", "original"]
_CHAT_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# The other files of a checkpoint, which are copied from its base; any other file is not.
_COMPANIONS = (
    "tokenizer.json", _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", _CHAT_TEMPLATE, "chat_template.json", "preprocessor_config.json", "processor_config.json",
    GENERATION_CONFIG,
)  # fmt: skip
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """`new_folder` for a checkpoint. Raises WorkError, too, where a device's memory is too small for the model."""
    try:
        with new_folder(out) as folder:
            yield folder
    except torch.OutOfMemoryError as error:
        raise WorkError(f"the model does not fit into the device's memory: use --device cpu [{error}]") from error


def write_checkpoint(
    folder: Path,
    model: Any,
    layout: str,
    *,
    base: Layout,
    tokenizer: Any,
    tower: WhisperTower | None = None,
) -> None:
    """Write config and weights of `model` in a layout, with tokenizer, template and licences of `base`.

    `tower` is the Whisper encoder that the original layout includes, where it is loaded already.
    Raises CheckpointError for a model that a layout cannot express.
    """
    export = load_family(base.family).export
    export.write(folder, model, layout, base=base, tokenizer=tokenizer, tower=tower)
    _copy_companions(base.folder, folder, export.chat_template())


def write_sampling(folder: Path, sampling: Sampling) -> None:
    """Let a checkpoint recommend `sampling`. Its generation_config.json is unchanged if it does so already."""
    if base_sampling(folder) == sampling:
        return
    path = folder / GENERATION_CONFIG
    values = read_json(path, "") if path.exists() else {}
    kept = {name: value for name, value in values.items() if name not in GENERATION_NAMES}
    path.write_text(json.dumps(kept | sampling.generation_config(), indent=2) + "\n", encoding="utf-8")


def licence_files(folder: Path) -> list[Path]:
    """The licence files at the top of a checkpoint's or a codec's folder."""
    return sorted({path for pattern in _LICENCES for path in folder.glob(pattern) if path.is_file()})


def copy_codec(codec: Path, folder: Path) -> None:
    """Include a codec, with its licence, in the sub-folder where loading a checkpoint looks for one."""
    shutil.copytree(codec, folder / CODEC_FOLDER, ignore=shutil.ignore_patterns(".*"))


def _copy_companions(base: Path, folder: Path, chat_template: str | None) -> None:
    for name in _COMPANIONS:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for path in licence_files(base):
        shutil.copyfile(path, folder / path.name)
    templates = base / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
    written = [folder / _CHAT_TEMPLATE, folder / "chat_template.json"]
    tokenizer = folder / _TOKENIZER_CONFIG
    has_one = any(path.exists() for path in written) or (
        tokenizer.exists() and "chat_template" in read_json(tokenizer, "")
    )
    if not has_one and chat_template is not None:
        (folder / _CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
