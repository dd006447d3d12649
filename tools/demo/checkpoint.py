"""The miniature base: its tokenizer, its model, and the tables that training sees as maps and the disk as they are."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from higgstune.data.messages import DEFAULT_SCENE, DEFAULT_SYSTEM
from higgstune.families.higgs_v2.prompt import native_chat_template

# The control tokens of the released checkpoint that a prompt can hold, in the order of their ids there.
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|scene_desc_start|>", "<|scene_desc_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>",
    "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>",
]  # fmt: skip
BASE_VOICE = "hibari"
SCENES = {
    BASE_VOICE: DEFAULT_SCENE,
    "slt": "A woman speaks in a quiet room.",
    "awb": "A man from Scotland speaks in a quiet room.",
    "kal16": "A robot speaks in a quiet room.",
}
SHIFTED_SCENE = "Another voice speaks in a quiet room."  # of `fit_codec.py encode --shift`
MAX_VOCABULARY = 4096


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a token for each word of `texts`, and the control tokens of the released checkpoint."""
    prompts = "system user assistant\n\n" + " ".join([DEFAULT_SYSTEM, *SCENES.values()])
    words = {word.strip(".,?") for text in [*texts, prompts] for word in text.split()}
    # Each word equally often, inside a sentence and capitalised at its beginning: merging ends when each is one token.
    forms = [f" {word}" for word in words] + [word[0].upper() + word[1:] for word in words if word[0].isalpha()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sorted(forms) * 2, prompts, prompts, "\n\n"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
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


class CodeGeometry(nn.Module):
    """A parametrization: maps [K, features, D] -> rows [K * (codes + 2), D], one for each code, BOS and EOS."""

    def __init__(self, codebooks: Tensor) -> None:
        """codebooks: the code vectors [K, codes, components]."""
        super().__init__()
        scaled = codebooks / codebooks.std(dim=1, keepdim=True)
        squares = scaled.pow(2).mean(dim=-1, keepdim=True) - 1
        vectors = torch.cat([scaled, squares, torch.ones_like(squares)], dim=-1)
        features = torch.zeros(len(codebooks), codebooks.shape[1] + 2, vectors.shape[-1] + 2)
        features[:, :-2, :-2] = vectors
        features[:, -2, -2] = features[:, -1, -1] = 1.0
        self.register_buffer("features", features, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return (self.features @ maps).flatten(0, 1)

    def right_inverse(self, rows: Tensor) -> Tensor:
        return torch.linalg.pinv(self.features) @ rows.unflatten(0, self.features.shape[:2])


class Sounds(nn.Module):
    """A parametrization of the text embeddings: [V, D] -> [V, D] with a linear map of each token's phonemes added."""

    PLACES = 10

    def __init__(self, sounds: Sequence[str], width: int) -> None:
        """sounds: the phonemes of each token, empty where it is not a word."""
        super().__init__()
        alphabet = {c: i for i, c in enumerate(sorted({c for word in sounds for c in word}))}
        features = torch.zeros(len(sounds), 2 * self.PLACES + 1, len(alphabet))
        for token, word in enumerate(sounds):
            for place, c in enumerate(word[: self.PLACES]):
                features[token, place, alphabet[c]] = 1  # from the beginning
            for place, c in enumerate(word[::-1][: self.PLACES]):
                features[token, self.PLACES + place, alphabet[c]] = 1  # from the end
            for c in word:
                features[token, -1, alphabet[c]] = 1
        self.register_buffer("features", features.flatten(1), persistent=False)
        self.map = nn.Parameter(torch.randn(self.features.shape[1], width) * 0.01)

    def forward(self, own: Tensor) -> Tensor:
        return own + self.features @ self.map

    def right_inverse(self, rows: Tensor) -> Tensor:
        return rows - self.features @ self.map


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
