"""The parts of a message: texts and audio files in the spellings that people have, brought into one."""

from collections.abc import Iterable, Iterator
from typing import Any

from higgstune.data.rejection import RowError, did_you_mean, shown
from higgstune.data.text import clean_text, find_control_tokens, normalize_text

Part = dict[str, Any]

_TEXT_KEYS = ("type", "text")
_AUDIO_KEYS = ("type", "url", "audio_url", "audio", "offset", "duration", "raw_audio", "row_id", "as")
_READ_AS = ("codes", "whisper")  # how the model takes an audio that it listens to


def normalize_parts(content: Any, where: str) -> Iterator[Part]:
    """A message's content -> {"type": "text", "text"} and {"type": "audio", "url"} parts, in order.

    A string is one text. An audio part keeps `offset` and `duration` (seconds) where it has them. `where`
    names the message in errors. Raises RowError for anything that is neither.
    """
    if isinstance(content, str | dict):
        content = [content]
    if not isinstance(content, list) or not content:
        raise RowError("bad_row", f"{where}: content must be a text or a list of parts")
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            yield _text_part(part, place)
        elif kind in ("audio", "audio_url"):
            yield _audio_part(part, place)
        else:
            raise RowError("bad_row", f"{place} has the type {shown(kind)}: text or audio")


def normalize_texts(parts: list[Part], where: str) -> list[Part]:
    """The parts of a user's or an assistant's message with their texts normalised; empty texts go.

    Raises RowError for control tokens and where nothing is left.
    """
    check_texts(parts, where)
    texts = [part for part in parts if part["type"] == "text"]
    for part in texts:
        is_last = part is texts[-1]
        part["text"] = normalize_text(part["text"]) if is_last else clean_text(part["text"])
    kept = [part for part in parts if part["type"] == "audio" or part["text"]]
    if not kept:
        raise RowError("empty_text", f"{where} is empty")
    return kept


def check_texts(parts: Iterable[Part], where: str) -> None:
    """Raise RowError where a text part holds a control token."""
    for part in parts:
        if part["type"] == "text":
            check_control_tokens(part["text"], where)


def check_control_tokens(text: str, where: str) -> None:
    """Raise RowError where a text holds a control token, as written or once invisible characters are gone."""
    if tokens := find_control_tokens(text) or find_control_tokens(clean_text(text)):
        raise RowError(
            "control_token",
            f"{where} holds the control token {tokens[0][:100]}: remove it, it is structure of the prompt",
        )


def check_keys(given: dict[str, Any], valid: Iterable[str], where: str) -> None:
    """Raise RowError for a key that is not one of the valid ones, naming the nearest."""
    for key in given:
        if key not in valid:
            raise RowError("bad_row", f"{where}: the key {shown(key)} is unknown; {did_you_mean(str(key), valid)}")


def _text_part(part: Part, where: str) -> Part:
    check_keys(part, _TEXT_KEYS, where)
    text = part.get("text")
    if not isinstance(text, str) or not is_unicode(text):
        raise RowError("bad_row", f"{where}: text must be a string of valid Unicode")
    return {"type": "text", "text": text}


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8: half a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _audio_part(part: Part, where: str) -> Part:
    check_keys(part, _AUDIO_KEYS, where)
    url = part.get("url") or part.get("audio_url") or part.get("audio")
    if isinstance(url, dict):
        url = url.get("url")
    if part.get("raw_audio"):
        raise RowError("bad_row", f"{where}: raw_audio is not read; write the recording to a file, name it as url")
    if not isinstance(url, str) or not url or not is_unicode(url):
        raise RowError("bad_row", f"{where}: an audio part needs the path of its file as url")
    result: Part = {"type": "audio", "url": url}
    for key in ("offset", "duration"):
        if part.get(key) is not None:
            result[key] = _seconds(part[key], f"{where}.{key}")
    if part.get("as") is not None:
        if part["as"] not in _READ_AS:
            raise RowError("bad_row", f"{where}.as is {shown(part['as'])}: one of {', '.join(_READ_AS)}")
        result["as"] = part["as"]
    return result


def _seconds(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise RowError("bad_row", f"{where} must be a number of seconds, it is {shown(value)}")
    return float(value)
