"""How fast it will go: one layer of the recipe's shape, with random weights, timed on the device at hand.

It is not compiled, which would take longer than all the rest: on a GPU a long stage goes faster than planned.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgstune.batch.collate import pack, positions, tensors_to
from higgstune.families.base import Example
from higgstune.families.higgs_v2.extensions import add_conditioning, base_of
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.kernels.memory import checkpoint_first
from higgstune.kernels.quantize import quantize_layers
from higgstune.model.adapters import add_lora
from higgstune.model.compiled import packed_loss
from higgstune.planning.dry_run import StepSpec

CPU_TOKENS = 512  # of the pack that is timed on a CPU
_REPEATS = 2  # the shorter one counts: the first of all is a cold start
_LARGEST = 4_000_000_000  # bytes of the weights that are made for it on a CPU


@dataclass(frozen=True)
class Speed:
    """Seconds, measured: of a position in a layer and outside of layers, and of the optimizer in a layer."""

    layer: float
    layer_again: float  # with its forward pass computed once more
    outside: float  # embedding and heads
    optimizer: float

    def step(self, tokens: float, layers: int, checkpointed: int, passes: int) -> float:
        """Seconds of an optimizer step with `tokens` positions in each of its passes."""
        kept = layers - checkpointed
        a_token = self.outside + kept * self.layer + checkpointed * self.layer_again
        return passes * tokens * a_token + layers * self.optimizer


def measure(spec: StepSpec, examples: list[Example], device: torch.device, *, layers: int, again: int) -> Speed | None:
    """Time the real training step of models with one layer and with none; None where making them takes too much.

    `examples` are those of a pack; on a CPU a part of them is timed. Of `layers`, the first `again` are computed again:
    a layer is timed only as it is trained.
    """
    if device.type == "cpu" and _bytes(spec.config, spec.dtype) > _LARGEST:
        return None
    batch = tensors_to(pack(_some(examples) if device.type == "cpu" else examples), device)
    tokens = positions(batch)
    model = _one_layer(spec, device)
    base = base_of(model)

    def train() -> float:
        return _seconds(lambda: packed_loss(model, batch).backward(), device)

    kept = train() if again < layers else 0.0
    checkpoint_first(base.model.layers, 1)
    recomputed = train() if again else 0.0
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    update = _seconds(torch.optim.AdamW(trained, fused=True).step, device)
    del base.model.layers[0]
    base.model.norm.weight.requires_grad_(True)  # so that the heads have a backward pass
    outside = train()
    one = max(kept - outside, 0.0)
    return Speed(one / tokens, max(recomputed - outside, one) / tokens, outside / tokens, update)


def _one_layer(spec: StepSpec, device: torch.device) -> PeftModel:
    config = type(spec.config).from_dict(spec.config.to_dict() | {"num_hidden_layers": 1})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with torch.device(device):
            model: Any = HiggsAudioV2ForConditionalGeneration._from_config(config, use_text_head=True, dtype=spec.dtype)
        for parameter in model.parameters():
            parameter.data.uniform_(-0.02, 0.02)
        add_conditioning(model, spec.own)
        if spec.quantize is not None:
            quantize_layers(model, device)
        add_conditioning(model, spec.trained)
        with_training_forward(model)
        return add_lora(model, spec.lora, spec.kind, spec.trained, spec.attention).train()


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some repeats."""
    taken = []
    for _ in range(_REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _some(examples: list[Example]) -> list[Example]:
    """As many as make a pack that is timed on a CPU."""
    chosen: list[Example] = []
    for example in examples:
        if sum(map(len, chosen)) < CPU_TOKENS:
            chosen.append(example)
    return chosen


def _bytes(config: HiggsAudioV2Config, dtype: torch.dtype) -> int:
    embeddings = config.hidden_size * (2 * config.vocab_size + 2 * config.num_codebooks * config.codebook_size)
    layer = 4 * config.hidden_size**2 + 6 * config.hidden_size * config.intermediate_size
    return dtype.itemsize * (embeddings + layer)
