"""The decoder layers of a model that speaks: a cache of fixed size, filled by prompts and extended row by row.

A slot holds one clip. Slots 0 to n - 1 speak; one that ends is filled by the last of them, so that a step computes
nothing for clips that have ended. A step reads no value back and has no shape that depends on one.

Letters in shapes: S slots, n of them in a call, P positions of the cache, R rows of hidden states, D hidden size,
H query heads, G key heads, d head size, K codebooks, V classes of a codebook.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgstune.errors import CheckpointError
from higgstune.families.base import DecoderParts, Example, LayerParts, Pathway, Spec
from higgstune.generate.linears import Adaptable, Adapters, Linear, fused, live, product
from higgstune.generate.prefixes import Prefixes

_GROWTH = 256  # positions
_PREFIX_BYTES = 1 << 28  # of keys and values of earlier prompts
_Rows = Callable[[Tensor], Tensor]  # of hidden states


@dataclass(frozen=True)
class _FeedForward:
    norm: nn.Module
    gate_up: Linear
    down: Linear

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(_normed(hidden, self.norm)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, hidden)


class _Layer(NamedTuple):
    text_norm: _Rows
    audio_norm: _Rows
    qkv: Linear
    head_norm: tuple[Tensor, float] | None  # weights of q and k heads [H + G, d], and epsilon
    output: Linear
    text: _FeedForward
    audio: _FeedForward


class Stack:
    """Decoder layers with their cache."""

    def __init__(self, parts: DecoderParts, spec: Spec, slots: int, *, copy: bool) -> None:
        """`copy` speaks faster, from copies of the weights; without, from the model's own as they are at each step."""
        self._adapters = Adapters()
        self._prefixes = Prefixes(_PREFIX_BYTES if copy else 0)  # weights that may change give other keys
        self._adaptable: list[Adaptable] = []

        def join(layers: Sequence[nn.Module]) -> Linear:
            self._adaptable.append(Adaptable(layers, fused(layers) if copy else live(layers), self._adapters))
            return self._adaptable[-1]

        self._parts, self._spec = parts, spec
        self._layers = [_layer(layer, spec, join) for layer in parts.layers]
        self._head = product(cast(Tensor, parts.head.weight)) if copy else None
        weight: Any = parts.norm.weight
        self._cache = torch.zeros(
            (len(self._layers), slots, 0, 2 * spec.key_value_heads, spec.head_dim),
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.lengths = [0] * slots  # positions in use
        self._end = torch.zeros(slots, dtype=torch.long, device=weight.device)  # the same, on the device

    @property
    def positions(self) -> int:
        """The size of a slot."""
        return self._cache.shape[2]

    def reserve(self, positions: int) -> None:
        """Make every slot at least as large."""
        if positions > self.positions:
            more = _GROWTH * -(-positions // _GROWTH) - self.positions
            self._cache = F.pad(self._cache, (0, 0, 0, 0, 0, more))
            self._rotary = _rotary(self._parts.rotary, self.positions, self._cache)

    def add_adapter(self, name: str, lora: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> None:
        """LoRA that rows may choose: A [r, in] and B [out, r], scaled, of each linear layer that it changes.

        Raises CheckpointError for layers that are not among those of the stack.
        """
        if strange := lora.keys() - {layer for linear in self._adaptable for layer in linear.layers}:
            raise CheckpointError(f"the adapter {name} changes {len(strange)} layers outside the decoder layers")
        for linear in self._adaptable:
            linear.add(name, [lora.get(layer) for layer in linear.layers])

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter."""
        for linear in self._adaptable:
            linear.remove(name)
        self._prefixes.forget(name)

    def select(self, adapters: Sequence[str]) -> None:
        """The adapters of the rows to come, in the order of slots; one alone is for all. "" is the base."""
        self._adapters.select(adapters)

    def prefill(self, prompts: Sequence[Example], start: list[int] | None, first: int, adapter: str = "") -> Tensor:
        """Read prompts, and after each the row `start` [K] where the family gives it, into the slots from `first` on;
        the logits [n, K, V] of the next row. What an earlier prompt began with as well is copied.
        """
        device, spans = self._end.device, []
        for slot, prompt in enumerate(prompts, first):
            length = len(prompt) + (start is not None)
            known = self._prefixes.copy(prompt, self._cache[:, slot], adapter)
            spans.append((min(known, length - 1), length))
        left = [_rows(prompt, start, known) for prompt, (known, _) in zip(prompts, spans, strict=True)]
        audio, ids, rows = (torch.cat(parts).to(device) for parts in zip(*left, strict=True))
        of_audio, of_text = audio.nonzero()[:, 0], (~audio).nonzero()[:, 0]
        hidden = self._parts.embed_text(ids)
        hidden = hidden.index_copy(0, of_audio, self._parts.embed_rows(rows).to(hidden.dtype))
        for slot, (_, length) in enumerate(spans, first):
            self.lengths[slot] = length
        self._end[first : first + len(spans)] = torch.tensor([length for _, length in spans], device=device)
        places = torch.cat([torch.arange(*span) for span in spans]).to(device)
        cos, sin = (part[places, None] for part in self._rotary)
        for layer, cache in zip(self._layers, self._cache, strict=True):
            normed = _by_pathway(hidden, of_text, of_audio, layer.text_norm, layer.audio_norm)
            q, kv = self._heads(layer, normed, cos, sin)
            attended, begin = [], 0
            for slot, (at, length) in enumerate(spans, first):
                part = slice(begin, begin + length - at)
                cache[slot, at:length] = kv[part]
                attended.append(_causal(q[part], cache[slot, :length]))
                begin = part.stop
            hidden = layer.output(torch.cat(attended), hidden)
            hidden = _by_pathway(hidden, of_text, of_audio, layer.text, layer.audio)
        for slot, ((known, _), prompt) in enumerate(zip(spans, prompts, strict=True), first):
            self._prefixes.keep(prompt, known, self._cache[:, slot], adapter)
        last = torch.tensor([length - at for at, length in spans]).cumsum(0) - 1
        return self._logits(hidden[last.to(device)])

    def step(self, rows: Tensor) -> Tensor:
        """Feed the next row [n, K] of the first n slots; the logits [n, K, V] of the one after it."""
        count, longest = len(rows), max(self.lengths[: len(rows)]) + 1
        end = self._end[:count]
        hidden = self._parts.embed_rows(rows).to(self._cache.dtype)
        cos, sin = (part.index_select(0, end)[:, None] for part in self._rotary)
        into = end + self.positions * torch.arange(count, device=end.device)
        mask = None
        if min(self.lengths[:count]) + 1 < longest:
            seen = torch.arange(longest, device=end.device) <= end[:, None]
            mask = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, -torch.inf)[:, None, None]
        for layer, cache in zip(self._layers, self._cache, strict=True):
            q, kv = self._heads(layer, layer.audio_norm(hidden), cos, sin)
            cache.view(-1, *kv.shape[1:]).index_copy_(0, into, kv)
            k, v = cache[:count, :longest].transpose(1, 2).chunk(2, dim=1)
            # The query heads of a key head are rows of one attention, so that no key is repeated.
            grouped = q.unflatten(1, (k.shape[1], -1))
            attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
            hidden = layer.audio(layer.output(attended.flatten(1), hidden))
        self._end[:count] += 1
        for slot in range(count):
            self.lengths[slot] += 1
        return self._logits(hidden)

    def move(self, slot: int, to: int) -> None:
        """Put the clip of a slot into another one."""
        length = self.lengths[slot]
        self._cache[:, to, :length] = self._cache[:, slot, :length]
        self._end[to], self.lengths[to] = self._end[slot], length

    def _heads(self, layer: _Layer, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normed rows [R, D] -> rotated queries [R, H, d], and rotated keys and then values [R, 2G, d]."""
        heads = layer.qkv(normed).unflatten(-1, (-1, self._spec.head_dim))
        rotated, values = heads.split((self._spec.heads + self._spec.key_value_heads, self._spec.key_value_heads), 1)
        if layer.head_norm is not None:
            weight, epsilon = layer.head_norm
            rotated = F.rms_norm(rotated, rotated.shape[-1:], eps=epsilon) * weight
        rotated = torch.addcmul(rotated * cos, rotated.roll(self._spec.head_dim // 2, -1), sin)
        q, k = rotated.split((self._spec.heads, self._spec.key_value_heads), 1)
        return q, torch.cat((k, values), 1)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight: Any = self._parts.head.weight  # float32 while it is trained
        hidden = _normed(hidden, self._parts.norm).to(weight.dtype)
        logits = F.linear(hidden, weight) if self._head is None else self._head(hidden)
        return logits.unflatten(-1, (self._spec.num_codebooks, self._spec.classes))


def _layer(parts: LayerParts, spec: Spec, join: Callable[[Sequence[nn.Module]], Linear]) -> _Layer:
    attention: Any = parts.attention
    head_norm = None
    if (of_q := getattr(attention, "q_norm", None)) is not None:
        weights = (of_q.weight.expand(spec.heads, -1), attention.k_norm.weight.expand(spec.key_value_heads, -1))
        head_norm = torch.cat(weights), of_q.variance_epsilon
    audio = _pathway(parts.audio, join)
    text = audio if parts.text is parts.audio else _pathway(parts.text, join)
    qkv = join([attention.q_proj, attention.k_proj, attention.v_proj])
    return _Layer(text[0], audio[0], qkv, head_norm, join([attention.o_proj]), text[1], audio[1])


def _pathway(pathway: Pathway, join: Callable[[Sequence[nn.Module]], Linear]) -> tuple[_Rows, _FeedForward]:
    mlp: Any = pathway.mlp
    feed_forward = _FeedForward(pathway.mlp_norm, join([mlp.gate_proj, mlp.up_proj]), join([mlp.down_proj]))
    return functools.partial(_normed, norm=pathway.norm), feed_forward


def _rows(prompt: Example, start: list[int] | None, known: int) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt and a first row, from row `known` on: the mask of audio frames [R], ids with 0 in their places [R], the
    frames [A, K].
    """
    mask, rows = torch.from_numpy(prompt.audio_mask), torch.from_numpy(prompt.audio_input_ids)
    rows, mask, ids = rows[mask[:known].sum() :], mask[known:], torch.from_numpy(prompt.input_ids)[known:]
    ids = ids.masked_fill(mask, 0)
    if start is not None:
        mask, ids = F.pad(mask, (0, 1), value=True), F.pad(ids, (0, 1))
        rows = torch.cat((rows, torch.tensor([start])))
    return mask, ids, rows


def _by_pathway(hidden: Tensor, of_text: Tensor, of_audio: Tensor, text: _Rows, audio: _Rows) -> Tensor:
    if text is audio or not len(of_audio):
        return text(hidden)
    changed = torch.empty_like(hidden)
    changed[of_text] = text(hidden[of_text])
    changed[of_audio] = audio(hidden[of_audio])
    return changed


def _normed(hidden: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _causal(q: Tensor, kv: Tensor) -> Tensor:
    """Attention of a prompt's last rows: q [R, H, d], keys and values of all its rows [P, 2G, d] -> [R, H * d]."""
    k, v = kv.transpose(0, 1)[None].chunk(2, dim=1)
    new, total, mask = len(q), len(kv), None
    if new < total:
        mask = torch.arange(total, device=q.device) <= torch.arange(total - new, total, device=q.device)[:, None]
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return attended[0].transpose(0, 1).flatten(1)


def _rotary(rotary: Any, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [P, d]; those of the first half of a head with the sign of the half that rotates into it."""
    cos, sin = (part[0] for part in rotary(like, torch.arange(positions, device=like.device)[None]))
    half = sin.shape[-1] // 2
    return cos, torch.cat((-sin[:, :half], sin[:, half:]), -1)
