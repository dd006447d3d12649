"""The native model with one more way through its forward: from a packed batch to sums of losses.

Training must go through the wrapped module's own `forward` (a DDP wrapper that is by-passed synchronises nothing), and
heads cost most where no label needs them. So the class of a loaded native model is exchanged for this subclass, which
adds no parameter and leaves every other call as it was.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import HiggsAudioV2ForConditionalGeneration

from higgstune.batch.packed import Packed
from higgstune.errors import CheckpointError
from higgstune.model.attention import Runs
from higgstune.model.conditioning import base_of
from higgstune.model.fused import Order
from higgstune.model.heap import give_back_holes, leaves_holes
from higgstune.model.loss import LossWeights, Sums, combine, head_sums, label_counts
from higgstune.model.packed import Places, Stance, with_packed_layers


class HiggsAudioForTraining(HiggsAudioV2ForConditionalGeneration):
    """`HiggsAudioV2ForConditionalGeneration` whose forward also takes a packed batch."""

    compiler_stance: Stance | None = None  # with which layers run compiled: see `model.compiled`

    def forward(self, *args: Any, lengths: tuple[int, ...] | None = None, **kwargs: Any) -> Any:
        """With a packed batch (see `batch.packed`): sums of losses. Without: the native forward, unchanged."""
        if lengths is None:
            if "audio_targets" in kwargs:  # the native forward would take them, and leave them out in silence
                raise ValueError("a padded batch with targets is not trained on: pack the examples (batch.packed.pack)")
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
            **{f"text_{key}": value.sum() for key, value in text.items()},  # of one; FSDP wants no views
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
        heard_positions: Tensor | None = None,
        whisper_features: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [R, D] after the last norm, text first."""
        inner = self.model
        embedded = self._with_features(inner.embed_tokens(text_ids), heard_positions, whisper_features)
        # On a GPU autocast adds up codebooks in float32, and all layers would then work on hidden states of that.
        hidden = torch.cat((embedded, inner.embed_audio_tokens(audio_ids).to(embedded.dtype)))
        cos, sin = (part[0] for part in inner.rotary_emb(hidden, position_ids[None]))
        of_audio = from_sequence[len(text_ids) :]
        places = Places(
            len(text_ids),
            Order(to_sequence, from_sequence, shared_at),
            whole=Runs.of(lengths, (cos, sin)),
            audio=Runs.of(audio_lengths, (cos[of_audio], sin[of_audio])),
            compiler=self.compiler_stance,
        )
        with_holes = leaves_holes(hidden, inner.layers)
        for done, layer in enumerate(inner.layers, start=1):
            hidden = layer(hidden, places=places)
            if with_holes:
                give_back_holes(inner.layers, done)
        return inner.norm(hidden)

    def _with_features(self, embedded: Tensor, positions: Tensor | None, features: Tensor | None) -> Tensor:
        """Text embeddings [T, D] with Whisper's projected features [W, d_model] at their positions [W]."""
        shape = getattr(getattr(self.model, "conditioning", None), "whisper", None)
        if shape is None:
            if features is not None:
                raise ValueError("whisper_features need a model with a projector for them: add_conditioning first")
            return embedded
        if features is None or positions is None:
            # The projector takes part all the same: a parameter that some ranks of a step do not use would leave the
            # others waiting.
            features = embedded.new_zeros((0, shape.d_model))
            positions = torch.empty(0, dtype=torch.long, device=embedded.device)
        projected = self.model.audio_encoder_proj(features).to(embedded.dtype)
        return embedded.index_copy(0, positions, projected)


def with_training_forward(model: HiggsAudioV2ForConditionalGeneration) -> HiggsAudioForTraining:
    """Exchange the class of a native model and of its layers in place; its text head must be loaded. None is compiled.

    Raises CheckpointError for an architecture that the packed layers do not compute.
    """
    assert model.text_lm_head is not None, "load the model through load_model: it needs its text head"
    config = model.config
    if config.hidden_act != "silu" or config.attention_dropout:
        raise CheckpointError(
            f"the checkpoint has hidden_act {config.hidden_act!r} and attention_dropout {config.attention_dropout}: "
            "training knows silu without attention dropout, as the released one has them"
        )
    with_packed_layers(model.model.layers)
    # FSDP looks for the layers that it wraps by the names of their classes.
    model._no_split_modules = sorted({type(layer).__name__ for layer in model.model.layers})
    if not isinstance(model, HiggsAudioForTraining):  # or a subclass of it, which FSDP makes
        model.__class__ = HiggsAudioForTraining
    assert isinstance(model, HiggsAudioForTraining)
    model.compiler_stance = None
    return model


def packed_loss(model: nn.Module, batch: Packed) -> Tensor:
    """The loss of a pack through a peft model with the training forward, in the dtype that training computes it in."""
    base = base_of(model)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        sums = model(**batch)
    return combine(sums, label_counts(batch, eos_id=base.config.audio_stream_eos_id), LossWeights())
