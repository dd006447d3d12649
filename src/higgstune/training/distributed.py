"""The processes of a run: one, or those that torchrun or accelerate started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from higgstune.errors import ConfigError
from higgstune.families import family_of
from higgstune.peft_compat import PeftModel

Value = TypeVar("Value")
# Collectives time out after minutes; preparing data, or verifying a large model, may take longer.
_TIMEOUT = timedelta(days=9)
_REFUSED = {  # accelerate's own sharding is unknown to saving, resuming and verifying here
    "ACCELERATE_USE_FSDP": "set parallel: fsdp in the recipe, and leave accelerate's FSDP off",
    "ACCELERATE_USE_DEEPSPEED": "it is not supported; set parallel: fsdp in the recipe for a base that does not fit",
    "ACCELERATE_USE_MEGATRON_LM": "it is not supported; set parallel: fsdp in the recipe for a base that does not fit",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "it is not supported; processes share the data and, with fsdp, the weights",
}


class Processes:
    """This process among those of the run, and what they exchange outside of training steps."""

    def __init__(self, *, cpu: bool) -> None:
        """Joins the others. Raises ConfigError for accelerate's FSDP and DeepSpeed."""
        for variable, advice in _REFUSED.items():
            if os.environ.get(variable, "").lower() in ("true", "1"):
                raise ConfigError(f"{variable} is set: {advice}")
        state = PartialState(cpu=cpu)
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self._group = dist.new_group(timeout=_TIMEOUT, backend="gloo") if state.use_distributed else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self._group is not None:
            dist.barrier(self._group)

    def broadcast(self, value: Value) -> Value:
        """The first process's value, in all of them."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Every process' value, in all of them."""
        if self._group is None:
            return [value]
        box: list[Value] = [value] * self.count
        dist.all_gather_object(box, value, group=self._group)
        return box

    def all_reduce_max(self, value: int) -> "PendingReduce":
        """The largest of all processes' values, without waiting for it; all processes together."""
        box = torch.tensor(value)
        if self._group is None:
            return PendingReduce(box, None)
        return PendingReduce(box, dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group, async_op=True))


class PendingReduce:
    """A number that is being reduced over the processes while they work."""

    def __init__(self, box: torch.Tensor, work: "dist.Work | None") -> None:
        self._box = box
        self._work = work

    def result(self) -> int:
        """The number, once all processes have given theirs."""
        if self._work is not None:
            self._work.wait()
        return int(self._box)


def shard(model: PeftModel, device: torch.device) -> None:
    """Spread a model that is on the CPU over all processes, on `device` of each; in place, layer by layer.

    No device ever holds the whole model.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    base: Any = model.get_base_model()
    for layer in family_of(model).layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    base._is_fsdp_managed_module = True  # by which transformers recognises such a model


def is_sharded(model: Any) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def sharded_parameters(model: nn.Module) -> int:
    """How many of a model's parameters are spread over the processes."""
    return sum(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def embedding_and_heads(model: Any) -> Iterator[None]:
    """Gather what is outside of the layers, to call parts of a sharded model; all processes together."""
    if not is_sharded(model):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
