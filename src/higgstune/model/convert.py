"""The original layout (boson_multimodal, model_type `higgs_audio`) as the native one.

Names and shapes only: no weight is changed. Source of the mapping: boson_multimodal f04f5df and the transformers
class; proven by tests/test_convert.py against the original code's logits.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import HiggsAudioV2Config, LlamaConfig

from higgstune.errors import CheckpointError
from higgstune.model.layout import Layout

_RENAMES = (
    (re.compile(r"^audio_codebook_embeddings\."), "model.embed_audio_tokens.embed_audio_tokens."),
    (re.compile(r"^(embed_tokens|layers|norm)\."), r"model.\1."),
    (re.compile(r"^audio_decoder_proj\."), ""),
)
# Parts that the original keeps as a frozen and a trainable half; the halves are rows of one matrix.
_HALVES = re.compile(r"^(.+)\.(?:embedding|linear)_(frozen|trainable)\.weight$")
_DROPPED = re.compile(r"(^|\.)(audio_codebook_weights|rotary_emb\..*)$")
_TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_bias", "attention_dropout", "mlp_bias", "head_dim",
)  # fmt: skip


def native_config(original: Mapping[str, Any]) -> HiggsAudioV2Config:
    """The native configuration of an original one.

    Raises CheckpointError for an architecture that the native class does not have: what would be lost is named.
    """
    text = _with_llama_defaults(original.get("text_config") or {})
    _refuse_other_architectures(original, text)
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {"rope_type": "default"})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return HiggsAudioV2Config(
        **{key: text[key] for key in _TEXT_KEYS if text.get(key) is not None},
        rope_parameters={"rope_theta": text.get("rope_theta", 10000.0), **rope},
        num_codebooks=original["audio_num_codebooks"],
        codebook_size=original["audio_codebook_size"] + 2,
        audio_token_id=original["audio_out_token_idx"],
        audio_bos_token_id=original["audio_out_bos_token_id"],
        # The original repeats <|AUDIO_OUT|> where native has a delay token: the next id is the one it reserves.
        audio_delay_token_id=original["audio_out_bos_token_id"] + 1,
        audio_stream_bos_id=original["audio_stream_bos_id"],
        audio_stream_eos_id=original["audio_stream_eos_id"],
        pad_token_id=original.get("pad_token_id"),
        bos_token_id=text.get("bos_token_id"),
        eos_token_id=text.get("eos_token_id"),
    )


def _with_llama_defaults(written: Mapping[str, Any]) -> dict[str, Any]:
    """A text config may leave out what is Llama's default, which is not the native class's."""
    defaults: dict[str, Any] = LlamaConfig().to_dict()
    text: dict[str, Any] = {key: defaults.get(key) for key in _TEXT_KEYS}
    text |= {key: value for key, value in written.items() if value is not None}
    if written.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if written.get("head_dim") is None:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    return text


def _refuse_other_architectures(original: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    layers = list(range(text.get("num_hidden_layers", 0)))
    dual = original.get("audio_dual_ffn_layers")
    wrong = {
        f"audio_adapter_type is {original.get('audio_adapter_type')!r}, only 'dual_ffn' has a native class": (
            original.get("audio_adapter_type") != "dual_ffn"
        ),
        f"audio FFNs in layers {dual} only, the native class has one in all {len(layers)}": (
            dual is not None and sorted(dual) != layers
        ),
        "audio self-attention (use_audio_out_self_attention) has no place in it": bool(
            original.get("use_audio_out_self_attention")
        ),
        "Whisper conditioning (encode_whisper_embed) has no place in it": bool(original.get("encode_whisper_embed")),
        "extra decoder layers (audio_decoder_proj_num_layers) have no place in it": bool(
            original.get("audio_decoder_proj_num_layers")
        ),
        "an audio embedding projector has no place in it": bool(original.get("use_audio_out_embed_projector")),
        "an RQ transformer has no place in it": bool(original.get("use_rq_transformer")),
        "it was trained without the delay pattern": original.get("use_delay_pattern") is False,
    }
    found = [reason for reason, holds in wrong.items() if holds]
    if found:
        raise CheckpointError("this original-format checkpoint cannot be loaded: " + "; ".join(found))


def native_state(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original names -> native names; frozen and trainable halves concatenated, buffers dropped."""
    whole = {key: tensor for key, tensor in original.items() if not _HALVES.match(key) and not _DROPPED.search(key)}
    for base in {match.group(1) for key in original if (match := _HALVES.match(key))}:
        halves = {
            m.group(2): tensor for key, tensor in original.items() if (m := _HALVES.match(key)) and m.group(1) == base
        }
        if set(halves) != {"frozen", "trainable"}:
            raise CheckpointError(f"the checkpoint has only the {', '.join(halves)} half of {base}")
        whole[f"{base}.weight"] = torch.cat([halves["frozen"], halves["trainable"]])
    renamed = {}
    for key, tensor in whole.items():
        for pattern, replacement in _RENAMES:
            key = pattern.sub(replacement, key)
        renamed[key] = tensor
    return renamed


def read_original(layout: Layout) -> tuple[HiggsAudioV2Config, dict[str, Tensor]]:
    """Config and weights of an original-format folder, in the native layout. Raises CheckpointError."""
    config = native_config(layout.config)
    state: dict[str, Tensor] = {}
    for file in layout.weights:
        state |= load_file(file)
    return config, native_state(state)
