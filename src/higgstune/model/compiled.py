"""Layers compiled for a GPU, once their gradients were seen to be those of the plain ones.

A training step is some thousand small kernels, which take a CPU longer to launch than a GPU to compute; compiled, it is
a fraction of them. A compiler that fails must not end a run, and one that makes gradients of zero must not train one:
that of torch 2.11 does, of functions that change a tensor in place.
"""

import logging
import os
import shutil
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from higgstune.batch.packed import Packed
from higgstune.model.conditioning import base_of
from higgstune.model.fused import is_plain
from higgstune.model.loss import LossWeights, combine, label_counts

_LOG = logging.getLogger(__name__)
Compile = bool | Literal["auto"]
_WORTH = 1000  # steps: on an H100 compiling took a minute and more, and saved 0.1 s of each
_TOLERANCE = 0.2  # relative, of all gradients together; rounding to bfloat16 gave 0.01 with two layers, 0.07 with 28


def is_worth_it(wanted: Compile, steps: int) -> bool:
    """Whether layers are to be compiled for so many optimizer steps."""
    return steps >= _WORTH if wanted == "auto" else wanted


def compile_layers(model: nn.Module, batch: Packed) -> float | None:
    """Layers run compiled from now on when they are trained; a warning where that fails.

    `model` is a peft model with the training forward, `batch` three or more examples on its device (of two, what they
    share is one row, which a compiler takes for a constant). Returns how far gradients of the compiled layers are from
    those of the plain ones, relative; None where layers stay as they are: on a CPU, in float32 (whose attention goes
    example by example), and with what others compute: peft dropout and DoRA, bitsandbytes 4 bits.
    """
    base: Any = base_of(model)
    base.compiles_layers = False
    if not _possible(base):
        return None
    problem = None if has_compiler() else "it takes Triton, and a C compiler"
    if problem is None:
        torch.compiler.reset()  # of an earlier stage; only so many variants are kept
        expected = _gradients(model, batch)
        base.compiles_layers = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of the compiler about what it does itself
                difference = _difference(_gradients(model, batch), expected)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever makes a compiler fail, the plain layers compute)
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            if difference <= _TOLERANCE:
                return difference
            problem = f"their gradients would be off by {difference:.0%}"
    base.compiles_layers = False
    _LOG.warning("layers are not compiled, and training is slower for it: %s", problem)
    return None


def _possible(base: Any) -> bool:
    return base.device.type == "cuda" and base.dtype == torch.bfloat16 and is_plain(base.model.layers)


def has_compiler() -> bool:
    """Whether there is Triton, and a C compiler where Triton looks for one."""
    return has_triton() and ("CC" in os.environ or any(map(shutil.which, ("clang", "gcc", "cc"))))


def packed_loss(model: nn.Module, batch: Packed) -> Tensor:
    """The loss of a pack, in the dtype that training computes it in."""
    base = base_of(model)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        sums = model(**batch)
    return combine(sums, label_counts(batch, eos_id=base.config.audio_stream_eos_id), LossWeights())


def _gradients(model: nn.Module, batch: Packed) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [part.float() for part in torch.autograd.grad(packed_loss(model, batch), trained, materialize_grads=True)]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    distance = torch.stack([(one - other).norm() for one, other in zip(found, expected, strict=True)]).norm()
    return float(distance / torch.stack([part.norm() for part in expected]).norm())
