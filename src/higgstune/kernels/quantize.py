"""A 4-bit base (QLoRA): bitsandbytes keeps the linear weights of the decoder layers as nf4 with double quantisation.

These are 4.9 of the 5.8 billion parameters of Higgs Audio v2. Embeddings, heads and norms stay as they are, and so does
what is added to the model afterwards, such as LoRA. Source of the format: Dettmers et al., QLoRA (arXiv 2305.14314),
sections 3 and 4.
"""

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn

from higgstune.errors import ConfigError

_BLOCK = 64  # values that share a scale; scales are 8 bits, in blocks of 256 that share a float32
_SCALE_BLOCK = 256
_LEVELS = 16 * 4  # bytes of each weight's own table of levels
_OFFSET = 4  # and of the mean of its scales
_LOG = logging.getLogger(__name__)


def check_quantize(quantize: str | None, dtype: torch.dtype) -> None:
    """Raises ConfigError for an unknown value, without bitsandbytes, and for a dtype that 4 bits do not compute in."""
    if quantize is None:
        return
    if quantize != "4bit":
        raise ConfigError(f"unknown quantize {quantize!r}: use 4bit, or leave it out")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"quantize: 4bit computes in float32 or bfloat16, not in {dtype}: choose another dtype")
    _bitsandbytes()


def quantize_layers(model: nn.Module, pattern: str, device: torch.device) -> None:
    """Quantize the linear layers whose full paths match `pattern` to 4 bits on `device`, in place; the rest stays.

    The model must be on the CPU, in the dtype that it will compute in. One weight at a time goes to the device, which
    at its peak holds all weights in 4 bits and one in its dtype (50 MB of bfloat16 in the released model, beside
    2.5 GB); the CPU holds the whole base once (11.5 GB), which shrinks with every layer.
    """
    odd: list[str] = []
    for name in layers_in_4_bits(model, pattern):
        part = model.get_submodule(name)
        assert isinstance(part, nn.Linear)
        layer = _in_4_bits(part, device)
        if device.type == "cpu" and part.in_features % _BLOCK and _is_far_off(layer.weight, part.weight):
            odd.append(name)
        model.set_submodule(name, layer)
    if odd:
        _LOG.warning(
            "bitsandbytes computes %d layers wrongly on this CPU, such as %s: the length of their weights' rows is not "
            "a multiple of %d. An adapter trained on them does not fit the unquantized base; use a GPU, or leave out "
            "model.quantize",
            len(odd), odd[0], _BLOCK,
        )  # fmt: skip
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # the name by which peft and transformers know


def is_quantized(model: Any) -> bool:
    """Whether a model's layers are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def dequantized(weight: Tensor) -> Tensor:
    """The values that a weight computes with, in its shape and dtype; the weight itself if it is not in 4 bits."""
    state = getattr(weight, "quant_state", None)
    return weight if state is None else _bitsandbytes().functional.dequantize_4bit(weight.data, state)


def compute_dtype(linear: Any) -> torch.dtype:
    """The dtype in which a linear layer computes, with or without 4 bits and LoRA."""
    state = getattr(linear.weight, "quant_state", None)
    return linear.weight.dtype if state is None else state.dtype


def layers_in_4_bits(model: nn.Module, pattern: str) -> list[str]:
    """Full paths of the layers that `quantize_layers` replaces."""
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def bytes_in_4_bits(weight: Tensor) -> int:
    """The bytes of a weight in 4 bits. The weight may be on the meta device."""
    scales = -(-weight.numel() // _BLOCK)
    return -(-weight.numel() // 2) + scales + 4 * -(-scales // _SCALE_BLOCK) + _LEVELS + _OFFSET


def _in_4_bits(linear: nn.Linear, device: torch.device) -> Any:
    bnb, weight = _bitsandbytes(), linear.weight.data
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
    # In eval mode bitsandbytes repacks weights for CPUs with AVX512-BF16, for good: from then on without gradients, and
    # in bfloat16 whatever the dtype. Training and verification would compute with different weights.
    layer.support_avx512bf16_for_cpu = False
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    layer.bias = linear.bias
    return layer.train(linear.training)


def _is_far_off(quantized: Tensor, weight: Tensor) -> bool:
    """Whether the 4-bit weight is wrong: bitsandbytes 0.50's kernel for AVX512 mixes up the scales of blocks that cross
    the end of a row (22 to 29 % off; 9.5 % is normal for normally distributed weights).
    """
    found, whole = dequantized(quantized).float(), weight.float()
    return bool((found - whole).norm() > 0.15 * whole.norm())


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            "a 4-bit base needs bitsandbytes, which cannot be imported here "
            f"({error}): pip install 'higgstune[quant]', or leave out model.quantize"
        ) from error
    return bitsandbytes
