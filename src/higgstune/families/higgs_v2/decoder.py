"""Step-by-step generation with the native class: the prompt once, then one row of codes at a time.

A row has no token ids, so that it takes the audio pathway, as in training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from higgstune.families.base import Example
from higgstune.families.higgs_v2.extensions import check_features
from higgstune.families.padded import left_padded


class Decoder:
    """The model's side of generation: the KV cache of a batch of left-padded prompts, extended row by row."""

    def __init__(self, model: Any, prompts: Sequence[Example]) -> None:
        self.model = model
        self.logits: Tensor | None = None  # the sampler gives the first row: all BOS
        self.device = next(model.parameters()).device
        self.cache = DynamicCache(config=model.config)
        batch = left_padded(prompts, pad_id=model.config.pad_token_id or 0)
        check_features(model, batch)
        self.attention_mask = batch["attention_mask"].to(self.device)
        self.lengths = self.attention_mask.sum(-1, keepdim=True)  # [B, 1] tokens so far, without padding
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        model(
            **{key: value.to(self.device) for key, value in batch.items() if key != "attention_mask"},
            attention_mask=self.attention_mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def step(self, rows: Tensor) -> Tensor:
        """Feed one row [B, K]; the logits [B, K, V] of the next one."""
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.lengths)], dim=-1)
        output = self.model(
            audio_input_ids=rows[:, None].to(self.device),
            attention_mask=self.attention_mask,
            position_ids=self.lengths,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.lengths = self.lengths + 1
        config = self.model.config
        return output.logits[:, -1].unflatten(-1, (config.num_codebooks, config.codebook_size))
