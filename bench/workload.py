"""What the bench computes on: a model with random weights, and clips with random codes and the lengths of real ones."""

from dataclasses import dataclass

import numpy as np
import report  # noqa: F401  # it puts the checkout's src on the path
import torch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgstune.families.base import Example
from higgstune.families.higgs_v2.delay import build_frames
from higgstune.kernels import IGNORE

FRAME_RATE = 25
BEFORE = 26  # tokens of the system message, the scene and the user's header in the released tokenizer
BETWEEN = 6  # the user's <|eot_id|>, the assistant's header, <|audio_out_bos|>
AFTER = 2  # <|audio_eos|>, <|eot_id|>
TOKENS_PER_SECOND = 3.3  # of a transcript: about 15 characters a second, 4.5 characters a token
SPECIAL = 16  # the last ids of the vocabulary: special tokens


@dataclass(frozen=True)
class Shape:
    """A model's proportions; `scale` divides width, vocabulary and codebooks of the released model alike."""

    scale: int = 1
    layers: int = 28

    def config(self) -> HiggsAudioV2Config:
        """Of the native class. Heads keep the ratio 3 : 1 of queries to keys."""
        hidden = 3072 // self.scale
        vocabulary = 128256 // self.scale
        codes = max(8, 1024 // self.scale)
        heads = 24 if self.scale == 1 else max(3, hidden // 64 // 3 * 3)
        return HiggsAudioV2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=8192 // self.scale,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3,
            head_dim=hidden // heads,
            codebook_size=codes + 2,
            num_codebooks=8,
            audio_stream_bos_id=codes,
            audio_stream_eos_id=codes + 1,
            pad_token_id=vocabulary - 1,
            audio_bos_token_id=vocabulary - 2,
            audio_token_id=vocabulary - 3,
            audio_delay_token_id=vocabulary - 4,
            bos_token_id=vocabulary - 5,
            eos_token_id=vocabulary - 6,
            tie_word_embeddings=False,
        )


def random_model(
    config: HiggsAudioV2Config, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> HiggsAudioV2ForConditionalGeneration:
    """The native class with random weights, made on the device itself."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = HiggsAudioV2ForConditionalGeneration._from_config(config, use_text_head=True, dtype=dtype)
    return model.eval()


def clip_seconds(count: int, *, low: float, high: float, median: float, sigma: float, seed: int) -> np.ndarray:
    """Lengths of clips [count], lognormal and drawn again where they fall outside low..high."""
    generator = np.random.default_rng(seed)
    found = np.empty(0)
    while len(found) < count:
        drawn = generator.lognormal(np.log(median), sigma, size=2 * count)
        found = np.concatenate([found, drawn[(drawn >= low) & (drawn <= high)]])
    return found[:count]


def make_examples(config: HiggsAudioV2Config, seconds: np.ndarray, *, seed: int) -> list[Example]:
    """Training examples of utterances of these lengths: random text and codes, labelled as with `transcript`."""
    generator = np.random.default_rng(seed)
    return [_example(config, round(float(length) * FRAME_RATE), generator) for length in seconds]


def _example(config: HiggsAudioV2Config, frames: int, generator: np.random.Generator) -> Example:
    codebooks, codes = config.num_codebooks, config.audio_stream_bos_id
    rows, row_labels = build_frames(
        generator.integers(0, codes, size=(frames, codebooks)), bos_id=codes, eos_id=config.audio_stream_eos_id
    )
    transcript = max(2, round(frames / FRAME_RATE * TOKENS_PER_SECOND))
    before = BEFORE + transcript + BETWEEN
    text = generator.integers(0, config.vocab_size - SPECIAL, size=before + AFTER)
    text[:BEFORE] = np.arange(BEFORE)  # the same in all utterances
    placeholders = np.full(len(rows), config.audio_token_id)
    placeholders[len(rows) - (codebooks - 1) :] = config.audio_delay_token_id
    ids = np.concatenate([text[:before], placeholders, text[before:]])
    labels = np.full(len(ids), IGNORE)
    labelled = np.r_[BEFORE : BEFORE + transcript + 1, before - 1, len(ids) - AFTER : len(ids)]
    labels[labelled] = ids[labelled]
    return Example(
        prompt="",
        input_ids=ids,
        audio_mask=(ids == config.audio_token_id) | (ids == config.audio_delay_token_id),
        audio_input_ids=rows,
        text_labels=labels,
        audio_labels=row_labels,
    )
