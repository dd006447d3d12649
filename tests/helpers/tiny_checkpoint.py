"""A checkpoint of the real format and architecture that is small enough to be made in every test."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerFast

from higgstune.families.higgs_v2.prompt import native_chat_template
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds

SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|scene_desc_start|>", "<|scene_desc_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>",
    "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>",
]  # fmt: skip
SENTENCES = ["The sun rises in the east.", "It was the night before my birthday.", "Hello there, good morning."]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the control tokens of the released checkpoint."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>"
    )
    fast.chat_template = native_chat_template()
    return fast


def tiny_config(tokenizer: Any, *, codes: int = 1024, **changes: Any) -> HiggsAudioV2Config:
    """The native configuration at hidden size 64 with 2 layers."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "codebook_size": codes + 2,
        "audio_stream_bos_id": codes, "audio_stream_eos_id": codes + 1,
        "bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": ids["<|eot_id|>"],
        "pad_token_id": ids["<|end_of_text|>"], "audio_token_id": ids["<|AUDIO_OUT|>"],
        "audio_bos_token_id": ids["<|audio_out_bos|>"], "audio_delay_token_id": ids["<|reserved_special_token_6|>"],
    }  # fmt: skip
    return HiggsAudioV2Config(**(settings | changes))


def tiny_model(config: HiggsAudioV2Config, seed: int = 0) -> HiggsAudioV2ForConditionalGeneration:
    """Random weights; larger than the default initialisation, so that every token matters to the logits."""
    torch.manual_seed(seed)
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
    return model.eval()


def tiny_prompter(*, codes: int = 1024) -> tuple[HiggsAudioV2ForConditionalGeneration, Prompter]:
    """A model and the prompter for it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tiny_config(tokenizer, codes=codes))
    return model, Prompter(tokenizer, SpecialIds.from_config(model.config))


def save_tiny_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint folder: config, safetensors, tokenizer, chat template, generation config."""
    tokenizer = tiny_tokenizer()
    tiny_model(tiny_config(tokenizer, **changes), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_codes(frames: int, seed: int, *, codes: int = 1024) -> np.ndarray:
    """[frames, 8] uint16."""
    return np.random.default_rng(seed).integers(0, codes, (frames, 8)).astype(np.uint16)
