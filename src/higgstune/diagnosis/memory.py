"""Whether the plan fits: bytes that training or speaking will need, against those that are free."""

import re
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from peft import LoraConfig
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgstune.diagnosis.checkpoint import empty_model
from higgstune.diagnosis.report import Finding
from higgstune.model.adapters import AttentionTraining, Lora, StageKind
from higgstune.model.conditioning import Conditioning, add_conditioning
from higgstune.training.recipe import Recipe

CHECK = "memory"
_LITTLE = 0.1  # of what is free
_TRAINED = 16  # bytes of a trained parameter: weight, gradient and two moments of AdamW, in float32
_PROMPT = 100  # positions before the target, where no data tells
_SECONDS = 30.0  # of the longest clip, where no data tells


@dataclass(frozen=True)
class Plan:
    """What is to be done, and the bytes that it takes. The formulas are in docs/doctor.md."""

    what: str
    weights: int
    trained: int  # adapter, gradients, optimizer
    activations: int  # or, in speaking, the KV cache

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.trained + self.activations


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, with what this process holds and does not use, or in RAM."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def largest_training_plan(
    recipe: Recipe, config: HiggsAudioV2Config, dtype: torch.dtype, positions: int | None, *, audio_attention: bool
) -> Plan:
    """The plan of the stage that needs most. `positions` are those of the longest row, None where no data tell."""
    conditioning = Conditioning(audio_attention=audio_attention or bool(recipe.model.audio_attention))
    plans = [
        training_plan(
            config,
            dtype,
            recipe.lora,
            stage.kind,
            conditioning=conditioning,
            attention=recipe.model.audio_attention or "lora",
            positions=positions,
            batch_size=stage.batch_size,
            gradient_checkpointing=recipe.gradient_checkpointing,
        )
        for stage in recipe.stages
    ]
    return max(plans, key=lambda plan: plan.total)


def training_plan(
    config: HiggsAudioV2Config,
    dtype: torch.dtype,
    lora: Lora,
    kind: StageKind,
    *,
    conditioning: Conditioning,
    attention: AttentionTraining,
    positions: int | None,
    batch_size: int,
    gradient_checkpointing: bool,
) -> Plan:
    """Memory of an optimizer step on `batch_size` clips of `positions` positions (None: of 30 s)."""
    model = _empty_model(config, conditioning)
    length = positions or _longest(config)
    activations = activation_bytes(config, batch_size, length, dtype, gradient_checkpointing=gradient_checkpointing)
    return Plan(
        f"training a {kind} stage, {batch_size} x {length} positions",
        weights=_weight_bytes(model, dtype),
        trained=_TRAINED * trained_parameters(model, lora.config(kind, conditioning, attention)),
        activations=activations,
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


def activation_bytes(
    config: HiggsAudioV2Config, clips: int, positions: int, dtype: torch.dtype, *, gradient_checkpointing: bool
) -> int:
    """What the forward pass of `clips` clips of `positions` positions keeps for the backward pass, and the logits.

    The factors were counted on small models with `torch.autograd.graph.saved_tensors_hooks`.
    """
    hidden, inner, width = config.hidden_size, config.intermediate_size, dtype.itemsize
    layer = 7 * hidden * 4 + 4 * inner * width  # norms and LoRA compute in float32
    layers = config.num_hidden_layers
    body = layers * hidden * width + layer if gradient_checkpointing else layers * layer
    logit = 2 * 4 + width  # as computed, its log-softmax, its gradient
    audio = positions * config.num_codebooks * config.codebook_size * logit
    text = _PROMPT * config.vocab_size * logit
    return clips * (positions * body + audio + text)


def trained_parameters(model: nn.Module, config: LoraConfig) -> int:
    """Parameters that a stage trains: LoRA on its layers, and modules that are trained in full."""
    targets, saved = re.compile(str(config.target_modules)), tuple(config.modules_to_save or ())
    total = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in saved:
            total += sum(parameter.numel() for parameter in module.parameters())
        elif isinstance(module, nn.Linear) and targets.fullmatch(name):
            total += config.r * (module.in_features + module.out_features) + config.use_dora * module.out_features
    return total


def check_memory(plan: Plan, free: int, *, device: str) -> Finding:
    """The plan against what is free."""
    parts = f"{_size(plan.weights)} weights, {_size(plan.activations)} KV cache"
    if plan.trained:
        parts = f"{_size(plan.weights)} weights, {_size(plan.trained)} trained, {_size(plan.activations)} activations"
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
        "a smaller batch_size with more gradient_accumulation, gradient_checkpointing: true, shorter clips, a smaller "
        "lora.r, or a GPU with more memory"
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


def positions_of(frames: np.ndarray, context_frames: np.ndarray, codebooks: int) -> int | None:
    """Positions of a store's longest row, from the frames of its rows and of what they hear; None without rows."""
    if not len(frames):
        return None
    return int((frames + context_frames).max()) + 2 * (codebooks + 1) + _PROMPT
