"""How fast it will go: one layer of the recipe's shape, with random weights, timed on the device at hand.

It is not compiled, which would take longer than all the rest: on a GPU a long stage goes faster than planned.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from higgstune.batch.collate import count_tokens, pack, tensors_to
from higgstune.families.base import Example, Spec
from higgstune.kernels.memory import checkpoint_first
from higgstune.kernels.quantize import quantize_layers
from higgstune.model.adapters import add_lora
from higgstune.model.compiled import packed_loss
from higgstune.peft_compat import PeftModel
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

    `examples` are those of a pack; on a CPU a part of them is timed. Of `layers`, the first `again` are recomputed:
    a layer is timed only as it is trained.
    """
    if device.type == "cpu" and _bytes(spec.base, spec.dtype) > _LARGEST:
        return None
    batch = tensors_to(pack(_some(examples) if device.type == "cpu" else examples), device)
    tokens = count_tokens(batch)
    model = _one_layer(spec, device)
    decoder = spec.family.layers(model)

    def train() -> float:
        return _seconds(lambda: packed_loss(model, batch).backward(), device)

    kept = train() if again < layers else 0.0
    checkpoint_first(decoder, 1)
    recomputed = train() if again else 0.0
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
        family.extensions.add(model, spec.own)
        if spec.quantize is not None:
            quantize_layers(model, family.four_bits, device)
        family.extensions.add(model, spec.trained)
        family.pack_forward(model)
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


def _bytes(base: Spec, dtype: torch.dtype) -> int:
    embeddings = base.hidden_size * (2 * base.vocab_size + 2 * base.num_codebooks * base.classes)
    layer = 4 * base.hidden_size**2 + 6 * base.hidden_size * base.intermediate_size
    return dtype.itemsize * (embeddings + layer)
