"""What something was made with: versions of Python and packages, the machine, the device."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from higgstune.errors import ConfigError

_PACKAGES = ("higgstune", "torch", "transformers", "peft", "bitsandbytes", "numpy", "jiwer", "faster-whisper")


def versions(device: torch.device | None = None) -> dict[str, str]:
    """By name; of packages those that are installed."""
    found = {"Python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device is not None:
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, else CUDA where there is one, else the CPU. Raises ConfigError for one that is not there."""
    if device is None or str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}: cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device} was asked for, but PyTorch {torch.__version__} sees no CUDA device here")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The given dtype, else bf16 where the device computes in it natively, else float32. Raises ConfigError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float64": torch.float64}
    if dtype not in named:
        raise ConfigError(f"unknown dtype {dtype!r}: auto, {', '.join(named)}")
    return named[dtype]


def to_device_async(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device: from pinned memory, so that a GPU's queue of work goes on."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
