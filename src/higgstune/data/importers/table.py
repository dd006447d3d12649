"""Rows from an LJSpeech `metadata.csv`, and from similar tables with a header."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from higgstune.data.audio import AUDIO_SUFFIXES, is_file
from higgstune.data.manifest import Utterance
from higgstune.data.messages import is_unicode
from higgstune.data.rejection import RowError
from higgstune.data.source import SourceRow, path_within, read_whole
from higgstune.errors import DataError

_FOLDERS = ("wavs", "", "wav", "audio", "clips")
_COLUMNS = {  # the names of a column in a header; the first one that is present counts
    "audio": ("audio", "audio_file", "file", "file_name", "filename", "path", "wav", "clip", "id"),
    "id": ("id",),
    "text": (
        *("normalised_text", "normalized_text", "normalised text", "normalized text", "normalised", "normalized"),
        *("text", "transcript", "transcription", "sentence"),
    ),
    "raw_text": ("text", "transcript", "transcription", "sentence"),
    "speaker": ("speaker", "speaker_id", "speaker_name"),
    "language": ("language", "lang"),
    "scene": ("scene",),
}
_HINT = "one clip a line: id|text or id|text|normalised text, or a header such as file_name,text,speaker"


def read_table(path: Path, *, allow_outside: bool = False) -> Iterator[SourceRow]:
    """The rows of `id|text`, `id|text|normalised text`, `id|speaker|text|score`, or a table with a header.

    With a header the columns may come in any order, separated by `|` or commas; unknown ones are skipped.
    The normalised text is used where there is one. The recording of an id is looked for, with any known suffix, in
    `wavs/` and beside the table. Raises DataError for a table that cannot be read or has no rows.
    """
    lines = _lines(path)
    header = _header(lines[0][1])
    rows = lines[1:] if header else lines
    if not rows:
        raise DataError(f"{path} has a header but no rows: write {_HINT}")
    for number, fields in rows:
        location = f"{path.name}:{number}"
        try:
            row = _utterance(path.parent, _named(header, fields) if header else _plain(fields), allow_outside)
        except RowError as error:
            yield SourceRow(location, path.parent, error, id=fields[0] or None)
        else:
            yield SourceRow(location, path.parent, row, row.id, row.audio, allow_outside)


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """The fields of every line that is not empty, with the line's number from 1."""
    text = read_whole(path).decode("utf-8-sig", errors="surrogateescape")
    plain = [(n, line.rstrip("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not plain:
        raise DataError(f"{path} is empty: write {_HINT}")
    if "|" in plain[0][1]:
        return [(n, [field.strip() for field in line.split("|")]) for n, line in plain]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader if any(fields)]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} cannot be read: {error}; write {_HINT}") from error
    if not lines or not _header(lines[0][1]):
        raise DataError(f"{path} is not a table of clips: write {_HINT}")
    return lines


def _header(fields: Sequence[str]) -> dict[str, int]:
    """The index of each column, by its meaning; empty for a line that is not a header."""
    names = [field.lower() for field in fields]
    columns = {
        meaning: names.index(name)
        for meaning, known in _COLUMNS.items()
        if (name := next((name for name in known if name in names), None)) is not None
    }
    return columns if "audio" in columns and "text" in columns else {}


def _named(header: dict[str, int], fields: Sequence[str]) -> dict[str, str]:
    if len(fields) <= max(header.values()):
        raise RowError("bad_row", f"{len(fields)} columns, but the header needs {max(header.values()) + 1}")
    return {meaning: fields[index] for meaning, index in header.items()}


def _plain(fields: Sequence[str]) -> dict[str, str]:
    if len(fields) in (2, 3):
        return {"audio": fields[0], "id": fields[0], "text": fields[-1], "raw_text": fields[1]}
    if len(fields) == 4 and _is_number(fields[3]):
        return {"audio": fields[0], "id": fields[0], "speaker": fields[1], "text": fields[2]}
    raise RowError("bad_row", f"{len(fields)} columns without a header: write {_HINT}")


def _utterance(folder: Path, values: dict[str, str], allow_outside: bool) -> Utterance:
    if broken := [name for name, value in values.items() if not is_unicode(value)]:
        raise RowError("bad_row", f"the column {broken[0]} is not UTF-8: convert the table")
    audio = _find_audio(folder, values["audio"], allow_outside)
    row_id = values.get("id") or values["audio"]
    return Utterance(
        audio=audio,
        text=values["text"] or values.get("raw_text", ""),
        id=_without_suffix(row_id),
        speaker=values.get("speaker") or None,
        language=values.get("language") or None,
        scene=values.get("scene") or None,
    )


def _find_audio(folder: Path, name: str, allow_outside: bool) -> str:
    """The path, relative to the table, of the recording that a line names. Raises RowError without one.

    No path outside of the folder is even looked up unless `allow_outside`.
    """
    if not name:
        raise RowError("bad_row", "the line names no recording")
    for place in _FOLDERS:
        for suffix in ("", *AUDIO_SUFFIXES):
            path = Path(place, name + suffix).as_posix()
            if is_file(path_within(folder, path, allow_outside)):
                return path
    raise RowError(
        "missing_audio",
        f"there is no recording {_without_suffix(name)}, in wavs/ or beside the table, with any known suffix",
    )


def _without_suffix(name: str) -> str:
    path = Path(name)
    return path.with_suffix("").as_posix() if path.suffix.lower() in AUDIO_SUFFIXES else name


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
