"""Rows of a source with their place in it, the limits of what a source may name, and the record of refused rows."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from higgstune.data.manifest import Utterance
from higgstune.data.rejection import Rejection, RowError, shown
from higgstune.errors import DataError

MAX_BYTES = 1 << 29  # of a source that is read as a whole: a million rows, which take ten times as much once decoded


@dataclass(frozen=True)
class SourceRow:
    """One row of a source: its content, or the reason why it cannot be used."""

    location: str  # file and row, counted as in an editor
    folder: Path  # its paths are relative to it
    content: Utterance | RowError
    id: str | None = None  # as far as they are known for a refused row
    audio: str | None = None
    allow_outside: bool = False  # whether its paths may leave the folder

    def path(self, name: str) -> Path:
        """A path of this row, resolved. Raises RowError where it leaves the folder without permission."""
        return path_within(self.folder, name, self.allow_outside)


def path_within(folder: Path, name: str, allow_outside: bool) -> Path:
    """`folder / name`. Raises RowError where `..`, a link or an absolute path leads out of the folder.

    A source from a stranger must not turn files that it did not bring into rows. With `allow_outside` the user permits
    it.
    """
    path = folder / name
    try:
        leaves = not allow_outside and not is_within(path, folder)
    except ValueError:  # a null byte, half a surrogate pair: no file has such a name, and its reader reports it
        return path
    if leaves:
        raise RowError(
            "outside_folder",
            f"{shown(name)} leads out of the folder {folder} of its source: move the file there, or, if you trust "
            "whoever wrote the source, give --allow-outside (allow_outside=True in Python)",
        )
    return path


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path, with links followed, is a folder or lies in it. Raises ValueError for an impossible path."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def read_whole(path: Path) -> bytes:
    """The bytes of a source's file. Raises DataError where it cannot be read or is too large."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES >> 20} MB: split it, or write a manifest of JSON lines")
    return content


def rejections_of(rows: Sequence[SourceRow], refused: Mapping[int, RowError]) -> list[Rejection]:
    """The records of refused rows, which are given by their numbers, in order."""
    return [
        Rejection(rows[index].location, rows[index].id, rows[index].audio, error.reason, str(error))
        for index, error in sorted(refused.items())
    ]
