"""Train a miniature base checkpoint of the demo: a family's architecture with 6 or 12 M parameters.

    python tools/demo/train_base.py corpus/*.parquet --codec src/higgstune/demo/assets/codec \\
        --out src/higgstune/demo/assets/base --work corpus/base --steps 5000

The parquet files are what `fit_codec.py encode` writes. Progress goes to stdout, a JSON line a report. At each report
the checkpoint is written to `--out` and the state of the training to `--work`; the same command resumes from it.
`--family` is the module that knows the architecture. `--base` begins with a checkpoint of the family that this tool
wrote, instead of random weights; `--start-from` with what fits of the other family's.

What makes a small model read within hours of CPU time, apart from the loss of the codes:

- *Alignment.* Three attention heads learn to attend to the word that is spoken next, and to the one after it. The
  synthesiser says when each word is spoken.
- *Words as tokens.* Each word of the lexicon is one token, and its embedding is partly a linear map of its phonemes, so
  that words share what they sound like. The map is folded into the table on disk.
- *Weights.* Codebook 0 carries the words, so most of the loss is its; two others are drawn in a step.
- *Corruption.* Some input codes are replaced by random ones, so that the model does not trust its own past too much.
- *Voices.* The corpora of other voices, some of them shifted in pitch, are announced by a scene or a reference, or have
  no loss in their first frames: so the model learns to continue in any voice, but begins in its own.
- *Ends.* In Higgs Audio v2 the first EOS of any codebook ends a clip. All codebooks but the first, whose codes are hard
  to predict, learn to hold the score of EOS far below that of codes until the one before has ended; else it would often
  be the likeliest.

The audio tables (embedding and head, or the one that is both) are trained as linear maps of the codec's code vectors
and written out as plain tables. A code that the base voice never uses so gets a sensible row, too; without
that an adapter, which changes no table, could hardly make another voice say it.
"""

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from checkpoint import BASE_VOICE, CodeGeometry, Miniature, Sounds
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from higgstune.data.messages import speech_messages
from higgstune.families.base import Example, Prompter
from higgstune.kernels import IGNORE
from higgstune.kernels.fused import rms_norm, rotate

FAMILIES = ("higgs_audio_v2", "higgs_tts_3")
PRIMED_ROWS = 16  # audio frames without loss, of other voices that nothing announces
END_MARGIN = 12.0  # nats below the codes
DIGIT_SHARE = 0.15  # of the sentences have digits for their numbers
FRAMES_PER_SECOND = 25
HELD_OUT = 32  # clips of each voice
ALIGNED = ((1, 0, 0), (2, 0, 0), (2, 2, 1))  # layer, head, and how many words ahead it attends to
FIRST_SHARE = 0.6  # of the audio loss is codebook 0's
DRAWN = (0.0, 4, 3, 2, 1, 1, 1, 1)  # chances of the other codebooks, of which two are drawn
NUMBER_WORDS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
NUMBERS = dict(zip(NUMBER_WORDS.split(), map(str, [*range(1, 21), *range(30, 100, 10)]), strict=True))


def with_digits(text: str) -> str:
    """The text with its number words as digits, where no word is capitalised or part of a larger number."""
    words = text.split(" ")
    plain = [word.strip(".,?") in NUMBERS for word in words]
    for i, word in enumerate(words):
        neighbours = plain[max(0, i - 1) : i] + plain[i + 1 : i + 2]
        if plain[i] and not any(neighbours):
            bare = word.strip(".,?")
            words[i] = word.replace(bare, NUMBERS[bare])
    return " ".join(words)


@dataclass(frozen=True)
class Clip:
    """One clip of the corpus."""

    text: str
    voice: str
    codes: np.ndarray  # [frames, K]
    words: np.ndarray  # [words, 2] seconds; empty where unknown


def read_corpus(paths: Sequence[Path]) -> tuple[list[Clip], dict[str, str]]:
    """All clips, and the phonemes of each word as it is most often said."""
    clips, said = [], defaultdict(Counter)
    for path in paths:
        for row in pq.read_table(path).to_pylist():
            words = np.array(row["words"], dtype=np.float64).reshape(-1, 2)
            clips.append(Clip(row["text"], row["speaker"], np.array(row["codes"], dtype=np.int64), words))
            for word, sound in zip(row["text"].split(), row["sounds"] or [], strict=False):
                said[word.strip(".,?").lower()]["".join(c for c in sound if c.isalpha())] += 1
    return clips, {word: counts.most_common(1)[0][0] for word, counts in said.items()}


class Corpus:
    """Examples of the clips, each of which is made once."""

    def __init__(self, clips: Sequence[Clip], prompter: Prompter, family: Miniature) -> None:
        self.clips = clips
        self.prompter = prompter
        self.family = family
        self.made: dict[tuple[int, bool], tuple[Example, np.ndarray]] = {}

    def example(self, index: int, context: int | None = None, digits: bool = False) -> tuple[Example, np.ndarray]:
        """The example, and for each of its audio frames and each of ALIGNED the token to attend to, or IGNORE."""
        if context is not None:
            return self._make(index, context, digits)
        key = (index, digits)
        if key not in self.made:
            self.made[key] = self._make(index, None, digits)
        return self.made[key]

    def _make(self, index: int, context: int | None, digits: bool) -> tuple[Example, np.ndarray]:
        clip = self.clips[index]
        text = with_digits(clip.text) if digits else clip.text
        turns = [] if context is None else [(self.clips[context].text, "context")]
        scene, primed = self.family.scene(clip.voice, index, context is not None)
        messages = [*speech_messages(text, context=turns, scene=scene), _TARGET]
        codes = [self.clips[i].codes for i in ([] if context is None else [context]) + [index]]
        example = self.prompter.example(messages, codes, text_targets=self.family.TEXT_TARGETS)
        if primed:
            example.audio_labels[:PRIMED_ROWS] = IGNORE
        return example, self._alignment(example, text, clip)

    def _alignment(self, example: Example, text: str, clip: Clip) -> np.ndarray:
        """[audio frames, len(ALIGNED)]"""
        encoded = self.prompter.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], np.array(encoded["offset_mapping"])
        found = np.full((len(example.audio_input_ids), len({ahead for *_, ahead in ALIGNED})), IGNORE)
        if len(clip.words) == 0:
            return found
        windows = np.lib.stride_tricks.sliding_window_view(example.input_ids, len(ids))
        start = int(np.flatnonzero((windows == ids).all(axis=1))[-1])
        starts = np.cumsum([0] + [len(word) + 1 for word in text.split(" ")])[:-1]
        tokens = [start + int(np.flatnonzero(offsets[:, 1] > at)[0]) for at in starts]
        tokens += [start + len(ids)] * 2  # after the last word the end of the turn
        frames = len(clip.codes)
        before = self.family.ROWS_BEFORE
        first = len(found) - (
            frames + clip.codes.shape[1] - 1 + 2 * before
        )  # rows before the codes are also after them
        # The row before code r, which is spoken at (r + 0.5) / FRAMES_PER_SECOND, attends to its word.
        now = np.searchsorted(clip.words[:, 1], (np.arange(1 - before, frames + 1) + 0.5) / FRAMES_PER_SECOND)
        for ahead in range(found.shape[1]):
            found[first : first + len(now), ahead] = np.array(tokens)[np.minimum(now + ahead, len(clip.words))]
        return found

    def batches(self, indices: Sequence[int], tokens: int, seed: int) -> Iterator[list[tuple[int, int | None, bool]]]:
        """Endless batches of about `tokens` tokens, each of one voice and of clips of about equal lengths."""
        generator = np.random.default_rng(seed)
        lengths = np.array([len(clip.codes) + 3 * len(clip.text.split()) // 2 + 20 for clip in self.clips])
        while True:
            voices = defaultdict(list)
            for index in generator.permutation(np.array(indices)):
                voices[self.clips[index].voice].append(int(index))
            batches = []
            for clips in voices.values():
                for at in range(0, len(clips), 512):
                    batches += _fill(sorted(clips[at : at + 512], key=lambda i: lengths[i]), lengths, tokens)
            for number in generator.permutation(len(batches)):
                batch = batches[number]
                in_context = generator.random() < self.family.context_share(self.clips[batch[0]].voice)
                if in_context:  # a batch twice as long, so with half of the clips
                    half = batch[: max(1, len(batch) // 2)]
                    yield [(i, int(generator.choice(batch)), False) for i in half]
                else:
                    yield [(i, None, bool(generator.random() < DIGIT_SHARE)) for i in batch]


def _fill(clips: Sequence[int], lengths: np.ndarray, tokens: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for index in clips:
        if (len(batches[-1]) + 1) * lengths[index] > tokens:
            batches.append([])
        batches[-1].append(index)
    return [batch for batch in batches if batch]


_TARGET = {"role": "assistant", "content": [{"type": "audio", "url": "target"}]}


@dataclass(frozen=True)
class Batch:
    """B examples without the prefix that all begin with: N rows in all, text first, then the audio frames.

    text_ids [T] begins with the S tokens of the prefix. `padded` [B, L] has the row of each position, and `rows` the
    flat position in it of each row after the prefix.
    """

    prefix: int
    text_ids: Tensor
    audio_ids: Tensor  # [A, K]
    positions: Tensor  # [N]
    padded: Tensor
    rows: Tensor
    audio_rows: Tensor  # [M], rows that predict a frame
    audio_targets: Tensor  # [M, K]
    text_rows: Tensor
    text_targets: Tensor
    align_at: Tensor  # [J, 2]: example and query
    align_to: Tensor  # [J, ahead]: keys


def make_batch(examples: Sequence[tuple[Example, np.ndarray]]) -> Batch:
    first = examples[0][0].input_ids
    shared = min(int(example.audio_mask.argmax()) for example, _ in examples) - 1
    for example, _ in examples[1:]:
        same = example.input_ids[:shared] == first[:shared]
        shared = shared if same.all() else int(same.argmin())
    if len(examples) == 1:
        shared = min(shared, 8)
    length = max(len(example) for example, _ in examples) - shared
    texts = [np.flatnonzero(~e.audio_mask[shared:]) for e, _ in examples]
    frames = [np.flatnonzero(e.audio_mask[shared:]) for e, _ in examples]
    text_flat = np.concatenate([b * length + at for b, at in enumerate(texts)])
    audio_flat = np.concatenate([b * length + at for b, at in enumerate(frames)])
    flat = np.concatenate([text_flat, audio_flat])
    row_of = np.zeros(len(examples) * length, dtype=np.int64)
    row_of[flat] = np.arange(len(flat)) + shared
    gathered = defaultdict(list)
    for b, ((example, alignment), at) in enumerate(zip(examples, frames, strict=True)):
        labelled = (example.audio_labels != IGNORE).any(axis=1)
        gathered["audio_rows"].append(row_of[b * length + at[labelled] - 1])
        gathered["audio_targets"].append(example.audio_labels[labelled])
        places = np.flatnonzero(example.text_labels != IGNORE)
        places = places[places > shared]
        gathered["text_rows"].append(row_of[b * length + places - 1 - shared])
        gathered["text_targets"].append(example.text_labels[places])
        known = alignment[:, 0] != IGNORE
        gathered["align_at"].append(np.stack([np.full(known.sum(), b), at[known]], axis=1))
        gathered["align_to"].append(alignment[known])
    joined = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in gathered.items()}
    text_ids = np.concatenate(
        [first[:shared], *[e.input_ids[shared:][at] for (e, _), at in zip(examples, texts, strict=True)]]
    )
    return Batch(
        prefix=shared,
        text_ids=torch.from_numpy(text_ids),
        audio_ids=torch.from_numpy(np.concatenate([e.audio_input_ids for e, _ in examples])),
        positions=torch.from_numpy(np.concatenate([np.arange(shared), flat % length + shared])),
        padded=torch.from_numpy(row_of).view(len(examples), length),
        rows=torch.from_numpy(flat),
        **joined,
    )


def corrupted(audio_ids: Tensor, codes: int, share: float = 0.08) -> Tensor:
    """Some whole frames and some single codes are replaced by random ones, but no BOS or EOS."""
    replaced = (torch.rand(len(audio_ids), 1) < share) | (torch.rand(audio_ids.shape) < share)
    return torch.where(replaced & (audio_ids < codes), torch.randint(codes, audio_ids.shape), audio_ids)


def run_layers(family: Miniature, model: Any, batch: Batch, audio_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D], and the alignment loss. The same numbers as the model's own forward, in less time."""
    inner = model.model
    text = len(batch.text_ids)
    hidden = family.embed(model, batch.text_ids, audio_ids)
    cos, sin = (part[0].chunk(2, -1)[0][:, None] for part in inner.rotary_emb(hidden, batch.positions[None]))
    s, (b, length) = batch.prefix, batch.padded.shape
    before = torch.ones(length, length, dtype=torch.bool).tril_()
    mask = torch.cat((torch.ones(length, s, dtype=torch.bool), before), dim=1)
    mask = torch.zeros(mask.shape).masked_fill_(~mask, -1e9)
    prefix_mask = torch.zeros(s, s).masked_fill_(~torch.ones(s, s, dtype=torch.bool).tril_(), -1e9)
    alignment = []

    for number, layer in enumerate(inner.layers):
        attention = layer.self_attn
        q, k, v = family.queries_keys_values(layer, hidden, text)
        q, k = rotate(q.float(), cos, sin) * attention.scaling, rotate(k.float(), cos, sin)
        v = v.float()
        with torch.autocast("cpu", enabled=False):
            groups = q.shape[1] // k.shape[1]
            of_prefix, _ = _attend(q[:s][None], k[:s][None], v[:s][None], groups, prefix_mask)
            padded = [x.index_select(0, batch.padded.flatten()).unflatten(0, (b, length)) for x in (q, k, v)]
            keys, values = (
                torch.cat((x[:s].expand(b, *x[:s].shape), part), dim=1) for x, part in ((k, padded[1]), (v, padded[2]))
            )
            attended, scores = _attend(padded[0], keys, values, groups, mask)
            attended = torch.cat((of_prefix[0], attended.flatten(0, 1).index_select(0, batch.rows)))
            for at, head, ahead in ALIGNED:
                if at == number and len(batch.align_at):
                    rows = scores[batch.align_at[:, 0], head, batch.align_at[:, 1]]
                    alignment.append(F.cross_entropy(rows, batch.align_to[:, ahead]))
        hidden = hidden + attention.o_proj(attended.flatten(1))
        hidden = hidden + family.feed_forward(layer, hidden, text)
    return rms_norm(hidden, inner.norm), torch.stack(alignment).mean() if alignment else torch.zeros(())


def _attend(q: Tensor, k: Tensor, v: Tensor, groups: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, L, H, d] scaled, k and v [B, S, G, d], mask [L, S] -> [B, L, H, d] and scores [B, H, L, S]."""
    b, length, heads, d = q.shape
    rows = q.transpose(1, 2).reshape(b, heads // groups, groups * length, d)
    scores = (rows @ k.permute(0, 2, 3, 1)).view(b, heads, length, -1) + mask
    weights = scores.softmax(-1).view(b, heads // groups, groups * length, -1)
    return (weights @ v.transpose(1, 2)).view(b, heads, length, d).transpose(1, 2), scores


def losses(
    family: Miniature, model: Any, batch: Batch, *, every: bool, generator: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The training loss of one batch, and its parts."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = family.audio_weight(model)
        codebooks, classes, _ = weight.shape
        hidden, alignment = run_layers(family, model, batch, corrupted(batch.audio_ids, classes - 2))
        rows = hidden.index_select(0, batch.audio_rows)
        others = range(1, codebooks)
        if not every:
            chances = np.array(DRAWN) / sum(DRAWN)
            others = generator.choice(codebooks, size=2, replace=False, p=chances)
        parts = [_head_loss(rows, weight[k], batch.audio_targets[:, k]) for k in (0, *others)]
        early = torch.stack([_early_end(rows, weight[k], batch.audio_targets[:, k]) for k in others]).mean()
        text = torch.zeros(())
        if len(batch.text_rows):
            text = F.cross_entropy(family.text_logits(model, hidden[batch.text_rows]).float(), batch.text_targets)
    audio = FIRST_SHARE * parts[0] + (1 - FIRST_SHARE) * torch.stack(parts[1:]).mean()
    total = audio + 0.05 * text + 0.3 * alignment + 0.1 * early
    shown = {"codebook_0": parts[0], "alignment": alignment, "text": text, "early": early}
    return total, {name: float(part.detach()) for name, part in shown.items()}


def _head_loss(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    known = targets != IGNORE
    return F.cross_entropy((rows[known] @ weight.to(rows.dtype).T).float(), targets[known])


def _early_end(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """By how much the score of EOS is less than END_MARGIN below those of the codes, where a code is right."""
    eos = len(weight) - 1
    known = (targets != IGNORE) & (targets != eos)
    scores = (rows[known] @ weight.to(rows.dtype).T).float()
    return F.relu(scores[:, eos] - scores[:, : eos - 1].logsumexp(-1) + END_MARGIN).mean()


@torch.no_grad()
def held_out_losses(family: Miniature, model: Any, batch: Batch) -> tuple[list[float], float]:
    """The loss of each codebook, and the alignment loss."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, alignment = run_layers(family, model, batch, batch.audio_ids)
        rows = hidden.index_select(0, batch.audio_rows)
        found = [
            float(_head_loss(rows, w, t))
            for w, t in zip(family.audio_weight(model), batch.audio_targets.T, strict=True)
        ]
    return found, float(alignment)


def optimizers(model: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for tables, heads and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)),
    ]


def learning_rate(progress: float) -> float:
    """Warm-up over the first 2 %, then a cosine to 2 % of the peak; `progress` in 0..1."""
    if progress < 0.02:
        return progress / 0.02
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path, nargs="+", help="parquet files of `fit_codec.py encode`")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the codec that made the codes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder of the training's state")
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0])
    parser.add_argument("--base", type=Path, help="folder of the checkpoint to begin with")
    parser.add_argument(
        "--start-from", type=Path, help="folder of a miniature of Higgs Audio v2, to begin with parts of"
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=2400)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    family = cast(Miniature, import_module(args.family))
    clips, sounds = read_corpus(args.codes)
    if args.base is None:
        tokenizer = family.build_tokenizer([clip.text for clip in clips] + [with_digits(clip.text) for clip in clips])
        model = family.build_model(tokenizer)
    else:
        tokenizer, model = family.open_base(args.base)
    if args.start_from is not None:
        family.start_from(model, tokenizer, args.start_from)
    codebooks = load_file(args.codec / "model.safetensors")["codebooks"].float()
    for module in family.tables(model):
        parametrize.register_parametrization(module, "weight", CodeGeometry(codebooks))
        if args.base is None and args.start_from is None:
            nn.init.normal_(module.parametrizations.weight.original, std=0.003)
    words = [tokenizer.decode([i]).strip().lower() for i in range(len(tokenizer))]
    spoken = [sounds.get({v: k for k, v in NUMBERS.items()}.get(word, word), "") for word in words]
    print(json.dumps({"tokens": len(tokenizer), "words with sounds": sum(map(bool, spoken))}), flush=True)
    parametrize.register_parametrization(model.model.embed_tokens, "weight", Sounds(spoken, model.config.hidden_size))
    corpus = Corpus(clips, family.prompter(tokenizer, model), family)
    of_voice = defaultdict(list)
    for index, clip in enumerate(clips):
        of_voice[clip.voice].append(index)
    held_out = {voice: _held_out(corpus, indices[:HELD_OUT]) for voice, indices in of_voice.items()}
    hidden_away = {index for indices in of_voice.values() for index in indices[:HELD_OUT]}
    batches = corpus.batches([i for i in range(len(clips)) if i not in hidden_away], args.tokens, args.seed)
    found = optimizers(model, args.lr)
    generator = np.random.default_rng(args.seed)
    step, cpu, state = 0, 0.0, args.work / "state.pt"
    args.work.mkdir(parents=True, exist_ok=True)
    if state.exists():
        saved = torch.load(state, weights_only=False)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(found, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        step, cpu = saved["step"], saved["cpu"]
        generator.bit_generator.state = saved["numpy"]
        torch.set_rng_state(saved["torch"])
        for _ in range(step):
            next(batches)
    reported, started, means = time.process_time(), time.process_time() - cpu, Counter()
    while step < args.steps:
        progress = step / args.steps
        for optimizer in found:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(progress)
        batch = make_batch([corpus.example(*chosen) for chosen in next(batches)])
        loss, parts = losses(family, model, batch, every=progress > 0.75, generator=generator)
        for optimizer in found:
            optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite")
        for optimizer in found:
            optimizer.step()
        step += 1
        means.update({**parts, "n": 1, "rows": len(batch.positions)})
        if time.process_time() - reported > 60 or step == args.steps:
            reported = time.process_time()
            cpu = reported - started
            found_losses = {
                voice: [held_out_losses(family, model, batch) for batch in pair] for voice, pair in held_out.items()
            }
            (true, alignment), _ = found_losses[BASE_VOICE]
            gaps = {voice: round(other[0] - own[0], 3) for voice, ((own, _), (other, _)) in found_losses.items()}
            line = {
                "step": step, "cpu_minutes": round(cpu / 60, 1), "rows_a_step": round(means["rows"] / means["n"]),
                "held_out": [round(x, 2) for x in true], "swap_gap": gaps,
                "alignment": round(alignment, 3),
                "train": {k: round(means[k] / means["n"], 3) for k in ("codebook_0", "alignment", "text", "early")},
            }  # fmt: skip
            means.clear()
            print(json.dumps(line), flush=True)
            family.save(model, tokenizer, args.out)
            part = state.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(), "optimizers": [o.state_dict() for o in found], "step": step,
                    "cpu": cpu, "numpy": generator.bit_generator.state, "torch": torch.get_rng_state(),
                },
                part,
            )  # fmt: skip
            part.replace(state)


def _held_out(corpus: Corpus, indices: Sequence[int]) -> tuple[Batch, Batch]:
    """The clips, and the same with each other's texts."""
    others = [*indices[1:], indices[0]]
    swapped = [_swapped(corpus, index, other) for index, other in zip(indices, others, strict=True)]
    return make_batch([corpus.example(index) for index in indices]), make_batch(swapped)


def _swapped(corpus: Corpus, index: int, other: int) -> tuple[Example, np.ndarray]:
    """The clip with another clip's text."""
    clip = corpus.clips[index]
    mixed = Clip(corpus.clips[other].text, clip.voice, clip.codes, np.zeros((0, 2)))
    return Corpus([mixed], corpus.prompter, corpus.family).example(0)


if __name__ == "__main__":
    main()
