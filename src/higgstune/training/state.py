"""What a training run needs to go on exactly: trained weights, optimizer, random numbers.

Tensors are keyed by the names under which peft saves an adapter's, and are whole, so that what one process saved goes
on in four, sharded or not.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from higgstune.errors import CheckpointError


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the name that it is saved under."""
    own = dict(model.named_parameters())
    if not isinstance(model, PeftModel):
        return {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    return dict(get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False))


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU; all processes together gather one that is sharded."""
    gathered = value.full_tensor() if isinstance(value, DTensor) else value
    return gathered.detach().cpu().contiguous()


def like(value: Tensor, place: Tensor) -> Tensor:
    """A whole tensor on the device of another, and sharded as it is."""
    moved = value.to(place.device)
    if isinstance(place, DTensor):
        return distribute_tensor(moved, place.device_mesh, place.placements, src_data_rank=None)
    return moved


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole trained tensors by their own names, as peft's `save_pretrained` takes them; all processes together."""
    return {name: whole(value) for name, value in model.named_parameters() if value.requires_grad}


def set_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Fill trained parameters. Raises CheckpointError unless names and shapes are the same."""
    odd = sorted(parameters.keys() ^ weights.keys())
    odd += [name for name in parameters.keys() & weights.keys() if parameters[name].shape != weights[name].shape]
    if odd:
        raise CheckpointError(f"its weights are not those of this model: {len(odd)} differ, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(weights[name], parameter))


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Moments and step counts, as `NAME moment`; all processes together."""
    return {
        f"{name} {key}": whole(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def set_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave. Raises CheckpointError unless it is of what this model trains."""
    odd = sorted(parameters.keys() ^ {key.rpartition(" ")[0] for key in tensors})
    if odd:
        raise CheckpointError(f"its optimizer is not that of this model: {len(odd)} names differ, such as {odd[0]}")
    for key, value in tensors.items():
        name, _, moment = key.rpartition(" ")
        parameter = parameters[name]
        place: Tensor = parameter if value.ndim else torch.empty((), device=parameter.device)  # counts are not sharded
        optimizer.state[parameter][moment] = like(value, place)


def random_states() -> dict[str, Tensor]:
    """States of torch's generators [processes, bytes], from which dropout draws; all processes together."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: _of_all(state) for name, state in states.items()}


def set_random_states(tensors: Mapping[str, Tensor], *, rank: int, processes: int, seed: int) -> None:
    """Go on drawing where each process was; where they were another number, each begins with a seed of its own."""
    if len(tensors["cpu"]) != processes:
        torch.manual_seed(seed + rank)
        return
    torch.set_rng_state(tensors["cpu"][rank].clone())  # torch reads a view from the start of its storage
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"][rank].clone())


def _of_all(value: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return value[None]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return torch.stack(gathered)


def under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a part `name` of a file."""
    return {f"{name}/{key}": value for key, value in tensors.items()}


def part(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part `name` of a file's tensors."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
