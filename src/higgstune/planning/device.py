"""The device that is planned for, and its memory: what is free, or what a user says that it has."""

import math
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from higgstune.errors import ConfigError
from higgstune.model.load import choose_device
from higgstune.training.recipe import Recipe

DeviceKind = Literal["cpu", "cuda"]
MARGIN = 0.05  # of the memory: a plan that `auto` makes leaves it free


@dataclass(frozen=True)
class Machine:
    """The device that is planned for."""

    kind: DeviceKind
    memory: int | None  # bytes that training may take; None: the device is not here, and nobody said
    at_hand: bool

    def usable(self) -> int | None:
        """Bytes that a plan may fill."""
        return None if self.memory is None else int((1 - MARGIN) * self.memory)


def machine_for(recipe: Recipe, *, memory: int | None = None, device: str | None = None) -> Machine:
    """The device of the recipe, or another kind that is planned for; its memory is the given one, or what is free.

    Raises ConfigError for a device that cannot be.
    """
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {device}: a plan is for cpu or cuda")
    here = device is None or device == "cpu" or torch.cuda.is_available()
    kind = choose_device(device or recipe.model.device).type if here else "cuda"
    assert kind in ("cpu", "cuda")
    if memory is None and here:
        memory = free_memory(torch.device(kind)) + (psutil.Process().memory_info().rss if kind == "cpu" else 0)
    return Machine("cuda" if kind == "cuda" else "cpu", memory, here)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, with what this process holds and does not use, or in RAM."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def parse_memory(text: str) -> int:
    """`16GB`, `15.5 GiB`, `800MB`. Raises ConfigError, also without a unit: 16 is meant as gigabytes by some."""
    units = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbGgIiMmTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * units[unit]
    except (KeyError, ValueError):
        raise ConfigError(f"--memory {text}: write a number with MB, GB, MiB or GiB, such as 16GB") from None
    if not 0 < size < math.inf:
        raise ConfigError(f"--memory {text}: it must be more than nothing")
    return int(size)
