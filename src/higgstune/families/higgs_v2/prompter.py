"""Conversations with codes -> token ids, delayed frames and labels.

`Prompter.example` (training) and `Prompter.prompt` (generation) render with the same template, tokenize the same
string and replace the same placeholders, so the tokens before the target are identical.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higgstune.codec.base import WhisperFeatures
from higgstune.data.messages import Message, content_parts
from higgstune.errors import CheckpointError, DataError
from higgstune.families.base import Audio, Codes, Example, TextTargets, check_vocabulary
from higgstune.families.higgs_v2.delay import build_frames
from higgstune.families.higgs_v2.prompt import AUDIO_EOS, AUDIO_IN, AUDIO_OUT, AUDIO_OUT_BOS, END_OF_TURN, Piece, pieces
from higgstune.kernels import IGNORE

# Of a native config.json: all that a prompt needs.
_IDS = (
    "audio_token_id", "audio_bos_token_id", "audio_delay_token_id", "audio_stream_bos_id", "audio_stream_eos_id",
    "num_codebooks", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class SpecialIds:
    """The special ids of a checkpoint's configuration."""

    audio_token: int  # <|AUDIO_OUT|>: an audio frame
    audio_delay_token: int  # the last K - 1 delayed frames of an audio
    stream_bos: int
    stream_eos: int
    num_codebooks: int

    @classmethod
    def from_config(cls, config: Any) -> "SpecialIds":
        """Read from a native `HiggsAudioV2Config`."""
        return cls(
            audio_token=config.audio_token_id,
            audio_delay_token=config.audio_delay_token_id,
            stream_bos=config.audio_stream_bos_id,
            stream_eos=config.audio_stream_eos_id,
            num_codebooks=config.num_codebooks,
        )


class Prompter:
    """Turns conversations into examples for one tokenizer and one checkpoint's special ids."""

    def __init__(self, tokenizer: Any, ids: SpecialIds) -> None:
        """`tokenizer` must be a fast one: labels need the character offsets of tokens. Raises CheckpointError."""
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: the checkpoint needs its tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.ids = ids
        token_id = tokenizer.convert_tokens_to_ids(AUDIO_IN)
        self.whisper_token_id: int | None = token_id if isinstance(token_id, int) else None

    def example(
        self,
        messages: Sequence[Message],
        audio: Sequence[Audio],
        *,
        text_targets: TextTargets = "none",
        target_from: int | None = None,
    ) -> Example:
        """A training example.

        `audio` has the codes [frames, K] of every audio part in order, or, for a part of a user, system or scene
        message, its Whisper features. Targets are the assistant messages from index `target_from` on (None: the last
        message). Only their audio is labelled.

        Raises DataError if placeholders and audio do not match, no target is left, or `text_targets` is "assistant"
        and no target has text.
        """
        targets = _target_turns(messages, target_from)
        if text_targets == "assistant" and not any(_has_text(messages[turn]) for turn in targets):
            raise DataError(
                "text_targets is assistant, but no target message has text: the labels would be three control "
                "tokens a clip; use text_targets: transcript"
            )
        parts = pieces(messages, chunks=_chunks(audio))
        return self._expand(parts, audio, _labelled_pieces(messages, parts, targets, text_targets), set(targets))

    def prompt(self, messages: Sequence[Message], audio: Sequence[Audio]) -> Example:
        """The prompt for the next speech: ends with `<|audio_out_bos|>` and carries no labels."""
        return self._expand(pieces(messages, generation=True, chunks=_chunks(audio)), audio, set(), set())

    def lengths(self, conversations: Sequence[tuple[Sequence[Message], Sequence[Audio]]]) -> list[int]:
        """The number of tokens of each conversation's example. Only the shape of codes matters."""
        rendered = [pieces(messages, chunks=_chunks(audio)) for messages, audio in conversations]
        encoded = self.tokenizer(["".join(part.text for part in parts) for parts in rendered], add_special_tokens=False)
        return [
            len(tokens) - sum(part.kind in ("audio", "whisper") for part in parts) + sum(map(self._token_count, audio))
            for tokens, parts, (_, audio) in zip(encoded["input_ids"], rendered, conversations, strict=True)
        ]

    def _token_count(self, audio: Audio) -> int:
        return len(audio.features) if isinstance(audio, WhisperFeatures) else len(audio) + self.ids.num_codebooks + 1

    def _expand(self, parts: list[Piece], audio: Sequence[Audio], labelled: set[int], targets: set[int]) -> Example:
        coded = [part for part in parts if part.kind == "audio"]
        codes = [item for item in audio if not isinstance(item, WhisperFeatures)]
        features = [item for item in audio if isinstance(item, WhisperFeatures)]
        chunks = [count for item in features for count in item.chunks]
        if len(coded) != len(codes) or len(chunks) != sum(part.kind == "whisper" for part in parts):
            raise DataError(f"the conversation has {_audio_parts(parts)} audio parts and got codes for {len(audio)}")
        tokens, owners = self._tokenize(parts)
        frames = iter([self._frames(c, labelled=p.turn in targets) for p, c in zip(coded, codes, strict=True)])
        chunk_lengths = iter(chunks)
        ids: list[NDArray[np.int64]] = []
        text_labels: list[NDArray[np.int64]] = []
        rows: list[NDArray[np.int64]] = []
        row_labels: list[NDArray[np.int64]] = []
        start = 0
        for position in [i for i, o in enumerate(owners) if parts[o].kind in ("audio", "whisper")] + [len(tokens)]:
            ids.append(tokens[start:position])
            text_labels.append(_text_labels(tokens[start:position], owners[start:position], labelled))
            start = position + 1
            if position == len(tokens):
                break
            if parts[owners[position]].kind == "whisper":
                ids.append(np.full(next(chunk_lengths), self.whisper_token_id, dtype=np.int64))
            else:
                row, label = next(frames)
                rows.append(row)
                row_labels.append(label)
                ids.append(self._placeholders(len(row)))
            text_labels.append(np.full(len(ids[-1]), IGNORE, dtype=np.int64))
        input_ids = np.concatenate(ids)
        empty = np.empty((0, self.ids.num_codebooks), dtype=np.int64)
        return Example(
            prompt="".join(part.text for part in parts),
            input_ids=input_ids,
            audio_mask=(input_ids == self.ids.audio_token) | (input_ids == self.ids.audio_delay_token),
            audio_input_ids=np.concatenate([empty, *rows]),
            text_labels=np.concatenate(text_labels),
            audio_labels=np.concatenate([empty, *row_labels]),
            whisper_features=np.concatenate([item.features for item in features]) if features else None,
            feature_positions=np.flatnonzero(input_ids == self.whisper_token_id) if features else None,
        )

    def _tokenize(self, parts: list[Piece]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids of the whole string, and for each the index of the piece with its first character."""
        encoded = self.tokenizer(
            "".join(part.text for part in parts), add_special_tokens=False, return_offsets_mapping=True
        )
        ends = np.cumsum([len(part.text) for part in parts])
        starts = np.array([offset[0] for offset in encoded["offset_mapping"]], dtype=np.int64)
        return np.array(encoded["input_ids"], dtype=np.int64), np.searchsorted(ends, starts, side="right")

    def _frames(self, codes: Codes, *, labelled: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if codes.ndim != 2 or codes.shape[1] != self.ids.num_codebooks:
            raise DataError(f"codes of shape {codes.shape} do not have {self.ids.num_codebooks} codebooks")
        rows, labels = build_frames(codes, bos_id=self.ids.stream_bos, eos_id=self.ids.stream_eos)
        return rows, labels if labelled else np.full_like(labels, IGNORE)

    def _placeholders(self, rows: int) -> NDArray[np.int64]:
        ids = np.full(rows, self.ids.audio_token, dtype=np.int64)
        ids[rows - (self.ids.num_codebooks - 1) :] = self.ids.audio_delay_token
        return ids


def _chunks(audio: Sequence[Audio]) -> list[int]:
    """The number of Whisper chunks of every audio part; 0 for a part with codes."""
    return [len(item.chunks) if isinstance(item, WhisperFeatures) else 0 for item in audio]


def _audio_parts(parts: list[Piece]) -> int:
    return sum(part.kind in ("audio", "whisper") for part in parts)


def _target_turns(messages: Sequence[Message], target_from: int | None) -> list[int]:
    first = len(messages) - 1 if target_from is None else target_from
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if not any(part["type"] == "audio" for turn in turns for part in content_parts(messages[turn])):
        raise DataError(f"no assistant message from message {first} on has audio: the row has no target to train on")
    return turns


def _has_text(message: Message) -> bool:
    return any(part["type"] == "text" and part["text"].strip() for part in content_parts(message))


def _labelled_pieces(
    messages: Sequence[Message], parts: list[Piece], targets: list[int], text_targets: TextTargets
) -> set[int]:
    """Indices of the pieces whose tokens are text labels: the table in docs/prompt.md."""
    if text_targets == "none":
        return set()
    transcripts = {_user_turn_before(messages, turn) for turn in targets} if text_targets == "transcript" else set()
    labelled = set()
    for index, part in enumerate(parts):
        in_target = part.turn in targets and (
            part.text in (AUDIO_OUT_BOS, AUDIO_EOS, END_OF_TURN)
            or (text_targets == "assistant" and part.kind == "text")
        )
        in_user = part.turn in transcripts and (part.kind == "text" or part.text == END_OF_TURN)
        if (in_target or in_user) and part.text != AUDIO_OUT:
            labelled.add(index)
    return labelled


def _user_turn_before(messages: Sequence[Message], turn: int) -> int | None:
    return next((i for i in range(turn - 1, -1, -1) if messages[i]["role"] == "user"), None)


def _text_labels(tokens: NDArray[np.int64], owners: NDArray[np.int64], labelled: set[int]) -> NDArray[np.int64]:
    return np.where(np.isin(owners, list(labelled)), tokens, IGNORE)


def check_tokenizer(tokenizer: Any, config: Any, folder: Path) -> None:
    """Raises CheckpointError when the tokenizer does not fit the config."""
    for token, expected in {AUDIO_OUT: config.audio_token_id, AUDIO_OUT_BOS: config.audio_bos_token_id}.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise CheckpointError(
                f"the tokenizer in {folder} gives {token} the id {found}, the config says {expected}: "
                "tokenizer and weights are not of the same checkpoint"
            )
    check_vocabulary(tokenizer, config, folder)


def read_prompter(tokenizer: Any, written: Mapping[str, Any], folder: Path) -> Prompter | None:
    """The prompter of a checkpoint by its config.json as `written`, without torch; None where that is not enough: the
    original layout, and values that are left to transformers. Raises CheckpointError as `check_tokenizer`.
    """
    if not all(type(written.get(key)) is int for key in _IDS):
        return None
    config = SimpleNamespace(**{key: written[key] for key in _IDS})
    check_tokenizer(tokenizer, config, folder)
    return Prompter(tokenizer, SpecialIds.from_config(config))
