"""Heap trimming: returns the memory that glibc holds between live blocks to the system while a CPU trains.

The layers of peft and bitsandbytes (LoRA dropout, DoRA, 4 bits) allocate short-lived blocks of many sizes. What is kept
for the backward pass lies in between and leaves holes that the next layer's blocks do not fit: a tenth to a third of
the process. Returned pages must be allocated anew when a hole fills up, so not every layer trims, and plain layers
never do: they leave few holes, and trimming would cost a tenth of the time.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from higgstune.kernels.fused import is_plain

_LAYERS = 8  # between two calls: in 28 layers they cost 8 % of a step; 4 saved another 2 to 6 % of memory, for 20 %
_LAYERS_RECOMPUTED = 4  # between two calls in recomputed layers, where memory counts and a step takes longer anyway
MIN_BYTES_TO_TRIM = 1_000_000  # bytes of hidden states; smaller ones leave small holes


def leaves_holes(hidden: Tensor, layers: nn.ModuleList) -> bool:
    """Whether a forward pass of `layers` that starts from these hidden states should trim the heap."""
    keeps_activations = hidden.device.type == "cpu" and torch.is_grad_enabled()
    return keeps_activations and hidden.nbytes >= MIN_BYTES_TO_TRIM and not is_plain(layers)


def trim_heap(layers: nn.ModuleList, done: int) -> None:
    """Trim after every few layers and after the last one, before the heads allocate most; `done` layers have run."""
    trim = _malloc_trim()
    layer: Any = layers[done - 1]
    every = _LAYERS_RECOMPUTED if layer.gradient_checkpointing else _LAYERS
    if trim is not None and (done % every == 0 or done == len(layers)):
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The function of glibc; None with another C library."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = [ctypes.c_size_t]
    return found


def checkpoint_first(layers: Iterable[nn.Module], count: int) -> None:
    """Recompute the first `count` layers in the backward pass (activation checkpointing); the others keep what they
    need. In place.

    The first ones, because the backward pass starts at the last layer: when a layer is recomputed, the layers that keep
    everything are done and have freed it. No number changes.
    """
    for index, part in enumerate(layers):
        layer: Any = part
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
