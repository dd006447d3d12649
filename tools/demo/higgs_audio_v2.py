"""The miniature of Higgs Audio v2: see `checkpoint.Miniature`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from checkpoint import BASE_VOICE, words_as_tokens
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from higgstune.data.messages import DEFAULT_SCENE, DEFAULT_SYSTEM
from higgstune.families.base import TextTargets
from higgstune.families.higgs_v2.prompt import native_chat_template
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.kernels.fused import feed_forward as gated
from higgstune.kernels.fused import rms_norm

TEXT_TARGETS: TextTargets = "transcript"
ROWS_BEFORE = 1  # all BOS
# The control tokens of the released checkpoint that a prompt can hold, in the order of their ids there.
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|scene_desc_start|>", "<|scene_desc_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>",
    "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>",
]  # fmt: skip
SCENES = {
    BASE_VOICE: DEFAULT_SCENE,
    "slt": "A woman speaks in a quiet room.",
    "awb": "A man from Scotland speaks in a quiet room.",
    "kal16": "A robot speaks in a quiet room.",
}
SHIFTED_SCENE = "Another voice speaks in a quiet room."  # of `fit_codec.py encode --shift`
PRIMED_SHARE = 2 / 3  # of the clips of other voices
CONTEXT_SHARE = 0.1  # of the examples have an earlier turn, as references and long texts do


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a token for each word of `texts`, and the control tokens of the released checkpoint."""
    prompts = "system user assistant\n\n" + " ".join([DEFAULT_SYSTEM, *SCENES.values()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words_as_tokens(texts, prompts, SPECIAL_TOKENS),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = native_chat_template()
    return fast


def open_base(folder: Path) -> tuple[PreTrainedTokenizerFast, HiggsAudioV2ForConditionalGeneration]:
    """A base that `save` wrote, in float32."""
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, dtype=torch.float32)
    model.generation_config = GenerationConfig.from_pretrained(folder)  # without `use_text_head`
    return PreTrainedTokenizerFast.from_pretrained(folder), model


def build_model(tokenizer: PreTrainedTokenizerFast) -> HiggsAudioV2ForConditionalGeneration:
    """The native architecture at 1/12 of its width and 5 of its 28 layers."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = HiggsAudioV2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        codebook_size=1026,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|eot_id|>"],
        pad_token_id=ids["<|end_of_text|>"],
        audio_token_id=ids["<|AUDIO_OUT|>"],
        audio_bos_token_id=ids["<|audio_out_bos|>"],
        audio_delay_token_id=ids["<|reserved_special_token_6|>"],
    )
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=50, top_p=0.95, bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
    )  # fmt: skip
    model.generation_config.ras_win_len = None
    return model


def start_from(model: HiggsAudioV2ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    raise SystemExit("the miniature of Higgs Audio v2 starts from nothing, or from itself (--base)")


def prompter(tokenizer: PreTrainedTokenizerFast, model: HiggsAudioV2ForConditionalGeneration) -> Prompter:
    return Prompter(tokenizer, SpecialIds.from_config(model.config))


def scene(voice: str, index: int, in_context: bool) -> tuple[str, bool]:
    """Other voices have a scene of their own, or no loss in their first frames."""
    primed = voice != BASE_VOICE and (in_context or index % 3 < 3 * PRIMED_SHARE)
    return (DEFAULT_SCENE if primed else SCENES.get(voice, SHIFTED_SCENE)), primed and not in_context


def context_share(voice: str) -> float:
    return CONTEXT_SHARE


def tables(model: HiggsAudioV2ForConditionalGeneration) -> list[nn.Module]:
    return [model.audio_lm_head, model.model.embed_audio_tokens.embed_audio_tokens]


def audio_weight(model: HiggsAudioV2ForConditionalGeneration) -> Tensor:
    return model.audio_lm_head.weight.unflatten(0, (model.config.num_codebooks, -1))


def text_logits(model: HiggsAudioV2ForConditionalGeneration, hidden: Tensor) -> Tensor:
    return model.text_lm_head(hidden)


def embed(model: HiggsAudioV2ForConditionalGeneration, text_ids: Tensor, audio_ids: Tensor) -> Tensor:
    return torch.cat((model.model.embed_tokens(text_ids), model.model.embed_audio_tokens(audio_ids)))


def queries_keys_values(layer: nn.Module, hidden: Tensor, text: int) -> list[Tensor]:
    attention = layer.self_attn
    normed = torch.cat(
        (rms_norm(hidden[:text], layer.input_layernorm), rms_norm(hidden[text:], layer.audio_input_layernorm))
    )
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [part(normed).unflatten(-1, (-1, attention.head_dim)) for part in parts]


def feed_forward(layer: nn.Module, hidden: Tensor, text: int) -> Tensor:
    of_text = gated(rms_norm(hidden[:text], layer.post_attention_layernorm), layer.mlp)
    of_audio = gated(rms_norm(hidden[text:], layer.audio_post_attention_layernorm), layer.audio_mlp)
    return torch.cat((of_text, of_audio))


@torch.no_grad()
def save(model: HiggsAudioV2ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint in bfloat16, with plain tables."""
    state = {key: value for key, value in model.state_dict().items() if "parametrizations" not in key}
    state["audio_lm_head.weight"] = model.audio_lm_head.weight
    state["model.embed_tokens.weight"] = model.model.embed_tokens.weight
    state["model.embed_audio_tokens.embed_audio_tokens.weight"] = (
        model.model.embed_audio_tokens.embed_audio_tokens.weight
    )
    copy = HiggsAudioV2ForConditionalGeneration(model.config, use_text_head=True)
    copy.load_state_dict(state)
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
