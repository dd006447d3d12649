"""Rows of a code store -> conversations -> training examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from higgstune.batch.lengths import known_lengths
from higgstune.codec.base import WhisperFeatures
from higgstune.data.messages import (
    DEFAULT_SCENE,
    Message,
    ReferencePlace,
    conversation_audio,
    speech_messages,
    whisper_clips,
)
from higgstune.data.store import MixedRows, Row, SplitView
from higgstune.errors import DataError
from higgstune.families.base import Audio, Example, Prompter, TextTargets

TARGET: Message = {"role": "assistant", "content": [{"type": "audio", "url": "target"}]}
_TOKENIZED_AT_ONCE = 1000  # rows
_MAX_PROBED = 64  # rows of a split that `probe_rows` reads


class Features(Protocol):
    """The Whisper features of a store's clips, by audio hash."""

    def read(self, sha256: str) -> WhisperFeatures:
        """Raises DataError for a clip that was not encoded."""
        ...


@dataclass(frozen=True)
class Rendering:
    """How rows become conversations; speaking places a reference in the same way."""

    reference: ReferencePlace = "turn"  # an utterance's reference: an earlier turn, or a voice in the scene
    features: Features | None = None  # None: audio in user and system turns is read by its codes


PLAIN = Rendering()


def row_conversation(row: Row, rendering: Rendering = PLAIN) -> tuple[list[Message], list[Audio], int | None]:
    """A row's messages, the audio of their audio parts in order, and the index of the first target message (None: the
    last message).

    An utterance becomes the conversation that generation uses: default system message, its scene (or the default one),
    its reference in its place, its text, its audio. With Whisper features, they stand for audio in user, system and
    scene messages, except in parts that say `"as": "codes"`.
    """
    if row.messages is not None:
        return list(row.messages), _audio_in_order(row, rendering.features), row.start_index
    scene = DEFAULT_SCENE if row.scene is None else row.scene
    if row.reference_codes is None:
        return [*speech_messages(row.text, scene=scene), TARGET], [row.codes], None
    if rendering.reference == "turn":
        context = [(row.reference_text or "", "reference")]
        return (
            [*speech_messages(row.text, scene=scene, context=context), TARGET],
            [row.reference_codes, row.codes],
            None,
        )
    voice: Audio = row.reference_codes
    if rendering.features is not None:
        assert row.reference_sha256 is not None
        voice = rendering.features.read(row.reference_sha256)
    return [*speech_messages(row.text, scene=scene, voice="reference"), TARGET], [voice, row.codes], None


def row_example(prompter: Prompter, row: Row, text_targets: TextTargets, rendering: Rendering = PLAIN) -> Example:
    """The training example of a row. Raises DataError as `Prompter.example`."""
    messages, audio, target_from = row_conversation(row, rendering)
    return prompter.example(messages, audio, text_targets=text_targets, target_from=target_from)


def probe_rows(splits: Sequence[tuple[str, Sequence[Row]]], rendering: Rendering) -> tuple[str, list[Row]]:
    """Rows to compare models on, and the name of their split: the first split that has any.

    With Whisper, only rows with Whisper features, of the first split that has any: other rows would prove nothing about
    the projector.
    """
    if rendering.features is not None:
        for name, rows in splits:
            with_features = [row for row in islice(rows, _MAX_PROBED) if whisper_clips(row, rendering.reference)]
            if with_features:
                return name, with_features
    return next(((name, list(islice(rows, _MAX_PROBED))) for name, rows in splits if len(rows)), ("", []))


class RowExamples:
    """The examples of one split for one stage, as a map-style data set that builds each one on access."""

    def __init__(
        self,
        rows: Sequence[Row],
        prompter: Prompter,
        text_targets: TextTargets,
        rendering: Rendering = PLAIN,
    ) -> None:
        self.rows = rows
        self.prompter = prompter
        self.text_targets = text_targets
        self.rendering = rendering
        self._lengths: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def with_targets(self, text_targets: TextTargets) -> "RowExamples":
        """The same rows with other labels; known lengths are kept."""
        other = RowExamples(self.rows, self.prompter, text_targets, self.rendering)
        other._lengths = self._lengths
        return other

    def row_id(self, index: int) -> str:
        """The id of an example's row."""
        return self.rows[index].id

    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each example, [rows], without reading the codes of a store."""
        if self._lengths is None:
            self._lengths = self._measured()
        return self._lengths

    def _measured(self) -> NDArray[np.int64]:
        rows, reference = self.rows, self.rendering.reference
        if self.rendering.features is not None:
            return np.array(self._measure(_outlines(rows)), dtype=np.int64)
        own = rows.own if isinstance(rows, MixedRows) else rows
        if not isinstance(own, SplitView):
            return np.array(self._measure(iter(rows)), dtype=np.int64)
        lengths = known_lengths(own, self.prompter, reference, lambda chosen: self._measure(map(own.outline, chosen)))
        if isinstance(rows, MixedRows):
            lengths = np.concatenate([lengths, self._measure(map(rows.replayed.outline, rows.drawn))])
        return lengths

    def _measure(self, outlines: Iterator[Row]) -> list[int]:
        lengths: list[int] = []
        while rows := list(islice(outlines, _TOKENIZED_AT_ONCE)):
            try:
                lengths += self.prompter.lengths([row_conversation(row, self.rendering)[:2] for row in rows])
            except DataError:
                for row in rows:
                    self._example(row)  # its error names the row
                raise
        return lengths

    def __getitem__(self, index: int) -> Example:
        return self._example(self.rows[index])

    def _example(self, row: Row) -> Example:
        try:
            return row_example(self.prompter, row, self.text_targets, self.rendering)
        except DataError as error:
            raise DataError(f"row {row.id} of the {row.split} split: {error}") from error


def _outlines(rows: Sequence[Row]) -> Iterator[Row]:
    return rows.outlines() if isinstance(rows, SplitView | MixedRows) else iter(rows)


def _audio_in_order(row: Row, features: Features | None) -> list[Audio]:
    """Context and target audio in the order of the conversation."""
    assert row.messages is not None
    parts, target = conversation_audio(row.messages)
    context = parts[:target] + parts[target + 1 :]
    audio: list[Audio] = []
    for part, codes, sha256 in zip(context, row.context_codes, row.context_sha256, strict=True):
        if features is None and part.read_as == "whisper":
            raise DataError('an audio part says "as": "whisper", but no Whisper is configured: set model.whisper')
        audio.append(codes if features is None or not part.uses_whisper else features.read(sha256))
    audio.insert(target, row.codes)
    return audio
