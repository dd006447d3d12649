"""Higgs TTS 3 as an implementation of `families.base.Family`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from higgstune.families.base import (
    TRAINS_TABLE,
    Conditioning,
    DecoderParts,
    LayerParts,
    LoraTargets,
    NoExtensions,
    Pathway,
    base_of,
)
from higgstune.families.higgs_tts_3 import INFO, checkpoint, prompter
from higgstune.families.higgs_tts_3.checkpoint import PROJECTIONS, TABLE
from higgstune.families.higgs_tts_3.checks import HiggsTTS3Checks
from higgstune.families.higgs_tts_3.decoder import Decoder
from higgstune.families.higgs_tts_3.export import HiggsTTS3Export
from higgstune.families.higgs_tts_3.packed import with_training_forward
from higgstune.families.higgs_tts_3.prompter import Prompter
from higgstune.families.higgs_tts_3.sampler import RowSampler


class HiggsTTS3Family:
    """See `families.base.Family`."""

    info = INFO
    extensions = NoExtensions()
    export = HiggsTTS3Export()
    checks = HiggsTTS3Checks()
    lora_patterns = (PROJECTIONS,)
    trainable = (TABLE,)
    four_bits = PROJECTIONS

    read_config = staticmethod(checkpoint.read_config)
    spec = staticmethod(checkpoint.spec_of)
    architecture = staticmethod(checkpoint.architecture)
    plain_name = staticmethod(checkpoint.plain_name)
    check_tokenizer = staticmethod(prompter.check_tokenizer)
    build = staticmethod(checkpoint.build)
    load = staticmethod(checkpoint.load)
    decoder = Decoder
    sampler = RowSampler
    pack_forward = staticmethod(with_training_forward)

    def prompter(self, tokenizer: Any, config: Any) -> Prompter:
        """The prompter for a checkpoint's tokenizer."""
        return Prompter(tokenizer, config.num_codebooks, config.boc_id)

    def layers(self, model: Any) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers: nn.ModuleList = base_of(model).model.layers
        return layers

    def final_norm(self, model: Any) -> nn.Module:
        """The norm between the layers and the heads."""
        norm: nn.Module = base_of(model).model.norm
        return norm

    def lora_targets(self, kind: str, conditioning: Conditioning, attention: str) -> LoraTargets:
        """The seven projections of every layer, and where the kind says so the table, which stays one tensor."""
        return LoraTargets(PROJECTIONS, (TABLE,) if kind.endswith(TRAINS_TABLE) else ())

    def decoder_parts(self, model: Any) -> DecoderParts | None:
        """The modules for the engine; None for another activation than silu."""
        base = base_of(model)
        if base.config.hidden_act != "silu":
            return None
        layers = []
        for layer in base.model.layers:
            pathway = Pathway(layer.input_layernorm, layer.post_attention_layernorm, layer.mlp)
            layers.append(LayerParts(layer.self_attn, text=pathway, audio=pathway))
        inner = base.model
        return DecoderParts(layers, inner.norm, inner.rotary_emb, inner.embed_tokens, base.embed_rows, base.audio_table)

    def label_logits(
        self, model: Any, batch: Mapping[str, Tensor], limit: int, gathered: AbstractContextManager[None]
    ) -> dict[str, Tensor]:
        """Audio logits [M, K * V] and text logits [N, vocabulary] for the first `limit` labels of each kind."""
        base, device = base_of(model), next(model.parameters()).device
        moved = {key: value.to(device) for key, value in batch.items()}
        with gathered:
            hidden = base.model(
                inputs_embeds=base.embed_padded(moved), attention_mask=moved["attention_mask"], use_cache=False
            ).last_hidden_state.flatten(0, 1)
            audio = base.audio_logits(hidden[moved["audio_positions"][:limit]])
            text = base.text_logits(hidden[moved["text_positions"][:limit]])
        return {"audio_logits": audio, "text_logits": text}


FAMILY = HiggsTTS3Family()
