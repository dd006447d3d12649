"""Conversations -> prompt strings of Higgs Audio v2; no other module knows the template.

There are two templates. `native` is that of the released checkpoint (transformers); training and speaking use it.
`chatml` is that of the original code (boson_multimodal), which writes input audio as
`<|audio_bos|><|AUDIO|><|audio_eos|>`. Both write the same wherever both can express a conversation. With Whisper
conditioning, native prompts also write audio encoded by Whisper in that way, once for each chunk of 30 s.

A message is {"role": "system" | "scene" | "user" | "assistant", "content": [part, ...]} and a part
{"type": "text", "text": ...} or {"type": "audio", ...}; a content that is a plain string is one text part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from higgstune.data.messages import ROLES, Message, content_parts
from higgstune.data.text import find_control_tokens
from higgstune.errors import DataError

Template = Literal["native", "chatml"]

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TURN = "<|eot_id|>"
SCENE_START = "<|scene_desc_start|>"
SCENE_END = "<|scene_desc_end|>"
AUDIO_OUT_BOS = "<|audio_out_bos|>"
AUDIO_OUT = "<|AUDIO_OUT|>"
AUDIO_BOS = "<|audio_bos|>"
AUDIO_IN = "<|AUDIO|>"
AUDIO_EOS = "<|audio_eos|>"


@dataclass(frozen=True)
class Piece:
    """A part of the prompt: control tokens, text of a message, or the placeholder of an audio or of a chunk of it."""

    text: str
    kind: Literal["control", "text", "audio", "whisper"]  # audio: replaced by codes; whisper: by Whisper features
    turn: int  # index of its message; -1 before the first


def render(messages: Sequence[Message], *, template: Template = "native", generation: bool = False) -> str:
    """The prompt of a conversation; each audio part stays one placeholder.

    With `generation` it ends with `<|audio_out_bos|>`, where the model starts to speak. If the last message is an
    assistant's, its text stands before that token, and its audio is to be generated.

    Raises DataError for an unknown template, role or part, and for control tokens in a user's or assistant's text.

    >>> from higgstune.data.messages import speech_messages
    >>> print(render(speech_messages("Hello."), generation=True).split("<|eot_id|>")[1])
    <|start_header_id|>user<|end_header_id|>
    <BLANKLINE>
    Hello.
    """
    return "".join(piece.text for piece in pieces(messages, template=template, generation=generation))


def pieces(
    messages: Sequence[Message],
    *,
    template: Template = "native",
    generation: bool = False,
    chunks: Sequence[int] | None = None,
) -> list[Piece]:
    """The pieces that `render` joins, from which labels are chosen. Raises as `render`.

    `chunks` has the number of Whisper chunks of every audio part in order; 0 means that codes replace the part.
    """
    if template not in ("native", "chatml"):
        raise DataError(f"unknown template {template!r}: native or chatml")
    if not messages:
        raise DataError("a conversation needs at least one message")
    writer = _Writer(template, chunks)
    for turn, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise DataError(f"message {turn} has the role {message.get('role')!r}: one of {', '.join(ROLES)}")
        is_last = turn == len(messages) - 1
        writer.message(turn, messages, stop_at_audio=generation and is_last and message["role"] == "assistant")
    if generation and messages[-1]["role"] != "assistant":
        writer.header(len(messages), "assistant")
        writer.control(len(messages), AUDIO_OUT_BOS)
    return writer.pieces


class _Writer:
    """Builds the pieces in the order of the prompt."""

    def __init__(self, template: Template, chunks: Sequence[int] | None) -> None:
        self.template = template
        self.chunks = None if chunks is None else iter(chunks)
        self.pieces = [Piece(BEGIN_OF_TEXT, "control", -1)]

    def control(self, turn: int, text: str) -> None:
        self.pieces.append(Piece(text, "control", turn))

    def text(self, turn: int, role: str, text: str) -> None:
        allowed = (SCENE_START, SCENE_END) if role == "system" else ()
        found = [token for token in find_control_tokens(text) if token not in allowed]
        if found:
            raise DataError(
                f"the {role} text of message {turn} holds the control token {found[0]}: remove it, "
                "only the prompt template writes control tokens"
            )
        # The native chat template trims every text part, the original code none.
        text = text.strip() if self.template == "native" else text
        if text:
            self.pieces.append(Piece(text, "text", turn))

    def audio(self, turn: int, role: str) -> None:
        default = int(self.template == "chatml" and role != "assistant")
        chunks = default if self.chunks is None else next(self.chunks, 0)
        if chunks and role == "assistant":
            raise DataError(f"message {turn} is an assistant's: its audio needs codes, not Whisper features")
        for _ in range(chunks):
            self.control(turn, AUDIO_BOS)
            self.pieces.append(Piece(AUDIO_IN, "whisper", turn))
            self.control(turn, AUDIO_EOS)
        if not chunks:
            self.control(turn, AUDIO_OUT_BOS)
            self.pieces.append(Piece(AUDIO_OUT, "audio", turn))
            self.control(turn, AUDIO_EOS)

    def header(self, turn: int, role: str) -> None:
        self.control(turn, f"<|start_header_id|>{role}<|end_header_id|>\n\n")

    def message(self, turn: int, messages: Sequence[Message], *, stop_at_audio: bool) -> None:
        message = messages[turn]
        if message["role"] == "scene":
            if turn != 1 or messages[0]["role"] != "system":
                raise DataError("a scene message must be the second one, right after the system message")
            return  # written inside the system turn
        self.header(turn, message["role"])
        if stop_at_audio:
            self._assistant_until_audio(turn, message)
            return
        for part in content_parts(message):
            if part["type"] == "text":
                self.text(turn, message["role"], part["text"])
            else:
                self.audio(turn, message["role"])
        if message["role"] == "system" and len(messages) > 1 and messages[1]["role"] == "scene":
            self._scene(1, messages[1])
        self.control(turn, END_OF_TURN)

    def _assistant_until_audio(self, turn: int, message: Message) -> None:
        for part in content_parts(message):
            if part["type"] == "audio":
                break
            self.text(turn, "assistant", part["text"])
        self.control(turn, AUDIO_OUT_BOS)

    def _scene(self, turn: int, message: Message) -> None:
        self.control(turn, f"\n\n{SCENE_START}\n")
        parts = content_parts(message)
        for index, part in enumerate(parts):
            if part["type"] == "audio":
                self.control(turn, " ")
                self.audio(turn, "scene")
            else:
                self.text(turn, "scene", part["text"])
            self.control(turn, _scene_separator(parts, index))
        self.control(turn, f"\n{SCENE_END}")


def _scene_separator(parts: Sequence[Mapping[str, Any]], index: int) -> str:
    """The native template's separator after scene part `index`: a blank line after the description, then newlines."""
    if index == len(parts) - 1:
        return ""
    if parts[index]["type"] == "audio":
        return "\n"
    if index == 0:
        return "\n\n"
    return "" if parts[index + 1]["type"] == "audio" else "\n"


def native_chat_template() -> str:
    """The native template as Jinja, for a tokenizer's `chat_template`, with which other software renders."""
    return (resources.files("higgstune.families.higgs_v2") / "native_template.jinja").read_text(encoding="utf-8")
