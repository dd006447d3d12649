"""Right-padded batches for the native forward, with `labels` and `audio_labels`: what the baseline trains on."""

from collections.abc import Sequence
from typing import Any

import report  # noqa: F401  # it puts the checkout's src on the path
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from higgstune.families.base import Example
from higgstune.kernels import IGNORE


def collate(examples: Sequence[Example], config: Any) -> dict[str, Tensor]:
    """Unshifted labels: the native loss shifts them itself."""

    def padded(name: str, value: int) -> Tensor:
        arrays = [torch.from_numpy(getattr(example, name)) for example in examples]
        return pad_sequence(arrays, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(example) for example in examples])
    rows = torch.tensor([len(example.audio_input_ids) for example in examples])
    return {
        "input_ids": padded("input_ids", config.pad_token_id),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "audio_input_ids": padded("audio_input_ids", config.audio_stream_eos_id),
        "audio_input_ids_mask": torch.arange(int(rows.max())) < rows[:, None],
        "labels": padded("text_labels", IGNORE),
        "audio_labels": padded("audio_labels", IGNORE),
    }
