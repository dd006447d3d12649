"""Compiles layers for a GPU, after comparing their gradients with those of the plain layers.

A training step is thousands of small kernels, which a CPU launches more slowly than a GPU computes them; compilation
leaves a fraction of them. A compiler that fails must not end a run, and one with wrong gradients must not train one:
that of torch 2.11 returns zeros for functions that change a tensor in place in their forward pass.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from higgstune.batch.collate import Packed
from higgstune.config.recipe import Compile
from higgstune.families import family_of
from higgstune.families.base import base_of
from higgstune.kernels.fused import is_plain
from higgstune.kernels.loss import LossWeights, combine, label_counts

_LOG = logging.getLogger(__name__)
MIN_STEPS_TO_COMPILE = 1000  # on an H100 compilation took more than a minute and saved 0.1 s per step
_TOLERANCE = 0.2  # relative, of all gradients of a kind; rounding to bfloat16 gave 0.01 with two layers, 0.07 with 28
_KINDS = ("lora_A", "lora_B", "")  # parts of a parameter's name; the first match counts
_SHIFT = 0.02  # standard deviation of what is added to B, since a B of zero passes no gradient to A


def is_worth_it(wanted: Compile, steps: int) -> bool:
    """Whether to compile layers for this number of optimizer steps."""
    return steps >= MIN_STEPS_TO_COMPILE if wanted == "auto" else wanted


def compile_layers(model: nn.Module, batch: Packed) -> float | None:
    """Make layers run compiled in training from now on; warn if that fails.

    `model` is a peft model with the training forward, `batch` a pack of at least three examples on its device (with
    two, a shape of the shared prefix is 1, which a compiler takes for a constant). Returns the relative difference of
    the compiled layers' gradients from those of the plain ones; None if layers stay uncompiled: on a CPU, in float32
    (where attention computes each example apart), and with layers of others: dropout and DoRA of peft, 4 bits of
    bitsandbytes.
    """
    base: Any = base_of(model)
    base.compiler_stance = None
    if not _possible(base):
        return None
    problem = None if _has_compiler() else "Triton or a C compiler is missing"
    if problem is None:
        torch.compiler.reset()  # drops an earlier stage's code: the number of kept variants is limited
        try:
            difference = _compare(model, base, batch)
        except Exception as error:  # noqa: BLE001 (whatever makes a compiler fail, the plain layers compute)
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            if difference <= _TOLERANCE:
                # Other kinds of packs (of one clip) use the plain layers: unchecked code trains nothing.
                base.compiler_stance = "eager_on_recompile"
                return difference
            problem = f"their gradients would be off by {difference:.0%}"
    base.compiler_stance = None
    _LOG.warning("layers are not compiled, so training is slower: %s", problem)
    return None


def _compare(model: nn.Module, base: Any, batch: Packed) -> float:
    with _shifted(model):
        expected = _gradients(model, batch)
        base.compiler_stance = "default"
        import torch._functorch.config as functorch_config

        # The backward pass recomputes cheap values rather than keep them, also for a product: see `fused`.
        with warnings.catch_warnings(), functorch_config.patch(ban_recompute_materialized_backward=False):
            warnings.simplefilter("ignore")  # the compiler's warnings about its own work
            return _difference(_gradients(model, batch), expected)


@contextmanager
def _shifted(model: nn.Module) -> Iterator[None]:
    """Shift every B away from zero; training's random numbers are not used."""
    weights = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    before = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(_SHIFT * torch.randn(weight.shape, generator=generator).to(weight))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def _possible(base: Any) -> bool:
    return base.device.type == "cuda" and base.dtype == torch.bfloat16 and is_plain(family_of(base).layers(base))


def _has_compiler() -> bool:
    """Whether Triton is installed, and a C compiler where Triton looks for one."""
    from torch.utils._triton import has_triton

    return has_triton() and ("CC" in os.environ or any(map(shutil.which, ("clang", "gcc", "cc"))))


def packed_loss(model: nn.Module, batch: Packed) -> Tensor:
    """The loss of a pack through a peft model with the training forward, in the dtype of training."""
    base = base_of(model)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        sums = model(**batch)
    return combine(sums, label_counts(batch, eos_id=family_of(base).spec(base.config).stream_eos), LossWeights())


def _gradients(model: nn.Module, batch: Packed) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(packed_loss(model, batch), list(trained.values()), materialize_grads=True)
    return {name: part.float() for name, part in zip(trained, found, strict=True)}


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of any kind of gradients."""
    of_kind: dict[str, list[str]] = {}
    for name in expected:
        of_kind.setdefault(next(kind for kind in _KINDS if kind in name), []).append(name)
    return max(
        float(
            torch.stack([(found[name] - expected[name]).norm() for name in names]).norm()
            / torch.stack([expected[name].norm() for name in names]).norm().clamp(min=torch.finfo(torch.float32).tiny)
        )
        for names in of_kind.values()
    )
