"""The memory of a device: what is free, and what a user says that it has."""

import math

import psutil
import torch

from higgstune.errors import ConfigError


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, with what this process holds and does not use, or in RAM."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def parse_memory(text: str) -> int:
    """`16GB`, `15.5 GiB`, `800MB`, or bytes. Raises ConfigError."""
    units = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbGgIiMmTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = float(number) * units[unit]
    except (KeyError, ValueError):
        raise ConfigError(f"--memory {text}: write a number with MB, GB, MiB or GiB, such as 16GB") from None
    if not 0 < size < math.inf:
        raise ConfigError(f"--memory {text}: it must be more than nothing")
    return int(size)
