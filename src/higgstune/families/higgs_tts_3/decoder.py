"""Step-by-step generation: the prompt once, then one row of codes at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from higgstune.families.base import Example, base_of
from higgstune.families.higgs_tts_3.checkpoint import spec_of
from higgstune.families.higgs_tts_3.model import CACHE
from higgstune.families.padded import left_padded


class Decoder:
    """The KV cache of a batch of left-padded prompts, extended row by row; `<|audio|>` predicts the first row."""

    def __init__(self, model: Any, prompts: Sequence[Example]) -> None:
        self.model = base_of(model)
        self.device = next(model.parameters()).device
        self.cache = DynamicCache(config=self.model.config)
        batch = left_padded(prompts, pad_id=spec_of(self.model.config).pad_id)
        self.attention_mask = batch["attention_mask"].to(self.device)
        self.lengths = self.attention_mask.sum(-1, keepdim=True)  # [B, 1] tokens so far, without padding
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        embedded = embed_padded(self.model, batch, self.device)
        self.logits: Tensor | None = self._logits(embedded, positions)

    def step(self, rows: Tensor) -> Tensor:
        """Feed one row [B, K]; the logits [B, K, V] of the next one."""
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.lengths)], dim=-1)
        logits = self._logits(self.model.embed_rows(rows[:, None].to(self.device)), self.lengths)
        self.lengths = self.lengths + 1
        return logits

    def _logits(self, embedded: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.model(
            inputs_embeds=embedded,
            attention_mask=self.attention_mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE: self.cache},
        ).last_hidden_state
        config = self.model.config
        return self.model.audio_logits(hidden[:, -1]).unflatten(-1, (config.num_codebooks, config.codebook_size))


def embed_padded(model: Any, batch: Any, device: torch.device) -> Tensor:
    """A padded batch (`left_padded`, or of `PaddedCollator`) -> its embeddings [B, S, D]."""
    input_ids = batch["input_ids"].to(device)
    rows = batch["audio_input_ids"][batch["audio_input_ids_mask"]] if "audio_input_ids" in batch else None
    if rows is None:
        rows = torch.zeros((0, model.config.num_codebooks), dtype=torch.long)
    # Ids below 0 are slots: no token has one.
    return model.embed(input_ids, input_ids < 0, rows.to(device))
