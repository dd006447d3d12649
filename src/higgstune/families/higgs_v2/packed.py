"""The training forward of the native model: packed batches (see `batch.collate.pack`) -> sums of losses.

The classes of a loaded model and of its layers are replaced in place by subclasses that add no parameter and keep the
native forward for every other call, such as generation's.

Letters in shapes: P tokens, R rows of hidden states (T of text, then A audio frames), D hidden size, H query heads,
G key heads, d head size, W Whisper features.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2DecoderLayer

from higgstune.errors import CheckpointError
from higgstune.families.higgs_v2.audio_attention import AudioAttentionLayer
from higgstune.kernels.attention import Segments, attend
from higgstune.kernels.fused import Order, feed_forward, gather, linear, linears, rms_norm, scatter
from higgstune.kernels.loss import Sums, head_sums
from higgstune.kernels.memory import leaves_holes, trim_heap
from higgstune.kernels.quantize import compute_dtype

Stance = Literal["default", "eager_on_recompile"]  # of `torch.compiler.set_stance`


class HiggsAudioForTraining(HiggsAudioV2ForConditionalGeneration):
    """`HiggsAudioV2ForConditionalGeneration` whose forward also takes a packed batch."""

    compiler_stance: Stance | None = None  # of compiled layers; None: layers are not compiled. See `model.compiled`

    def forward(self, *args: Any, lengths: tuple[int, ...] | None = None, **kwargs: Any) -> Any:
        """With a packed batch (see `batch.collate.pack`): sums of losses. Without: the native forward, unchanged."""
        if lengths is None:
            if "audio_targets" in kwargs:  # the native forward would accept and silently ignore them
                raise ValueError(
                    "padded batches with targets are not supported: pack the examples (batch.collate.pack)"
                )
            return super().forward(*args, **kwargs)
        return self._sums(lengths=lengths, **kwargs)

    def _sums(
        self,
        *,
        audio_positions: Tensor,
        audio_targets: Tensor,
        text_positions: Tensor,
        text_targets: Tensor,
        **batch: Any,
    ) -> Sums:
        hidden = self._hidden(**batch)
        assert self.text_lm_head is not None  # see `with_training_forward`
        audio = head_sums(
            hidden.index_select(0, audio_positions),
            self.audio_lm_head.weight,
            audio_targets,
            eos_id=self.config.audio_stream_eos_id,
        )
        text = head_sums(hidden.index_select(0, text_positions), self.text_lm_head.weight, text_targets[:, None])
        return {
            **{f"audio_{key}": value for key, value in audio.items()},
            **{f"text_{key}": value.sum() for key, value in text.items()},  # of one value: FSDP accepts no views
        }

    def _hidden(
        self,
        *,
        text_ids: Tensor,
        audio_ids: Tensor,
        position_ids: Tensor,
        to_sequence: Tensor,
        from_sequence: Tensor,
        shared_at: Tensor,
        lengths: tuple[int, ...],
        audio_lengths: tuple[int, ...],
        feature_positions: Tensor | None = None,
        whisper_features: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [R, D] after the last norm, text first."""
        inner = self.model
        embedded = self._with_features(inner.embed_tokens(text_ids), feature_positions, whisper_features)
        # On a GPU autocast sums codebooks in float32, and all layers would then compute in float32.
        hidden = torch.cat((embedded, inner.embed_audio_tokens(audio_ids).to(embedded.dtype)))
        cos, sin = (part[0] for part in inner.rotary_emb(hidden, position_ids[None]))
        of_audio = from_sequence[len(text_ids) :]
        layout = PackedLayout(
            len(text_ids),
            Order(to_sequence, from_sequence, shared_at),
            segments=Segments.of(lengths, (cos, sin)),
            audio_segments=Segments.of(audio_lengths, (cos[of_audio], sin[of_audio])),
            compiler=self.compiler_stance,
        )
        trims = leaves_holes(hidden, inner.layers)
        for done, layer in enumerate(inner.layers, start=1):
            hidden = layer(hidden, layout=layout)
            if trims:
                trim_heap(inner.layers, done)
        return inner.norm(hidden)

    def _with_features(self, embedded: Tensor, positions: Tensor | None, features: Tensor | None) -> Tensor:
        """Text embeddings [T, D], with projected Whisper features [W, d_model] at `positions` [W]."""
        spec = getattr(getattr(self.model, "conditioning", None), "whisper", None)
        if spec is None:
            if features is not None:
                raise ValueError("whisper_features need a model with a projector for them: add_conditioning first")
            return embedded
        if features is None or positions is None:
            # The projector still runs: if a parameter were unused on some ranks of a step, the others would wait for
            # its gradient.
            features = embedded.new_zeros((0, spec.d_model))
            positions = torch.empty(0, dtype=torch.long, device=embedded.device)
        projected = self.model.audio_encoder_proj(features).to(embedded.dtype)
        return embedded.index_copy(0, positions, projected)


def with_training_forward(model: HiggsAudioV2ForConditionalGeneration) -> HiggsAudioForTraining:
    """Replace the class of a native model and of its layers in place; its text head must be loaded. Layers stay
    uncompiled.

    Raises CheckpointError for an architecture that the packed layers do not support.
    """
    assert model.text_lm_head is not None, "load the model through load_model: it needs its text head"
    config = model.config
    if config.hidden_act != "silu" or config.attention_dropout:
        raise CheckpointError(
            f"the checkpoint has hidden_act {config.hidden_act!r} and attention_dropout {config.attention_dropout}: "
            "training supports only silu without attention dropout, as in the released checkpoint"
        )
    with_packed_layers(model.model.layers)
    # FSDP finds the layers to wrap by the names of their classes.
    model._no_split_modules = sorted({type(layer).__name__ for layer in model.model.layers})
    if not isinstance(model, HiggsAudioForTraining):  # FSDP makes a subclass of it
        model.__class__ = HiggsAudioForTraining
    assert isinstance(model, HiggsAudioForTraining)
    model.compiler_stance = None
    return model


@dataclass(frozen=True)
class PackedLayout:
    """How the rows of hidden states map to pathways, to the sequence and to its segments."""

    text: int  # the first T rows are text, the others audio
    order: Order
    segments: Segments
    audio_segments: Segments  # audio frames alone, for audio self-attention
    compiler: Stance | None = None  # None: layers are not compiled


class PackedLayer(HiggsAudioV2DecoderLayer):
    """The native layer, which also takes packed hidden states."""

    def forward(self, hidden_states: Tensor, *args: Any, layout: PackedLayout | None = None, **kwargs: Any) -> Tensor:
        """[R, D] -> [R, D] with `layout`; without, the native layer."""
        if layout is None:
            return super().forward(hidden_states, *args, **kwargs)
        return _run(self, hidden_states, layout, self.audio_input_layernorm)


class PackedAudioAttentionLayer(AudioAttentionLayer):
    """The layer with audio self-attention, which also takes packed hidden states."""

    def forward(self, hidden_states: Tensor, *args: Any, layout: PackedLayout | None = None, **kwargs: Any) -> Tensor:
        """[R, D] -> [R, D] with `layout`; without, the layer for other calls."""
        if layout is None:
            return super().forward(hidden_states, *args, **kwargs)
        text, rows = hidden_states.split((layout.text, len(hidden_states) - layout.text))
        own_dtype = compute_dtype(self.audio_attn.q_proj)  # of modules trained in full: float32 beside bfloat16
        normed = rms_norm(rows, self.audio_input_layernorm).to(own_dtype)
        q, k, v = _queries_keys_values(self.audio_attn, normed)
        attended = linear(
            attend(q, k, v, layout.audio_segments, self.audio_attn.scaling).flatten(1), self.audio_attn.o_proj
        )
        hidden_states = torch.cat((text, rows + attended.to(rows.dtype)))
        return _run(self, hidden_states, layout, self.audio_post_audio_attn_layer_norm)


_PACKED: dict[type[nn.Module], type[nn.Module]] = {
    HiggsAudioV2DecoderLayer: PackedLayer,
    AudioAttentionLayer: PackedAudioAttentionLayer,
}


def with_packed_layers(layers: nn.ModuleList) -> None:
    """Replace the layers' classes in place."""
    for layer in layers:
        layer.__class__ = _PACKED.get(type(layer), type(layer))


def _run(layer: nn.Module, hidden: Tensor, layout: PackedLayout, audio_norm: nn.Module) -> Tensor:
    # Compilation is slow and repeats for each kind of call, so validations and the first layer of a stage, whose input
    # needs no gradient, run uncompiled.
    if layout.compiler is None or not (torch.is_grad_enabled() and hidden.requires_grad):
        return _packed_layer(layer, hidden, layout, audio_norm)
    with torch.compiler.set_stance(layout.compiler):  # only here: a process may compile other functions as well
        return _compiled()(layer, hidden, layout, audio_norm)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The compiled function for all layers and pack lengths, made on first use: see `model.compiled`."""
    return torch.compile(_packed_layer, dynamic=True)


def _packed_layer(layer: Any, hidden: Tensor, layout: PackedLayout, audio_norm: nn.Module) -> Tensor:
    normed = _by_pathway(
        hidden, layout, lambda x: rms_norm(x, layer.input_layernorm), lambda x: rms_norm(x, audio_norm)
    )
    q, k, v = [scatter(x, layout.order) for x in _queries_keys_values(layer.self_attn, normed)]
    attended = gather(attend(q, k, v, layout.segments, layer.self_attn.scaling), layout.order)
    hidden = hidden + linear(attended.flatten(1), layer.self_attn.o_proj)
    return hidden + _by_pathway(
        hidden,
        layout,
        lambda x: feed_forward(rms_norm(x, layer.post_attention_layernorm), layer.mlp),
        lambda x: feed_forward(rms_norm(x, layer.audio_post_attention_layernorm), layer.audio_mlp),
    )


def _by_pathway(
    hidden: Tensor, layout: PackedLayout, text: Callable[[Tensor], Tensor], audio: Callable[[Tensor], Tensor]
) -> Tensor:
    text_rows, audio_rows = hidden.split((layout.text, len(hidden) - layout.text))
    return torch.cat((text(text_rows), audio(audio_rows)))


def _queries_keys_values(attention: Any, x: Tensor) -> list[Tensor]:
    """[R, D] -> [R, H, d], [R, G, d], [R, G, d]."""
    found = linears(x, [attention.q_proj, attention.k_proj, attention.v_proj])
    return [part.unflatten(-1, (-1, attention.head_dim)) for part in found]
