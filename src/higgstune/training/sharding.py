"""FSDP2: each process keeps a share of every weight, gradient and moment, and gathers a layer while it computes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard(model: PeftModel, device: torch.device) -> None:
    """Spread a model that is on the CPU over all processes, on `device` of each; in place, layer by layer.

    No device ever holds the whole model.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    base: Any = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    base._is_fsdp_managed_module = True  # what transformers knows such a model by


def is_sharded(model: Any) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def sharded_parameters(model: nn.Module) -> int:
    """How many of a model's parameters are spread over the processes."""
    return sum(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def embedding_and_heads(model: Any) -> Iterator[None]:
    """All processes: what stands outside of the layers is gathered inside of it, for whoever calls parts of a model."""
    if not is_sharded(model):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
