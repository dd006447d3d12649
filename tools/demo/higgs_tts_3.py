"""The miniature of Higgs TTS 3: see `checkpoint.Miniature`. It has the released layout, without copies as heads."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from checkpoint import BASE_VOICE, SHIFTED_VOICE, words_as_tokens
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, normalizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from higgstune.data.messages import DEFAULT_SCENE
from higgstune.families import read_layout
from higgstune.families.base import TextTargets
from higgstune.families.higgs_tts_3.checkpoint import THETA, load, read_config, stored_name
from higgstune.families.higgs_tts_3.model import HiggsTTS3, HiggsTTS3Config
from higgstune.families.higgs_tts_3.prompter import Prompter
from higgstune.families.higgs_tts_3.tokens import AUDIO, FIRST, REFERENCE_AUDIO, REFERENCE_TEXT, TEXT, TTS
from higgstune.kernels.fused import feed_forward as gated
from higgstune.kernels.fused import rms_norm

# The released tokenizer's tokens beyond its BPE, in the order of their ids there.
_ADDED = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
    <|file_sep|> <|asr|> <|streaming_asr|> <|tts|> <|streaming_tts|> <|audio_cont_txt|> <|audio|> <|audio_end|>
    <|text|> <|text_end|> <|eoc|> <|user|> <|assistant|> <|system|> <|await_audio|> <|ref_audio|> <|ref_text|>
    <|emotion:elation|> <|emotion:amusement|> <|emotion:enthusiasm|> <|emotion:determination|>
    <|emotion:pride|> <|emotion:contentment|> <|emotion:affection|> <|emotion:relief|>
    <|emotion:contemplation|> <|emotion:confusion|> <|emotion:surprise|> <|emotion:awe|> <|emotion:longing|>
    <|emotion:arousal|> <|emotion:anger|> <|emotion:fear|> <|emotion:disgust|> <|emotion:bitterness|>
    <|emotion:sadness|> <|emotion:shame|> <|emotion:helplessness|> <|env:music|> <|env:noise|>
    <|style:singing|> <|style:shouting|> <|style:whispering|> <|sfx:cough|> <|sfx:laughter|> <|sfx:crying|>
    <|sfx:screaming|> <|sfx:burping|> <|sfx:humming|> <|sfx:sigh|> <|sfx:sniff|> <|sfx:sneeze|>
    <|prosody:speed_very_slow|> <|prosody:speed_slow|> <|prosody:speed_fast|> <|prosody:speed_very_fast|>
    <|prosody:pitch_low|> <|prosody:pitch_high|> <|prosody:pause|> <|prosody:long_pause|> <|chatml|>
    <|prosody:expressive_high|> <|prosody:expressive_low|>
"""
ADDED_TOKENS = _ADDED.split()
TEXT_TARGETS: TextTargets = "none"  # no server reads the logits of text
ROWS_BEFORE = 0
CONTEXT_SHARE = {BASE_VOICE: 0.1, SHIFTED_VOICE: 0.0}  # of the examples have a reference
OTHERS_CONTEXT_SHARE = 1 / 3
GENERATION = {"do_sample": True, "temperature": 0.5, "top_k": 50, "top_p": 0.95}
# What the prompt's tokens begin as, of the miniature of Higgs Audio v2.
LIKE = {TTS: "<|begin_of_text|>", TEXT: "<|end_header_id|>", REFERENCE_TEXT: "<|end_header_id|>",
        REFERENCE_AUDIO: "<|audio_out_bos|>"}  # fmt: skip


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a token for each word of `texts`, then the released tokenizer's added tokens."""
    tokenizer = words_as_tokens(texts, "", [])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in ADDED_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=FIRST, pad_token=FIRST, clean_up_tokenization_spaces=False
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> HiggsTTS3:
    """The released architecture at a tenth of its width and 5 of its 36 layers."""
    end = tokenizer.convert_tokens_to_ids(FIRST)
    config = HiggsTTS3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": float(THETA), "rope_type": "default"},
    )
    return HiggsTTS3(config)


@torch.no_grad()
def start_from(model: HiggsTTS3, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Take over what fits of the miniature of Higgs Audio v2: words, attention, the pathway of audio, audio embeddings.

    It cannot be converted: it has no q/k norms and other rotary frequencies, two pathways, and a head of its own.
    """
    theirs = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    words = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    audio = theirs["model.embed_audio_tokens.embed_audio_tokens.weight"]
    table, embedding = model.audio_table.weight, model.model.embed_tokens.weight
    table.copy_(audio)
    for token, number in tokenizer.get_vocab().items():
        if (other := words.get(LIKE.get(token, token))) is not None:
            embedding[number] = theirs["model.embed_tokens.weight"][other]
    # What predicts code 0 there is the row in which all codebooks begin.
    embedding[tokenizer.convert_tokens_to_ids(AUDIO)] = audio.unflatten(0, (model.config.num_codebooks, -1))[:, -2].sum(
        0
    )
    for number, layer in enumerate(model.model.layers):
        first = f"model.layers.{number}"
        layer.input_layernorm.weight.copy_(theirs[f"{first}.audio_input_layernorm.weight"])
        layer.post_attention_layernorm.weight.copy_(theirs[f"{first}.audio_post_attention_layernorm.weight"])
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).weight.copy_(theirs[f"{first}.self_attn.{name}.weight"])
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).weight.copy_(theirs[f"{first}.audio_mlp.{name}.weight"])
        # The norms keep the scale that queries and keys of inputs without direction have there.
        for projection, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
            weight = getattr(layer.self_attn, projection).weight * layer.input_layernorm.weight
            getattr(layer.self_attn, norm).weight.fill_(float(weight.square().sum(-1).mean().sqrt()))
    model.model.norm.weight.copy_(theirs["model.norm.weight"])


def open_base(folder: Path) -> tuple[PreTrainedTokenizerFast, HiggsTTS3]:
    model, _ = load(read_layout(folder), read_config(folder), torch.float32)
    return PreTrainedTokenizerFast.from_pretrained(folder), model


@torch.no_grad()
def save(model: HiggsTTS3, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    state = {key: value for key, value in model.state_dict().items() if "parametrizations" not in key}
    state |= {
        "audio_table.weight": model.audio_table.weight,
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
    }
    stored = {stored_name(key): value.to(torch.bfloat16).contiguous() for key, value in state.items()}
    save_file(stored, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(_released_config(model.config), indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    tokenizer.save_pretrained(out)


def _released_config(config: HiggsTTS3Config) -> dict[str, object]:
    text = (
        "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
        "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size",
    )  # fmt: skip
    return {
        "architectures": ["HiggsMultimodalQwen3ForConditionalGeneration"],
        "model_type": config.model_type,
        "audio_token_id": -100,
        "dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen3",
            **{key: getattr(config, key) for key in text},
            "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        "audio_encoder_config": {
            "encoder_type": "discrete",
            "num_codebooks": config.num_codebooks,
            "vocab_size": config.codebook_size,
            "out_dim": config.hidden_size,
            "tie_word_embeddings": True,
            "use_delay_pattern": True,
        },
    }


def prompter(tokenizer: PreTrainedTokenizerFast, model: HiggsTTS3) -> Prompter:
    return Prompter(tokenizer, model.config.num_codebooks, model.config.boc_id)


def scene(voice: str, index: int, in_context: bool) -> tuple[str, bool]:
    """There are no scenes: other voices have a reference, or no loss in their first frames."""
    return DEFAULT_SCENE, voice != BASE_VOICE and not in_context


def context_share(voice: str) -> float:
    return CONTEXT_SHARE.get(voice, OTHERS_CONTEXT_SHARE)


def tables(model: HiggsTTS3) -> list[nn.Module]:
    return [model.audio_table]


def audio_weight(model: HiggsTTS3) -> Tensor:
    return model.audio_table.weight.unflatten(0, (model.config.num_codebooks, -1))


def text_logits(model: HiggsTTS3, hidden: Tensor) -> Tensor:
    return model.text_logits(hidden)


def embed(model: HiggsTTS3, text_ids: Tensor, audio_ids: Tensor) -> Tensor:
    return torch.cat((model.model.embed_tokens(text_ids), model.embed_rows(audio_ids)))


def queries_keys_values(layer: nn.Module, hidden: Tensor, text: int) -> list[Tensor]:
    attention = layer.self_attn
    normed = rms_norm(hidden, layer.input_layernorm)
    q, k, v = (
        part(normed).unflatten(-1, (-1, attention.head_dim))
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return [_each_head(q, attention.q_norm), _each_head(k, attention.k_norm), v]


def _each_head(x: Tensor, norm: nn.Module) -> Tensor:
    return rms_norm(x.flatten(0, 1), norm).view_as(x)


def feed_forward(layer: nn.Module, hidden: Tensor, text: int) -> Tensor:
    return gated(rms_norm(hidden, layer.post_attention_layernorm), layer.mlp)
