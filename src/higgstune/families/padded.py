"""Prompts of unequal lengths as one left-padded batch, for decoders that need one."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from higgstune.families.base import Example


def left_padded(prompts: Sequence[Example], *, pad_id: int) -> dict[str, Tensor]:
    """Prompts -> input_ids and attention_mask [B, S], padded on the left, and if prompts have any, audio frames
    [B, A, K] and Whisper features [W, d_model].
    """
    length = max(len(prompt) for prompt in prompts)
    rows = max(len(prompt.audio_input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_id)
    attention = torch.zeros((len(prompts), length), dtype=torch.long)
    audio = torch.zeros((len(prompts), rows, prompts[0].audio_input_ids.shape[1]), dtype=torch.long)
    audio_mask = torch.zeros((len(prompts), rows), dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        input_ids[b, length - len(prompt) :] = torch.from_numpy(prompt.input_ids)
        attention[b, length - len(prompt) :] = 1
        audio[b, : len(prompt.audio_input_ids)] = torch.from_numpy(prompt.audio_input_ids)
        audio_mask[b, : len(prompt.audio_input_ids)] = True
    batch = {"input_ids": input_ids, "attention_mask": attention, **feature_tensors(prompts)}
    return batch | ({"audio_input_ids": audio, "audio_input_ids_mask": audio_mask} if rows else {})


def feature_tensors(examples: Sequence[Example]) -> dict[str, Tensor]:
    """`whisper_features` of a batch; empty if no example has any."""
    features = [example.whisper_features for example in examples if example.whisper_features is not None]
    return {"whisper_features": torch.from_numpy(np.concatenate(features))} if features else {}
