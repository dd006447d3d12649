"""Whether the plan fits: bytes that training or speaking will need, against those that are free."""

import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import nn

from higgstune import torchaudio_compat
from higgstune.config.recipe import Recipe
from higgstune.diagnostics.report import Finding
from higgstune.families.base import Conditioning, Family, Spec
from higgstune.files import format_bytes
from higgstune.planning.dry_run import ADAPTER, GRADIENTS, OPTIMIZER, WEIGHTS
from higgstune.planning.survey import free_memory, machine_for

__all__ = ["CHECK", "Plan", "check_memory", "free_memory", "speaking_plan", "training_plan"]

CHECK = "memory"
LOW_HEADROOM = 0.1  # of what is free
_PROMPT = 100  # tokens before the target, without data
_SECONDS = 30.0  # of the longest clip, without data


@dataclass(frozen=True)
class Plan:
    """What is to be done, and the bytes that it takes. The formulas are in docs/doctor.md."""

    what: str
    weights: int
    trained: int  # adapter, gradients, optimizer
    activations: int  # and all else that training needs for a moment; in speaking, the KV cache

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.trained + self.activations


def training_plan(recipe: Recipe, device: torch.device) -> Plan:
    """What the stage that needs most will take beside this process: as `higgstune train --plan` says.

    Raises CheckpointError, DataError or ConfigError for anything that the recipe names and that is missing.
    """
    from higgstune.planning.plan import Planner  # which reads checkpoints as this package does

    planner = Planner(recipe, machine_for(recipe, device=device.type))
    stage = max(planner.plan().stages, key=lambda stage: stage.peak)
    trained = stage.memory[ADAPTER] + stage.memory[GRADIENTS] + stage.memory[OPTIMIZER]
    weights = stage.memory[WEIGHTS]
    return Plan(
        f"training a {stage.kind} stage, packs of up to {stage.positions} tokens",
        weights=weights,
        trained=trained,
        activations=stage.peak - planner.process - weights - trained,
    )


def speaking_plan(
    family: Family, config: Any, dtype: torch.dtype, adapter_bytes: int = 0, *, audio_attention: bool = False
) -> Plan:
    """Memory of speaking one clip of 30 s; `adapter_bytes` is the size of the adapter's file."""
    base = family.spec(config)
    per_position = 2 * base.layers * base.key_value_heads * base.head_dim * dtype.itemsize
    with torch.device("meta"):
        model = family.build(config)
        family.extensions.add(model, Conditioning(audio_attention=audio_attention))
    return Plan(
        f"speaking a clip of {_SECONDS:g} s",
        weights=_weight_bytes(model, dtype) + adapter_bytes,
        trained=0,
        activations=per_position * _longest(base),
    )


def check_memory(plan: Plan, free: int, *, device: str) -> Finding:
    """The plan against what is free."""
    parts = f"{format_bytes(plan.weights)} weights, {format_bytes(plan.activations)} KV cache"
    if plan.trained:
        rest = f"{format_bytes(plan.activations)} activations and all else"
        parts = f"{format_bytes(plan.weights)} weights, {format_bytes(plan.trained)} trained, {rest}"
    text = f"{plan.what} takes about {format_bytes(plan.total)} ({parts}); {format_bytes(free)} are free on {device}"
    if plan.total > free:
        return Finding(CHECK, "failed", text, _advice(plan))
    if plan.total > (1 - LOW_HEADROOM) * free:
        return Finding(CHECK, "warning", f"{text}: hardly anything is left", _advice(plan))
    return Finding(CHECK, "ok", text)


def _advice(plan: Plan) -> str:
    """What makes a plan smaller."""
    if not plan.trained:
        return "close what else uses the memory, or use a GPU with more of it; in bfloat16 the weights take half"
    return (
        "`higgstune train --plan` says what would fit: gradient_checkpointing, a smaller batch_tokens with more "
        "gradient_accumulation, model.quantize: 4bit; also shorter clips, a smaller lora.r, or a GPU with more memory"
    )


def _weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


def _longest(base: Spec) -> int:
    return round(_SECONDS * 25) + base.extra_rows + _PROMPT


ENVIRONMENT = "environment"
_SHOWN = ("torch", "transformers", "peft")
LOW_DISK = 5e9  # bytes; two checkpoints with their optimizer, and a store, need about as much
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
            ENVIRONMENT, "warning", "higgstune is not installed, so its requirements are unknown", "pip install it"
        )
    problems = [] if found in SpecifierSet(wanted_python) else [f"Python {found}, needs {wanted_python}"]
    for requirement in map(Requirement, declared or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            problems += _wrong_version(requirement, installed)
    if problems:
        return Finding(
            ENVIRONMENT, "failed", "; ".join(problems), "install what is declared: pip install --upgrade higgstune"
        )
    versions = ", ".join(f"{name} {installed(name)}" for name in _SHOWN)
    return Finding(ENVIRONMENT, "ok", f"Python {found}, {versions}: all as declared")


def check_device() -> Finding:
    """The CUDA device, or that there is none, and whether it computes in bfloat16."""
    if not torch.cuda.is_available():
        built = "a build without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return Finding(
            ENVIRONMENT,
            "warning",
            f"no CUDA device is seen by PyTorch ({built}); models are loaded in float32 on the CPU",
            "enough for the demo's miniature; for the released checkpoint use a GPU, and a PyTorch and driver that fit",
        )
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    text = f"{name}, {format_bytes(total)}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(ENVIRONMENT, "ok", f"{text}, computes in bfloat16")
    return Finding(
        ENVIRONMENT,
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
    return Finding(ENVIRONMENT, "ok", f"the codec resamples with {what}")


def check_disk(free: int, folder: Path | None = None) -> Finding:
    """Free bytes where runs are written."""
    text = f"{format_bytes(free)} are free on the disk of {folder or Path.cwd()}"
    advice = "make room, or work in a folder on another disk: checkpoints and stores are written below it"
    if free < _NO_DISK:
        return Finding(ENVIRONMENT, "failed", text, advice)
    if free < LOW_DISK:
        return Finding(ENVIRONMENT, "warning", text, advice)
    return Finding(ENVIRONMENT, "ok", text)


def _wrong_version(requirement: Requirement, installed: Callable[[str], str]) -> list[str]:
    try:
        found = installed(requirement.name)
    except metadata.PackageNotFoundError:
        return [f"{requirement.name} is not installed, needs {requirement.specifier}"]
    if requirement.specifier.contains(found, prereleases=True):
        return []
    return [f"{requirement.name} {found}, needs {requirement.specifier}"]
