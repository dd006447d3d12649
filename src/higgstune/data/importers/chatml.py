"""Rows from the formats of earlier trainers of this model: a ChatML list, `metadata.json` with samples."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from higgstune.data.importers.transcripts import read_transcript
from higgstune.data.manifest import Utterance, parse_utterance, unique_keys
from higgstune.data.rejection import RowError, shown
from higgstune.data.source import SourceRow, decode, read_whole
from higgstune.errors import DataError

_CHATML_KEYS = ("messages", "start_index", "speaker", "misc", "id", "language")
_SAMPLE_KEYS = (
    *("id", "audio_id", "audio_file", "transcript_file", "transcript", "text"),
    *("speaker_id", "speaker", "speaker_name", "scene", "language"),
    *("ref_audio_file", "ref_transcript", "ref_transcript_file", "ref_speakers"),
)
# Known, but not used: Higgstune measures these itself, or the trainers never read them either.
_IGNORED_SAMPLE_KEYS = (
    *("duration", "emotion", "gender", "quality_score", "original_audio_path", "user_instruction"),
    *("task_type", "num_ref_speakers", "sample_rate"),
)
_NO_OBJECT = RowError("bad_row", "it is not an object with keys")
_UNKNOWN = ("", "unknown", "unknown_speaker")  # written by the converters where a name is missing


def load_json(path: Path) -> Any:
    """Decode a JSON file; an object that has a key twice becomes its RowError.

    Raises DataError, with the place, where the file is broken.
    """
    content = read_whole(path)
    try:
        data = json.loads(decode(content), object_pairs_hook=_object)
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to be a data set") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if isinstance(data, RowError):
        raise DataError(f"{path}: {data}")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RowError:
    try:
        return unique_keys(pairs)
    except ValueError as error:
        return RowError("bad_row", str(error))


def check_keys(item: Any) -> None:
    """Raise the RowError that stands in a row of `load_json`, at any depth, for an object that has a key twice."""
    if isinstance(item, RowError):
        raise item
    for part in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
        check_keys(part)


def is_trainer_json(data: Any) -> bool:
    """Whether decoded JSON is one of the two formats."""
    if isinstance(data, dict):
        return isinstance(data.get("samples"), list)
    return isinstance(data, list) and any(isinstance(item, dict) and "messages" in item for item in data)


def read_trainer_json(path: Path, data: Any, *, allow_outside: bool = False) -> Iterator[SourceRow]:
    """The rows of `load_json(path)`, where `is_trainer_json`. Raises DataError where there are none."""
    if isinstance(data, dict):
        items, place = data["samples"], f"{path.name}:samples"
        convert = _from_sample
    else:
        items, place, convert = data, path.name, _from_chatml
    if not items:
        raise DataError(f"{path} has no samples")
    for number, item in enumerate(items):
        unread = item if isinstance(item, RowError) else _NO_OBJECT
        row = SourceRow(f"{place}[{number}]", path.parent, unread, allow_outside=allow_outside)
        yield _converted(row, item, convert) if isinstance(item, dict) else row


def _converted(
    row: SourceRow, item: dict[str, Any], convert: Callable[[SourceRow, dict[str, Any]], Utterance]
) -> SourceRow:
    item = {key: None if _is_nan(value) else value for key, value in item.items()}  # NaN stands for a missing value
    row = replace(row, id=_text(item.get("id")), audio=_text(item.get("audio_file")))
    try:
        check_keys(item)
        return replace(row, content=convert(row, item))
    except RowError as error:
        return replace(row, content=error)
    except RecursionError:
        return replace(row, content=RowError("bad_row", "it is nested too deeply to be a row"))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _from_chatml(row: SourceRow, item: dict[str, Any]) -> Utterance:  # noqa: ARG001  (as `_from_sample`)
    _check_spelling(item, _CHATML_KEYS)
    misc = item.get("misc")
    misc = misc if isinstance(misc, dict) else {}
    start = item.get("start_index")
    return parse_utterance(
        {
            "id": _text(item.get("id")),
            "messages": item.get("messages") or [],
            "start_index": int(start) if isinstance(start, float) and start.is_integer() else start,
            "speaker": _text(item.get("speaker")) or _text(misc.get("speaker")),
            "language": _text(item.get("language")) or _text(misc.get("language")),
        }
    )


def _from_sample(row: SourceRow, item: dict[str, Any]) -> Utterance:
    _check_spelling(item, _SAMPLE_KEYS, _IGNORED_SAMPLE_KEYS)
    values: dict[str, Any] = {
        "id": _text(item.get("id")) or _text(item.get("audio_id")),
        "speaker": next(filter(None, map(_text, map(item.get, ("speaker_id", "speaker", "speaker_name")))), None),
        "language": _text(item.get("language")),
    }
    audio, text, scene = item.get("audio_file"), _transcript(row, item, ""), _scene(item.get("scene"))
    if item.get("ref_speakers"):
        values["messages"] = _multi_speaker_messages(row, item["ref_speakers"], audio, text, scene)
    else:
        values |= {"audio": audio, "text": text, "scene": scene}
        if item.get("ref_audio_file"):
            values["reference_audio"] = item["ref_audio_file"]
            values["reference_text"] = _transcript(row, item, "ref_")
    return parse_utterance(values)


def _transcript(row: SourceRow, item: dict[str, Any], prefix: str) -> Any:
    for key in (f"{prefix}transcript", f"{prefix}text"):
        if item.get(key) is not None:
            return item[key]
    name = item.get(f"{prefix}transcript_file")
    if isinstance(name, str) and name:
        return read_transcript(row.path(name))
    if prefix:
        return None
    raise RowError("no_transcript", "the sample has neither transcript_file nor transcript")


def _multi_speaker_messages(row: SourceRow, speakers: Any, audio: Any, text: Any, scene: str | None) -> list[Any]:
    """`ref_speakers` as the earlier trainer reads them: a turn for each of the voices, then the target's."""
    if not isinstance(speakers, list) or not all(isinstance(speaker, dict) for speaker in speakers):
        raise RowError("bad_row", "ref_speakers must be a list of objects with ref_audio_file and ref_transcript")
    messages: list[Any] = [{"role": "scene", "content": scene}] if scene else []
    for number, speaker in enumerate(speakers):
        tag = speaker.get("speaker_tag") or f"[SPEAKER{number}]"
        words = _transcript(row, speaker, "ref_")
        messages.append({"role": "user", "content": f"{tag} {words or ''}"})
        messages.append({"role": "assistant", "content": _audio(speaker.get("ref_audio_file"))})
    return [*messages, {"role": "user", "content": text}, {"role": "assistant", "content": _audio(audio)}]


def _audio(path: Any) -> dict[str, Any]:
    return {"type": "audio", "url": path}


def _scene(scene: Any) -> str | None:
    """A tag such as quiet_room becomes a sentence, as in the earlier trainer; a sentence is unchanged."""
    text = _text(scene)
    if text is None or not re.fullmatch(r"[\w-]+", text):
        return text
    return f"Audio is recorded from {text.replace('_', ' ')}."


def _text(value: Any) -> str | None:
    """A name as text; None for other values, and for words such as 'unknown'. The formats hold numbers, too."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value).strip()
    return None if text.lower() in _UNKNOWN else text


def _check_spelling(item: dict[str, Any], known: tuple[str, ...], ignored: tuple[str, ...] = ()) -> None:
    """Refuse a key that looks like a misspelling of a known one; other unknown keys are ignored."""
    for key in item:
        if key not in known + ignored and (near := get_close_matches(key[:100], known, n=1, cutoff=0.85)):
            raise RowError("bad_row", f"the key {shown(key)} is unknown; did you mean {near[0]!r}?")
