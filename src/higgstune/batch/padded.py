"""Several examples as one right-padded batch, with the labelled positions already shifted and counted.

The shift happens here, inside each example and before they are put together: hidden state p predicts position p + 1,
so the last row of one clip can never be asked for the first of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from higgstune.prompt.delay import IGNORE
from higgstune.prompt.example import Example

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
            **heard_features(examples),
        }


def heard_features(examples: Sequence[Example]) -> Batch:
    """`whisper_features` of a batch, or nothing where no example hears any audio."""
    heard = [example.whisper_features for example in examples if example.whisper_features is not None]
    return {"whisper_features": torch.from_numpy(np.concatenate(heard))} if heard else {}


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
