"""Memory that glibc keeps between pieces that are alive, given back to the system while a CPU trains.

peft's and bitsandbytes' own layers (LoRA dropout, DoRA, 4 bits) make pieces of many sizes for a moment, and what is
kept for the backward pass in between leaves holes that the next layer's pieces do not fit: a tenth to a third of the
process. Pages that are given back have to be made anew when a hole is filled again, so it is not done after every
layer, nor where layers are plain: there are few holes, and it would cost a tenth of the time.
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

_LAYERS = 8  # between two calls: in 28 layers they cost 8 % of a step; with 4 a process took 2 to 6 % less, for 20 %
_LAYERS_RECOMPUTED = 4  # of those that are computed again, where memory counts and a step takes longer anyway
MIN_BYTES_TO_TRIM = 1_000_000  # bytes of hidden states: those of fewer leave small holes


def leaves_holes(hidden: Tensor, layers: nn.ModuleList) -> bool:
    """Whether to give back what a forward pass of `layers`, which begins with these hidden states, leaves unused."""
    keeps_activations = hidden.device.type == "cpu" and torch.is_grad_enabled()
    return keeps_activations and hidden.nbytes >= MIN_BYTES_TO_TRIM and not is_plain(layers)


def trim_heap(layers: nn.ModuleList, done: int) -> None:
    """After so many of the layers: after some, and after the last, before the heads need most."""
    trim = _malloc_trim()
    layer: Any = layers[done - 1]
    every = _LAYERS_RECOMPUTED if layer.gradient_checkpointing else _LAYERS
    if trim is not None and (done % every == 0 or done == len(layers)):
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other libraries have none."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = [ctypes.c_size_t]
    return found


def checkpoint_first(layers: Iterable[nn.Module], count: int) -> None:
    """The first `count` layers are computed again in the backward pass, the others keep what they need; in place.

    The first ones, because the last layer's backward pass comes first: by the time that a layer is computed again, the
    layers that keep everything are done and have freed it. No number changes by it.
    """
    for index, part in enumerate(layers):
        layer: Any = part
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
