"""Conversion between the original layout (boson_multimodal, model_type `higgs_audio`) and the native one.

Only names and shapes change, no values. Source of the mapping: boson_multimodal f04f5df and the transformers class;
tests/model/test_load.py checks it against the original code's logits.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import HiggsAudioV2Config, LlamaConfig

from higgstune.checkpoint_files import read_weights
from higgstune.codec.whisper_encoder import WhisperTower, tower_from_original
from higgstune.errors import CheckpointError
from higgstune.families.base import Conditioning, Layout
from higgstune.families.higgs_v2.extensions import whisper_spec
from higgstune.families.higgs_v2.prompt import AUDIO_BOS, AUDIO_EOS, AUDIO_IN, AUDIO_OUT, AUDIO_OUT_BOS

_RENAMES = (
    (re.compile(r"^audio_codebook_embeddings\."), "model.embed_audio_tokens.embed_audio_tokens."),
    (re.compile(r"^(embed_tokens|embed_audio_tokens|layers|norm|audio_encoder_proj)\."), r"model.\1."),
    (re.compile(r"^audio_decoder_proj\."), ""),
)
_RENAMES_BACK = (
    (re.compile(r"^model\.embed_audio_tokens\.embed_audio_tokens\."), "audio_codebook_embeddings."),
    (re.compile(r"^model\.(embed_tokens|layers|norm|audio_encoder_proj)\."), r"\1."),
    (re.compile(r"^(audio|text)_lm_head\."), r"audio_decoder_proj.\1_lm_head."),
)
_ORIGINAL_TOKENS = {
    "audio_bos_token": AUDIO_BOS, "audio_eos_token": AUDIO_EOS, "audio_out_bos_token": AUDIO_OUT_BOS,
    "audio_in_token": AUDIO_IN, "audio_out_token": AUDIO_OUT,
}  # fmt: skip
# The original splits some matrices by rows into a frozen and a trainable half.
_HALVES = re.compile(r"^(.+)\.(?:embedding|linear)_(frozen|trainable)\.weight$")
_DROPPED = re.compile(r"(^|\.)(audio_codebook_weights|rotary_emb\..*)$")
_TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_bias", "attention_dropout", "mlp_bias", "head_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Original:
    """The weights of an original-format checkpoint in the native layout."""

    state: dict[str, Tensor]
    conditioning: Conditioning  # its extensions of the native class
    whisper: WhisperTower | None  # its audio_tower


def read_original(layout: Layout) -> Original:
    """The weights of an original-format folder, after `native_config` accepted it. Raises CheckpointError."""
    written = layout.config
    state = read_weights(layout.weights)
    tower = {key: state.pop(key) for key in list(state) if key.startswith("audio_tower.")}
    whisper = None
    if not written.get("skip_audio_tower", True):
        whisper = tower_from_original(written.get("audio_encoder_config"), tower, layout.folder)
    conditioning = Conditioning(audio_attention=bool(written.get("use_audio_out_self_attention")))
    if whisper is not None:
        token_id = written.get("audio_in_token_idx")
        if not isinstance(token_id, int):
            raise CheckpointError(f"{layout.folder / 'config.json'} has no audio_in_token_idx: download it again")
        conditioning = conditioning.model_copy(update={"whisper": whisper_spec(whisper, token_id)})
    return Original(native_state(state), conditioning, whisper)


def native_config(original: Mapping[str, Any]) -> HiggsAudioV2Config:
    """The native configuration of an original one.

    Raises CheckpointError for an architecture that the native class lacks, and names what would be lost.
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
        # The original repeats <|AUDIO_OUT|> where native has a delay token, for which it reserves the next id.
        audio_delay_token_id=original["audio_out_bos_token_id"] + 1,
        audio_stream_bos_id=original["audio_stream_bos_id"],
        audio_stream_eos_id=original["audio_stream_eos_id"],
        pad_token_id=original.get("pad_token_id"),
        bos_token_id=text.get("bos_token_id"),
        eos_token_id=text.get("eos_token_id"),
    )


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
    return {native_name(key): tensor for key, tensor in whole.items()}


def native_name(name: str) -> str:
    """A parameter's original name, or its native one without a leading `model.` -> its native name."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def original_config(
    native: HiggsAudioV2Config,
    *,
    tokens: Mapping[str, int],
    conditioning: Conditioning | None = None,
    encoder: Mapping[str, Any] | None = None,
    written: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The original configuration of a native one: the inverse of `native_config`.

    `tokens` are the ids of `<|AUDIO|>` and `<|audio_eos|>`, which native has only in its tokenizer; `encoder` is the
    Whisper encoder's configuration if `conditioning` has one; `written` is the configuration of a checkpoint that came
    in the original layout, whose other keys stay. Raises CheckpointError for what the layout cannot express.
    """
    if native.audio_delay_token_id != native.audio_bos_token_id + 1:
        raise CheckpointError(
            f"the delay token {native.audio_delay_token_id} does not follow <|audio_out_bos|> "
            f"({native.audio_bos_token_id}): the original layout has no place for it; use the native one"
        )
    has = conditioning or Conditioning()
    text = dict((written or {}).get("text_config") or {}) | _original_text(native)
    config = {
        "architectures": ["HiggsAudioModel"],
        "audio_adapter_type": "dual_ffn",
        "audio_embed_avg": False,
        "audio_ffn_hidden_size": native.hidden_size,
        "audio_ffn_intermediate_size": native.intermediate_size,
        "audio_dual_ffn_layers": list(range(native.num_hidden_layers)),
        "audio_decoder_proj_num_layers": 0,
        "use_delay_pattern": True,
        "use_audio_out_embed_projector": False,
        "use_rq_transformer": False,
        "encode_audio_in_tokens": True,
        **_ORIGINAL_TOKENS,
        **(written or {}),
        "model_type": "higgs_audio",
        "text_config": text,
        "audio_num_codebooks": native.num_codebooks,
        "audio_codebook_size": native.codebook_size - 2,
        "audio_in_token_idx": tokens[AUDIO_IN],
        "audio_eos_token_id": tokens[AUDIO_EOS],
        "audio_out_token_idx": native.audio_token_id,
        "audio_out_bos_token_id": native.audio_bos_token_id,
        "audio_stream_bos_id": native.audio_stream_bos_id,
        "audio_stream_eos_id": native.audio_stream_eos_id,
        "pad_token_id": native.pad_token_id,
        "use_audio_out_self_attention": has.audio_attention,
        "encode_whisper_embed": has.whisper is not None,
        "skip_audio_tower": has.whisper is None,
    }
    if has.whisper is not None:
        assert encoder is not None, "in this layout a checkpoint with Whisper conditioning includes its encoder"
        config["audio_encoder_config"] = {
            "model_type": "higgs_audio_encoder",
            "num_hidden_layers": encoder["encoder_layers"],
            **encoder,
        }
    return config


def original_state(native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Native names -> original names: the inverse of `native_state`, without its halves and buffers."""
    renamed = {}
    for key, tensor in native.items():
        for pattern, replacement in _RENAMES_BACK:
            key = pattern.sub(replacement, key)
        renamed[key] = tensor
    return renamed


def _with_llama_defaults(written: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what a text config leaves out: Llama's defaults, which differ from the native class's."""
    defaults: dict[str, Any] = LlamaConfig().to_dict()
    text: dict[str, Any] = {key: defaults.get(key) for key in _TEXT_KEYS}
    text |= {key: value for key, value in written.items() if value is not None}
    if written.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if written.get("head_dim") is None:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    return text


def _refuse_other_architectures(original: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    layers = range(text.get("num_hidden_layers", 0))
    dual = original.get("audio_dual_ffn_layers")
    wrong = {
        f"audio_adapter_type is {original.get('audio_adapter_type')!r}, only 'dual_ffn' has a native class": (
            original.get("audio_adapter_type") != "dual_ffn"
        ),
        f"audio FFNs in layers {dual} only, the native class has one in all {len(layers)}": (
            dual is not None and (len(dual) != len(layers) or sorted(dual) != list(layers))
        ),
        "Whisper conditioning is on (encode_whisper_embed), but its encoder is missing (skip_audio_tower)": bool(
            original.get("encode_whisper_embed") and original.get("skip_audio_tower")
        ),
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


def _original_text(native: HiggsAudioV2Config) -> dict[str, Any]:
    rope = dict(native.rope_parameters or {})
    theta = rope.pop("rope_theta", 10000.0)  # the default of `native_config`, too
    return {
        "model_type": "llama",
        **{key: getattr(native, key) for key in _TEXT_KEYS},
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "rope_parameters": None,
        "bos_token_id": native.bos_token_id,
        "eos_token_id": native.eos_token_id,
        "tie_word_embeddings": False,
    }
