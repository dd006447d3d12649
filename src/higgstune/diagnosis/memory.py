"""Whether the plan fits: bytes that training or speaking will need, against those that are free."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgstune.diagnosis.checkpoint import empty_model
from higgstune.diagnosis.report import Finding
from higgstune.model.conditioning import Conditioning, add_conditioning
from higgstune.planning.device import free_memory, machine_for
from higgstune.planning.rehearsal import ADAPTER, GRADIENTS, OPTIMIZER, WEIGHTS
from higgstune.training.recipe import Recipe

__all__ = ["CHECK", "Plan", "check_memory", "free_memory", "speaking_plan", "training_plan"]

CHECK = "memory"
_LITTLE = 0.1  # of what is free
_PROMPT = 100  # positions before the target, where no data tells
_SECONDS = 30.0  # of the longest clip, where no data tells


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

    Raises CheckpointError, DataError or ConfigError for what the recipe names and is not there.
    """
    from higgstune.planning.plan import Planner  # which reads checkpoints as this package does

    planner = Planner(recipe, machine_for(recipe, device=device.type))
    stage = max(planner.plan().stages, key=lambda stage: stage.peak)
    trained = stage.memory[ADAPTER] + stage.memory[GRADIENTS] + stage.memory[OPTIMIZER]
    weights = stage.memory[WEIGHTS]
    return Plan(
        f"training a {stage.kind} stage, packs of up to {stage.positions} positions",
        weights=weights,
        trained=trained,
        activations=stage.peak - planner.process - weights - trained,
    )


def speaking_plan(
    config: HiggsAudioV2Config, dtype: torch.dtype, adapter_bytes: int = 0, *, audio_attention: bool = False
) -> Plan:
    """Memory of speaking one clip of 30 s; `adapter_bytes` is the size of the adapter's file."""
    heads = config.num_key_value_heads or config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    per_position = 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize
    return Plan(
        f"speaking a clip of {_SECONDS:g} s",
        weights=_weight_bytes(_empty_model(config, Conditioning(audio_attention=audio_attention)), dtype)
        + adapter_bytes,
        trained=0,
        activations=per_position * _longest(config),
    )


def check_memory(plan: Plan, free: int, *, device: str) -> Finding:
    """The plan against what is free."""
    parts = f"{_size(plan.weights)} weights, {_size(plan.activations)} KV cache"
    if plan.trained:
        rest = f"{_size(plan.activations)} activations and all else"
        parts = f"{_size(plan.weights)} weights, {_size(plan.trained)} trained, {rest}"
    text = f"{plan.what} takes about {_size(plan.total)} ({parts}); {_size(free)} are free on {device}"
    if plan.total > free:
        return Finding(CHECK, "failed", text, _advice(plan))
    if plan.total > (1 - _LITTLE) * free:
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


def _empty_model(config: HiggsAudioV2Config, conditioning: Conditioning) -> HiggsAudioV2ForConditionalGeneration:
    model = empty_model(config)
    add_conditioning(model, conditioning)
    return model


def _weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


def _longest(config: HiggsAudioV2Config) -> int:
    return round(_SECONDS * 25) + config.num_codebooks + 1 + _PROMPT


def _size(size: int) -> str:
    if size < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB"
