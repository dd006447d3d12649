"""Which layers keep nothing but their input for the backward pass, and are computed again there."""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_first(layers: Iterable[nn.Module], count: int) -> None:
    """The first `count` layers are computed again in the backward pass, the others keep what they need; in place.

    The first ones, because the last layer's backward pass comes first: by the time that a layer is computed again, the
    layers that keep everything are done and have freed it. No number changes by it.
    """
    for index, part in enumerate(layers):
        layer: Any = part
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
