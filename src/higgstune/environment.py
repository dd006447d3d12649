"""The environment of a run: versions of Python and packages, the machine, the device and the dtype."""

import platform
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import TYPE_CHECKING

from higgstune.errors import ConfigError, WorkError

if TYPE_CHECKING:  # torch is imported where it is needed: a misspelt device is refused without it
    import torch
    from packaging.requirements import Requirement
    from torch import Tensor

_DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")
INSTALL = "install what is needed: pip install --upgrade higgstune"
_PACKAGES = ("higgstune", "torch", "transformers", "peft", "bitsandbytes", "numpy", "jiwer", "faster-whisper")


def versions(device: "torch.device | None" = None) -> dict[str, str]:
    """The versions of Python and of the installed packages, the machine and, if given, the device, by name."""
    found = {"Python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device is not None:
        import torch

        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found


def find_wrong_versions(
    requirements: Sequence[str] | None = None,
    python: str | None = None,
    installed: Callable[[str], str] = version,
) -> list[str]:
    """What is missing, or is outside of the range that the package declares, among Python and its requirements.

    Nothing of it is imported. Raises PackageNotFoundError where Higgstune itself is not installed.
    """
    from packaging.requirements import Requirement  # 30 ms
    from packaging.specifiers import SpecifierSet

    found = python or platform.python_version()
    wanted = metadata("higgstune")["Requires-Python"]
    problems = [] if found in SpecifierSet(wanted) else [f"Python {found}, needs {wanted}"]
    declared = requires("higgstune") if requirements is None else requirements
    for requirement in map(Requirement, declared or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            problems += _wrong_version(requirement, installed)
    return problems


def _wrong_version(requirement: "Requirement", installed: Callable[[str], str]) -> list[str]:
    needed = ",".join(sorted(map(str, requirement.specifier), reverse=True))  # the lower bound first
    try:
        found = installed(requirement.name)
    except PackageNotFoundError:
        return [f"{requirement.name} is not installed, needs {needed}"]
    if requirement.specifier.contains(found, prereleases=True):
        return []
    return [f"{requirement.name} {found}, needs {needed}"]


def check_versions() -> None:
    """Raise WorkError for a version that does not fit, before anything large is imported: see `find_wrong_versions`."""
    try:
        problems = find_wrong_versions()
    except PackageNotFoundError:  # run from its sources, whose requirements are unknown
        return
    if problems:
        raise WorkError(f"this environment does not fit: {'; '.join(problems)}; {INSTALL}")


def check_device_name(device: str | None) -> None:
    """Raise ConfigError for a name of no possible device, without importing PyTorch."""
    if device is not None and not _DEVICE.fullmatch(device):
        raise ConfigError(f"unknown device {device!r}: auto, cpu, cuda or cuda:N")


def choose_device(device: "str | torch.device | None" = None) -> "torch.device":
    """The given device, else CUDA if available, else the CPU. Raises ConfigError for an unavailable device."""
    import torch

    if device is None or str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}: cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda", "mps", "xpu"):  # "meta" holds no values
        raise ConfigError(f"unknown device {device!r}: cpu, cuda or cuda:N")
    kind = None if chosen.type == "cpu" else getattr(torch, chosen.type)
    found = kind.device_count() if kind is not None and kind.is_available() else 0
    if kind is not None and (chosen.index or 0) >= found:
        seen = f"only {found}" if found else f"no {chosen.type.upper()} device"
        raise ConfigError(f"device {device} is not available: PyTorch {torch.__version__} sees {seen} here")
    return chosen


def choose_dtype(dtype: "str | torch.dtype | None", device: "torch.device") -> "torch.dtype":
    """The given dtype, else bfloat16 if the device computes in it natively, else float32. Raises ConfigError."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float64": torch.float64}
    if dtype not in named:
        raise ConfigError(f"unknown dtype {dtype!r}: auto, {', '.join(named)}")
    return named[dtype]


def to_device_async(value: "Tensor", device: "torch.device") -> "Tensor":
    """Copy a CPU tensor to a device, from pinned memory, so that the copy does not block a GPU's queue."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def free_memory(device: "torch.device") -> int:
    """Free bytes: in RAM, or on a GPU with those that this process has reserved but does not use."""
    if device.type != "cuda":
        import psutil

        return int(psutil.virtual_memory().available)
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
