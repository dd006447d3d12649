"""Parts of a layer with their own backward pass: fewer passes over memory, fewer kept tensors, the same mathematics.

Letters in shapes: P tokens, R rows of hidden states, D hidden size, F features, H heads, d head size, r rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


class Order(NamedTuple):
    """Maps rows of hidden states to positions in the sequence and back: see `batch.collate.pack`."""

    to_sequence: Tensor  # [P]
    from_sequence: Tensor  # [R]
    shared_at: Tensor  # [n - 1, S]


def scatter(hidden: Tensor, order: Order) -> Tensor:
    """Rows of hidden states [R, ...] -> the sequence [P, ...]."""
    return _Scatter.apply(hidden, *order)


def gather(sequence: Tensor, order: Order) -> Tensor:
    """The sequence [P, ...] -> rows of hidden states [R, ...]; a shared row comes from its first position."""
    return _Gather.apply(sequence, *order)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """x [P, D] through an RMS norm of transformers, computed in float32 as there."""
    return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [P, H, d]; cos and sin [P, 1, d / 2] count for both halves of a head."""
    if torch.compiler.is_compiling():
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return _Rotate.apply(x, cos, sin)


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """x [P, D] -> [P, F] through a linear layer: see `linears`."""
    return linears(x, [layer])[0]


def linears(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """x [P, D] -> [P, F] through each of several linear layers; in one pass if all have plain LoRA on frozen weights.

    Layers with anything else (dropout, DoRA, quantised weights, several adapters) run peft's own forward.
    """
    found = [_plain_lora(layer) for layer in layers]
    loras = [lora for lora in found if lora is not None]
    if len(loras) < len(layers):
        return [layer(x) for layer in layers]
    x = as_autocast(x)
    if torch.compiler.is_compiling():
        return _lora_products(x, loras)
    return _LoraLinears.apply(x, [lora.scaling for lora in loras], *_tensors(loras))


def is_plain(model: nn.Module) -> bool:
    """Whether all layers with an adapter have plain LoRA on frozen weights."""
    return all(_plain_lora(layer) is not None for layer in model.modules() if hasattr(layer, "lora_A"))


def feed_forward(x: Tensor, mlp: Any) -> Tensor:
    """x [P, D] -> [P, D] through a gated feed-forward layer: down(silu(gate(x)) * up(x))."""
    gate, up = linears(x, [mlp.gate_proj, mlp.up_proj])
    if torch.compiler.is_compiling():
        return linear(F.silu(gate) * up, mlp.down_proj)
    lora = _plain_lora(mlp.down_proj)
    if lora is None:
        return mlp.down_proj(_SwiGlu.apply(gate, up))
    return _SwiGluLoraLinear.apply(gate, up, lora.scaling, *_tensors([lora]))


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast, if enabled, uses for matrix products."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Lora(NamedTuple):
    """A layer that computes x W^T + s (x A^T) B^T, with W frozen."""

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


def _tensors(loras: Sequence[_Lora]) -> tuple[Tensor, ...]:
    """The tensors as an autograd function takes and keeps them: see `_loras`."""
    return *(lora.weight for lora in loras), *(lora.a for lora in loras), *(lora.b for lora in loras)


def _loras(tensors: Sequence[Tensor], scalings: Sequence[float]) -> list[_Lora]:
    count = len(scalings)
    columns = (tensors[:count], tensors[count : 2 * count], tensors[2 * count :], scalings)
    return [_Lora(*row) for row in zip(*columns, strict=True)]


class _Scatter(Function):
    """Plain indexing would accumulate gradients row by row, as if any row could repeat."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, to_sequence: Tensor, from_sequence: Tensor, shared_at: Tensor) -> Tensor:
        ctx.save_for_backward(from_sequence, shared_at)
        return hidden.index_select(0, to_sequence)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        from_sequence, shared_at = ctx.saved_tensors
        gathered = grad.index_select(0, from_sequence)
        repeated = grad.index_select(0, shared_at.flatten()).unflatten(0, shared_at.shape)
        gathered[: shared_at.shape[1]] += repeated.sum(0)
        return gathered, None, None, None


class _Gather(Function):
    """Of the positions that share a row, only the first one is read, so the others get no gradient."""

    @staticmethod
    def forward(ctx: Any, sequence: Tensor, to_sequence: Tensor, from_sequence: Tensor, shared_at: Tensor) -> Tensor:
        ctx.save_for_backward(to_sequence, shared_at)
        return sequence.index_select(0, from_sequence)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        to_sequence, shared_at = ctx.saved_tensors
        return grad.index_select(0, to_sequence).index_fill_(0, shared_at.flatten(), 0), None, None, None


class _RmsNorm(Function):
    """Keeps the input, which the residual keeps anyway, and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * x.float() * scale).sum(0).to(weight.dtype)
        return _normed_backward(grad, x, weight, scale), grad_weight, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def _normed_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    wide, pull = x.float(), (grad * weight).float()
    along = (pull * wide).mean(-1, keepdim=True) * scale.pow(3)
    return pull.mul(scale).addcmul(wide, along, value=-1).to(x.dtype)


class _Rotate(Function):
    """The backward pass rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    rotated = torch.empty_like(x)
    (first, second), (new_first, new_second) = x.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=direction)
    return rotated


class _SwiGlu(Function):
    """Keeps gate and up alone; the backward pass recomputes silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _swiglu_backward(grad.clone(), gate, up, F.silu(gate))


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, from `grad` of their product and `opened` = silu(gate); overwrites both."""
    grad_up = opened.mul_(grad)
    return torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up


class _LoraLinears(Function):
    """Layers with the same input; keeps that input and its product with all their A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        loras = _loras(tensors, scalings)
        inner = _inner(x, loras)
        ctx.save_for_backward(x, inner, *tensors)
        ctx.scalings = scalings
        parts = zip(inner.split(_ranks(loras), dim=1), loras, strict=True)
        return tuple(_lora_forward(x, part, lora) for part, lora in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, *tensors = ctx.saved_tensors
        loras = _loras(tensors, ctx.scalings)
        grad_x, of_tensors = _lora_backward(grads, x, inner, loras, of_x=ctx.needs_input_grad[0])
        return grad_x, None, *of_tensors


class _SwiGluLoraLinear(Function):
    """`_SwiGlu` and a layer with LoRA in one; the backward pass recomputes what lies between them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, scaling: float, *tensors: Tensor) -> Tensor:
        [lora] = _loras(tensors, [scaling])
        x = F.silu(gate).mul_(up)
        inner = _inner(x, [lora])
        ctx.save_for_backward(gate, up, inner, *tensors)
        ctx.scaling = scaling
        return _lora_forward(x, inner, lora)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, inner, *tensors = ctx.saved_tensors
        loras = _loras(tensors, [ctx.scaling])
        opened = F.silu(gate)
        grad_x, of_tensors = _lora_backward([grad], opened * up, inner, loras)
        assert grad_x is not None
        return *_swiglu_backward(grad_x, gate, up, opened), None, *of_tensors


def _all_a(loras: Sequence[_Lora], dtype: torch.dtype) -> Tensor:
    """[sum of r, D]."""
    return torch.cat([lora.a for lora in loras]).to(dtype)


def _inner(x: Tensor, loras: Sequence[_Lora]) -> Tensor:
    """What all A make of x, side by side: [P, sum of r]."""
    return x @ _all_a(loras, x.dtype).T


def _ranks(loras: Sequence[_Lora]) -> list[int]:
    return [len(lora.a) for lora in loras]


def _lora_forward(x: Tensor, inner: Tensor, lora: _Lora) -> Tensor:
    """x W^T + s (x A^T) B^T, with x A^T as `inner`.

    In float32 the update s B A is added to the weight first, which costs r / P of a product and saves one, and the sums
    that go with it, in each direction. In half precision that sum would round away what LoRA has learned: there the
    products stay apart, and the larger one adds to the smaller as it is written.
    """
    if _folds(x):
        return x @ _folded(lora).T
    return (inner @ lora.b.to(x.dtype).T).addmm_(x, lora.weight.to(x.dtype).T, beta=lora.scaling)


def _lora_products(x: Tensor, loras: Sequence[_Lora]) -> list[Tensor]:
    """The same for a compiler, which finds the backward pass and what to keep for it.

    The compiler of torch 2.11 returns zero gradients for autograd functions whose forward changes a tensor in place.
    """
    parts = _inner(x, loras).split(_ranks(loras), dim=1)
    return [
        x @ lora.weight.to(x.dtype).T + (part * lora.scaling) @ lora.b.to(x.dtype).T
        for part, lora in zip(parts, loras, strict=True)
    ]


def _lora_backward(
    grads: Sequence[Tensor], x: Tensor, inner: Tensor, loras: Sequence[_Lora], *, of_x: bool = True
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x (None unless `of_x`) and of the layers' tensors, each in its dtype."""
    pairs = list(zip(grads, loras, strict=True))
    grad_inner = torch.cat([(grad @ lora.b.to(grad.dtype)).mul_(lora.scaling) for grad, lora in pairs], dim=1)
    of_a = [part.to(loras[0].a.dtype) for part in (grad_inner.T @ x).split(_ranks(loras))]
    of_b = [
        (part.T @ grad).T.to(lora.b.dtype).mul_(lora.scaling)
        for (grad, lora), part in zip(pairs, inner.split(_ranks(loras), dim=1), strict=True)
    ]
    of_tensors = [*[None] * len(loras), *of_a, *of_b]
    if not of_x:
        return None, of_tensors
    if _folds(x):
        (grad, lora), *pairs = pairs
        grad_x = grad @ _folded(lora)
    else:
        grad_x = grad_inner @ _all_a(loras, x.dtype)
    for grad, lora in pairs:
        grad_x.addmm_(grad, _folded(lora) if _folds(x) else lora.weight.to(grad.dtype))
    return grad_x, of_tensors


def _folds(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _folded(lora: _Lora) -> Tensor:
    return torch.addmm(lora.weight, lora.b, lora.a, alpha=lora.scaling)
