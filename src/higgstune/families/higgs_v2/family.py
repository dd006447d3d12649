"""Higgs Audio v2 as an implementation of `families.base.Family`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from higgstune.families.base import DecoderParts, LayerParts, Pathway, base_of
from higgstune.families.higgs_v2 import INFO, checkpoint, extensions, lora, prompter
from higgstune.families.higgs_v2.checks import HiggsV2Checks
from higgstune.families.higgs_v2.decoder import Decoder
from higgstune.families.higgs_v2.export import HiggsV2Export
from higgstune.families.higgs_v2.original import native_name
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.families.higgs_v2.sampler import RowSampler


class HiggsV2Extensions:
    """Audio self-attention, and a projector for Whisper features."""

    written = staticmethod(checkpoint.written_conditioning)
    of = staticmethod(extensions.conditioning_of)
    builtin = staticmethod(extensions.builtin_conditioning)
    add = staticmethod(extensions.add_conditioning)
    remove = staticmethod(extensions.remove_conditioning)
    owns = staticmethod(extensions.is_conditioning_key)
    modules = staticmethod(extensions.conditioning_modules)


class HiggsV2:
    """See `families.base.Family`."""

    info = INFO
    extensions = HiggsV2Extensions()
    export = HiggsV2Export()
    checks = HiggsV2Checks()
    lora_patterns = lora.LORA_PATTERNS
    trainable = ()
    four_bits = lora.FOUR_BITS

    read_config = staticmethod(checkpoint.read_config)
    spec = staticmethod(checkpoint.spec_of)
    architecture = staticmethod(checkpoint.architecture)
    plain_name = staticmethod(native_name)
    check_tokenizer = staticmethod(prompter.check_tokenizer)
    build = staticmethod(checkpoint.build)
    load = staticmethod(checkpoint.load)
    lora_targets = staticmethod(lora.lora_targets)
    decoder = Decoder
    sampler = RowSampler
    pack_forward = staticmethod(with_training_forward)

    def prompter(self, tokenizer: Any, config: Any) -> Prompter:
        """Raises CheckpointError for a tokenizer that cannot give character offsets."""
        return Prompter(tokenizer, SpecialIds.from_config(config))

    def layers(self, model: Any) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers: nn.ModuleList = base_of(model).model.layers
        return layers

    def final_norm(self, model: Any) -> nn.Module:
        """The norm between the layers and the heads."""
        norm: nn.Module = base_of(model).model.norm
        return norm

    def decoder_parts(self, model: Any) -> DecoderParts | None:
        """The modules for the engine; None with audio attention or Whisper, or another activation than silu."""
        base = base_of(model)
        if extensions.conditioning_of(base) or base.config.hidden_act != "silu":
            return None
        inner = base.model
        layers = [
            LayerParts(
                layer.self_attn,
                text=Pathway(layer.input_layernorm, layer.post_attention_layernorm, layer.mlp),
                audio=Pathway(layer.audio_input_layernorm, layer.audio_post_attention_layernorm, layer.audio_mlp),
            )
            for layer in inner.layers
        ]
        return DecoderParts(
            layers, inner.norm, inner.rotary_emb, inner.embed_tokens, inner.embed_audio_tokens, base.audio_lm_head
        )

    def label_logits(
        self, model: Any, batch: Mapping[str, Tensor], limit: int, gathered: AbstractContextManager[None]
    ) -> dict[str, Tensor]:
        """Audio logits [M, K * V] and text logits [N, vocab] for the first `limit` labels of each kind."""
        extensions.check_features(model, batch)
        base, device = base_of(model), next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items() if not key.endswith(("_positions", "_targets"))}
        with gathered:
            hidden = base.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
            audio = base.audio_lm_head(hidden[batch["audio_positions"][:limit].to(device)])
            text = base.text_lm_head(hidden[batch["text_positions"][:limit].to(device)])
        return {"audio_logits": audio, "text_logits": text}


FAMILY = HiggsV2()
