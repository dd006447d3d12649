"""The speed of training, from timing one layer of the recipe's shape with random weights on the available device.

The layer is not compiled, which would take longer than the rest of planning; on a GPU, long stages are faster.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from higgstune.batch.collate import count_tokens, pack, tensors_to
from higgstune.families.base import Example
from higgstune.kernels.memory import checkpoint_first
from higgstune.kernels.quantize import quantize_layers
from higgstune.model.adapters import add_lora
from higgstune.model.compiled import packed_loss
from higgstune.peft_compat import PeftModel
from higgstune.planning.dry_run import StepSpec

CPU_TOKENS = 512  # timed on a CPU
_REPEATS = 2  # the shortest counts, as the first one of all is a cold start
_MAX_CPU_BYTES = 4_000_000_000  # of the timed model's weights


@dataclass(frozen=True)
class Speed:
    """Measured seconds per token in a layer and outside of layers, and of the optimizer per layer."""

    layer: float
    layer_recomputed: float  # with activation checkpointing
    outside: float  # embedding and heads
    optimizer: float

    def step(self, tokens: float, layers: int, checkpointed: int, passes: int) -> float:
        """Seconds of an optimizer step with `tokens` tokens in each of its passes."""
        kept = layers - checkpointed
        per_token = self.outside + kept * self.layer + checkpointed * self.layer_recomputed
        return passes * tokens * per_token + layers * self.optimizer


def measure(
    spec: StepSpec, examples: list[Example], device: torch.device, *, layers: int, checkpointed: int
) -> Speed | None:
    """Time the real training step of models with one layer and with none; None for models that are too large to build.

    `examples` are those of a pack; on a CPU only the first ones are timed. The first `checkpointed` of the stage's
    `layers` are recomputed: a layer is timed with recomputing, without it or both, as the stage needs it.
    """
    if device.type == "cpu" and _bytes(spec) > _MAX_CPU_BYTES:
        return None
    batch = tensors_to(pack(_first_examples(examples) if device.type == "cpu" else examples), device)
    tokens = count_tokens(batch)
    model = _one_layer(spec, device)
    decoder = spec.family.layers(model)

    def train() -> float:
        return _seconds(lambda: packed_loss(model, batch).backward(), device)

    kept = train() if checkpointed < layers else 0.0
    checkpoint_first(decoder, 1)
    recomputed = train() if checkpointed else 0.0
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    update = _seconds(torch.optim.AdamW(trained, fused=True).step, device)
    del decoder[0]
    spec.family.final_norm(model).requires_grad_(True)  # so that the heads have a backward pass
    outside = train()
    one = max(kept - outside, 0.0)
    return Speed(one / tokens, max(recomputed - outside, one) / tokens, outside / tokens, update)


def _one_layer(spec: StepSpec, device: torch.device) -> PeftModel:
    family = spec.family
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with torch.device(device):
            model = family.build(spec.config, layers=1, dtype=spec.dtype)
        for parameter in model.parameters():
            parameter.data.uniform_(-0.02, 0.02)
        family.extensions.add(model, spec.builtin_extensions)
        if spec.quantize is not None:
            quantize_layers(model, family.four_bits, device)
        family.extensions.add(model, spec.trained)
        family.pack_forward(model)
        return add_lora(model, spec.lora, spec.kind, spec.trained, spec.attention).train()


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the shortest of some repeats."""
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


def _first_examples(examples: list[Example]) -> list[Example]:
    """The first examples, with at least `CPU_TOKENS` tokens if there are as many."""
    chosen: list[Example] = []
    for example in examples:
        if sum(map(len, chosen)) < CPU_TOKENS:
            chosen.append(example)
    return chosen


def _bytes(spec: StepSpec) -> int:
    with torch.device("meta"):
        model = spec.family.build(spec.config, layers=1, dtype=spec.dtype)
    return sum(parameter.nbytes for parameter in model.parameters())
