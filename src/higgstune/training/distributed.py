"""The processes of a run: one, or those that torchrun or accelerate started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from higgstune.errors import ConfigError
from higgstune.families import family_of

Value = TypeVar("Value")
# Collectives give up after minutes; preparing data, or the proof of a large model, may take longer.
_PATIENCE = timedelta(days=9)
_OTHER_WAYS = {  # accelerate's own sharding would go past what is saved, resumed and proven here
    "ACCELERATE_USE_FSDP": "set parallel: fsdp in the recipe, and leave accelerate's FSDP off",
    "ACCELERATE_USE_DEEPSPEED": "it is not supported; set parallel: fsdp in the recipe for a base that does not fit",
    "ACCELERATE_USE_MEGATRON_LM": "it is not supported; set parallel: fsdp in the recipe for a base that does not fit",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "it is not supported; processes share the data and, with fsdp, the weights",
}


class Processes:
    """This process among those of the run, and what they tell each other outside of training steps."""

    def __init__(self, *, cpu: bool) -> None:
        """Joins the others. Raises ConfigError for accelerate's FSDP and DeepSpeed."""
        for variable, advice in _OTHER_WAYS.items():
            if os.environ.get(variable, "").lower() in ("true", "1"):
                raise ConfigError(f"{variable} is set: {advice}")
        state = PartialState(cpu=cpu)
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self._group = dist.new_group(timeout=_PATIENCE, backend="gloo") if state.use_distributed else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self._group is not None:
            dist.barrier(self._group)

    def broadcast(self, value: Value) -> Value:
        """The first process' value, in all of them."""
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

    def largest(self, value: int) -> "PendingReduce":
        """Ask for the largest of all processes' values; all must ask."""
        box = torch.tensor(value)
        if self._group is None:
            return PendingReduce(box, None)
        return PendingReduce(box, dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group, async_op=True))


class PendingReduce:
    """A number that is being agreed on while work goes on."""

    def __init__(self, box: torch.Tensor, work: "dist.Work | None") -> None:
        self._box = box
        self._work = work

    def result(self) -> int:
        """The number, once all have named theirs."""
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
