"""Checks of the machine: versions, device, disk, and the memory for training or speaking."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from higgstune import torchaudio_compat
from higgstune.config.recipe import Recipe
from higgstune.diagnostics.report import Finding
from higgstune.diagnostics.without_libraries import ENVIRONMENT, check_disk, check_versions
from higgstune.environment import free_memory
from higgstune.families.base import Conditioning, Family, Spec
from higgstune.files import format_bytes
from higgstune.planning.dry_run import ADAPTER, GRADIENTS, OPTIMIZER, WEIGHTS
from higgstune.planning.survey import machine_for

__all__ = ["CHECK", "Plan", "check_memory", "free_memory", "speaking_plan", "training_plan"]
CHECK = "memory"
LOW_HEADROOM = 0.1  # of the free memory
_PROMPT = 100  # tokens before the target
_SECONDS = 30.0  # of the clip


def check_environment() -> list[Finding]:
    """Check versions, device, torchaudio and free disk space."""
    return [check_versions(), check_device(), check_torchaudio(), check_disk()]


def check_device() -> Finding:
    """Check for a CUDA device that computes in bfloat16."""
    if not torch.cuda.is_available():
        built = "a build without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return Finding(
            ENVIRONMENT,
            "warning",
            f"PyTorch finds no CUDA device ({built}); models are loaded in float32 on the CPU",
            "enough for the demo's miniature; for the released checkpoint use a GPU with matching PyTorch and driver",
        )
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    text = f"{name}, {format_bytes(total)}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(ENVIRONMENT, "ok", f"{text}, computes in bfloat16")
    return Finding(
        ENVIRONMENT,
        "warning",
        f"{text}, does not compute in bfloat16: models are loaded in float32",
        "expect twice the memory, or use a GPU of the Ampere generation or newer",
    )


def check_torchaudio() -> Finding:
    """Report whether the codec uses torchaudio or the stand-in; both give the same codes."""
    torchaudio_compat.install()
    origin = sys.modules["torchaudio"].__spec__
    stand_in = origin is not None and origin.origin == torchaudio_compat.__name__
    what = "a stand-in (torchaudio does not load here)" if stand_in else "torchaudio"
    return Finding(ENVIRONMENT, "ok", f"the codec resamples with {what}")


@dataclass(frozen=True)
class Plan:
    """A use of the model and its memory in bytes. The formulas are in docs/doctor.md."""

    use: str
    weights: int
    trained: int  # adapter, gradients, optimizer
    activations: int  # with all other temporary memory; in speaking, the KV cache

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.trained + self.activations


def training_plan(recipe: Recipe, device: torch.device) -> Plan:
    """The stage that needs the most memory in addition to this process, as planned by `higgstune train --plan`.

    Raises CheckpointError, DataError or ConfigError for files that the recipe names and that are missing.
    """
    from higgstune.planning.plan import Planner

    planner = Planner(recipe, machine_for(recipe, device=device.type))
    stage = max(planner.plan().stages, key=lambda stage: stage.peak)
    trained = stage.memory[ADAPTER] + stage.memory[GRADIENTS] + stage.memory[OPTIMIZER]
    weights = stage.memory[WEIGHTS]
    return Plan(
        f"training a {stage.kind} stage, packs of up to {stage.max_tokens_per_pack} tokens",
        weights=weights,
        trained=trained,
        activations=stage.peak - planner.process - weights - trained,
    )


def speaking_plan(
    family: Family, config: Any, dtype: torch.dtype, adapter_bytes: int = 0, *, audio_attention: bool = False
) -> Plan:
    """Speaking one clip of 30 s; `adapter_bytes` is the size of the adapter's file."""
    base = family.spec(config)
    per_token = 2 * base.layers * base.key_value_heads * base.head_dim * dtype.itemsize
    with torch.device("meta"):
        model = family.build(config)
        family.extensions.add(model, Conditioning(audio_attention=audio_attention))
    return Plan(
        f"speaking a clip of {_SECONDS:g} s",
        weights=_weight_bytes(model, dtype) + adapter_bytes,
        trained=0,
        activations=per_token * _longest(base),
    )


def _weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


def _longest(base: Spec) -> int:
    return round(_SECONDS * 25) + base.extra_rows + _PROMPT


def check_memory(plan: Plan, free: int, *, device: str) -> Finding:
    """Whether the plan fits the free memory."""
    parts = f"{format_bytes(plan.weights)} weights, {format_bytes(plan.activations)} KV cache"
    if plan.trained:
        rest = f"{format_bytes(plan.activations)} activations and others"
        parts = f"{format_bytes(plan.weights)} weights, {format_bytes(plan.trained)} trained, {rest}"
    text = f"{plan.use} needs about {format_bytes(plan.total)} ({parts}); {format_bytes(free)} are free on {device}"
    if plan.total > free:
        return Finding(CHECK, "failed", text, _advice(plan))
    if plan.total > (1 - LOW_HEADROOM) * free:
        return Finding(CHECK, "warning", f"{text}: little headroom", _advice(plan))
    return Finding(CHECK, "ok", text)


def _advice(plan: Plan) -> str:
    """How to reduce the memory."""
    if not plan.trained:
        return "close other programs that use the memory, or use a GPU with more; in bfloat16 the weights need half"
    return (
        "`higgstune train --plan` shows changes that would fit: gradient_checkpointing, a smaller batch_tokens with "
        "more gradient_accumulation, model.quantize: 4bit; shorter clips, a smaller lora.r, or a larger GPU"
    )
