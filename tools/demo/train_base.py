"""Train the miniature base checkpoint of the demo from scratch: one voice, the native architecture, 10 M parameters.

    python tools/demo/train_base.py --codes corpus/base.parquet --codec src/higgstune/demo/assets/codec \\
        --out src/higgstune/demo/assets/base --minutes 42 --threads 1

`--codes` is what `fit_codec.py` writes: text and codes [frames, 8] of the base voice. Progress goes to stdout as one
JSON line a report; the checkpoint is written at every report, so that a stopped run leaves its last state.

The audio tables (embedding and head) are trained as linear maps of the codec's code vectors and written out as the
plain tables that the native class has. A code that the base voice never uses so gets a sensible row, too; without
that an adapter, which changes no table, could hardly make another voice say it.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils import parametrize
from transformers import (
    GenerationConfig,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from higgstune.batch.collate import Packed, count_tokens, pack
from higgstune.data.messages import DEFAULT_SCENE, DEFAULT_SYSTEM, speech_messages
from higgstune.families.base import Example
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.families.higgs_v2.prompt import native_chat_template
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.kernels.loss import LossWeights, combine, label_counts

# The control tokens of the released checkpoint that a prompt can hold, in the order of their ids there.
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|scene_desc_start|>", "<|scene_desc_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>",
    "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>",
]  # fmt: skip
VOCABULARY = 512
_EVERY_PROMPT = f"system user assistant\n\n{DEFAULT_SYSTEM}\n\n{DEFAULT_SCENE}"
CONTEXT_SHARE = 0.15  # of the examples have an earlier turn, as references and long texts do


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A small byte-level BPE over `texts`, with the control tokens of the released checkpoint."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The words of every prompt become one token each: a third of a short example's tokens.
    tokenizer.train_from_iterator([*texts, *[_EVERY_PROMPT] * len(texts)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = native_chat_template()
    return fast


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
        do_sample=True, temperature=1.0, top_k=50, top_p=0.95, bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
    )  # fmt: skip
    model.generation_config.ras_win_len = 7
    model.generation_config.ras_win_max_num_repeat = 2
    return model


class CodeGeometry(torch.nn.Module):
    """A parametrization: maps [K, features, D] -> rows [K * (codes + 2), D], one for each code, BOS and EOS."""

    def __init__(self, codebooks: torch.Tensor) -> None:
        """codebooks: the code vectors [K, codes, components]."""
        super().__init__()
        scaled = codebooks / codebooks.std(dim=1, keepdim=True)
        squares = scaled.pow(2).mean(dim=-1, keepdim=True) - 1
        vectors = torch.cat([scaled, squares, torch.ones_like(squares)], dim=-1)
        features = torch.zeros(len(codebooks), codebooks.shape[1] + 2, vectors.shape[-1] + 2)
        features[:, :-2, :-2] = vectors
        features[:, -2, -2] = features[:, -1, -1] = 1.0
        self.register_buffer("features", features)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return (self.features @ maps).flatten(0, 1)

    def right_inverse(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.linalg.pinv(self.features) @ rows.unflatten(0, self.features.shape[:2])


def with_code_geometry(model: HiggsAudioV2ForConditionalGeneration, codec: Path) -> None:
    """Let the audio tables of a fresh model be maps of the codec's code vectors."""
    codebooks = load_file(codec / "model.safetensors")["codebooks"].float()
    for module in (model.audio_lm_head, model.model.embed_audio_tokens.embed_audio_tokens):
        parametrize.register_parametrization(module, "weight", CodeGeometry(codebooks))
        torch.nn.init.normal_(module.parametrizations.weight.original, std=0.003)


class Corpus:
    """Texts and codes of one voice."""

    def __init__(self, path: Path, prompter: Prompter) -> None:
        table = pq.read_table(path, columns=["text", "codes"])
        self.texts = table["text"].to_pylist()
        self.codes = [np.array(codes.as_py(), dtype=np.int64) for codes in table["codes"]]
        self.prompter = prompter

    def example(self, index: int, context: int | None) -> Example:
        turns = [] if context is None else [(self.texts[context], "context")]
        messages = [*speech_messages(self.texts[index], context=turns), _TARGET]
        codes = [self.codes[i] for i in ([] if context is None else [context]) + [index]]
        return self.prompter.example(messages, codes, text_targets="transcript")

    def batches(self, clips: range, tokens: int, generator: np.random.Generator) -> Iterator[list[Example]]:
        """Endless batches of about `tokens` tokens, of clips of about equal lengths."""
        while True:
            order = generator.permutation(np.array(clips))
            for window in np.array_split(order, max(1, len(order) // 512)):
                yield from self._window(window, tokens, generator)

    def _window(self, window: np.ndarray, tokens: int, generator: np.random.Generator) -> Iterator[list[Example]]:
        contexts = [int(generator.choice(window)) if generator.random() < CONTEXT_SHARE else None for _ in window]
        examples = [self.example(int(i), c) for i, c in zip(window, contexts, strict=True)]
        examples.sort(key=len)
        batches: list[list[Example]] = [[]]
        for example in examples:
            if (len(batches[-1]) + 1) * len(example) > tokens:
                batches.append([])
            batches[-1].append(example)
        for index in generator.permutation(len(batches)):
            if batches[index]:
                yield batches[index]


_TARGET = {"role": "assistant", "content": [{"type": "audio", "url": "target"}]}


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over the first 3 %, then a cosine to 2 % of the peak; `progress` in 0..1."""
    if progress < 0.03:
        return peak * progress / 0.03
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True, help="folder of the codec that made the codes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    texts = pq.read_table(args.codes, columns=["text"])["text"].to_pylist()
    tokenizer = build_tokenizer(texts)
    model = with_training_forward(build_model(tokenizer))
    with_code_geometry(model, args.codec)
    prompter = Prompter(tokenizer, SpecialIds.from_config(model.config))
    corpus = Corpus(args.codes, prompter)
    held_out = pack([corpus.example(i, None) for i in range(32)])
    batches = corpus.batches(range(32, len(corpus.texts)), args.tokens, np.random.default_rng(args.seed))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    weights = LossWeights(text=0.2, audio=1.0)
    started, seen, step, reported = time.monotonic(), 0, 0, 0.0
    while (progress := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        batch = pack(next(batches))
        loss = losses(model, batch, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + count_tokens(batch)
        if time.monotonic() - reported > 60:
            reported = time.monotonic()
            report(model, tokenizer, args.out, held_out, step, seen, float(loss.detach()), progress)
    report(model, tokenizer, args.out, held_out, step, seen, float(loss.detach()), 1.0)


def losses(model: torch.nn.Module, batch: Packed, weights: LossWeights) -> torch.Tensor:
    """The training loss of one batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = model(**batch)
    return combine(sums, label_counts(batch, eos_id=model.config.audio_stream_eos_id), weights)


@torch.no_grad()
def report(
    model: HiggsAudioV2ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path, held_out: Packed,
    step: int, seen: int, loss: float, progress: float,
) -> None:  # fmt: skip
    """Print one JSON line and write the checkpoint."""
    sums = model(**held_out)
    counts = label_counts(held_out, eos_id=model.config.audio_stream_eos_id)
    per_codebook = (sums["audio_loss"] / counts["audio"]).tolist()
    line = {
        "progress": round(progress, 3), "step": step, "tokens": seen, "loss": round(loss, 4),
        "held_out_audio": round(sum(per_codebook) / len(per_codebook), 4),
        "held_out_codebooks": [round(x, 2) for x in per_codebook],
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    state = {key: value for key, value in model.state_dict().items() if "parametrizations" not in key}
    state["audio_lm_head.weight"] = model.audio_lm_head.weight
    state["model.embed_audio_tokens.embed_audio_tokens.weight"] = (
        model.model.embed_audio_tokens.embed_audio_tokens.weight
    )
    copy = HiggsAudioV2ForConditionalGeneration(model.config, use_text_head=True)
    copy.load_state_dict(state)
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
