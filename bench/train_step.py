"""One optimizer step: the native class with peft on padded batches, against packed training. The same clips in both.

Baseline: `HiggsAudioV2ForConditionalGeneration` + peft LoRA, right-padded batches, the model's own loss, in random
order and grouped by length, each with its best batch size. Ours: the same LoRA on packs of a token budget. One step of
fused AdamW for each batch or pack. Tokens are those of the clips, padding apart; each side computes all labels.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from report import Case, Found, Meter, Row, alternate, finish, parser, peak_bytes, rates, same_work, say, values

BATCH_SIZES = (1, 2, 4, 8)
VARIANTS = ("no-prefix", "peft-lora", "compiled")  # ours with one idea taken away, or one added
TARGETS = r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|(?:audio_)?mlp\.(?:gate|up|down)_proj)"


def main() -> None:
    """The command."""
    arguments = _arguments()
    if arguments.size == "full":
        import train_step_cuda

        train_step_cuda.main(arguments)
        return
    settings = _settings(arguments)
    sizes = [1, 2, 4] if arguments.quick else list(BATCH_SIZES)
    orders = ("random",) if arguments.quick else ("random", "grouped")
    best = {order: _best_size(order, sizes, settings, arguments) for order in orders}
    cases = {order: _baseline(order, best[order], settings) for order in orders} | {"ours": Case(ours, settings)}
    cases |= {variant: Case(ours, settings | {"variant": variant}) for variant in arguments.variants}
    found = alternate(cases, repeats=arguments.repeats, threads=arguments.threads)
    same_work(*found.values(), counted="tokens")
    ours_rate = rates(found["ours"], "tokens")
    rows = [
        Row(f"{order}, batch {best[order]}", rates(found[order], "tokens"), ours_rate, "tokens/CPU-s")
        for order in orders
    ]
    rows += [
        Row(f"ours, {name}", rates(found[name], "tokens"), ours_rate, "tokens/CPU-s") for name in arguments.variants
    ]
    if not arguments.quick:
        rows += _memory(settings, arguments)
    finish("train_step", rows, arguments, best_batch_sizes=best, shares=_shares(found["ours"]))
    if arguments.min_ratio is not None:
        ratio = statistics.median(rows[0].ratios)
        if ratio < arguments.min_ratio:
            sys.exit(f"ours is {ratio:.2f} x the baseline in random order, less than {arguments.min_ratio:g} x")


def _arguments() -> argparse.Namespace:
    made = parser(__doc__ or "", "python bench/train_step.py --clips 64 --batch-tokens 4096 --json step.json")
    made.add_argument("--size", choices=("mini", "full"), default="mini", help="mini: CPU. full: a GPU, all in one go")
    made.add_argument("--scale", type=int, default=16, help="mini: width, vocabulary and codebooks divided by this")
    made.add_argument("--layers", type=int, default=28)
    made.add_argument("--clips", type=int, help="clips that each side trains on (default: 64; 24 with --quick)")
    made.add_argument("--batch-tokens", type=int, default=4096, help="mini: ours, positions in a pack")
    made.add_argument("--low", type=float, default=1.0, help="seconds of the shortest clip")
    made.add_argument("--high", type=float, default=15.0, help="seconds of the longest clip")
    made.add_argument("--median", type=float, default=4.0, help="seconds; of the lognormal that is cut to low..high")
    made.add_argument("--sigma", type=float, default=0.6, help="of its logarithm")
    made.add_argument("--rank", type=int, default=16, help="of the LoRA")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--variants", nargs="*", choices=VARIANTS, default=[], help="measure these beside ours")
    made.add_argument("--min-ratio", type=float, help="exit with 1 where random order is not that many times slower")
    return made.parse_args()


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("scale", "layers", "batch_tokens", "low", "high", "median", "sigma", "rank", "seed")
    clips = arguments.clips or (24 if arguments.quick else 64)
    return {name: getattr(arguments, name) for name in names} | {"clips": clips}


def _baseline(order: str, batch_size: int, settings: dict[str, Any]) -> Case:
    return Case(baseline, settings | {"order": order, "batch_size": batch_size})


def _best_size(order: str, sizes: Sequence[int], settings: dict[str, Any], arguments: argparse.Namespace) -> int:
    """The batch size with which the baseline is quickest."""
    found = {size: _baseline(order, size, settings).run(threads=arguments.threads) for size in sizes}
    for size, one in found.items():
        say(f"baseline, {order}, batch {size}: {one['tokens'] / one['cpu_seconds']:.0f} tokens/CPU-s")
    return max(sizes, key=lambda size: found[size]["tokens"] / found[size]["cpu_seconds"])


def _memory(settings: dict[str, Any], arguments: argparse.Namespace) -> list[Row]:
    """Peak memory of steps of equally many tokens: baseline batches of as many clips as a pack holds on average."""
    mean = _lengths(settings).mean()
    clips = max(1, round(settings["batch_tokens"] / mean))
    few = settings | {"clips": clips}
    cases = {"baseline": _baseline("random", clips, few), "ours": Case(ours, few)}
    found = alternate(cases, repeats=arguments.repeats, threads=arguments.threads)
    name = f"peak memory, {settings['batch_tokens']} tokens a step"
    peaks = [values(found[side], "peak_bytes", scale=1e-9) for side in ("baseline", "ours")]
    return [Row(name, *peaks, "GB")]


def _shares(found: Sequence[Found]) -> Found:
    """What ours left out: rows of hidden states against positions, heads against positions."""
    one = found[0]
    return {"rows_per_token": one["rows"] / one["tokens"], "fill": one["fill"]}


# What follows runs in a process of its own.


def _lengths(settings: dict[str, Any]) -> Any:
    import numpy as np
    from workload import Shape, clip_seconds, make_examples

    seconds = clip_seconds(
        settings["clips"], low=settings["low"], high=settings["high"], median=settings["median"],
        sigma=settings["sigma"], seed=settings["seed"],
    )  # fmt: skip
    config = Shape(settings["scale"], settings["layers"]).config()
    return np.array([len(example) for example in make_examples(config, seconds, seed=settings["seed"])])


def baseline(*, order: str, batch_size: int, **settings: Any) -> Found:
    """A pass over the clips as a user of the native class would train."""
    import numpy as np
    from padded import collate

    examples, model, optimizer = _world(settings)
    config = model.get_base_model().config
    generator = np.random.default_rng(settings["seed"])
    if order == "grouped":
        indices = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    else:
        indices = generator.permutation(len(examples)).tolist()
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    batches = [batches[i] for i in generator.permutation(len(batches))]

    def step(batch: list[int]) -> None:
        loss = model(**collate([examples[i] for i in batch], config)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _measured(step, batches, examples)


def ours(*, batch_tokens: int, variant: str = "", **settings: Any) -> Found:
    """A pass over the same clips, packed."""
    import numpy as np

    from higgstune.batch.packed import pack
    from higgstune.batch.packing import PackSampler, PackSize, fill
    from higgstune.model import fused
    from higgstune.model.forward import with_training_forward
    from higgstune.model.loss import LossWeights, combine, label_counts

    examples, model, optimizer = _world(settings)
    base = with_training_forward(model.get_base_model())
    config, share_prefix = base.config, variant != "no-prefix"
    if variant == "peft-lora":
        fused._plain_lora = lambda layer: None
    if variant == "compiled":
        for layer in base.model.layers:
            layer.compile(dynamic=True)
    lengths = np.array([len(example) for example in examples])
    packs = PackSampler(lengths, PackSize(tokens=batch_tokens), seed=settings["seed"]).packs(0)

    def packed(chosen: list[int]) -> Any:
        return pack([examples[i] for i in chosen], share_prefix=share_prefix)

    def step(chosen: list[int]) -> None:
        batch = packed(chosen)
        counts = label_counts(batch, eos_id=config.audio_stream_eos_id)
        combine(model(**batch), counts, LossWeights()).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = _measured(step, packs, examples, warm_up=2 if variant == "compiled" else 1)
    rows = sum(len(packed(chosen)["from_sequence"]) for chosen in packs)
    return found | {"rows": rows, "fill": fill(packs, lengths, batch_tokens)}


def _world(settings: dict[str, Any]) -> tuple[list[Any], Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from workload import Shape, clip_seconds, make_examples, random_model

    config = Shape(settings["scale"], settings["layers"]).config()
    seconds = clip_seconds(
        settings["clips"], low=settings["low"], high=settings["high"], median=settings["median"],
        sigma=settings["sigma"], seed=settings["seed"],
    )  # fmt: skip
    examples = make_examples(config, seconds, seed=settings["seed"])
    model = random_model(config, dtype=torch.float32, device=torch.device("cpu"), seed=settings["seed"])
    rank = settings["rank"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, bias="none")
    adapted = get_peft_model(model, lora).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return examples, adapted, torch.optim.AdamW(trained, lr=1e-4, fused=True)


def _measured(
    step: Callable[[list[int]], None], batches: list[list[int]], examples: list[Any], *, warm_up: int = 1
) -> Found:
    for batch in batches[:warm_up]:  # libraries initialise themselves, optimizer states are made
        step(batch)
    meter = Meter()
    with meter:
        for batch in batches:
            step(batch)
    tokens = sum(len(example) for example in examples)
    return meter.found(tokens=tokens, steps=len(batches), peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
