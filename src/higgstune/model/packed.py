"""The native model's layers on a packed batch: see `batch.packed` for the order of positions.

The classes of a loaded model's layers are exchanged in place for subclasses that add no parameter and leave the native
forward as it was for every other call, as generation's.

Letters in shapes: P positions, T of text, A rows of audio, D hidden size, H query heads, G key heads, d head size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2DecoderLayer

from higgstune.model.attention import Runs, attend
from higgstune.model.audio_attention import AudioAttentionLayer
from higgstune.model.fused import Order, collect, feed_forward, linear, linears, rms_norm, spread
from higgstune.model.quantize import compute_dtype

Stance = Literal["default", "eager_on_recompile"]  # of `torch.compiler.set_stance`


@dataclass(frozen=True)
class Places:
    """Where the rows of hidden states belong."""

    text: int  # the first T rows are text, the others audio
    order: Order
    whole: Runs
    audio: Runs  # rows of audio alone, for audio self-attention
    compiler: Stance | None = None  # None: layers are not compiled


class PackedLayer(HiggsAudioV2DecoderLayer):
    """The native layer, which also takes packed hidden states."""

    def forward(self, hidden_states: Tensor, *args: Any, places: Places | None = None, **kwargs: Any) -> Tensor:
        """[P, D] -> [P, D] with `places`; without, the native layer."""
        if places is None:
            return super().forward(hidden_states, *args, **kwargs)
        return _run(self, hidden_states, places, self.audio_input_layernorm)


class PackedAudioAttentionLayer(AudioAttentionLayer):
    """The layer with audio self-attention, which also takes packed hidden states."""

    def forward(self, hidden_states: Tensor, *args: Any, places: Places | None = None, **kwargs: Any) -> Tensor:
        """[P, D] -> [P, D] with `places`; without, the layer for other calls."""
        if places is None:
            return super().forward(hidden_states, *args, **kwargs)
        text, rows = hidden_states.split((places.text, len(hidden_states) - places.text))
        own_dtype = compute_dtype(self.audio_attn.q_proj)  # of modules trained in full: float32 beside bfloat16
        normed = rms_norm(rows, self.audio_input_layernorm).to(own_dtype)
        q, k, v = _queries_keys_values(self.audio_attn, normed)
        attended = linear(attend(q, k, v, places.audio, self.audio_attn.scaling).flatten(1), self.audio_attn.o_proj)
        hidden_states = torch.cat((text, rows + attended.to(rows.dtype)))
        return _run(self, hidden_states, places, self.audio_post_audio_attn_layer_norm)


_PACKED: dict[type[nn.Module], type[nn.Module]] = {
    HiggsAudioV2DecoderLayer: PackedLayer,
    AudioAttentionLayer: PackedAudioAttentionLayer,
}


def with_packed_layers(layers: nn.ModuleList) -> None:
    """Exchange the layers' classes in place."""
    for layer in layers:
        layer.__class__ = _PACKED.get(type(layer), type(layer))


def _run(layer: nn.Module, hidden: Tensor, places: Places, audio_norm: nn.Module) -> Tensor:
    # Compiling takes long, for each way of being called: not for validations, nor for the first layer of a stage.
    if places.compiler is None or not (torch.is_grad_enabled() and hidden.requires_grad):
        return _packed_layer(layer, hidden, places, audio_norm)
    with torch.compiler.set_stance(places.compiler):  # here alone: a process may compile other things as well
        return _compiled()(layer, hidden, places, audio_norm)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One for all layers and lengths of packs, made when it is first called: see `model.compiled`."""
    return torch.compile(_packed_layer, dynamic=True)


def _packed_layer(layer: Any, hidden: Tensor, places: Places, audio_norm: nn.Module) -> Tensor:
    normed = _by_pathway(
        hidden, places, lambda x: rms_norm(x, layer.input_layernorm), lambda x: rms_norm(x, audio_norm)
    )
    q, k, v = [spread(x, places.order) for x in _queries_keys_values(layer.self_attn, normed)]
    attended = collect(attend(q, k, v, places.whole, layer.self_attn.scaling), places.order)
    hidden = hidden + linear(attended.flatten(1), layer.self_attn.o_proj)
    return hidden + _by_pathway(
        hidden,
        places,
        lambda x: feed_forward(rms_norm(x, layer.post_attention_layernorm), layer.mlp),
        lambda x: feed_forward(rms_norm(x, layer.audio_post_attention_layernorm), layer.audio_mlp),
    )


def _by_pathway(
    hidden: Tensor, places: Places, text: Callable[[Tensor], Tensor], audio: Callable[[Tensor], Tensor]
) -> Tensor:
    text_rows, audio_rows = hidden.split((places.text, len(hidden) - places.text))
    return torch.cat((text(text_rows), audio(audio_rows)))


def _queries_keys_values(attention: Any, x: Tensor) -> list[Tensor]:
    """[P, D] -> [P, H, d], [P, G, d], [P, G, d]."""
    found = linears(x, [attention.q_proj, attention.k_proj, attention.v_proj])
    return [part.unflatten(-1, (-1, attention.head_dim)) for part in found]
