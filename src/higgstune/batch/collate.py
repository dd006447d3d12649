"""Several examples as one sequence without padding, each pathway's positions together.

Hidden states have the text positions of all examples first, then the rows of audio of all examples, each in their
order: norms and feed-forward layers of a pathway then work on one slice. Only attention wants the order of the
sequence, and there each example is a run of its own.

The shift happens here, inside each example and before they are put together: hidden state p predicts position p + 1,
so the last row of one clip can never be asked for the first of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgstune.families.base import Example, Spec
from higgstune.families.padded import feature_tensors
from higgstune.kernels import IGNORE

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class PaddedCollator:
    """Examples -> the arguments of the model's forward. B examples, S positions, A rows of audio, K codebooks.

    input_ids, attention_mask          [B, S]
    audio_input_ids                    [B, A, K], audio_input_ids_mask [B, A]
    audio_positions [M], audio_targets [M, K]    flat positions (b * S + s) and what they predict
    text_positions [N],  text_targets [N]
    whisper_features [W, d_model]                of all <|AUDIO|> positions in order; only where anything is heard
    """

    pad_id: int
    stream_eos: int

    @classmethod
    def of(cls, spec: Spec) -> "PaddedCollator":
        """For the models of a checkpoint."""
        return cls(pad_id=spec.pad_id, stream_eos=spec.stream_eos)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        length = max(len(example) for example in examples)
        rows = max(len(example.audio_input_ids) for example in examples)
        codebooks = examples[0].audio_input_ids.shape[1]
        input_ids = np.full((len(examples), length), self.pad_id, dtype=np.int64)
        attention = np.zeros((len(examples), length), dtype=np.int64)
        audio = np.full((len(examples), rows, codebooks), self.stream_eos, dtype=np.int64)
        audio_mask = np.zeros((len(examples), rows), dtype=bool)
        for b, example in enumerate(examples):
            input_ids[b, : len(example)] = example.input_ids
            attention[b, : len(example)] = 1
            audio[b, : len(example.audio_input_ids)] = example.audio_input_ids
            audio_mask[b, : len(example.audio_input_ids)] = True
        targets = [shifted_targets(example, offset=b * length) for b, example in enumerate(examples)]
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention),
            "audio_input_ids": torch.from_numpy(audio),
            "audio_input_ids_mask": torch.from_numpy(audio_mask),
            **{key: torch.from_numpy(np.concatenate([t[key] for t in targets])) for key in targets[0]},
            **feature_tensors(examples),
        }


def shifted_targets(example: Example, *, offset: int = 0) -> dict[str, np.ndarray]:
    """Which positions of one example predict something, and what; positions are counted from `offset`."""
    row_positions = np.flatnonzero(example.audio_mask)
    labelled = (example.audio_labels != IGNORE).any(axis=1)
    text_positions = np.flatnonzero(example.text_labels != IGNORE)
    return {
        "audio_positions": row_positions[labelled] - 1 + offset,
        "audio_targets": example.audio_labels[labelled],
        "text_positions": text_positions - 1 + offset,
        "text_targets": example.text_labels[text_positions],
    }


Packed = dict[str, Any]


def pack(examples: Sequence[Example], *, share_prefix: bool = True) -> Packed:
    """Examples -> the arguments of the training forward: a sequence of P positions, of which R have hidden states.

    R is less than P where examples begin with the same text (`share_prefix`): what all of them begin with is computed
    once. That changes no number, but a dropout would then fall on all of them alike.

    text_ids [T], audio_ids [A, K]   T + A = R: hidden states of text come first
    position_ids [P]                 in the order of the sequence; they begin anew in each example
    to_sequence [P]                  sequence = hidden[to_sequence]
    from_sequence [R]                hidden = sequence[from_sequence]
    shared_at [n - 1, S]             where the S shared rows stand again in the sequence, in examples 1 to n - 1
    lengths, audio_lengths           of the examples: positions, and rows of audio (tuples of int)
    audio_positions [M], audio_targets [M, K]    rows of hidden states, and what they predict
    text_positions [N],  text_targets [N]
    feature_positions [W], whisper_features [W, d_model]    of all <|AUDIO|>; only where anything is heard
    """
    shared = _common_prefix(examples) if share_prefix else 0
    lengths = tuple(len(example) for example in examples)
    starts = np.cumsum((0, *lengths[:-1]))
    shared_at = starts[1:, None] + np.arange(shared)
    is_audio = np.concatenate([example.audio_mask for example in examples])
    from_sequence = np.argsort(is_audio, kind="stable")
    from_sequence = from_sequence[~np.isin(from_sequence, shared_at)]
    to_sequence = np.empty_like(is_audio, dtype=np.int64)
    to_sequence[from_sequence] = np.arange(len(from_sequence))
    to_sequence[shared_at] = np.arange(shared)
    input_ids = np.concatenate([example.input_ids for example in examples])[from_sequence]
    audio_ids = np.concatenate([example.audio_input_ids for example in examples])
    targets = [shifted_targets(e, offset=int(start)) for e, start in zip(examples, starts, strict=True)]
    arrays: dict[str, NDArray[Any]] = {
        "text_ids": input_ids[: len(input_ids) - len(audio_ids)],
        "audio_ids": audio_ids,
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "to_sequence": to_sequence,
        "from_sequence": from_sequence,
        "shared_at": shared_at,
        **{key: np.concatenate([part[key] for part in targets]) for key in targets[0]},
    }
    heard = feature_tensors(examples)
    if heard:
        hearing = [(e.feature_positions, start) for e, start in zip(examples, starts, strict=True)]
        arrays["feature_positions"] = np.concatenate([at + start for at, start in hearing if at is not None])
    for key in ("audio_positions", "text_positions", "feature_positions"):
        if key in arrays:
            arrays[key] = to_sequence[arrays[key]]
    return {
        **{key: torch.from_numpy(value) for key, value in arrays.items()},
        **heard,
        "lengths": lengths,
        "audio_lengths": tuple(len(example.audio_input_ids) for example in examples),
    }


def _common_prefix(examples: Sequence[Example]) -> int:
    """How many positions of plain text all examples begin with, less the last of the shortest one."""
    longest = min(_plain_until(example) for example in examples)
    same = np.ones(longest, dtype=bool)
    for example in examples[1:]:
        same &= example.input_ids[:longest] == examples[0].input_ids[:longest]
    return longest if same.all() else int(same.argmin())


def _plain_until(example: Example) -> int:
    """The first position that is audio, of either kind, or the last position."""
    first_audio = int(example.audio_mask.argmax()) if example.audio_mask.any() else len(example)
    first_heard = len(example) if example.feature_positions is None else int(example.feature_positions.min())
    return min(first_audio, first_heard, len(example) - 1)


def positions(batch: Packed) -> int:
    """How many positions a packed batch has."""
    return sum(batch["lengths"])


def tensors_to(batch: Packed, device: torch.device) -> Packed:
    """The batch with its tensors on a device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }
