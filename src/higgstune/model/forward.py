"""The native model with one more way through its forward: from a batch with targets to sums of losses.

Training must go through the wrapped module's own `forward` (a DDP wrapper that is by-passed synchronises nothing), and
heads cost most where no label needs them. So the class of a loaded native model is exchanged for this subclass, which
adds no parameter and leaves every other call as it was.
"""

from typing import Any

from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from higgstune.model.conditioning import conditioning_of
from higgstune.model.loss import Sums, audio_sums, text_sums


class HiggsAudioForTraining(HiggsAudioV2ForConditionalGeneration):
    """`HiggsAudioV2ForConditionalGeneration` whose forward also takes the targets of a batch."""

    def forward(
        self,
        *args: Any,
        audio_positions: Tensor | None = None,
        audio_targets: Tensor | None = None,
        text_positions: Tensor | None = None,
        text_targets: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """With targets (see `batch.padded`): sums of losses. Without: the native forward, unchanged."""
        if audio_positions is None or audio_targets is None or text_positions is None or text_targets is None:
            return super().forward(*args, **kwargs)
        if "whisper_features" in kwargs and conditioning_of(self).whisper is None:
            raise ValueError("whisper_features need a model with a projector for them: add_conditioning first")
        hidden = self.model(*args, **kwargs, use_cache=False).last_hidden_state.flatten(0, 1)  # [B * S, D]
        config = self.config
        audio_logits = self.audio_lm_head(hidden[audio_positions])
        audio_logits = audio_logits.unflatten(-1, (config.num_codebooks, config.codebook_size))
        assert self.text_lm_head is not None  # see `with_training_forward`
        text_logits = self.text_lm_head(hidden[text_positions])
        return self._sums(audio_logits, audio_targets, text_logits, text_targets)

    def _sums(self, audio_logits: Tensor, audio_targets: Tensor, text_logits: Tensor, text_targets: Tensor) -> Sums:
        return {
            **audio_sums(audio_logits, audio_targets, eos_id=self.config.audio_stream_eos_id),
            **text_sums(text_logits, text_targets),
        }


def with_training_forward(model: HiggsAudioV2ForConditionalGeneration) -> HiggsAudioForTraining:
    """Exchange the class of a native model in place and return it; its text head must be loaded."""
    assert model.text_lm_head is not None, "load the model through load_model: it needs its text head"
    model.__class__ = HiggsAudioForTraining
    assert isinstance(model, HiggsAudioForTraining)
    return model
