"""Extensions of the native class: audio self-attention, and a projector for Whisper features.

Both start as no-ops: added to a checkpoint that lacks them, they change no logit of any input by a bit. They are added
in place, by replacing classes of the loaded native model, whose source is not copied.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, HiggsAudioV2ForConditionalGeneration
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2Model
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, capture_outputs

from higgstune.codec.whisper_encoder import WhisperTower
from higgstune.families.base import Conditioning, WhisperSpec, base_of
from higgstune.families.higgs_v2 import audio_attention as attention

PROJECTOR = "audio_encoder_proj"
CONDITIONING_KEY = "higgstune_conditioning"  # of the extended layout's config.json


def whisper_spec(tower: WhisperTower, token_id: int) -> WhisperSpec:
    """The spec of an encoder; `token_id` is that of `<|AUDIO|>`."""
    return WhisperSpec(
        checkpoint=tower.checkpoint,
        revision=tower.revision,
        d_model=tower.d_model,
        chunk_frames=tower.chunk_frames,
        token_id=token_id,
    )


class FeatureProjector(nn.Module):
    """Whisper features [W, d_model] -> hidden states [W, D] of the `<|AUDIO|>` tokens."""

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Computed in the projector's own dtype, which is float32 while it is trained."""
        return self.linear(features.to(self.linear.weight))


class ConditionedModel(HiggsAudioV2Model):
    """The native inner model with extensions; `add_conditioning` turns a loaded model into one, in place."""

    conditioning: Conditioning
    audio_encoder_proj: FeatureProjector  # with Whisper conditioning only
    builtin: Conditioning = Conditioning()  # the extensions whose weights came with the checkpoint

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        audio_input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio_input_ids_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        whisper_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the native forward; `whisper_features` [W, d_model] belong to the batch's `<|AUDIO|>` tokens in order.

        With `output_attentions`, those of a layer's audio attention precede those of its shared attention.
        """
        if input_ids is None and audio_input_ids is None:
            raise ValueError("give input_ids, audio_input_ids or both; a conditioned model takes no inputs_embeds")
        audio_mask: Tensor | None = self.get_placeholder_mask(input_ids, None, audio_input_ids_mask)  # type: ignore[arg-type]
        hidden = self._embed(input_ids, audio_input_ids, audio_mask, audio_input_ids_mask, whisper_features)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None] + seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(hidden, position_ids)
        if self.conditioning.audio_attention:
            max_frames = 0 if audio_input_ids is None else audio_input_ids.shape[1]
            kwargs["audio_frames"] = attention.find_audio_frames(
                self.config, hidden, audio_mask, max_frames, position_ids, rotary, past_key_values
            )
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                audio_token_mask=audio_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=rotary,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _embed(
        self,
        input_ids: Tensor | None,
        audio_input_ids: Tensor | None,
        audio_mask: Tensor | None,
        audio_valid: Tensor | None,
        features: Tensor | None,
    ) -> Tensor:
        """The embeddings [B, S, D] of text tokens, audio frames and Whisper features."""
        rows = None if audio_input_ids is None else self.embed_audio_tokens(audio_input_ids)
        if input_ids is None or audio_mask is None:
            assert rows is not None
            return rows
        hidden = self.embed_tokens(input_ids)
        if self.conditioning.whisper is not None:
            hidden = self._with_features(hidden, input_ids == self.conditioning.whisper.token_id, features)
        if rows is None:
            return hidden
        rows = rows if audio_valid is None else rows[audio_valid]
        return hidden.masked_scatter(audio_mask[..., None], rows)

    def _with_features(self, hidden: Tensor, places: Tensor, features: Tensor | None) -> Tensor:
        if features is None:
            # Without features the token keeps its own embedding. The projector still runs: if a parameter were unused
            # on some ranks of a step, the others would wait for its gradient.
            assert self.conditioning.whisper is not None
            features = hidden.new_zeros((0, self.conditioning.whisper.d_model))
            places = torch.zeros_like(places)
        projected = self.audio_encoder_proj(features).to(hidden.dtype)
        return hidden.masked_scatter(places[..., None], projected)


def conditioning_of(model: Any) -> Conditioning:
    """The extensions of a native model, or of the base inside a peft model."""
    return getattr(base_of(model).model, "conditioning", Conditioning())


def builtin_conditioning(model: Any) -> Conditioning:
    """The extensions that came with the checkpoint, trained; the weights of others follow from the base."""
    return getattr(base_of(model).model, "builtin", Conditioning())


def check_features(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a batch has Whisper features, but not one for each of its `<|AUDIO|>` tokens."""
    features, spec = batch.get("whisper_features"), conditioning_of(model).whisper
    if features is None:
        return
    if spec is None:
        raise ValueError("whisper_features need a model with a projector for them: add_conditioning first")
    tokens = int((batch["input_ids"] == spec.token_id).sum())
    if len(features) != tokens:
        raise ValueError(f"{len(features)} Whisper features for {tokens} <|AUDIO|> tokens")


def add_conditioning(model: HiggsAudioV2ForConditionalGeneration, wanted: Conditioning) -> None:
    """Add the extensions that the model lacks, in place; they change no logit yet. Existing ones stay.

    Audio attention: see `add_audio_attention`. The projector starts with weight zero and the embedding of `<|AUDIO|>`
    as its bias, so that its tokens start with the base's own embedding. Both follow from the base alone: no random
    numbers.
    """
    inner, has = model.model, conditioning_of(model)
    if not wanted or wanted == has:
        return
    if wanted.audio_attention and not has.audio_attention:
        attention.add_audio_attention(inner.layers, model.config)
    if wanted.whisper is not None and has.whisper is None:
        inner.add_module(PROJECTOR, _neutral_projector(inner, wanted.whisper))
    inner.__class__ = ConditionedModel
    # `PreTrainedModel.__init__` registers this by class; output_attentions and output_hidden_states need it.
    _CAN_RECORD_REGISTRY[inner] = inner._can_record_outputs
    inner.conditioning = Conditioning(
        audio_attention=wanted.audio_attention or has.audio_attention, whisper=wanted.whisper or has.whisper
    )


def remove_conditioning(model: HiggsAudioV2ForConditionalGeneration) -> None:
    """Remove all extensions, in place, which leaves a plain native model."""
    inner, has = model.model, conditioning_of(model)
    if has.audio_attention:
        attention.remove_audio_attention(inner.layers)
    if has.whisper is not None:
        delattr(inner, PROJECTOR)
    if has:
        del inner.conditioning
        inner.__dict__.pop("builtin", None)
        inner.__class__ = HiggsAudioV2Model


def conditioning_modules(model: Any) -> list[str]:
    """Full names of the extensions' modules, in order."""
    names = (name for name, _ in base_of(model).named_modules())
    return [name for name in names if name.rpartition(".")[2] in (attention.ATTENTION, attention.NORM, PROJECTOR)]


def is_conditioning_key(key: str, of: Conditioning | None = None) -> bool:
    """Whether a parameter belongs to an extension, by its name in any layout; with `of`, to one of these."""
    names = [PROJECTOR] if of is None or of.whisper is not None else []
    names += [attention.ATTENTION, attention.NORM] if of is None or of.audio_attention else []
    return any(f".{name}." in f".{key}" for name in names)


def _neutral_projector(inner: HiggsAudioV2Model, spec: WhisperSpec) -> FeatureProjector:
    with torch.device("meta"):
        projector = FeatureProjector(spec.d_model, inner.config.hidden_size)
    bias = inner.embed_tokens.weight[spec.token_id].detach().clone()
    weight = bias.new_zeros((len(bias), spec.d_model))
    projector.load_state_dict({"linear.weight": weight, "linear.bias": bias}, assign=True)
    return projector.train(inner.training)
