"""Rows of a source with their place in it, the limits of what a source may name, and the record of refused rows."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from higgstune.data.audio import AUDIO_SUFFIXES, MEDIA_SUFFIXES, PLAIN_SUFFIXES
from higgstune.data.manifest import Utterance
from higgstune.data.rejection import Rejection, RowError, shown
from higgstune.data.text import encoding_of
from higgstune.errors import DataError

# Formats of recordings that are not read: rows with them are refused by name.
FOREIGN_SUFFIXES = (
    *(".wma", ".amr", ".ac3", ".aiff", ".aif", ".au", ".caf", ".w64", ".wv", ".ape", ".mpga", ".mp2", ".3gp", ".avi"),
)
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


@dataclass(frozen=True)
class Source:
    """The rows of a source, how it was understood, and what of it is not used, a clause each."""

    rows: Iterable[SourceRow]
    read_as: str
    notes: Callable[[], Iterable[str]] = tuple  # once the rows are read

    def __iter__(self) -> Iterator[SourceRow]:
        return iter(self.rows)


def path_within(folder: Path, name: str, allow_outside: bool) -> Path:
    """`folder / name`. Raises RowError where `..`, a link or an absolute path leads out of the folder.

    A source from a stranger must not turn files that it did not bring into rows. With `allow_outside` the user permits
    it.
    """
    path = folder / name
    if allow_outside or _goes_straight(folder, name):
        return path
    try:
        leaves = not is_within(path, folder)
    except ValueError:  # a null byte, half a surrogate pair: no file has such a name, and its reader reports it
        return path
    if leaves:
        raise RowError(
            "outside_folder",
            f"{shown(name)} leads out of the folder {folder} of its source: move the file there, or, if you trust "
            "whoever wrote the source, give --allow-outside (allow_outside=True in Python)",
        )
    return path


def _goes_straight(folder: Path, name: str) -> bool:
    """Whether a path goes down from its folder without any link: seldom not, and much sooner known than `is_within`."""
    steps = name.split("/")
    if os.name != "posix" or name.startswith("/") or ".." in steps:
        return False
    return not any(os.path.islink(os.path.join(folder, *steps[: count + 1])) for count in range(len(steps)))


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


def decode(data: bytes) -> str:
    """Text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark. Raises UnicodeDecodeError, also for NUL."""
    text = data.decode(encoding_of(data))
    if (place := text.find("\0")) >= 0:
        raise UnicodeDecodeError("utf-8", data, place, place + 1, "a NUL byte, which is in no text")
    return text


def decode_lines(data: bytes) -> list[str]:
    """The lines of a table, as `decode`; bytes that are not UTF-8 become surrogates, which refuse their row alone."""
    try:
        text = decode(data)
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", errors="surrogateescape")
    if "\n" not in text:  # as old programs on a Mac write it
        text = text.replace("\r", "\n")
    return [line.rstrip("\r") for line in text.split("\n")]


def without_audio_suffix(name: str) -> str:
    """A recording's name without a known suffix, with forward slashes."""
    path = Path(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in AUDIO_SUFFIXES else name


def nfc(name: str) -> str:
    """A name in Unicode NFC: a Mac writes the same name in another form than a text does."""
    return unicodedata.normalize("NFC", name)


def audio_files(folder: Path, allow_outside: bool) -> Iterator[tuple[Path, dict[str, str]]]:
    """Recordings, and the names beside each by NFC stem and lower-case suffix. Folders are visited once; hidden ones
    are not.

    A link to a folder outside is not visited unless `allow_outside`, and is yielded as if it were a recording.
    """
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if not allow_outside and not is_within(Path(root), folder):
            yield Path(root), {}
            folders.clear()
            continue
        siblings = {nfc(os.path.splitext(name)[0]) + os.path.splitext(name)[1].lower(): name for name in names}
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in AUDIO_SUFFIXES + FOREIGN_SUFFIXES and not name.startswith("."):
                yield Path(root, name), siblings


def is_converted(path: Path, siblings: Mapping[str, str]) -> bool:
    """Whether a file for `media` has the same sound beside it in a plain format, by its name, which is used instead."""
    return path.suffix.lower() in MEDIA_SUFFIXES and any(nfc(path.stem) + end in siblings for end in PLAIN_SUFFIXES)
