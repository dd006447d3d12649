"""The linear layers of a model that speaks: several as one product, in the layout that a CPU multiplies fastest.

A layer that cannot be copied (4 bits, DoRA), or must not be (a model in training), stays live: its own module computes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(Protocol):
    """A product [n, in] -> [n, out], added to a residual [n, out] where there is one."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


_ROWS = 8  # of a product, for which oneDNN lays a weight out; others are as right


class Adapters:
    """Which adapter each row of the next products is for; "" is the base."""

    def __init__(self) -> None:
        self.of_rows: Sequence[str] = ()  # one for each row; a single one is for all of them
        self.changes = 0

    def select(self, names: Sequence[str]) -> None:
        """The adapters of the next rows, in their order, or the one of all rows."""
        chosen = tuple(names) if len(set(names)) > 1 else (names[0],)
        if chosen != self.of_rows:
            self.of_rows, self.changes = chosen, self.changes + 1


class Adaptable:
    """Linear layers of one input side by side, whose rows may each have an adapter of their own."""

    def __init__(self, layers: Sequence[nn.Module], plain: Linear, adapters: Adapters) -> None:
        self.layers: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers]
        self._plain, self._adapters = plain, adapters
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}  # A [in, R], B [R, out] of each adapter with these layers
        self._of_rows: tuple[Tensor, Tensor] | None = None  # [n, in, R], [n, R, out]
        self._change = 0

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]."""
        names, plain = self._adapters.of_rows, self._plain(x, residual)
        if not any(name in self._pairs for name in names):
            return plain
        if len(names) == 1:
            a, b = self._pairs[names[0]]
            return torch.addmm(plain, x @ a, b)
        if self._change != self._adapters.changes:
            self._of_rows, self._change = self._stacked(names), self._adapters.changes
        assert self._of_rows is not None
        a, b = self._of_rows
        return torch.baddbmm(plain[:, None], torch.bmm(x[:, None], a), b)[:, 0]

    def add(self, name: str, found: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """An adapter's A [r, in] and B [out, r], scaled, of each layer that it has."""
        ranks = [0 if pair is None else len(pair[0]) for pair in found]
        if not any(ranks):
            return
        a = torch.cat([pair[0] for pair in found if pair is not None]).T.contiguous()
        b, row, column = a.new_zeros((sum(ranks), sum(layer.out_features for layer in self.layers))), 0, 0
        for layer, pair, rank in zip(self.layers, found, ranks, strict=True):
            if pair is not None:
                b[row : row + rank, column : column + layer.out_features] = pair[1].T
            row, column = row + rank, column + layer.out_features
        self._pairs[name], self._change = (a, b), -1

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self._pairs.pop(name, None)
        self._change = -1

    def _stacked(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        rank = max(len(b) for b in (self._pairs[name][1] for name in names if name in self._pairs))
        some_a, some_b = next(iter(self._pairs.values()))
        none = some_a.new_zeros((len(some_a), rank)), some_b.new_zeros((rank, some_b.shape[1]))
        pairs = [self._pairs.get(name, none) for name in names]
        return (
            torch.stack([F.pad(a, (0, rank - a.shape[1])) for a, _ in pairs]),
            torch.stack([F.pad(b, (0, 0, 0, rank - len(b))) for _, b in pairs]),
        )


def live(layers: Sequence[nn.Module]) -> Linear:
    """Linear layers of one input side by side, each computed by its module."""

    def multiply(x: Tensor, residual: Tensor | None = None) -> Tensor:
        found = layers[0](x) if len(layers) == 1 else torch.cat([layer(x) for layer in layers], dim=-1)
        return found if residual is None else residual + found

    return multiply


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
    """x @ weight.T + bias. On a CPU the weight is reordered once, where this PyTorch can."""
    weight = weight.detach()
    if weight.device.type == "cpu" and _can_reorder(weight.dtype):
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)

        def multiply(x: Tensor, residual: Tensor | None = None) -> Tensor:
            if residual is None:
                return torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], "")
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, reordered, bias, "add")

        return multiply
    transposed = weight.T

    def add(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return F.linear(x, weight, bias)
        return torch.addmm(residual if bias is None else residual + bias, x, transposed)

    return add


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
