"""A stand-in for linear layers in 4 bits: their bytes, and the whole weight that is there while they compute."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from higgstune.model.quantize import _IN_4_BITS, quantized_bytes


class FourBits(nn.Linear):
    """What `bitsandbytes.nn.Linear4bit` keeps and takes, without its numbers. Made on the meta device."""

    def __init__(self, name: str, whole: nn.Linear) -> None:
        """`name` is the layer's full path."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.shape, self.dtype = whole.weight.shape, whole.weight.dtype
        alone = _Holder(name, whole.weight)
        packed = torch.empty(quantized_bytes(alone, self.dtype, audio_attention=True), dtype=torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = whole.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The whole weight, as whoever asks for it (DoRA for its norm) would unpack it."""
        return self.packed.new_empty(self.shape, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return _Product.apply(x, self.packed, self.shape, self.dtype)


class _Holder(nn.Module):
    """A module with one weight under its full path, to be counted."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self._only = name, nn.Parameter(weight, requires_grad=False)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The one weight."""
        yield f"{self._only[0]}.weight", self._only[1]


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = shape, dtype
        ctx.save_for_backward(packed)
        return F.linear(x.to(dtype), packed.new_empty(shape, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,) = ctx.saved_tensors
        return grad @ packed.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None


def layers_in_4_bits(model: nn.Module) -> list[str]:
    """Full paths of the layers of a model that would be in 4 bits."""
    return [name for name, _ in model.named_modules() if _IN_4_BITS.fullmatch(name)]


def put_in_4_bits(model: nn.Module, names: list[str]) -> None:
    """Exchange layers of a model on the meta device for stand-ins, in place."""
    for name in names:
        whole = model.get_submodule(name)
        assert isinstance(whole, nn.Linear)
        model.set_submodule(name, FourBits(name, whole))
