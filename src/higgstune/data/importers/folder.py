"""Rows from a folder of recordings, each with its transcript in a .txt or .lab file of the same name."""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path

from higgstune.data.audio import AUDIO_SUFFIXES, is_file
from higgstune.data.manifest import Utterance
from higgstune.data.messages import is_unicode
from higgstune.data.rejection import RowError
from higgstune.data.source import SourceRow, is_within, path_within

TRANSCRIPT_SUFFIXES = (".txt", ".lab")
_FOREIGN_SUFFIXES = (".m4a", ".aac", ".wma", ".mp4", ".mkv", ".webm", ".amr", ".ac3", ".aiff", ".aif", ".au")
_MAX_TRANSCRIPT = 1 << 20  # bytes: an hour of speech is 60 kB
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_folder(folder: Path, *, allow_outside: bool = False) -> Iterator[SourceRow]:
    """One row for each recording below a folder, in the order of their paths; hidden files are skipped.

    A recording without a transcript, or in an unsupported format, is yielded as its RowError; so is a link that leads
    out of the folder, unless `allow_outside`.
    """
    for path, siblings in _audio_files(folder, allow_outside):
        location = path.relative_to(folder).as_posix()
        try:
            content: Utterance | RowError = _utterance(folder, location, siblings, allow_outside)
        except RowError as error:
            content = error
        yield SourceRow(location, folder, content, audio=location, allow_outside=allow_outside)


def has_audio(folder: Path, *, allow_outside: bool = False) -> bool:
    """Whether there is a recording, or a link to refuse, below a folder."""
    return next(_audio_files(folder, allow_outside), None) is not None


def read_transcript(path: Path) -> str:
    """The text of a transcript file. Raises RowError where it is missing, too long, not UTF-8 (or UTF-16)."""
    if not is_file(path):  # reading a pipe would block
        raise RowError("no_transcript", f"there is no transcript file {path.name}")
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_TRANSCRIPT + 1)
    except (OSError, ValueError) as error:
        raise RowError("no_transcript", f"the transcript {path.name} cannot be read: {error}") from error
    if len(data) > _MAX_TRANSCRIPT:
        raise RowError("no_transcript", f"{path.name} is longer than 1 MB: it is not the transcript of one clip")
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        raise RowError("no_transcript", f"{path.name} is not UTF-8 (byte {error.start}): convert it") from error


def decode_text(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark. Raises UnicodeDecodeError for another one."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding)


def _utterance(folder: Path, location: str, siblings: dict[str, str], allow_outside: bool) -> Utterance:
    if not is_unicode(location):
        raise RowError("bad_row", "the name of the file or of its folder is not UTF-8: rename it")
    path = path_within(folder, location, allow_outside)
    if path.suffix.lower() in _FOREIGN_SUFFIXES:
        raise RowError("unsupported_format", f"{path.suffix} is not supported: convert it to flac or wav")
    names = [siblings[key] for suffix in TRANSCRIPT_SUFFIXES if (key := path.stem + suffix) in siblings]
    if not names:
        raise RowError("no_transcript", f"there is no {path.stem}.txt or .lab file beside it")
    transcript = path_within(folder, str(Path(location).with_name(names[0])), allow_outside)
    return Utterance(audio=location, text=read_transcript(transcript))


def _audio_files(folder: Path, allow_outside: bool) -> Iterator[tuple[Path, dict[str, str]]]:
    """Recordings, and the names beside each by stem and lower-case suffix. Folders are visited once.

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
        siblings = {os.path.splitext(name)[0] + os.path.splitext(name)[1].lower(): name for name in names}
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in AUDIO_SUFFIXES + _FOREIGN_SUFFIXES and not name.startswith("."):
                yield Path(root, name), siblings
