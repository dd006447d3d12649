"""Examples -> the arguments of a model's forward: one packed sequence for training, or a padded batch for probes.

A packed sequence has no padding. Its hidden states have the text tokens of all examples first, then the audio frames of
all examples, each in their order: norms and feed-forward layers of a pathway then work on one slice. Only attention
needs the order of the sequence, where each example is a segment of its own.

Labels are shifted here, within each example and before examples are joined: hidden state p predicts token p + 1, so the
last frame of one clip never predicts the first frame of the next.
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

Batch = dict[str, Tensor]  # padded
Packed = dict[str, Any]  # tensors, and lengths as tuples


def pack(examples: Sequence[Example], *, share_prefix: bool = True) -> Packed:
    """Examples -> the arguments of the training forward: a sequence of P tokens, of which R have hidden states.

    R is less than P if examples begin with the same text (`share_prefix`): their common prefix is computed once. That
    changes no number, but dropout would then be the same for all of them.

    text_ids [T], audio_ids [A, K]   T + A = R: hidden states of text come first
    position_ids [P]                 in the order of the sequence; they restart in each example
    to_sequence [P]                  sequence = hidden[to_sequence]
    from_sequence [R]                hidden = sequence[from_sequence]
    shared_at [n - 1, S]             where the S shared rows repeat in the sequence, in examples 1 to n - 1
    lengths, audio_lengths           of the examples: tokens, and audio frames (tuples of int)
    audio_positions [M], audio_targets [M, K]    rows of hidden states, and what they predict
    text_positions [N],  text_targets [N]
    feature_positions [W], whisper_features [W, d_model]    of all examples; absent without Whisper features
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
    features = feature_tensors(examples)
    if features:
        placed = [(e.feature_positions, start) for e, start in zip(examples, starts, strict=True)]
        arrays["feature_positions"] = np.concatenate([at + start for at, start in placed if at is not None])
    for key in ("audio_positions", "text_positions", "feature_positions"):
        if key in arrays:
            arrays[key] = to_sequence[arrays[key]]
    return {
        **{key: torch.from_numpy(value) for key, value in arrays.items()},
        **features,
        "lengths": lengths,
        "audio_lengths": tuple(len(example.audio_input_ids) for example in examples),
    }


def count_tokens(batch: Packed) -> int:
    """The number of tokens in a packed batch."""
    return sum(batch["lengths"])


def tensors_to(batch: Packed, device: torch.device) -> Packed:
    """The batch with its tensors on a device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


@dataclass(frozen=True)
class PaddedCollator:
    """Examples -> a right-padded batch for the model's forward. B examples, S tokens, A audio frames, K codebooks.

    input_ids, attention_mask          [B, S]
    audio_input_ids                    [B, A, K], audio_input_ids_mask [B, A]
    audio_positions [M], audio_targets [M, K]    flat positions (b * S + s) and what they predict
    text_positions [N],  text_targets [N]
    whisper_features [W, d_model]                of all examples in order; absent without Whisper features
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
    """The positions of one example that predict a label, counted from `offset`, and their labels."""
    row_positions = np.flatnonzero(example.audio_mask)
    labelled = (example.audio_labels != IGNORE).any(axis=1)
    text_positions = np.flatnonzero(example.text_labels != IGNORE)
    return {
        "audio_positions": row_positions[labelled] - 1 + offset,
        "audio_targets": example.audio_labels[labelled],
        "text_positions": text_positions - 1 + offset,
        "text_targets": example.text_labels[text_positions],
    }


def _common_prefix(examples: Sequence[Example]) -> int:
    """The number of plain text tokens that all examples begin with; without the last token of the shortest one."""
    longest = min(_plain_until(example) for example in examples)
    same = np.ones(longest, dtype=bool)
    for example in examples[1:]:
        same &= example.input_ids[:longest] == examples[0].input_ids[:longest]
    return longest if same.all() else int(same.argmin())


def _plain_until(example: Example) -> int:
    """The position of the first audio frame or Whisper feature, or the last position."""
    first_audio = int(example.audio_mask.argmax()) if example.audio_mask.any() else len(example)
    first_feature = len(example) if example.feature_positions is None else int(example.feature_positions.min())
    return min(first_audio, first_feature, len(example) - 1)
