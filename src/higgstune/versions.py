"""What something was made with: versions of Python and packages, the machine, the device."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

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
