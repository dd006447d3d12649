"""Memory that glibc keeps between pieces that are alive, given back to the system while a CPU trains.

peft's and bitsandbytes' own layers (LoRA dropout, DoRA, 4 bits) make pieces of many sizes for a moment, and what is
kept for the backward pass in between leaves holes that the next layer's pieces do not fit: a quarter of the process.
Pages that are given back have to be made anew when a hole is filled again, so it is not done after every layer, nor
where layers are plain: there are few holes, and it would cost a tenth of the time.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from higgstune.model.fused import is_plain

_LAYERS = 4  # between two calls; after each layer a process took as much memory, and more time
_WORTH = 1_000_000  # bytes of hidden states: those of fewer leave small holes


def leaves_holes(hidden: Tensor, layers: nn.ModuleList) -> bool:
    """Whether to give back what a forward pass of `layers`, which begins with these hidden states, leaves unused."""
    keeps_activations = hidden.device.type == "cpu" and torch.is_grad_enabled()
    return keeps_activations and hidden.nbytes >= _WORTH and not is_plain(layers)


def give_back_holes(layer: int, layers: int) -> None:
    """After layer number `layer` (from 1): in each fourth one, and in the last, before the heads need most."""
    trim = _malloc_trim()
    if trim is not None and (layer % _LAYERS == 0 or layer == layers):
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other libraries have none."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = [ctypes.c_size_t]
    return found
