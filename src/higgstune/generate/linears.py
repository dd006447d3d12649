"""The linear layers of a model that speaks: several as one product, in the layout that a CPU multiplies fastest.

A layer that cannot be copied (4 bits, DoRA), or must not be (a model in training), stays live: its own module computes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]  # [..., in] -> [..., out]


def live(layers: Sequence[nn.Module]) -> Linear:
    """Linear layers of one input side by side, each computed by its module."""
    if len(layers) == 1:
        return layers[0]
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


def fused(layers: Sequence[nn.Module]) -> Linear:
    """The same from a copy of their weights, plain LoRA merged; live where a layer allows no copy."""
    weights = [weight for layer in layers if (weight := merged_weight(layer)) is not None]
    if len(weights) < len(layers):
        return live(layers)
    biases = [getattr(layer, "bias", None) for layer in layers]
    bias = None
    if any(bias is not None for bias in biases):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    return product(torch.cat(weights), bias)


def product(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """x -> x @ weight.T + bias. On a CPU the weight is reordered once, where this PyTorch can."""
    weight = weight.detach()
    if not (weight.device.type == "cpu" and _can_reorder(weight.dtype)):
        return lambda x: F.linear(x, weight, bias)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)

    def multiply(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")

    return multiply


def merged_weight(layer: nn.Module) -> Tensor | None:
    """The weight [out, in] of a linear layer, plain LoRA merged in float32; None where it cannot be written as one."""
    inner: Any = layer
    base = getattr(layer, "base_layer", layer)  # of peft
    if type(base) is not nn.Linear:
        return None
    weight = base.weight.detach()
    if base is layer or inner.merged or inner.disable_adapters:
        return weight
    for name in inner.active_adapters:
        if name not in inner.lora_A:
            continue
        if getattr(inner, "use_dora", {}).get(name) or inner.lora_bias.get(name):
            return None
        weight = (weight.float() + inner.get_delta_weight(name).float()).to(weight.dtype)
    return weight


def _can_reorder(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype from a layout of its own, by operators that `torch.compile` uses, too."""
    operators = torch.ops.mkldnn
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
