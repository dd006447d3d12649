"""Conversations with codes -> token ids, delayed rows and labels of Higgs TTS 3.

    no reference       <|tts|> <|text|> TEXT <|audio|>
    a reference        <|tts|> [<|ref_text|> WORDS] <|ref_audio|> [rows] <|text|> TEXT <|audio|>
    what was spoken    <|tts|> [reference] <|text|> TEXT <|audio|> [rows] ... <|text|> TEXT <|audio|>

Texts are tokenized as they are, with nothing between the parts: no chat template, no system prompt, no scene.
`Prompter.example` (training) and `Prompter.prompt` (generation) build the same tokens before the target.
Source: sglang-omni 0.1.9, vllm-omni 0.30.0 and mlx-audio 0.6.2, whose ids are equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from higgstune.codec.base import WhisperFeatures
from higgstune.data.messages import DEFAULT_SCENE, DEFAULT_SYSTEM, VOICE_LABEL, Message, content_parts
from higgstune.errors import CheckpointError, DataError
from higgstune.families.base import Audio, Codes, Example, TextTargets, check_vocabulary
from higgstune.families.higgs_tts_3.delay import delay, labels_of
from higgstune.families.higgs_tts_3.tokens import (
    AUDIO,
    FIRST,
    OFFSETS,
    REFERENCE_AUDIO,
    REFERENCE_TEXT,
    TEXT,
    TTS,
    check_tags,
)
from higgstune.kernels import IGNORE

SLOT = -100  # stands in the ids for a delayed row; it is never embedded
_SHOWN_ROWS = "[audio]"  # for all rows of an audio, in a prompt that people read


@dataclass(frozen=True)
class Turn:
    """A text and its speech; a reference may have no text, and the last turn of a prompt has no codes."""

    text: str
    codes: Codes | None = None
    is_target: bool = False


class Prompter:
    """Turns conversations into examples for one tokenizer."""

    whisper_token_id: int | None = None

    def __init__(self, tokenizer: Any, num_codebooks: int, boc_id: int) -> None:
        self.tokenizer = tokenizer
        self.num_codebooks = num_codebooks
        self.boc_id = boc_id

    def example(
        self,
        messages: Sequence[Message],
        audio: Sequence[Audio],
        *,
        text_targets: TextTargets = "none",
        target_from: int | None = None,
    ) -> Example:
        """A training example. `audio` has the codes [frames, K] of every audio part in order; the assistant messages
        from `target_from` on are the targets (None: the last message).

        The speech before the first target is the reference, with the user's text before it as its words; what follows
        it are earlier pieces. Raises DataError if parts and codes do not match, no target is left, a text has an
        unknown tag, or the conversation has what this family lacks.
        """
        first = len(messages) - 1 if target_from is None else target_from
        reference, turns = _turns(messages, audio, first)
        if not any(turn.is_target for turn in turns):
            raise DataError(
                f"no assistant message from message {first} on has audio: the row has no target to train on"
            )
        return self.build(turns, reference, text_targets=text_targets)

    def prompt(self, messages: Sequence[Message], audio: Sequence[Audio]) -> Example:
        """The prompt for the next speech: ends with `<|audio|>` and carries no labels. Raises DataError."""
        reference, turns = _turns(messages, audio, len(messages))
        if not turns or turns[-1].codes is not None:
            raise DataError("the conversation does not end with a text to speak")
        return self.build(turns, reference)

    def lengths(self, conversations: Sequence[tuple[Sequence[Message], Sequence[Audio]]]) -> list[int]:
        """The number of tokens of each conversation's example. Only the shape of codes matters."""
        found = []
        for messages, audio in conversations:
            reference, turns = _turns(messages, audio, len(messages))
            parts = [*turns] if reference is None else [reference, *turns]
            texts = sum(len(self._encode(part.text)) for part in parts)
            rows = sum(len(part.codes) + self.num_codebooks - 1 for part in parts if part.codes is not None)
            control = 1 + 2 * len(turns) + (0 if reference is None else 1 + bool(reference.text))
            found.append(texts + rows + control)
        return found

    def build(
        self, turns: Sequence[Turn], reference: Turn | None = None, *, text_targets: TextTargets = "none"
    ) -> Example:
        """The example of these turns, with texts as they are. Raises DataError for codes of another shape."""
        parts = _Parts(self)
        parts.add(TTS)
        if reference is not None:
            assert reference.codes is not None
            if reference.text:
                parts.add(REFERENCE_TEXT)
                parts.add_text(reference.text)
            parts.add(REFERENCE_AUDIO)
            parts.add_rows(reference.codes, labelled=False)
        for turn in turns:
            labelled = turn.is_target and text_targets == "transcript"
            parts.add(TEXT)
            parts.add_text(turn.text, labelled=labelled)
            parts.add(AUDIO, labelled=labelled)
            if turn.codes is not None:
                parts.add_rows(turn.codes, labelled=turn.is_target)
        return parts.example()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


class _Parts:
    """An example that is being built."""

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._text: list[str] = []
        self._ids: list[int] = []
        self._text_labels: list[int] = []
        empty = np.empty((0, prompter.num_codebooks), dtype=np.int64)
        self._rows, self._labels = [empty], [empty]

    def add(self, token: str, *, labelled: bool = False) -> None:
        self._append(token, [self._prompter.tokenizer.convert_tokens_to_ids(token)], labelled)

    def add_text(self, text: str, *, labelled: bool = False) -> None:
        self._append(text, self._prompter._encode(text), labelled)

    def add_rows(self, codes: Codes, *, labelled: bool) -> None:
        if codes.ndim != 2 or codes.shape[1] != self._prompter.num_codebooks:
            raise DataError(f"codes of shape {codes.shape} do not have {self._prompter.num_codebooks} codebooks")
        rows = delay(codes, boc_id=self._prompter.boc_id)
        self._rows.append(rows)
        self._labels.append(labels_of(rows) if labelled else np.full_like(rows, IGNORE))
        self._append(_SHOWN_ROWS, [SLOT] * len(rows), False)

    def _append(self, text: str, ids: list[int], labelled: bool) -> None:
        self._text.append(text)
        self._ids += ids
        self._text_labels += ids if labelled else [IGNORE] * len(ids)

    def example(self) -> Example:
        input_ids = np.array(self._ids, dtype=np.int64)
        return Example(
            prompt="".join(self._text),
            input_ids=input_ids,
            audio_mask=input_ids == SLOT,
            audio_input_ids=np.concatenate(self._rows),
            text_labels=np.array(self._text_labels, dtype=np.int64),
            audio_labels=np.concatenate(self._labels),
        )


def _turns(messages: Sequence[Message], audio: Sequence[Audio], target_from: int) -> tuple[Turn | None, list[Turn]]:
    """The reference, if there is one, and the turns after it. Raises DataError."""
    codes = iter(audio)
    reference: Turn | None = None
    turns: list[Turn] = []
    text: str | None = None
    for number, message in enumerate(messages):
        role = message["role"]
        for part in content_parts(message):
            if part["type"] == "text" and role == "user":
                check_tags(part["text"])
                text = part["text"] if text is None else f"{text}\n{part['text']}"
            elif part["type"] == "text":
                _check_unspoken(role, part["text"])
            elif role == "user":
                raise DataError("Higgs TTS 3 reads no audio of a user: name the voice as the row's reference")
            else:
                spoken = _codes(next(codes, None), len(audio))
                is_target = role == "assistant" and number >= target_from
                if reference is None and not turns and not is_target:
                    reference, text = Turn(text or "", spoken), None
                elif role != "assistant" or text is None:
                    raise DataError(f"message {number} has audio without a text of the user before it")
                else:
                    turns.append(Turn(text, spoken, is_target))
                    text = None
    if next(codes, None) is not None:
        raise DataError(f"the conversation has fewer audio parts than the {len(audio)} that were given")
    return reference, turns if text is None else [*turns, Turn(text)]


def _check_unspoken(role: str, text: str) -> None:
    """Raise DataError for a text that no prompt of this family has room for."""
    if role == "system" and text.strip() not in ("", DEFAULT_SYSTEM):
        raise DataError("Higgs TTS 3 has no system prompt: leave it out, and describe the speech with tags")
    if role == "scene" and text.strip() not in ("", DEFAULT_SCENE, VOICE_LABEL):
        raise DataError("Higgs TTS 3 has no scenes: leave the scene out, and describe the speech with tags")
    if role == "assistant" and text.strip():
        raise DataError("Higgs TTS 3 has no text of an assistant: what is spoken is the user's text before it")


def _codes(audio: Audio | None, given: int) -> Codes:
    if audio is None:
        raise DataError(f"the conversation has more audio parts than the {given} that were given")
    if isinstance(audio, WhisperFeatures):
        raise DataError("Higgs TTS 3 reads no Whisper features: its references are codes")
    return audio


def check_tokenizer(tokenizer: Any, config: Any, folder: Path) -> None:
    """Raises CheckpointError when the tokenizer is not of this family, or does not fit the config."""
    first = tokenizer.convert_tokens_to_ids(FIRST)
    for token, offset in OFFSETS.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found is None or found == tokenizer.unk_token_id or found != first + offset:
            raise CheckpointError(
                f"the tokenizer in {folder} gives {token} the id {found}, {offset} after {FIRST} is expected: it is "
                "not that of Higgs TTS 3 (Qwen3's own has other tokens there); copy tokenizer.json of the checkpoint"
            )
    check_vocabulary(tokenizer, config, folder)


def read_prompter(tokenizer: Any, written: Mapping[str, Any], folder: Path) -> Prompter | None:
    """The prompter of a checkpoint by its config.json as `written`, without torch; None for one that lacks a number.

    Raises CheckpointError as `check_tokenizer`.
    """
    audio, text = (written.get(key) or {} for key in ("audio_encoder_config", "text_config"))
    codebooks, classes, vocabulary = audio.get("num_codebooks"), audio.get("vocab_size"), text.get("vocab_size")
    if not (type(codebooks) is type(classes) is type(vocabulary) is int):
        return None
    check_tokenizer(tokenizer, SimpleNamespace(vocab_size=vocabulary), folder)
    return Prompter(tokenizer, codebooks, classes - 2)
