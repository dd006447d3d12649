"""Steps of a layer with a backward pass of their own: fewer passes over memory, less kept, the same mathematics.

Letters in shapes: P positions, R rows, D hidden size, F features, H heads, d head size, r rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


class Order(NamedTuple):
    """Which row of hidden states stands where in the sequence: see `batch.packed.pack`."""

    to_sequence: Tensor  # [P]
    from_sequence: Tensor  # [R]
    shared_at: Tensor  # [n - 1, S]


def spread(hidden: Tensor, order: Order) -> Tensor:
    """Rows of hidden states [R, ...] to their positions in the sequence [P, ...]."""
    return _Spread.apply(hidden, *order)


def collect(sequence: Tensor, order: Order) -> Tensor:
    """Positions of the sequence [P, ...] to rows of hidden states [R, ...]: of shared rows, the first of each."""
    return _Collect.apply(sequence, *order)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """x [P, D] through a `HiggsAudioV2RMSNorm`: computed in float32, as there."""
    return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [P, H, d]; cos and sin [P, 1, d / 2] count for both halves of a head."""
    return _Rotate.apply(x, cos, sin)


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """x [P, D] -> [P, F] through a linear layer, or through one with a plain LoRA on frozen weights in one go.

    What peft has beside these (dropout, DoRA, quantised weights, several adapters) goes through peft's own forward.
    """
    lora = _plain_lora(layer)
    return layer(x) if lora is None else _LoraLinear.apply(_as_autocast(x), *lora)


def feed_forward(x: Tensor, mlp: Any) -> Tensor:
    """x [P, D] -> [P, D] through a `HiggsAudioV2MLP`: down(silu(gate(x)) * up(x))."""
    gate, up = linear(x, mlp.gate_proj), linear(x, mlp.up_proj)
    lora = _plain_lora(mlp.down_proj)
    if lora is None:
        return mlp.down_proj(_SwiGlu.apply(gate, up))
    return _SwiGluLoraLinear.apply(gate, up, *lora)


class _Lora(NamedTuple):
    """A layer that is nothing but x W^T + s (x A^T) B^T with W frozen."""

    weight: Tensor  # [F, D]
    a: Tensor  # [r, D]
    b: Tensor  # [F, r]
    scaling: float


def _plain_lora(layer: Any) -> _Lora | None:
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name, base = layer.active_adapters[0], layer.base_layer
    plain = (
        type(base) is nn.Linear
        and base.bias is None
        and not base.weight.requires_grad
        and name in layer.lora_A
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
    )
    if not plain:
        return None
    return _Lora(base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


class _Spread(Function):
    """Plain indexing would add up gradients row by row, as if any row could be taken twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, to_sequence: Tensor, from_sequence: Tensor, shared_at: Tensor) -> Tensor:
        ctx.save_for_backward(from_sequence, shared_at)
        return hidden.index_select(0, to_sequence)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        from_sequence, shared_at = ctx.saved_tensors
        gathered = grad.index_select(0, from_sequence)
        again = grad.index_select(0, shared_at.flatten()).unflatten(0, shared_at.shape)
        gathered[: shared_at.shape[1]] += again.sum(0)
        return gathered, None, None, None


class _Collect(Function):
    """What the sequence has at the places of shared rows, but for the first, goes nowhere."""

    @staticmethod
    def forward(ctx: Any, sequence: Tensor, to_sequence: Tensor, from_sequence: Tensor, shared_at: Tensor) -> Tensor:
        ctx.save_for_backward(to_sequence, shared_at)
        return sequence.index_select(0, from_sequence)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        to_sequence, shared_at = ctx.saved_tensors
        return grad.index_select(0, to_sequence).index_fill_(0, shared_at.flatten(), 0), None, None, None


class _RmsNorm(Function):
    """Keeps the input, which the residual has anyway, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_weight = (grad.float() * normed).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        pull = (grad * weight).float()
        along = (pull * normed).mean(-1, keepdim=True)
        return ((pull - normed * along) * scale).to(x.dtype), grad_weight, None


class _Rotate(Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _SwiGlu(Function):
    """Keeps gate and up alone: silu(gate) is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _swiglu_backward(grad, gate, up, F.silu(gate))


class _LoraLinear(Function):
    """Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return _lora_forward(x, _Lora(weight, a, b, scaling))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        lora = _Lora(weight, a, b, ctx.scaling)
        grad_a, grad_b = _lora_gradients(grad, x, lora)
        return _lora_input_gradient(grad, lora) if ctx.needs_input_grad[0] else None, None, grad_a, grad_b, None


class _SwiGluLoraLinear(Function):
    """`_SwiGlu` and `_LoraLinear` in one: what stands between them is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(gate, up, weight, a, b)
        ctx.scaling = scaling
        return _lora_forward(F.silu(gate).mul_(up), _Lora(weight, a, b, scaling))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor, None]:
        gate, up, weight, a, b = ctx.saved_tensors
        lora = _Lora(weight, a, b, ctx.scaling)
        opened = F.silu(gate)
        grad_a, grad_b = _lora_gradients(grad, opened * up, lora)
        return *_swiglu_backward(_lora_input_gradient(grad, lora), gate, up, opened), None, grad_a, grad_b, None


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), opened.mul_(grad)


def _as_autocast(x: Tensor) -> Tensor:
    """In the dtype that autocast, where it is on, gives to matrix products."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _lora_forward(x: Tensor, lora: _Lora) -> Tensor:
    """x W^T + s (x A^T) B^T.

    In float32 the update s B A is added to the weight first, which costs r / P of a product and saves one, and the sums
    that go with it, in each direction. In half precision that sum would round away what LoRA has learned: there the
    products stay apart.
    """
    if _folds(x):
        return x @ _folded(lora).T
    inner = x @ lora.a.to(x.dtype).T
    return torch.addmm(x @ lora.weight.to(x.dtype).T, inner, lora.b.to(x.dtype).T, alpha=lora.scaling)


def _lora_input_gradient(grad: Tensor, lora: _Lora) -> Tensor:
    if _folds(grad):
        return grad @ _folded(lora)
    inner = grad @ lora.b.to(grad.dtype)
    return torch.addmm(grad @ lora.weight.to(grad.dtype), inner, lora.a.to(grad.dtype), alpha=lora.scaling)


def _lora_gradients(grad: Tensor, x: Tensor, lora: _Lora) -> tuple[Tensor, Tensor]:
    """Of A and B, in their own dtype."""
    grad_a = (grad @ lora.b.to(grad.dtype)).T @ x
    grad_b = grad.T @ (x @ lora.a.to(x.dtype).T)
    return grad_a.to(lora.a.dtype).mul_(lora.scaling), grad_b.to(lora.b.dtype).mul_(lora.scaling)


def _folds(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _folded(lora: _Lora) -> Tensor:
    return torch.addmm(lora.weight, lora.b, lora.a, alpha=lora.scaling)
