"""Layers compiled for a GPU, once their gradients were seen to be those of the plain ones.

A training step is some thousand small kernels, which take a CPU longer to launch than a GPU to compute; compiled, it is
a fraction of them. A compiler that fails must not end a run, and one that makes gradients of zero must not train one:
that of torch 2.11 does, of functions that change a tensor in place in their forward pass.
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


def packed_loss(model: nn.Module, batch: Packed) -> Tensor:
    """The loss of a pack through a peft model with the training forward, in the dtype that training computes it in."""
    base = base_of(model)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        sums = model(**batch)
    return combine(sums, label_counts(batch, eos_id=family_of(base).spec(base.config).stream_eos), LossWeights())


_LOG = logging.getLogger(__name__)
MIN_STEPS_TO_COMPILE = 1000  # steps: on an H100 compiling took a minute and more, and saved 0.1 s of each
_TOLERANCE = 0.2  # relative, of all gradients of a kind; rounding to bfloat16 gave 0.01 with two layers, 0.07 with 28
_KINDS = ("lora_A", "lora_B", "")  # by a part of the name, the first that fits
_MOVED = 0.02  # standard deviation of what is added to B, at whose start of zero no gradient reaches A


def is_worth_it(wanted: Compile, steps: int) -> bool:
    """Whether layers are to be compiled for so many optimizer steps."""
    return steps >= MIN_STEPS_TO_COMPILE if wanted == "auto" else wanted


def compile_layers(model: nn.Module, batch: Packed) -> float | None:
    """Layers run compiled from now on when they are trained; a warning where that fails.

    `model` is a peft model with the training forward, `batch` three or more examples on its device (of two, what they
    share is one row, which a compiler takes for a constant). Returns how far gradients of the compiled layers are from
    those of the plain ones, relative; None where layers stay as they are: on a CPU, in float32 (whose attention goes
    example by example), and with what others compute: peft dropout and DoRA, bitsandbytes 4 bits.
    """
    base: Any = base_of(model)
    base.compiler_stance = None
    if not _possible(base):
        return None
    problem = None if _has_compiler() else "it takes Triton, and a C compiler"
    if problem is None:
        torch.compiler.reset()  # of an earlier stage; only so many variants are kept
        try:
            difference = _compare(model, base, batch)
        except Exception as error:  # noqa: BLE001 (whatever makes a compiler fail, the plain layers compute)
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            if difference <= _TOLERANCE:
                # Packs of another kind (of one clip) stay with the plain layers: what was not checked is not trained.
                base.compiler_stance = "eager_on_recompile"
                return difference
            problem = f"their gradients would be off by {difference:.0%}"
    base.compiler_stance = None
    _LOG.warning("layers are not compiled, and training is slower for it: %s", problem)
    return None


def _compare(model: nn.Module, base: Any, batch: Packed) -> float:
    with _moved(model):
        expected = _gradients(model, batch)
        base.compiler_stance = "default"
        import torch._functorch.config as functorch_config

        # What is cheap to compute again is not kept, also where a product needs it: see `fused`.
        with warnings.catch_warnings(), functorch_config.patch(ban_recompute_materialized_backward=False):
            warnings.simplefilter("ignore")  # those of the compiler about what it does itself
            return _difference(_gradients(model, batch), expected)


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """With every B away from zero; no random number of training is drawn for it."""
    weights = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    before = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(_MOVED * torch.randn(weight.shape, generator=generator).to(weight))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def _possible(base: Any) -> bool:
    return base.device.type == "cuda" and base.dtype == torch.bfloat16 and is_plain(family_of(base).layers(base))


def _has_compiler() -> bool:
    """Whether there is Triton, and a C compiler where Triton looks for one."""
    from torch.utils._triton import has_triton

    return has_triton() and ("CC" in os.environ or any(map(shutil.which, ("clang", "gcc", "cc"))))


def _gradients(model: nn.Module, batch: Packed) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(packed_loss(model, batch), list(trained.values()), materialize_grads=True)
    return {name: part.float() for name, part in zip(trained, found, strict=True)}


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the kind of gradients that is farthest off."""
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
