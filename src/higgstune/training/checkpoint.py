"""The folder of a checkpoint: written beside its place, sealed with checksums, renamed. Whole, or not there.

A checkpoint holds safetensors and JSON alone, so that one from a stranger can be read without running what it says.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from higgstune.errors import CheckpointError
from higgstune.files import sync_files, sync_folder, writing
from higgstune.model.checksums import sha256_of
from higgstune.model.layout import read_json

SEAL = "checkpoint.json"
_PREFIX = "checkpoint-"
_INCOMPLETE = "incomplete"  # where a checkpoint is written before it gets its name
_LOG = logging.getLogger(__name__)


@contextmanager
def new_checkpoint(parent: Path, step: int, notes: dict[str, Any], *, keep: int | None = None) -> Iterator[Path]:
    """A folder to write a checkpoint into, which is `parent/checkpoint-STEP` in the end, sealed with `notes`.

    The newest `keep` checkpoints stay, all where it is not given. Raises WorkError where the disk refuses; then those
    before are as they were.
    """
    staged, final = parent / _INCOMPLETE, parent / f"{_PREFIX}{step}"
    try:
        with writing(final, "the checkpoints before it are as they were", again="go on with --resume"):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            yield staged
            _seal(staged, notes)
            if not _is_whole(final):  # a run that went back to an earlier one writes the same again
                _remove(final)
                os.replace(staged, final)
                sync_folder(parent)
            for old in _by_step(parent)[:-keep] if keep else ():
                _remove(old)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def newest_checkpoint(parent: Path) -> Path | None:
    """The newest whole checkpoint; one that is damaged is told of, and gets another name for a look at it."""
    found = _by_step(parent)
    for folder in reversed(found):
        try:
            read_checkpoint(folder)
        except CheckpointError as error:
            kept = folder.with_name(f"damaged-{folder.name}")
            _LOG.warning("%s: this checkpoint is skipped, and kept as %s", error, kept.name)
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(folder, kept)
        else:
            return folder
    if found:
        _LOG.warning("no checkpoint in %s is whole: the stage begins anew", parent)
    return None


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """What a checkpoint was sealed with. Raises CheckpointError unless every file is the one that was written."""
    seal = read_json(folder / SEAL, "a checkpoint is not whole without it")
    files = seal.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / SEAL} is damaged: it names no files")
    for name, sha256 in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or sha256_of(path) != sha256:
            raise CheckpointError(f"{path} is missing, cut off or changed (checksum)")
    return seal


def _is_whole(folder: Path) -> bool:
    try:
        read_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def _seal(folder: Path, notes: dict[str, Any]) -> None:
    sync_files(folder)
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    with open(folder / SEAL, "w", encoding="utf-8") as file:
        json.dump(notes | {"files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _by_step(parent: Path) -> list[Path]:
    """By their names: a clock that was set back changes nothing."""
    found = [path for path in parent.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _remove(folder: Path) -> None:
    """Without its seal first, so that what a crash leaves of it is not taken for a checkpoint."""
    (folder / SEAL).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
