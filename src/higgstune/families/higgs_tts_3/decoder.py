"""Step-by-step generation: the prompt once, then one row of codes at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from higgstune.families.base import Example, base_of
from higgstune.families.higgs_tts_3.checkpoint import spec_of
from higgstune.families.padded import left_padded


class Decoder:
    """The KV cache of a batch of left-padded prompts, extended row by row; `<|audio|>` predicts the first row."""

    def __init__(self, model: Any, prompts: Sequence[Example]) -> None:
        self.model = model
        config = base_of(model).config
        self.device = next(model.parameters()).device
        self.cache = DynamicCache(config=config)
        batch = left_padded(prompts, pad_id=spec_of(config).pad_id)
        self.attention_mask = batch.pop("attention_mask").to(self.device)
        self.lengths = self.attention_mask.sum(-1, keepdim=True)  # [B, 1] tokens so far, without padding
        self.logits: Tensor | None = self._logits((self.attention_mask.cumsum(-1) - 1).clamp(min=0), **batch)

    def step(self, rows: Tensor) -> Tensor:
        """Feed one row [B, K]; the logits [B, K, V] of the next one."""
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.lengths)], dim=-1)
        logits = self._logits(self.lengths, audio_input_ids=rows[:, None])
        self.lengths = self.lengths + 1
        return logits

    def _logits(self, positions: Tensor, **batch: Tensor) -> Tensor:
        inputs = {key: value.to(self.device) for key, value in batch.items()}
        logits: Tensor = self.model(
            **inputs, attention_mask=self.attention_mask, position_ids=positions, cache=self.cache
        )
        return logits
