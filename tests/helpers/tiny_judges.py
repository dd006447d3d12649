"""Judges of the real formats, with random weights, that are small enough to be made in every test."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tiny_whisper import save_tiny_whisper
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMForXVector,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from higgstune.evaluation.judges.campplus import _Network

WAVLM = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_buckets": 32,
    "max_bucket_distance": 80, "tdnn_dim": (32, 32, 32, 32, 64), "xvector_output_dim": 24,
    "use_weighted_layer_sum": True,
}  # fmt: skip
"""Sizes only: the kernels are the real ones, 20 ms a frame."""


def save_tiny_wavlm(folder: Path, seed: int = 0) -> Path:
    """A WavLM for speaker verification."""
    torch.manual_seed(seed)
    WavLMForXVector(WavLMConfig(**WAVLM)).eval().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)
    return folder


def save_tiny_asr(folder: Path, *, seconds: int = 30, multilingual: bool = True) -> Path:
    """A Whisper with tokenizer and generation settings; its transcripts are nonsense, and always the same."""
    save_tiny_whisper(folder, seconds=seconds)
    tokens = sorted(ByteLevel.alphabet())
    special = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>",
               "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|endoftext|>"])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([f"<|{step / 50:.2f}|>" for step in range(50 * seconds + 1)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ["<|endoftext|>", *special]}
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer))
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    marks = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    for key, value in marks.items():
        setattr(model.config, key, value)
    languages = {"lang_to_id": {token: ids[token] for token in ("<|en|>", "<|de|>")}}
    tasks = {"task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}}
    model.generation_config = GenerationConfig(
        **marks, max_length=16, is_multilingual=multilingual, no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"], return_timestamps=False, suppress_tokens=[ids["<|nospeech|>"]],
        begin_suppress_tokens=[end], **(languages | tasks if multilingual else {}),
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def save_campplus(file: Path, seed: int = 0) -> Path:
    """A CAM++ of the published sizes (28 MB, whatever it holds), with random weights by numpy alone."""
    with torch.device("meta"):
        layout = _Network().state_dict()
    random = np.random.default_rng(seed)
    weights = {name: torch.from_numpy(_values(name, value.shape, random)) for name, value in sorted(layout.items())}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, file)
    return file


def _values(name: str, shape: Sequence[int], random: np.random.Generator) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.array(1)
    values = random.standard_normal(shape).astype(np.float32)
    if name.endswith(("running_var", "batchnorm.weight", "bn1.weight", "bn2.weight", "shortcut.1.weight")):
        return 1 + np.abs(values) / 4
    if len(shape) == 1:
        return values / 4
    return values * np.float32((2 / np.prod(shape[1:])) ** 0.5)
