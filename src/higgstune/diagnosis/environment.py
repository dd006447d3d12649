"""The machine and what is installed on it."""

import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from higgstune import torchaudio_compat
from higgstune.diagnosis.report import Finding

CHECK = "environment"
_SHOWN = ("torch", "transformers", "peft")
_LITTLE_DISK = 5e9  # bytes; two checkpoints with their optimizer, and a store, need about as much
_NO_DISK = 2e8


def check_environment() -> list[Finding]:
    """Versions, device, torchaudio and free disk of this process."""
    return [check_versions(), check_device(), check_torchaudio(), check_disk(shutil.disk_usage(Path.cwd()).free)]


def check_versions(
    requirements: Sequence[str] | None = None,
    python: str | None = None,
    installed: Callable[[str], str] = metadata.version,
) -> Finding:
    """Python and every dependency against the ranges that the package declares."""
    found = python or platform.python_version()
    try:
        wanted_python = metadata.metadata("higgstune")["Requires-Python"]
        declared = metadata.requires("higgstune") if requirements is None else requirements
    except metadata.PackageNotFoundError:
        return Finding(
            CHECK, "warning", "higgstune is not installed, so its requirements are unknown", "pip install it"
        )
    problems = [] if found in SpecifierSet(wanted_python) else [f"Python {found}, needs {wanted_python}"]
    for requirement in map(Requirement, declared or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            problems += _wrong_version(requirement, installed)
    if problems:
        return Finding(
            CHECK, "failed", "; ".join(problems), "install what is declared: pip install --upgrade higgstune"
        )
    versions = ", ".join(f"{name} {installed(name)}" for name in _SHOWN)
    return Finding(CHECK, "ok", f"Python {found}, {versions}: all as declared")


def check_device() -> Finding:
    """The CUDA device, or that there is none, and whether it computes in bfloat16."""
    if not torch.cuda.is_available():
        built = "a build without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return Finding(
            CHECK,
            "warning",
            f"no CUDA device is seen by PyTorch ({built}); models are loaded in float32 on the CPU",
            "enough for the demo's miniature; for the released checkpoint use a GPU, and a PyTorch and driver that fit",
        )
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    text = f"{name}, {total / 1e9:.0f} GB"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(CHECK, "ok", f"{text}, computes in bfloat16")
    return Finding(
        CHECK,
        "warning",
        f"{text}, does not compute in bfloat16: models are loaded in float32",
        "count on twice the memory, or use a GPU of the Ampere generation or newer",
    )


def check_torchaudio() -> Finding:
    """Whether the codec will use torchaudio itself or the stand-in; both give the same codes."""
    torchaudio_compat.install()
    origin = sys.modules["torchaudio"].__spec__
    stand_in = origin is not None and origin.origin == torchaudio_compat.__name__
    what = "the stand-in (torchaudio itself does not load here)" if stand_in else "torchaudio"
    return Finding(CHECK, "ok", f"the codec resamples with {what}")


def check_disk(free: int, folder: Path | None = None) -> Finding:
    """Free bytes where runs are written."""
    text = f"{free / 1e9:.1f} GB are free on the disk of {folder or Path.cwd()}"
    advice = "make room, or work in a folder on another disk: checkpoints and stores are written below it"
    if free < _NO_DISK:
        return Finding(CHECK, "failed", text, advice)
    if free < _LITTLE_DISK:
        return Finding(CHECK, "warning", text, advice)
    return Finding(CHECK, "ok", text)


def _wrong_version(requirement: Requirement, installed: Callable[[str], str]) -> list[str]:
    try:
        found = installed(requirement.name)
    except metadata.PackageNotFoundError:
        return [f"{requirement.name} is not installed, needs {requirement.specifier}"]
    if requirement.specifier.contains(found, prereleases=True):
        return []
    return [f"{requirement.name} {found}, needs {requirement.specifier}"]
