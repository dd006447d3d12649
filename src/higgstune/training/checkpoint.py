"""The folder of a checkpoint, which is complete or does not exist: written under another name, sealed, then renamed.

A checkpoint holds safetensors and JSON alone, so that reading a stranger's runs no code.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from higgstune.checkpoint_files import read_json, sha256_of
from higgstune.errors import CheckpointError
from higgstune.files import sync_files, sync_folder, writing
from higgstune.peft_compat import PeftModel, get_peft_model_state_dict

SEAL = "checkpoint.json"
TRAINING_STATE = "training.safetensors"  # optimizer, random numbers, what was not logged yet
_PREFIX = "checkpoint-"
_INCOMPLETE = "incomplete"  # where a checkpoint is written before it gets its name
_LOG = logging.getLogger(__name__)


@contextmanager
def new_checkpoint(parent: Path, step: int, notes: dict[str, Any], *, keep: int | None = None) -> Iterator[Path]:
    """A folder to write a checkpoint into, which is then sealed with `notes` and named `parent/checkpoint-STEP`.

    Keeps the newest `keep` checkpoints, or all. Raises WorkError where the disk refuses; the checkpoints before it are
    then unchanged.
    """
    staged, final = parent / _INCOMPLETE, parent / f"{_PREFIX}{step}"
    try:
        with writing(final, "the checkpoints before it are unchanged", again="resume with --resume"):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            yield staged
            _seal(staged, notes)
            if not _is_whole(final):  # a run that resumed from an earlier one writes the same bytes
                _remove(final)
                os.replace(staged, final)
                sync_folder(parent)
            for old in _by_step(parent)[:-keep] if keep else ():
                _remove(old)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def newest_checkpoint(parent: Path) -> Path | None:
    """The newest complete checkpoint. Warns of damaged ones, and renames them to keep them for inspection."""
    found = _by_step(parent)
    for folder in reversed(found):
        try:
            read_checkpoint(folder)
        except CheckpointError as error:
            kept = folder.with_name(f"damaged-{folder.name}")
            _LOG.warning("%s: this checkpoint is skipped, and kept as %s", error, kept.name)
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(folder, kept)
        else:
            return folder
    if found:
        _LOG.warning("no checkpoint in %s is complete: the stage starts over", parent)
    return None


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The notes that a checkpoint was sealed with. Raises CheckpointError unless every file is as it was written."""
    seal = read_json(folder / SEAL, "the checkpoint is incomplete without it")
    files = seal.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / SEAL} is damaged: it lists no files")
    for name, sha256 in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or sha256_of(path) != sha256:
            raise CheckpointError(f"{path} is missing, cut off or changed (checksum)")
    return seal


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read, but for the model's weights."""

    folder: Path
    notes: dict[str, Any]  # see `HiggsAudioTrainer._save_checkpoint`
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Raises CheckpointError as `read_checkpoint`."""
        return cls(folder, read_checkpoint(folder), load_file(folder / TRAINING_STATE))

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors that were saved as `under(name, ...)`."""
        return part(name, self.tensors)


@contextmanager
def resuming(checkpoint: str | Path) -> Iterator[Path]:
    """The folder of a checkpoint. Raises CheckpointError, with its name, for content that does not fit."""
    try:
        yield Path(checkpoint)
    except (CheckpointError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot resume from {checkpoint}: {error}") from error


def save_weights(model: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Save an adapter alone, as peft does, or else a whole model; `weights`: see `trained_state`."""
    if isinstance(model, PeftModel):
        # "auto" would query the hub for the base's vocabulary, which no adapter here changes.
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder), state_dict=weights)


def _is_whole(folder: Path) -> bool:
    try:
        read_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def _seal(folder: Path, notes: dict[str, Any]) -> None:
    sync_files(folder)
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    with open(folder / SEAL, "w", encoding="utf-8") as file:
        json.dump(notes | {"files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _by_step(parent: Path) -> list[Path]:
    """By their names: a clock that was set back changes nothing."""
    found = [path for path in parent.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _remove(folder: Path) -> None:
    """The seal first, so that what a crash leaves is not taken for a checkpoint."""
    (folder / SEAL).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, by the names that they are saved under."""
    own = dict(model.named_parameters())
    if not isinstance(model, PeftModel):
        return {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    return dict(get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False))


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU; all processes gather a sharded one together."""
    gathered = value.full_tensor() if isinstance(value, DTensor) else value
    return gathered.detach().cpu().contiguous()


def like(value: Tensor, place: Tensor) -> Tensor:
    """A whole tensor on the device of `place`, and sharded as `place` is."""
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
    """Restore what `optimizer_tensors` gave. Raises CheckpointError unless it belongs to these parameters."""
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
    """Restore each process's generators; with another number of processes, seed each one by its rank instead."""
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
