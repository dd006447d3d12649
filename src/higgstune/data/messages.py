"""Conversations: the spellings that people have, brought into one.

The one spelling is the native chat template's: {"role": "system" | "scene" | "user" | "assistant", "content":
[part, ...]} with parts {"type": "text", "text": ...} and {"type": "audio", "url": path}. What the original
code writes into the system message as `<|scene_desc_start|> ... <|scene_desc_end|>` becomes a scene.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from higgstune.data.message_parts import Part, check_keys, check_texts, normalize_parts, normalize_texts
from higgstune.data.rejection import RowError, did_you_mean, shown

ROLES = ("system", "scene", "user", "assistant")
Message = Mapping[str, Any]

_DEFAULT_SYSTEM = "Generate audio following instruction."
_SCENE_MARK = re.compile(r"(<\|scene_desc_start\|>|<\|scene_desc_end\|>)")


def normalize_messages(messages: Any, start_index: int | None = None) -> tuple[list[Message], int | None]:
    """A conversation in any known spelling -> (the one spelling, `start_index` counted in it).

    The texts of user and assistant are normalised as everywhere; those of system and scene stay as they
    are. An audio part keeps `offset` and `duration` (seconds) where it has them.

    Raises RowError, naming the message, for an unknown role, key or part, for control tokens, and for a
    conversation that does not end with an assistant's audio, which is the target.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError("bad_row", "messages: a list of at least one message is needed")
    result: list[Message] = []
    places = []
    for number, message in enumerate(messages):
        places.append(len(result))
        result.extend(_normalize_message(number, message))
    _check_order(result)
    if start_index is not None and not 0 <= start_index < len(places):
        raise RowError("bad_row", f"start_index is {start_index}: there are {len(places)} messages, counted from 0")
    return result, None if start_index is None else places[start_index]


def audio_parts(messages: Iterable[Message]) -> list[Part]:
    """Every audio part in order; of a normalised conversation the last one is the target."""
    return [part for message in messages for part in message["content"] if part["type"] == "audio"]


def is_target(messages: Sequence[Message], start_index: int | None) -> list[bool]:
    """For every audio part in order, whether it is learnt.

    Those of assistants are, from `start_index` on; without it, those of the last message.
    """
    first = len(messages) - 1 if start_index is None else start_index
    return [
        message["role"] == "assistant" and number >= first
        for number, message in enumerate(messages)
        for _ in audio_parts([message])
    ]


def target_text(messages: Sequence[Message]) -> str:
    """What the target says: the assistant's own text where it has one, else what the user wants said."""
    for message in messages[:-3:-1]:
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        if texts and message["role"] in ("user", "assistant"):
            return "\n".join(texts)
    return ""


def _normalize_message(number: int, message: Any) -> list[Message]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise RowError("bad_row", f"{where} is no object with role and content")
    check_keys(message, ("role", "content", "recipient"), where)
    role = message.get("role")
    if role not in ROLES:
        raise RowError("bad_row", f"{where} has the role {shown(role)}; {did_you_mean(str(role), ROLES)}")
    if message.get("recipient"):
        raise RowError("bad_row", f"{where}: a recipient is not supported")
    parts = list(normalize_parts(message.get("content"), where))
    if role == "system":
        return _split_system(parts, where)
    if role == "scene":
        check_texts(parts, where)
        scene = {"role": "scene", "content": parts}
        return [_default_system(), scene] if number == 0 else [scene]
    return [{"role": role, "content": normalize_texts(parts, where)}]


def _default_system() -> Message:
    """The templates write a scene inside of a system turn, so a scene cannot be alone."""
    return {"role": "system", "content": [{"type": "text", "text": _DEFAULT_SYSTEM}]}


def _split_system(parts: list[Part], where: str) -> list[Message]:
    """A system message, and the scene that the original format writes inside of it."""
    before, scene, marks = _sections(parts)
    if marks not in ([], ["<|scene_desc_start|>", "<|scene_desc_end|>"]):
        raise RowError(
            "control_token",
            f"{where}: a scene is one <|scene_desc_start|>, its text and one <|scene_desc_end|>, at the end",
        )
    check_texts(before + scene, where)
    system = {"role": "system", "content": before} if before else _default_system()
    return [system, {"role": "scene", "content": _split_setting(scene)}] if scene else [system]


def _sections(parts: list[Part]) -> tuple[list[Part], list[Part], list[str]]:
    """The parts before the scene's start, those after it, and the marks met; what follows the end is one."""
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


def _split_setting(scene: list[Part]) -> list[Part]:
    """The native template writes an empty line after a scene's first part, so the original's is cut there."""
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
            "no_target", "the conversation does not end with an assistant's audio: there is nothing to learn"
        )
