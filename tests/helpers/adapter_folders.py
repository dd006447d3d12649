"""Read, copy and damage the folders of adapters and merged checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def card(folder: Path) -> dict[str, Any]:
    """The card of an adapter or of a merged checkpoint."""
    return json.loads((folder / "higgstune.json").read_text())


def copy_of(adapter: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an adapter with a changed card, and without the checksum that would reveal it."""
    shutil.copytree(adapter, folder)
    (folder / "higgstune.json").write_text(json.dumps(card(folder) | {"card_sha256": None} | changes))
    return folder


def drop_a_key(path: Path) -> None:
    """Leave one tensor out of a file."""
    weights = load_file(path)
    del weights[sorted(weights)[-1]]
    save_file(weights, path, metadata={"format": "pt"})
