"""Checksums of a folder's weight files, recorded where they were written and checked where they are loaded.

A flipped byte in a weight file changes what is said and raises nothing: the file has its length, its header is whole.
So a folder that Higgstune writes names each weight file with its sha256 in `higgstune.json`, and loading compares.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from higgstune.errors import CheckpointError
from higgstune.files import write_file
from higgstune.model.layout import read_json

FOLDER_CARD = "higgstune.json"  # what Higgstune notes of a folder that it wrote
FILES = "files"  # its key: {path from the folder: sha256}


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hex digits. Raises CheckpointError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def folder_card(folder: Path) -> dict[str, Any]:
    """What Higgstune noted of a folder; empty for one from elsewhere. Raises CheckpointError when it is broken."""
    path = folder / FOLDER_CARD
    return read_json(path, "") if path.exists() else {}


def write_checksums(folder: Path, **notes: Any) -> None:
    """Record the sha256 of every weight file below a folder, and `notes` beside them, in `higgstune.json`."""
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*.safetensors"))}
    card = folder_card(folder) | notes | {FILES: files}
    write_file(folder / FOLDER_CARD, json.dumps(card, indent=2, ensure_ascii=False))


def check_checksums(folder: Path) -> None:
    """Compare each recorded weight file with its checksum. A folder that records none passes.

    Raises CheckpointError naming the file that is missing or has changed.
    """
    files = folder_card(folder).get(FILES, {})
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / FOLDER_CARD}: {FILES} must map file names to checksums; copy it again")
    for name, recorded in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder / FOLDER_CARD} names a file outside of its folder: {name}; copy it again")
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {FOLDER_CARD} says that it belongs here; copy the folder again")
        found = sha256_of(path)
        if found != recorded:
            raise CheckpointError(
                f"{path} is not the file that was written: its sha256 is {found[:16]}..., {FOLDER_CARD} records "
                f"{str(recorded)[:16]}...; copy the folder again, or write it anew"
            )
