"""Audio self-attention: in each layer, audio frames attend to earlier audio frames before the shared attention.

    h  = audio_input_layernorm(x)                      for audio frames
    x' = x + audio_attn(h)                             h attends to the earlier frames of its own example only
    their shared attention and residual then start from audio_post_audio_attn_layer_norm(x') and x'

Source: boson_multimodal's `HiggsAudioDualFFNDecoderLayer` with `use_audio_out_self_attention` (golden
`audio_attention`). There the whole sequence passes `audio_attn` and text is masked; here audio frames are gathered
first, so text costs nothing, no row of the softmax is empty, and the KV cache holds audio frames alone.

Letters in shapes: B batch, S tokens, A audio frames (after the delay pattern; the maximum of any example), D hidden
size, H head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, HiggsAudioV2Config
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2Attention,
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2RMSNorm,
)

from higgstune.kernels.quantize import compute_dtype, dequantized

ATTENTION = "audio_attn"
NORM = "audio_post_audio_attn_layer_norm"


class AudioCache:
    """The keys and values of `audio_attn` in all layers: audio frames only, with their own length."""

    def __init__(self) -> None:
        self.entries = DynamicCache()
        self.valid: Tensor | None = None  # [B, frames so far] False where an example has fewer frames than another
        self._seen = 0  # tokens of the shared cache that these frames belong to

    @classmethod
    def of(cls, cache: Cache) -> "AudioCache":
        """The audio cache attached to a cache of the shared attention, whose lifetime it shares."""
        if not hasattr(cache, "audio_attention"):
            cache.audio_attention = cls()  # type: ignore[attr-defined]
        return cache.audio_attention  # type: ignore[attr-defined]

    def follow(self, seen: int, added: int) -> None:
        """Record that `added` tokens follow the `seen` ones. Raises ValueError if the shared cache was changed."""
        if seen != self._seen:
            raise ValueError(
                f"the cache holds {seen} tokens, audio attention has seen {self._seen}: a cache that was cropped, "
                "reset or filled by another model cannot be continued; start a new one"
            )
        self._seen = seen + added

    def grow(self, valid: Tensor) -> Tensor:
        """Record the frames [B, A] that are about to be added; returns the validity [B, A'] of all frames."""
        self.valid = valid if self.valid is None else torch.cat([self.valid, valid], dim=1)
        return self.valid


@dataclass(frozen=True)
class AudioFrames:
    """The audio frames of a batch: their positions, and which of them attend to which; the same for every layer."""

    positions: Tensor | None  # [B, A] in the sequence; None: every token is an audio frame
    valid: Tensor  # [B, A] False where an example has fewer frames; such entries point at text and are not written to
    rotary: tuple[Tensor, Tensor]  # cos and sin [B, A, H], by position id in the whole sequence
    mask: Any  # in the form that the configured attention takes
    cache: DynamicCache | None

    def gather(self, hidden: Tensor) -> Tensor:
        """[B, S, D] -> the audio frames [B, A, D]."""
        return hidden if self.positions is None else _take(hidden, self.positions)

    def add(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [B, S, D] plus rows [B, A, D] at their positions; text stays as it is."""
        if self.positions is None:
            return hidden + rows
        rows = rows.masked_fill(~self.valid[..., None], 0)
        return hidden.scatter_add(1, self.positions[..., None].expand_as(rows), rows)


def find_audio_frames(
    config: HiggsAudioV2Config,
    hidden: Tensor,
    audio_mask: Tensor | None,
    max_frames: int,
    position_ids: Tensor,
    rotary: tuple[Tensor, Tensor],
    past: Cache | None,
) -> AudioFrames | None:
    """The audio frames of a forward pass; None without any.

    hidden [B, S, D]; audio_mask [B, S], None when decoding audio frames alone; at most `max_frames` in an example;
    position_ids [1 or B, S], which jump at every example of a packed sequence; rotary 2 x [1 or B, S, H].
    """
    if "flash" in (config._attn_implementation or ""):
        raise ValueError(
            f"audio attention cannot separate examples with {config._attn_implementation}: use sdpa, eager or "
            "flex_attention"
        )
    cache = None if past is None else AudioCache.of(past)
    if cache is not None and past is not None:
        cache.follow(int(past.get_seq_length()), hidden.shape[1])
    if audio_mask is None:
        positions, valid = None, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    elif max_frames == 0:
        return None
    else:
        # A stable sort puts each example's audio first, in order, without a loop or a wait for the device.
        positions = (~audio_mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :max_frames]
        valid = audio_mask.gather(1, positions)
        rotary = tuple(_take(part.expand(len(hidden), -1, -1), positions) for part in rotary)  # type: ignore[assignment]
    rows = hidden[:, : valid.shape[1]]  # the mask depends only on its shape and type
    if cache is not None:
        seen = cache.grow(valid)
        mask = create_causal_mask(config, inputs_embeds=rows, attention_mask=seen, past_key_values=cache.entries)
        return AudioFrames(positions, valid, rotary, mask, cache.entries)
    chain = _chain(position_ids.expand(len(hidden), -1), positions, valid)
    mask = create_causal_mask(config, inputs_embeds=rows, attention_mask=None, past_key_values=None, position_ids=chain)
    return AudioFrames(positions, valid, rotary, mask, None)


class AudioAttentionLayer(HiggsAudioV2DecoderLayer):
    """The native layer with audio self-attention; `add_audio_attention` turns a native layer into one, in place."""

    audio_attn: HiggsAudioV2Attention
    audio_post_audio_attn_layer_norm: HiggsAudioV2RMSNorm

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Any = None,
        audio_token_mask: Tensor | None = None,
        audio_frames: AudioFrames | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D] as the native layer, to the bit if o_proj is zero."""
        if audio_frames is not None:
            hidden_states = audio_frames.add(
                hidden_states, self._attend(audio_frames.gather(hidden_states), audio_frames)
            )
        normed = self._by_pathway(
            hidden_states, audio_token_mask, self.input_layernorm, self.audio_post_audio_attn_layer_norm
        )
        attended, _ = self.self_attn(
            hidden_states=normed,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self._by_pathway(hidden_states, audio_token_mask, self._text_ffn, self._audio_ffn)

    def _attend(self, rows: Tensor, audio: AudioFrames) -> Tensor:
        normed = self.audio_input_layernorm(rows)
        # Modules that are trained in full stay in float32 beside a bfloat16 base.
        own_dtype = compute_dtype(self.audio_attn.q_proj)
        attended, _ = self.audio_attn(
            hidden_states=normed.to(own_dtype),
            position_embeddings=audio.rotary,
            attention_mask=audio.mask,
            past_key_values=audio.cache,
        )
        return attended.to(rows.dtype)

    def _text_ffn(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(hidden))

    def _audio_ffn(self, hidden: Tensor) -> Tensor:
        return self.audio_mlp(self.audio_post_attention_layernorm(hidden))

    @staticmethod
    def _by_pathway(hidden: Tensor, audio_mask: Tensor | None, text: Any, audio: Any) -> Tensor:
        """[B, S, D] through `audio` for audio frames and through `text` for other tokens."""
        if audio_mask is None:
            return audio(hidden).to(hidden.dtype)
        result = torch.empty_like(hidden)
        result[audio_mask] = audio(hidden[audio_mask]).to(hidden.dtype)
        result[~audio_mask] = text(hidden[~audio_mask]).to(hidden.dtype)
        return result


def add_audio_attention(layers: nn.ModuleList, config: HiggsAudioV2Config) -> None:
    """Give every layer an audio self-attention that changes nothing yet and follows from the base alone.

    q, k, v are copies of the layer's `self_attn`, o_proj is zero, the norm is a copy of `audio_input_layernorm`. Beside
    a 4-bit base they are not quantized and have the values that its `self_attn` computes with.
    """
    for index, layer in enumerate(layers):
        layer.__class__ = AudioAttentionLayer
        assert isinstance(layer, AudioAttentionLayer)
        with torch.device("meta"):
            attention = HiggsAudioV2Attention(config, index)
            norm = HiggsAudioV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        weights = {name: dequantized(value).detach().clone() for name, value in layer.self_attn.named_parameters()}
        weights |= {name: torch.zeros_like(value) for name, value in weights.items() if name.startswith("o_proj.")}
        attention.load_state_dict(weights, assign=True)
        norm.load_state_dict({"weight": layer.audio_input_layernorm.weight.detach().clone()}, assign=True)
        layer.add_module(ATTENTION, attention.train(layer.training))
        layer.add_module(NORM, norm.train(layer.training))


def remove_audio_attention(layers: nn.ModuleList) -> None:
    """Turn the layers back into native ones, in place."""
    for layer in layers:
        delattr(layer, ATTENTION)
        delattr(layer, NORM)
        layer.__class__ = HiggsAudioV2DecoderLayer


def _take(hidden: Tensor, positions: Tensor) -> Tensor:
    """[B, S, D], [B, A] -> [B, A, D]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def _chain(position_ids: Tensor, positions: Tensor | None, valid: Tensor) -> Tensor:
    """Position ids [B, A] that increase by one within an example and jump between examples, which is how a mask
    separates packed examples.

    Invalid entries come last. Each is an example of its own, so that it attends to itself and nothing attends to it.
    """
    starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    example = starts.cumsum(1)
    if positions is not None:
        example = example.gather(1, positions)
    count = torch.arange(valid.shape[1], device=valid.device)
    example = torch.where(valid, example, position_ids.shape[1] + 1 + count)
    return count + 2 * example
