"""Rows from the formats of this model's earlier trainers: a ChatML list, `metadata.json` with samples."""

import json
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from higgstune.data.import_folder import read_transcript
from higgstune.data.manifest import Utterance, parse_utterance
from higgstune.data.rejection import RowError
from higgstune.data.source import SourceRow
from higgstune.errors import DataError

_CHATML_KEYS = ("messages", "start_index", "speaker", "misc", "id", "language")
_SAMPLE_KEYS = (
    *("id", "audio_id", "audio_file", "transcript_file", "transcript", "text"),
    *("speaker_id", "speaker", "speaker_name", "scene", "language"),
    *("ref_audio_file", "ref_transcript", "ref_transcript_file", "ref_speakers"),
)
# Known, and of no use here: what they say is measured again, or the trainers never read them either.
_IGNORED_SAMPLE_KEYS = (
    *("duration", "emotion", "gender", "quality_score", "original_audio_path", "user_instruction"),
    *("task_type", "num_ref_speakers", "sample_rate"),
)
_UNKNOWN = ("", "unknown", "unknown_speaker")  # what the converters write for want of a name


def load_json(path: Path) -> Any:
    """Decode a JSON file. Raises DataError saying where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to be a data set") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def is_trainer_json(data: Any) -> bool:
    """Whether decoded JSON is one of the two formats."""
    if isinstance(data, dict):
        return isinstance(data.get("samples"), list)
    return isinstance(data, list) and any(isinstance(item, dict) and "messages" in item for item in data)


def read_trainer_json(path: Path, data: Any) -> Iterator[SourceRow]:
    """The rows of `load_json(path)`, where `is_trainer_json`. Raises DataError where there are none."""
    items, place, convert = (
        (data["samples"], f"{path.name}:samples", _from_sample)
        if isinstance(data, dict)
        else (data, path.name, _from_chatml)
    )
    if not items:
        raise DataError(f"{path} has no sample")
    for number, item in enumerate(items):
        yield _row(f"{place}[{number}]", path.parent, item, convert)


def _row(location: str, folder: Path, item: Any, convert: Callable[[Path, dict[str, Any]], Utterance]) -> SourceRow:
    if not isinstance(item, dict):
        return SourceRow(location, folder, RowError("bad_row", "it is no object with keys"))
    item = {key: None if value != value else value for key, value in item.items()}  # NaN stands for nothing
    row_id, audio = _text(item.get("id")), _text(item.get("audio_file"))
    try:
        return SourceRow(location, folder, convert(folder, item), id=row_id, audio=audio)
    except RowError as error:
        return SourceRow(location, folder, error, id=row_id, audio=audio)


def _from_chatml(folder: Path, item: dict[str, Any]) -> Utterance:
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


def _from_sample(folder: Path, item: dict[str, Any]) -> Utterance:
    _check_spelling(item, _SAMPLE_KEYS, _IGNORED_SAMPLE_KEYS)
    row: dict[str, Any] = {
        "id": _text(item.get("id")) or _text(item.get("audio_id")),
        "speaker": next(filter(None, map(_text, map(item.get, ("speaker_id", "speaker", "speaker_name")))), None),
        "language": _text(item.get("language")),
    }
    audio, text, scene = item.get("audio_file"), _transcript(folder, item, ""), _scene(item.get("scene"))
    if item.get("ref_speakers"):
        row["messages"] = _multi_speaker_messages(folder, item["ref_speakers"], audio, text, scene)
    else:
        row |= {"audio": audio, "text": text, "scene": scene}
        if item.get("ref_audio_file"):
            row["reference_audio"] = item["ref_audio_file"]
            row["reference_text"] = _transcript(folder, item, "ref_")
    return parse_utterance(row)


def _transcript(folder: Path, item: dict[str, Any], prefix: str) -> Any:
    for key in (f"{prefix}transcript", f"{prefix}text"):
        if item.get(key) is not None:
            return item[key]
    name = item.get(f"{prefix}transcript_file")
    if isinstance(name, str) and name:
        return read_transcript(folder / name)
    if prefix:
        return None
    raise RowError("no_transcript", "the sample has neither transcript_file nor transcript")


def _multi_speaker_messages(folder: Path, speakers: Any, audio: Any, text: Any, scene: str | None) -> list[Any]:
    """What the earlier trainer makes of `ref_speakers`: a turn for each of the voices, then the target's."""
    if not isinstance(speakers, list) or not all(isinstance(speaker, dict) for speaker in speakers):
        raise RowError("bad_row", "ref_speakers must be a list of objects with ref_audio_file and ref_transcript")
    messages: list[Any] = [{"role": "scene", "content": scene}] if scene else []
    for number, speaker in enumerate(speakers):
        tag = speaker.get("speaker_tag") or f"[SPEAKER{number}]"
        said = _transcript(folder, speaker, "ref_")
        messages.append({"role": "user", "content": f"{tag} {said or ''}"})
        messages.append({"role": "assistant", "content": _audio(speaker.get("ref_audio_file"))})
    return [*messages, {"role": "user", "content": text}, {"role": "assistant", "content": _audio(audio)}]


def _audio(path: Any) -> dict[str, Any]:
    return {"type": "audio", "url": path}


def _scene(scene: Any) -> str | None:
    """The sentence that the earlier trainer makes of a tag such as quiet_room; a sentence stays one."""
    text = _text(scene)
    if text is None or not re.fullmatch(r"[\w-]+", text):
        return text
    return f"Audio is recorded from {text.replace('_', ' ')}."


def _text(value: Any) -> str | None:
    """A name as text: the formats hold numbers, too, and words for what is not known."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value).strip()
    return None if text.lower() in _UNKNOWN else text


def _check_spelling(item: dict[str, Any], known: tuple[str, ...], ignored: tuple[str, ...] = ()) -> None:
    """Keys of other people's tools are passed over, unless one looks like a slip of a key that matters."""
    for key in item:
        if key not in known + ignored and (near := get_close_matches(str(key), known, n=1, cutoff=0.85)):
            raise RowError("bad_row", f"the key {key!r} is unknown; did you mean {near[0]!r}?")
