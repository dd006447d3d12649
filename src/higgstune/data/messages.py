"""Conversations: any known spelling -> the native chat template's, and what their audio parts are for.

A normalised conversation is a list of {"role": "system" | "scene" | "user" | "assistant", "content": [part, ...]} with
parts {"type": "text", "text": ...} and {"type": "audio", "url": path}. A scene that the original code writes into the
system message, as `<|scene_desc_start|> ... <|scene_desc_end|>`, becomes a message of its own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from higgstune.data.rejection import RowError, did_you_mean, shown
from higgstune.data.text import clean_text, find_control_tokens, normalize_text
from higgstune.errors import DataError

if TYPE_CHECKING:
    from higgstune.data.store import Context, Row

Part = dict[str, Any]
Message = Mapping[str, Any]
ReferencePlace = Literal["turn", "scene"]

ROLES = ("system", "scene", "user", "assistant")
_MESSAGE_KEYS = ("role", "content", "recipient")
_TEXT_KEYS = ("type", "text")
_AUDIO_KEYS = ("type", "url", "audio_url", "audio", "offset", "duration", "raw_audio", "row_id", "as")
_READ_AS = ("codes", "whisper")  # the two ways in which the model reads context audio
DEFAULT_SYSTEM = "Generate audio following instruction."
DEFAULT_SCENE = "Audio is recorded from a quiet room."
VOICE_LABEL = "SPEAKER0:"  # what the prompts of the released model have before a voice in the scene
_SCENE_MARK = re.compile(r"(<\|scene_desc_start\|>|<\|scene_desc_end\|>)")


def normalize_messages(messages: Any, start_index: int | None = None) -> tuple[list[Message], int | None]:
    """A conversation in any known spelling -> (the normalised conversation, `start_index` counted in it).

    The texts of user and assistant are normalised as everywhere; those of system and scene are unchanged. An audio part
    keeps `offset` and `duration` (seconds) where it has them.

    Raises RowError, naming the message, for an unknown role, key or part, for control tokens, and for a conversation
    that does not end with an assistant's audio, which is the target.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError("bad_row", "messages: a list of at least one message is needed")
    result: list[Message] = []
    starts = []
    for number, message in enumerate(messages):
        starts.append(len(result))
        result.extend(_normalize_message(number, message))
    _check_order(result)
    if start_index is not None and not 0 <= start_index < len(starts):
        raise RowError("bad_row", f"start_index is {start_index}: there are {len(starts)} messages, counted from 0")
    return result, None if start_index is None else starts[start_index]


def check_control_tokens(text: str, where: str, tags: Sequence[str] = ()) -> None:
    """Raise RowError where a text holds a control token that is none of the model's `tags`, as written or once
    invisible characters are removed.
    """
    tokens = [
        token for token in find_control_tokens(text) or find_control_tokens(clean_text(text)) if token not in tags
    ]
    if tokens and tags and ":" in tokens[0]:  # as tags have
        near = did_you_mean(tokens[0], tags)
        raise RowError("control_token", f"{where} has {tokens[0][:100]}, which the model has not as a tag; {near}")
    if tokens:
        raise RowError(
            "control_token",
            f"{where} holds the control token {tokens[0][:100]}, which would be part of the prompt's structure: "
            "remove it",
        )


def is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8: half a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def content_parts(message: Message) -> list[Mapping[str, Any]]:
    """The parts of a message; a plain string is one text part. Raises DataError for anything else."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise DataError(f"the content of a {message.get('role')} message must be a string or a list of parts")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "audio"):
            raise DataError(f"a content part must have the type text or audio, got {part!r}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise DataError(f"a text part needs a string `text`, got {part!r}")
    return list(content)


def audio_parts(messages: Iterable[Message]) -> list[Part]:
    """Every audio part in order; in a normalised conversation the last one is the target."""
    return [part for message in messages for part in message["content"] if part["type"] == "audio"]


def is_target(messages: Sequence[Message], start_index: int | None) -> list[bool]:
    """For every audio part in order, whether it is a target.

    Those of assistants are, from `start_index` on; without it, those of the last message.
    """
    first = len(messages) - 1 if start_index is None else start_index
    return [
        message["role"] == "assistant" and number >= first
        for number, message in enumerate(messages)
        for _ in audio_parts([message])
    ]


def target_text(messages: Sequence[Message]) -> str:
    """The words of the target: the assistant's own text where it has one, else the text of the user before it."""
    for message in messages[:-3:-1]:
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        if texts and message["role"] in ("user", "assistant"):
            return "\n".join(texts)
    return ""


@dataclass(frozen=True)
class AudioPart:
    """An audio part of a conversation, without its audio."""

    role: str
    read_as: str | None  # what the part itself requests: codes or whisper

    @property
    def uses_whisper(self) -> bool:
        """Whether a model with Whisper reads it by its Whisper features."""
        return self.role != "assistant" and self.read_as != "codes"


def conversation_audio(messages: Sequence[Message]) -> tuple[list[AudioPart], int]:
    """All audio parts of a conversation, and the index of the target: the last one of an assistant."""
    parts = [
        AudioPart(message["role"], part.get("as"))
        for message in messages
        for part in content_parts(message)
        if part["type"] == "audio"
    ]
    return parts, max(i for i, part in enumerate(parts) if part.role == "assistant")


def whisper_clips(row: "Row | Context", reference: ReferencePlace) -> list[str]:
    """Audio hashes of the clips of a row that Whisper encodes."""
    if row.messages is None:
        return [row.reference_sha256] if reference == "scene" and row.reference_sha256 is not None else []
    parts, target = conversation_audio(row.messages)
    context = parts[:target] + parts[target + 1 :]
    return [sha256 for part, sha256 in zip(context, row.context_sha256, strict=True) if part.uses_whisper]


def requests_whisper(row: "Row | Context") -> bool:
    """Whether a part of a conversation requests Whisper (`"as": "whisper"`)."""
    return row.messages is not None and any(part.read_as == "whisper" for part in conversation_audio(row.messages)[0])


def _normalize_message(number: int, message: Any) -> list[Message]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise RowError("bad_row", f"{where} is not an object with role and content")
    _check_keys(message, _MESSAGE_KEYS, where)
    role = message.get("role")
    if role not in ROLES:
        raise RowError("bad_row", f"{where} has the role {shown(role)}; {did_you_mean(str(role), ROLES)}")
    if message.get("recipient"):
        raise RowError("bad_row", f"{where}: a recipient is not supported")
    parts = list(_normalize_parts(message.get("content"), where))
    if role == "system":
        return _split_system(parts, where)
    if role == "scene":
        _check_texts(parts, where)
        scene = {"role": "scene", "content": parts}
        return [_default_system(), scene] if number == 0 else [scene]
    return [{"role": role, "content": _normalize_texts(parts, where)}]


def _normalize_parts(content: Any, where: str) -> Iterator[Part]:
    """A message's content -> {"type": "text", "text"} and {"type": "audio", "url"} parts, in order.

    A string is one text. An audio part keeps `offset` and `duration` (seconds) where it has them. `where` names the
    message in errors. Raises RowError for anything that is neither text nor audio.
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


def _text_part(part: Part, where: str) -> Part:
    _check_keys(part, _TEXT_KEYS, where)
    text = part.get("text")
    if not isinstance(text, str) or not is_unicode(text):
        raise RowError("bad_row", f"{where}: text must be a string of valid Unicode")
    return {"type": "text", "text": text}


def _audio_part(part: Part, where: str) -> Part:
    _check_keys(part, _AUDIO_KEYS, where)
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
        raise RowError("bad_row", f"{where} must be a number of seconds, but it is {shown(value)}")
    return float(value)


def _normalize_texts(parts: list[Part], where: str) -> list[Part]:
    """The parts of a user's or an assistant's message with their texts normalised and without empty texts.

    Raises RowError for control tokens, and for a message that is empty then.
    """
    _check_texts(parts, where)
    texts = [part for part in parts if part["type"] == "text"]
    for part in texts:
        is_last = part is texts[-1]
        part["text"] = normalize_text(part["text"]) if is_last else clean_text(part["text"])
    kept = [part for part in parts if part["type"] == "audio" or part["text"]]
    if not kept:
        raise RowError("empty_text", f"{where} is empty")
    return kept


def _check_texts(parts: Iterable[Part], where: str) -> None:
    """Raise RowError where a text part holds a control token."""
    for part in parts:
        if part["type"] == "text":
            check_control_tokens(part["text"], where)


def _check_keys(given: dict[str, Any], valid: Iterable[str], where: str) -> None:
    """Raise RowError for a key that is not one of the valid ones, naming the nearest."""
    for key in given:
        if key not in valid:
            raise RowError("bad_row", f"{where}: the key {shown(key)} is unknown; {did_you_mean(str(key), valid)}")


def _default_system() -> Message:
    """The templates write a scene inside a system turn, so a scene cannot be alone."""
    return {"role": "system", "content": [{"type": "text", "text": DEFAULT_SYSTEM}]}


def _split_system(parts: list[Part], where: str) -> list[Message]:
    """A system message, and the scene that the original format writes inside it."""
    before, scene, marks = _sections(parts)
    if marks not in ([], ["<|scene_desc_start|>", "<|scene_desc_end|>"]):
        raise RowError(
            "control_token",
            f"{where}: a scene is one <|scene_desc_start|>, its text and one <|scene_desc_end|>, at the end",
        )
    _check_texts(before + scene, where)
    system = {"role": "system", "content": before} if before else _default_system()
    return [system, {"role": "scene", "content": _split_scene(scene)}] if scene else [system]


def _sections(parts: list[Part]) -> tuple[list[Part], list[Part], list[str]]:
    """The parts before the scene's start, those after it, and the marks in order.

    Anything that follows the end counts as one more mark.
    """
    before: list[Part] = []
    scene: list[Part] = []
    marks: list[str] = []
    for part in parts:
        for piece in _SCENE_MARK.split(part["text"]) if part["type"] == "text" else [part]:
            if isinstance(piece, str) and _SCENE_MARK.fullmatch(piece):
                marks.append(piece)
                continue
            kept = {"type": "text", "text": piece.strip()} if isinstance(piece, str) else piece
            if kept.get("text") == "":
                continue
            (scene if marks else before).append(kept)
            if len(marks) > 1:
                marks.append("something after the end")
    return before, scene, marks


def _split_scene(scene: list[Part]) -> list[Part]:
    """The native template writes an empty line after a scene's first part, so the original's is split there."""
    if scene[0]["type"] != "text" or "\n\n" not in scene[0]["text"]:
        return scene
    texts = scene[0]["text"].split("\n\n", 1)
    return [{"type": "text", "text": text.strip()} for text in texts] + scene[1:]


def _check_order(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages):
        if message["role"] == "system" and number:
            raise RowError("bad_row", "a system message must be the first one")
        if message["role"] == "scene" and (number != 1 or messages[0]["role"] != "system"):
            raise RowError("bad_row", "a scene message must follow the system message at the beginning")
    last = messages[-1]
    if last["role"] != "assistant" or not audio_parts([last]):
        raise RowError(
            "no_target", "the conversation does not end with an assistant's audio: there is nothing to train on"
        )


def speech_messages(
    text: str,
    *,
    scene: str | None = DEFAULT_SCENE,
    system: str = DEFAULT_SYSTEM,
    context: Sequence[tuple[str, str]] = (),
    voice: str | None = None,
) -> list[Message]:
    """The conversation before the speech of `text`, ending with the user's turn.

    `context` holds earlier (text, name of its audio) turns: a reference voice, or what was spoken before. `voice` is
    the name of an audio in the scene instead: the speaker's voice, without its words.
    """
    messages: list[Message] = [_say("system", system)]
    described = [{"type": "text", "text": scene}] if scene else []
    if voice is not None:
        described += [{"type": "text", "text": VOICE_LABEL}, {"type": "audio", "url": voice}]
    if described:
        messages.append({"role": "scene", "content": described})
    for spoken, audio in context:
        messages.append(_say("user", spoken))
        messages.append({"role": "assistant", "content": [{"type": "audio", "url": audio}]})
    return [*messages, _say("user", text)]


def _say(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}
