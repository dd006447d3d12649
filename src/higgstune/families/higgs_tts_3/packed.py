"""The training forward: packed batches (see `batch.collate.pack`) -> sums of losses.

The classes of a loaded model and of its layers are replaced in place by subclasses that add no parameter and keep
their own forward for every other call, such as generation's.

Letters in shapes: P tokens of the sequence, R rows of hidden states, D hidden size, H query heads, d head size.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from higgstune.errors import CheckpointError
from higgstune.families.base import base_of
from higgstune.families.higgs_tts_3.model import HiggsTTS3
from higgstune.kernels.attention import Segments, attend
from higgstune.kernels.fused import Order, feed_forward, gather, linear, linears, rms_norm, scatter
from higgstune.kernels.loss import Sums, head_sums
from higgstune.kernels.memory import leaves_holes, trim_heap

Stance = Literal["default", "eager_on_recompile"]  # of `torch.compiler.set_stance`


class HiggsTTS3ForTraining(HiggsTTS3):
    """Whose forward takes packed batches."""

    compiler_stance: Stance | None = None  # of compiled layers; None: layers are not compiled. See `model.compiled`

    def forward(self, *args: Any, lengths: tuple[int, ...] | None = None, **kwargs: Any) -> Any:
        """With a packed batch (see `batch.collate.pack`): sums of losses. Without: the forward of generation."""
        return super().forward(*args, **kwargs) if lengths is None else self._sums(lengths=lengths, **kwargs)

    def _sums(
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
        audio_positions: Tensor,
        audio_targets: Tensor,
        text_positions: Tensor,
        text_targets: Tensor,
    ) -> Sums:
        """Sums of losses by codebook [K] and of the text."""
        inner = self.model
        order = Order(to_sequence, from_sequence, shared_at)
        # One pathway for text and audio: the sequence is put in order once, not in every layer.
        hidden = scatter(torch.cat((inner.embed_tokens(text_ids), self.embed_rows(audio_ids))), order)
        cos, sin = (part[0] for part in inner.rotary_emb(hidden, position_ids[None]))
        segments = Segments.of(lengths, (cos, sin))
        trims = leaves_holes(hidden, inner.layers)
        for done, layer in enumerate(inner.layers, start=1):
            hidden = layer(hidden, segments=segments, compiler=self.compiler_stance)
            if trims:
                trim_heap(inner.layers, done)
        hidden = inner.norm(gather(hidden, order))
        config: Any = self.config
        table = self.audio_table.weight
        audio = head_sums(
            hidden.index_select(0, audio_positions).to(table.dtype), table, audio_targets, eos_id=config.boc_id + 1
        )
        text = head_sums(hidden.index_select(0, text_positions), inner.embed_tokens.weight, text_targets[:, None])
        return {
            **{f"audio_{key}": value for key, value in audio.items()},
            **{f"text_{key}": value.sum() for key, value in text.items()},  # of one value: FSDP accepts no views
        }


class PackedLayer(Qwen3DecoderLayer):
    """The layer of transformers, which also takes a packed sequence."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        segments: Segments | None = None,
        compiler: Stance | None = None,
        **kwargs: Any,
    ) -> Any:
        """[P, D] -> [P, D] with `segments`; without, the layer of transformers."""
        if segments is None:
            return super().forward(hidden_states, *args, **kwargs)
        # Compilation is slow and repeats for each kind of call, so validations and the first layer of a stage, whose
        # input needs no gradient, run uncompiled.
        if compiler is None or not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return _packed_layer(self, hidden_states, segments)
        with torch.compiler.set_stance(compiler):  # only here: a process may compile other functions as well
            return _compiled()(self, hidden_states, segments)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The compiled function for all layers and pack lengths, made on first use: see `model.compiled`."""
    return torch.compile(_packed_layer, dynamic=True)


def _packed_layer(layer: Any, hidden: Tensor, segments: Segments) -> Tensor:
    attention = layer.self_attn
    normed = rms_norm(hidden, layer.input_layernorm)
    parts = linears(normed, [attention.q_proj, attention.k_proj, attention.v_proj])
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)
    attended = attend(
        _norm_heads(q, attention.q_norm), _norm_heads(k, attention.k_norm), v, segments, attention.scaling
    )
    hidden = hidden + linear(attended.flatten(1), attention.o_proj)
    return hidden + feed_forward(rms_norm(hidden, layer.post_attention_layernorm), layer.mlp)


def _norm_heads(x: Tensor, norm: nn.Module) -> Tensor:
    """[P, H, d], each head by itself, before its rotation."""
    return rms_norm(x.flatten(0, 1), norm).view_as(x)


def with_training_forward(model: Any) -> Any:
    """Replace the class of a model and of its layers in place. Layers stay uncompiled.

    Raises CheckpointError for an architecture that the packed layers do not support.
    """
    base = base_of(model)
    config = base.config
    if config.hidden_act != "silu" or config.attention_dropout:
        raise CheckpointError(
            f"the checkpoint has hidden_act {config.hidden_act!r} and attention_dropout {config.attention_dropout}: "
            "training supports only silu without attention dropout, as in the released checkpoint"
        )
    for layer in base.model.layers:
        layer.__class__ = PackedLayer
    base._no_split_modules = [PackedLayer.__name__]  # FSDP finds the layers to wrap by the names of their classes
    if not isinstance(base, HiggsTTS3ForTraining):  # FSDP makes a subclass of it
        base.__class__ = HiggsTTS3ForTraining
    base.compiler_stance = None
    return model
