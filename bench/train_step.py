"""One optimizer step: transformers' class with peft on padded batches, against packed training. The same clips in both.

Baseline: `HiggsAudioV2ForConditionalGeneration` + peft LoRA, right-padded batches, the model's own loss, in random
order and grouped by length, each with its best batch size; for Higgs TTS 3 `Qwen3Model` and a masked loss of logits for
all tokens. Ours: the same LoRA on packs of a token budget. One step of fused AdamW for each batch or pack. Tokens are
those of the clips, padding apart; each side computes all labels, and the loss of a batch must be the same on both.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from report import Case, Found, Meter, Row, alternate, finish, parser, peak_bytes, rates, same_work, values
from subjects import SUBJECTS, Subject
from workload import clip_seconds

from higgstune.batch.collate import count_tokens, pack
from higgstune.batch.packing import PackSampler, PackSize, fill
from higgstune.families.base import Conditioning
from higgstune.kernels import fused
from higgstune.kernels.loss import IGNORE, LossWeights, combine, label_counts

BATCH_SIZES = (1, 2, 4, 8)
VARIANTS = ("no-prefix", "peft-lora", "compiled")  # ours with one idea taken away, or one added
COMPARED = 4  # clips whose loss must be the same on both sides


def main() -> None:
    """The command."""
    arguments = _arguments()
    if arguments.size == "full":
        import train_step_cuda

        train_step_cuda.main(arguments)
        return
    settings = _settings(arguments)
    tried = {"random": [("random", size) for size in ((1, 2, 4) if arguments.quick else BATCH_SIZES)]}
    if not arguments.quick:
        tried["grouped"] = [("random", 1), *(("grouped", size) for size in BATCH_SIZES[1:])]  # one clip has no group
    sides = [side for both in tried.values() for side in both]
    cases = {f"{order}, batch {size}": _baseline(order, size, settings) for order, size in sides}
    cases |= {"ours": Case(ours, settings)}
    cases |= {variant: Case(ours, settings | {"variant": variant}) for variant in arguments.variants}
    found = alternate(cases, repeats=arguments.repeats, threads=arguments.threads)
    for counted in ("tokens", "text_labels", "audio_labels"):
        same_work(*found.values(), counted=counted)
    loss = _same_loss(found)
    speed = {name: rates(one, "tokens") for name, one in found.items()}
    rows = [
        Row(best if best.startswith(order) else f"{order}: {best}", speed[best], speed["ours"], "tokens/CPU-s")
        for order, best in _best(tried, speed)
    ]
    rows += [Row(f"ours, {name}", speed[name], speed["ours"], "tokens/CPU-s") for name in arguments.variants]
    if not arguments.quick:
        rows += _memory(settings, arguments)
    finish("train_step", rows, arguments, speed=speed, loss=loss, shares=_shares(found["ours"]))
    ratio = statistics.median(rows[0].ratios)
    if arguments.min_ratio is not None and ratio < arguments.min_ratio:
        sys.exit(f"ours is {ratio:.2f} x the baseline in random order, less than {arguments.min_ratio:g} x")


def _arguments() -> argparse.Namespace:
    made = parser(__doc__ or "", "python bench/train_step.py --clips 64 --batch-tokens 4096 --json step.json")
    made.add_argument("--size", choices=("mini", "full"), default="mini", help="mini: CPU. full: a GPU, all in one go")
    made.add_argument("--family", choices=SUBJECTS, default="higgs_audio_v2")
    made.add_argument("--scale", type=int, default=16, help="mini: width, vocabulary and codebooks divided by this")
    made.add_argument("--layers", type=int, help="default: as many as the released model has")
    made.add_argument("--clips", type=int, help="clips to train on (default: 64; 24 with --quick; 2048 with full)")
    made.add_argument("--batch-tokens", type=int, default=4096, help="mini: ours, tokens in a pack")
    made.add_argument("--low", type=float, default=1.0, help="seconds of the shortest clip")
    made.add_argument("--high", type=float, default=15.0, help="seconds of the longest clip")
    made.add_argument("--median", type=float, default=4.0, help="seconds; of the lognormal that is cut to low..high")
    made.add_argument("--sigma", type=float, default=0.6, help="of its logarithm")
    made.add_argument("--rank", type=int, default=16, help="of the LoRA")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--variants", nargs="*", choices=VARIANTS, default=[], help="measure these beside ours")
    made.add_argument("--min-ratio", type=float, help="exit with 1 where random order is not that many times slower")
    given = made.parse_args()
    if given.size == "full" and given.quick:
        made.error("--quick is for --size mini; full takes fewer --layers")
    given.layers = given.layers or SUBJECTS[given.family].LAYERS
    return given


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("family", "scale", "layers", "batch_tokens", "low", "high", "median", "sigma", "rank", "seed")
    clips = arguments.clips or (24 if arguments.quick else 64)
    return {name: getattr(arguments, name) for name in names} | {"clips": clips}


def _baseline(order: str, batch_size: int, settings: dict[str, Any]) -> Case:
    return Case(baseline, settings | {"order": order, "batch_size": batch_size})


def _best(tried: dict[str, list[tuple[str, int]]], speed: dict[str, list[float]]) -> list[tuple[str, str]]:
    """For each order the name of its quickest case, by the median of its repeats."""
    best = []
    for order, both in tried.items():
        names = [f"{kind}, batch {size}" for kind, size in both]
        best.append((order, max(names, key=lambda name: statistics.median(speed[name]))))
    return best


def _same_loss(found: dict[str, list[Found]]) -> float:
    """The loss of the same clips before a step. Raises ValueError where the sides do not have the same."""
    losses = [one["loss"] for side in found.values() for one in side]
    if max(losses) - min(losses) > 1e-4 * max(losses):
        raise ValueError(f"the sides do not compute the same loss: {sorted(losses)}")
    return losses[0]


def _memory(settings: dict[str, Any], arguments: argparse.Namespace) -> list[Row]:
    """Peak memory of a step on the same clips: as many of the first ones as a pack holds."""
    lengths = np.array([len(example) for example in _examples(settings)])
    first = settings | {"first": int((lengths.cumsum() <= settings["batch_tokens"]).sum())}
    cases = {"baseline": _baseline("random", first["first"], first), "ours": Case(ours, first)}
    found = alternate(cases, repeats=arguments.repeats, threads=arguments.threads)
    same_work(*found.values(), counted="steps")
    tokens = same_work(*found.values(), counted="tokens")
    peaks = [values(found[side], "peak_bytes", scale=1e-9) for side in ("baseline", "ours")]
    return [Row(f"peak memory, {tokens} tokens a step", *peaks, "GB")]


def _shares(found: Sequence[Found]) -> Found:
    """Rows of hidden states for each position, and how full the packs are."""
    return {"rows_per_token": found[0]["rows"] / found[0]["tokens"], "fill": found[0]["fill"]}


def baseline(*, order: str, batch_size: int, **settings: Any) -> Found:
    """A pass over the clips as a user of transformers' class would train; in a process of its own."""
    subject, examples = _subject(settings), _examples(settings)
    model, optimizer = _model(settings)
    generator = np.random.default_rng(settings["seed"])
    if order == "grouped":
        indices = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    else:
        indices = generator.permutation(len(examples)).tolist()
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    batches = [batches[i] for i in generator.permutation(len(batches))]

    def padded(batch: list[int]) -> dict[str, Any]:
        return subject.padded([examples[i] for i in batch])

    def step(batch: list[int]) -> None:
        subject.loss(model, padded(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        loss = float(subject.loss(model, subject.padded(examples[:COMPARED])))
    found = _measured(step, batches)
    made = [padded(batch) for batch in batches]
    return found | {
        "loss": loss,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in made),
        "text_labels": sum(int((batch["labels"] != IGNORE).sum()) for batch in made),
        "audio_labels": sum(int((batch["audio_labels"] != IGNORE).sum()) for batch in made),
    }


def ours(*, batch_tokens: int, variant: str = "", **settings: Any) -> Found:
    """A pass over the same clips, packed; in a process of its own."""
    subject, examples = _subject(settings), _examples(settings)
    model, optimizer = _model(settings)
    base = subject.family.pack_forward(model.get_base_model())
    if variant == "peft-lora":
        fused._plain_lora = lambda layer: None
    if variant == "compiled":
        for layer in base.model.layers:
            layer.compile(dynamic=True)
    lengths = np.array([len(example) for example in examples])
    packs = PackSampler(lengths, PackSize(tokens=batch_tokens), seed=settings["seed"]).packs(0)
    eos_id = subject.family.spec(base.config).stream_eos

    def packed(chosen: Iterable[int]) -> Any:
        return pack([examples[i] for i in chosen], share_prefix=variant != "no-prefix")

    def step(chosen: list[int]) -> None:
        batch = packed(chosen)
        combine(model(**batch), label_counts(batch, eos_id=eos_id), LossWeights()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        first = packed(range(len(examples[:COMPARED])))
        loss = float(subject.reduced(model(**first), label_counts(first, eos_id=eos_id)))
    found = _measured(step, packs, warm_up=len(packs) if variant == "compiled" else 1)
    made = [packed(chosen) for chosen in packs]
    return found | {
        "loss": loss,
        "tokens": sum(count_tokens(batch) for batch in made),
        "text_labels": sum(len(batch["text_targets"]) for batch in made),
        "audio_labels": sum(int((batch["audio_targets"] != IGNORE).sum()) for batch in made),
        "rows": sum(len(batch["from_sequence"]) for batch in made),
        "fill": fill(packs, lengths, batch_tokens),
    }


def _subject(settings: dict[str, Any]) -> Subject:
    return SUBJECTS[settings["family"]](settings["scale"], settings["layers"])


def _examples(settings: dict[str, Any]) -> list[Any]:
    seconds = clip_seconds(
        settings["clips"], low=settings["low"], high=settings["high"], median=settings["median"],
        sigma=settings["sigma"], seed=settings["seed"],
    )  # fmt: skip
    return _subject(settings).examples(seconds, seed=settings["seed"])[: settings.get("first")]


def _model(settings: dict[str, Any]) -> tuple[Any, Any]:
    subject = _subject(settings)
    model = subject.model(dtype=torch.float32, device=torch.device("cpu"), seed=settings["seed"])
    rank, targets = settings["rank"], subject.family.lora_targets("full", Conditioning(), "lora")
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets.pattern, bias="none")
    adapted = get_peft_model(model, lora).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return adapted, torch.optim.AdamW(trained, lr=1e-4, fused=True)


def _measured(step: Callable[[list[int]], None], batches: list[list[int]], *, warm_up: int = 1) -> Found:
    for batch in batches[:warm_up]:  # libraries initialise themselves, optimizer states are made
        step(batch)
    meter = Meter()
    with meter:
        for batch in batches:
            step(batch)
    return meter.found(steps=len(batches), peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
