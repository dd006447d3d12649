"""Step-by-step generation with a KV cache: prompts in, codes out, a batch of unequal lengths at a time.

The prompt goes through the model once; then each row of codes is fed alone, without token ids, so that it takes the
audio pathway, as in training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from higgstune.batch.collate import feature_tensors
from higgstune.families.base import Example
from higgstune.families.higgs_v2.delay import codes_from_frames
from higgstune.families.higgs_v2.extensions import check_features
from higgstune.families.higgs_v2.sampler import RowSampler
from higgstune.families.sampling import Sampling


@dataclass(frozen=True)
class Generated:
    """One generated clip."""

    codes: NDArray[np.int64]  # [frames, K]
    hit_cap: bool  # the frame cap ended it, not the model


def generate(
    model: Any,
    prompts: Sequence[Example],
    *,
    max_frames: Sequence[int],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    on_row: Callable[[], None] | None = None,
    sync_logits: Callable[[Tensor], Tensor] | None = None,
) -> list[Generated]:
    """Speak a batch of prompts (see `Prompter.prompt`). A clip's result depends on its own prompt and seed alone,
    up to the rounding of batched arithmetic. `model` is a native model or a peft model around one, in eval mode.
    Where several processes compute one model together, `sync_logits` gives all of them the logits of one. Otherwise a
    rounding difference would make them draw different codes, and one would end while the others wait for it.
    """
    config = model.config
    samplers = [
        RowSampler(
            sampling or Sampling(),
            num_codebooks=config.num_codebooks,
            bos_id=config.audio_stream_bos_id,
            eos_id=config.audio_stream_eos_id,
            max_frames=cap,
            seed=seed,
        )
        for cap, seed in zip(max_frames, seeds, strict=True)
    ]
    with torch.inference_mode():
        decoder = Decoder(model, prompts)
        rows = [sampler.rows[0] for sampler in samplers]
        while not all(sampler.finished for sampler in samplers):
            logits = decoder.step(torch.tensor(rows)).float().cpu()
            logits = logits if sync_logits is None else sync_logits(logits)
            rows = [rows[b] if sampler.finished else sampler.step(logits[b]) for b, sampler in enumerate(samplers)]
            if on_row is not None:
                on_row()
    eos = config.audio_stream_eos_id
    return [Generated(codes_from_frames(s.rows, eos_id=eos), s.hit_cap) for s in samplers]


class Decoder:
    """The model's side of generation: the KV cache of a batch of left-padded prompts, fed row by row."""

    def __init__(self, model: Any, prompts: Sequence[Example]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.cache = DynamicCache(config=model.config)
        batch = left_padded(prompts, pad_id=model.config.pad_token_id or 0)
        check_features(model, batch)
        self.attention_mask = batch["attention_mask"].to(self.device)
        self.lengths = self.attention_mask.sum(-1, keepdim=True)  # [B, 1] positions so far, padding apart
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


def left_padded(prompts: Sequence[Example], *, pad_id: int) -> dict[str, Tensor]:
    """Prompts -> input_ids and attention_mask [B, S], padded on the left, and what they hear, if there is any:
    rows of audio [B, A, K], Whisper features [W, d_model].
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
