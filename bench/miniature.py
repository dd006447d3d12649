"""A small model of the real proportions that trains on a CPU, for benches of the code around the training step."""

from typing import Any

import torch
from transformers import HiggsAudioV2Config
from workload import Shape, random_model

from higgstune.batch.collate import Packed
from higgstune.config.recipe import Lora
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.kernels.loss import LossWeights, combine, label_counts
from higgstune.model.adapters import add_lora


def small_config(*, codes: int = 1024, scale: int = 8, layers: int = 4) -> HiggsAudioV2Config:
    """The released model's proportions, `scale` times narrower, with codebooks of so many codes."""
    config = Shape(scale=scale, layers=layers).config()
    config.codebook_size = codes + 2
    config.audio_stream_bos_id, config.audio_stream_eos_id = codes, codes + 1
    return config


class Training:
    """A model with LoRA on both pathways, and its optimizer steps: one for each packed batch."""

    def __init__(self, config: HiggsAudioV2Config) -> None:
        self.eos_id: int = config.audio_stream_eos_id
        model = random_model(config, dtype=torch.float32, device=torch.device("cpu"))
        self.model: Any = add_lora(model, Lora(), "full").train()
        with_training_forward(model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self, batch: Packed) -> None:
        """Forward, backward, update."""
        loss = combine(self.model(**batch), label_counts(batch, eos_id=self.eos_id), LossWeights())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
