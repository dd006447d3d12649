"""Causal attention within each segment of a packed sequence: no token attends beyond the start of its segment.

Letters in shapes: P tokens, H query heads, G key heads, d head size, n rows of a block, b keys that the block sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention.varlen import varlen_attn

from higgstune.environment import to_device_async
from higgstune.kernels.fused import as_autocast, rotate

SHORT_SEGMENT = 512  # tokens, 17 s of speech: in longer segments the kept probabilities would take too much memory
_BLOCK = 64  # tokens whose queries are computed together
# torch 2.11 has no such argument: it takes fewer heads of keys without it.
_GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class Segments:
    """The segments of a sequence: examples, one after the other."""

    lengths: tuple[int, ...]
    longest: int
    offsets: Tensor  # [segments + 1] int32, on the device
    cos: Tensor  # [P, 1, d / 2] by position id, which restarts in each segment
    sin: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], rotary: tuple[Tensor, Tensor]) -> "Segments":
        """`rotary`: cos and sin [P, d], whose halves are equal."""
        cos, sin = (part.chunk(2, dim=-1)[0].unsqueeze(1).contiguous() for part in rotary)
        offsets = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
        return cls(lengths, max(lengths, default=0), to_device_async(offsets, cos.device), cos, sin)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float) -> Tensor:
    """q [P, H, d], k and v [P, G, d], not yet rotated, in the order of the sequence -> [P, H, d]."""
    q, k, v = [
        as_autocast(x) for x in (rotate(q, segments.cos, segments.sin), rotate(k, segments.cos, segments.sin), v)
    ]
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        ends = (segments.offsets, segments.offsets, segments.longest, segments.longest)
        attended = varlen_attn(q, k, v, *ends, scale=scaling, window_size=(-1, 0), **_GROUPED)
        assert isinstance(attended, Tensor)
        return attended
    return _attend_by_segment(q, k, v, segments, scaling)


@torch.compiler.disable  # each pack has segments of other lengths and would be compiled anew
def _attend_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float) -> Tensor:
    exact = q.dtype in (torch.float32, torch.float64)
    stretches = [
        (_attend_short if short else _attend_long, tuple(lengths))
        for short, lengths in groupby(segments.lengths, lambda length: exact and length <= SHORT_SEGMENT)
    ]
    if len(stretches) == 1:
        return stretches[0][0](q, k, v, segments.lengths, scaling)
    tokens = [sum(lengths) for _, lengths in stretches]
    parts = zip(stretches, *(x.split(tokens) for x in (q, k, v)), strict=True)
    return torch.cat([kind(a, b, c, lengths, scaling) for (kind, lengths), a, b, c in parts])


def _attend_long(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scaling: float) -> Tensor:
    by_segment = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v))
    attended = [
        F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        for query, key, value in zip(*by_segment, strict=True)
    ]
    return torch.cat(attended, dim=2).squeeze(0).transpose(0, 1)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scaling: float) -> Tensor:
    groups, heads = k.shape[1], q.shape[1] // k.shape[1]
    rows = (q * scaling).unflatten(1, (groups, heads)).transpose(0, 1).flatten(1, 2)
    attended = _ShortSegments.apply(rows, k.transpose(0, 1), v.transpose(0, 1), lengths, heads)
    return attended.unflatten(1, (len(q), heads)).transpose(0, 1).flatten(1, 2)


class _Block(NamedTuple):
    """Neighbouring queries, `first` to `end`, and all keys that any of them sees, `start` to `end`."""

    start: int  # of the segment
    first: int
    end: int


def _blocks(lengths: tuple[int, ...]) -> list[_Block]:
    """The blocks of all segments, in order."""
    return [
        _Block(end - length, first, min(first + _BLOCK, end))
        for length, end in zip(lengths, accumulate(lengths), strict=True)
        for first in range(end - length, end, _BLOCK)
    ]


def _by_rows(ctx: Any, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of [G, P * heads, d] in their blocks' rows: one call, where a slice for each took half of the time."""
    return (tensor.split(ctx.rows, dim=1) for tensor in tensors)


class _ShortSegments(Function):
    """Attention of short segments on a CPU, in half the time of PyTorch's kernel, which takes 32 or 64 rows of one head
    at a time.

    Here the query heads of a key head form one matrix, blocks leave out what causality hides, and the probabilities are
    kept rather than recomputed: b numbers for each row, where the kernel keeps d.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], heads: int) -> Tensor:
        """q [G, P * heads, d], scaled already; k and v [G, P, d]."""
        later = q.new_full((_BLOCK, _BLOCK), float("-inf")).triu_(1).repeat_interleave(heads, dim=0)
        ctx.blocks, ctx.rows = _blocks(lengths), [heads * (end - first) for _, first, end in _blocks(lengths)]
        attended, kept = torch.empty_like(q), []
        columns = k.mT
        for (start, first, end), queries, out in zip(ctx.blocks, *_by_rows(ctx, q, attended), strict=True):
            scores = torch.bmm(queries, columns[:, :, start:end])  # [G, n, b]
            scores[:, :, first - start :].add_(later[: queries.shape[1], : end - first])
            weights = scores.softmax(-1)
            torch.bmm(weights, v[:, start:end], out=out)
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        parts = zip(ctx.blocks, kept, *_by_rows(ctx, q, grad, of_q), strict=True)
        columns = v.mT
        for (start, _, end), weights, queries, of_attended, out in parts:
            of_v[:, start:end].baddbmm_(weights.mT, of_attended)
            of_weights = torch.bmm(of_attended, columns[:, :, start:end])
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            torch.bmm(of_scores, k[:, start:end], out=out)
            of_k[:, start:end].baddbmm_(of_scores.mT, queries)
        return of_q, of_k, of_v, None, None
