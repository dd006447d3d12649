"""Rows from JSON of other programs: the keys are mapped as the columns of a table are, from the whole file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from higgstune.data.importers.chatml import check_keys
from higgstune.data.importers.columns import UNUSED, Reading, by_name, is_known
from higgstune.data.importers.recordings import Recordings
from higgstune.data.manifest import Utterance, parse_utterance, read_json_lines
from higgstune.data.messages import audio_parts
from higgstune.data.origin import ORIGIN
from higgstune.data.rejection import RowError, shown
from higgstune.data.source import Source, SourceRow, decode, read_whole
from higgstune.errors import DataError

_TEXTS = ("speaker", "language", "id")  # numbers are accepted for them
_MAX_TIME = 1e9  # seconds
_PLACEHOLDER = "<audio>"  # of ms-swift, for the next of the row's audios
_KEYS = tuple(Utterance.model_fields)
_SPELT = tuple(key for key in _KEYS if key not in ORIGIN)  # other programs have `source_id` and `content`
_FOLDERS = ("", "wavs", "wav", "audio", "clips")  # paths are relative to the file; some name recordings alone
_WHISPER = ("start", "end", "text")  # keys of a segment


def read_records(path: Path, *, allow_outside: bool = False, columns: str | None = None) -> Source:
    """The rows of JSON lines, each an utterance or a conversation: a manifest, or one of another program.

    Raises DataError where the file cannot be read, has no row, or its keys name no recording and no text.
    """
    lines = list(read_json_lines(path))
    found = [(f"{path.name}:{number}", record) for number, record in lines]
    return records_source(path, found, allow_outside=allow_outside, columns=columns)


def records_source(
    path: Path,
    records: Sequence[tuple[str, Any]],
    *,
    allow_outside: bool = False,
    columns: str | None = None,
    recordings: Recordings | None = None,
) -> Source:
    """The rows of decoded objects, each with its place; an object may be a RowError."""
    if not records:
        raise DataError(
            f'{path} has no row: write one JSON object a line, such as {{"audio": "clips/1.wav", "text": "Hello."}}'
        )
    keys = list(dict.fromkeys(key for _, record in records if isinstance(record, dict) for key in record))
    reading = (
        Reading(tuple(keys), tuple(keys))
        if set(keys) <= set(_KEYS) and not columns
        else by_name(keys, columns, messages=True)
    )
    if reading is None and keys:
        raise DataError(
            f"{path}: its keys are {', '.join(map(str, keys[:20]))}; say which are the recording and the text with "
            "--columns, such as audio=path,text=words"
        )
    reading = reading or Reading((), ())
    recordings = recordings or Recordings(path.parent, allow_outside)
    objects = [_renamed(record, reading) for _, record in records if isinstance(record, dict)]
    recordings.expect(
        value
        for values in objects
        for key in ("audio", "reference_audio")
        if isinstance(value := values.get(key), str) and value
    )
    rows = [
        _row(path, place, record, reading, recordings, allow_outside, check_spelling=columns is None)
        for place, record in records
    ]
    rows, dropped = _without_unknown_references(rows) if "reference_audio" not in keys else (rows, 0)

    def notes() -> Iterator[str]:
        if dropped:
            yield f"references without a text, which are not used: {dropped}"
        yield from recordings.notes()

    return Source(rows, f"{path.name}: {reading}", notes)


def _without_unknown_references(rows: Sequence[SourceRow]) -> tuple[list[SourceRow], int]:
    """Rows of another program, whose references need no text: without those that have none, and how many these are."""
    with_text = {row.audio for row in rows}
    found, dropped = [], 0
    for row in rows:
        content = row.content
        reference = None if isinstance(content, RowError) or content.reference_text else content.reference_audio
        if reference is not None and reference not in with_text and isinstance(content, Utterance):
            found.append(replace(row, content=content.model_copy(update={"reference_audio": None})))
            dropped += 1
        else:
            found.append(row)
    return found, dropped


def is_record_list(path: Path) -> bool:
    """Whether a .json file is a list of rows, or has one a line."""
    content = read_whole(path)
    try:
        text = decode(content)
        data = json.loads(text.split("\n", 1)[0] if text.lstrip().startswith("{") else text)
    except (ValueError, RecursionError):
        return False
    first = data[0] if isinstance(data, list) and data else data
    try:
        return isinstance(first, dict) and by_name(list(first), messages=True) is not None
    except DataError:  # such as times that are not certain
        return False


def sidecar_rows(content: bytes, location: str, name: str) -> list[Utterance]:
    """The rows of the `.json` beside a recording: a text, or the segments of Whisper and WhisperX.

    Raises RowError for anything else.
    """
    try:
        data = json.loads(decode(content))
    except (ValueError, RecursionError) as error:
        raise RowError("no_transcript", f"{name} is not JSON: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("segments"), list):
        stem = Path(location).with_suffix("").as_posix()
        return [
            parse_utterance(
                {"audio": location, **segment, "speaker": segment["speaker"] and f"{stem} {segment['speaker']}",
                 "language": _name(data.get("language"))}
            )
            for segment in whisper_segments(data, name)
        ]  # fmt: skip
    try:
        reading = by_name(["audio", *(key for key in data if key != "audio")]) if isinstance(data, dict) else None
    except DataError as error:
        raise RowError("no_transcript", f"{name}: {error}") from error
    if reading is not None:
        values = _renamed(data, reading, skip=("audio", "id", "duration"))
        return [parse_utterance({**values, "audio": location})]
    raise RowError("no_transcript", f"{name} has neither a text nor segments")


def whisper_segments(data: Any, name: str) -> list[dict[str, Any]]:
    """The segments with a text of a decoded file of Whisper or WhisperX: text, start and end in seconds, speaker.

    Raises RowError where there are none, or a time is not a number.
    """
    segments = data.get("segments") if isinstance(data, dict) else None
    found = [s for s in segments if isinstance(s, dict) and s.get("text")] if isinstance(segments, list) else []
    if not found or any(key not in segment for segment in found for key in _WHISPER):
        raise RowError("no_transcript", f"{name} has no segments with start, end and text")
    return [
        {
            "text": str(segment["text"]).strip(),
            "start": _seconds(segment["start"], f" in {name}"),
            "end": _seconds(segment["end"], f" in {name}"),
            "speaker": _name(segment.get("speaker")),
        }
        for segment in found
    ]


def _row(
    path: Path,
    place: str,
    record: Any,
    reading: Reading,
    recordings: Recordings,
    allow_outside: bool,
    *,
    check_spelling: bool,
) -> SourceRow:
    try:
        check_keys(record)
        if not isinstance(record, dict):
            raise RowError("bad_row", f"a row must be an object with keys, but this is {shown(record)}")
        row = parse_utterance(_values(record, reading, recordings, check_spelling=check_spelling))
    except RowError as error:
        known = _renamed(record, reading) if isinstance(record, dict) else {}
        row_id, audio = (value if isinstance(value := known.get(key), str) else None for key in ("id", "audio"))
        return SourceRow(place, path.parent, error, row_id, audio)
    except RecursionError:
        return SourceRow(place, path.parent, RowError("bad_row", "it is nested too deeply to be a row"))
    recordings.used.update(str(part["url"]) for part in audio_parts(row.messages or []))
    return SourceRow(place, path.parent, row, row.id, row.audio, allow_outside)


def _values(
    record: dict[str, Any], reading: Reading, recordings: Recordings, *, check_spelling: bool
) -> dict[str, Any]:
    unused = {name for name, role in zip(reading.names, reading.roles, strict=True) if role == UNUSED}
    for key in unused.intersection(record) if check_spelling else ():
        if not is_known(key) and (near := get_close_matches(str(key)[:100], _SPELT, n=1, cutoff=0.8)):
            raise RowError("bad_row", f"the key {shown(key)} is unknown; did you mean {near[0]!r}?")
    values = _renamed(record, reading)
    duration = values.pop("duration", None)
    if duration is not None and values.get("start") is not None and values.get("end") is None:
        values["end"] = _seconds(values["start"]) + _seconds(duration)
    audios = values.pop("audios", None)
    if audios is not None and values.get("messages") is not None:
        values["messages"] = _with_audios(values["messages"], audios)
    for key in ("audio", "reference_audio"):
        if isinstance(values.get(key), list) and len(values[key]) == 1:
            [values[key]] = values[key]
        if isinstance(values.get(key), str) and values[key]:
            values[key] = recordings.find(values[key], _FOLDERS)
    return values


def _renamed(record: Mapping[str, Any], reading: Reading, skip: Sequence[str] = ()) -> dict[str, Any]:
    """The values that are used, by Higgstune's keys; null stands for a missing value, and numbers for names."""
    roles = dict(zip(reading.names, reading.roles, strict=True))
    values = {}
    for key, value in record.items():
        role = roles.get(key, UNUSED)
        if role != UNUSED and role not in skip and value is not None:
            values[role] = _name(value) if role in _TEXTS else _statement(value) if role in ORIGIN else value
    if values.get("normalised"):
        values["text"] = values["normalised"]
    values.pop("normalised", None)
    return values


def _with_audios(messages: Any, audios: Any) -> Any:
    """Messages in which each `<audio>` of a text is the next of the audios."""
    if not isinstance(messages, list) or not isinstance(audios, list):
        return messages
    left = iter(audios)
    changed = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or _PLACEHOLDER not in content:
            changed.append(message)
            continue
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(content.split(_PLACEHOLDER)):
            if number:
                if (audio := next(left, None)) is None:
                    raise RowError("bad_row", f"it has more {_PLACEHOLDER} than audios ({len(audios)})")
                parts.append({"type": "audio", "url": audio})
            if text.strip():
                parts.append({"type": "text", "text": text.strip()})
        changed.append({**message, "content": parts})
    if rest := sum(1 for _ in left):
        raise RowError("bad_row", f"{rest} of its audios have no {_PLACEHOLDER}")
    return changed


def _seconds(value: Any, place: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_TIME:
        raise RowError("bad_row", f"a time{place} is {shown(value)}, not a number of seconds")
    return float(value)


def _statement(value: Any) -> str:
    """What is stated of a recording as text: other programs have a number, or an object with an address."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _name(value: Any) -> Any:
    """A name as text: data sets number their speakers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
