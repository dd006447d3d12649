"""How cost grows: with the length of clips, with the examples in a pack, with the utterances in the store."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curves import PARTS, Points, draw, earlier_curves, rows_of, slope
from report import BENCH, Case, Found, Meter, alternate, finish, own_bytes, parser
from stores import demo_prompter, make_store

from higgstune.batch.dataset import RowExamples
from higgstune.batch.loader import PackLoader
from higgstune.batch.packing import PackSize, pack_indices
from higgstune.data.store import CodeStore

EXAMPLE = "python bench/growth.py --json growth.json --figure dev/figures/growth.png"
FIGURE = BENCH.parent / "docs" / "figures" / "growth.png"
BATCH_TOKENS = 4096


def by_seconds(lengths: Sequence[float], tokens: int, scale: int, layers: int) -> Found:
    """CPU-seconds of a training step per clip, in packs of about equally many tokens whatever the clips' length."""
    from miniature import Training, small_config
    from workload import make_examples

    config = small_config(scale=scale, layers=layers)
    training = Training(config)
    costs, per_token = [], []
    for seconds in lengths:
        one = len(make_examples(config, np.array([seconds]), seed=0)[0])
        examples = make_examples(config, np.full(max(1, round(tokens / one)), seconds), seed=1)
        cost = _step(training, examples)
        costs.append(cost / len(examples))
        per_token.append(cost / sum(map(len, examples)))
    return {"costs": costs, "per_token": per_token}


def by_examples(counts: Sequence[int], seconds: float, scale: int, layers: int) -> Found:
    """CPU-seconds of a training step by the examples in its pack, all of them equally long."""
    from miniature import Training, small_config
    from workload import make_examples

    config = small_config(scale=scale, layers=layers)
    training = Training(config)
    return {"costs": [_step(training, make_examples(config, np.full(n, seconds), seed=0)) for n in counts]}


def _step(training: Any, examples: Sequence[Any]) -> float:
    from higgstune.batch.collate import pack

    batch = pack(examples)
    training.step(batch)  # memory for tensors of these shapes is found once
    with Meter() as meter:
        training.step(batch)
    return meter.cpu_seconds


def by_utterances(folder: str, most: int) -> Found:
    """CPU-seconds of what a stage does with a whole store, and the memory that it takes, mapped files apart.

    Batches of at most so many rows are made, in the order of an epoch, and their cost is scaled to all rows.
    """
    prompter = demo_prompter()
    before = own_bytes() or 0
    meters = {part: Meter() for part in PARTS}
    with meters["opening"]:
        store = CodeStore.open(folder)
    examples = RowExamples(store.split("train"), prompter, "transcript")
    with meters["lengths"]:
        lengths = examples.lengths()
    with meters["plan"]:
        pack_indices(lengths, PackSize(tokens=BATCH_TOKENS), seed=0)
    examples.lengths = lambda: lengths  # type: ignore[method-assign]
    loader = PackLoader(examples, PackSize(tokens=BATCH_TOKENS), seed=0)
    made = 0
    with meters["pass"]:
        for batch in loader:
            made += len(batch["lengths"])
            if made >= most:
                break
    costs = {part: meter.cpu_seconds for part, meter in meters.items()}
    costs["pass"] *= len(store) / made
    memory = (own_bytes() or 0) - before
    return {
        "costs": costs,
        "memory": memory,
        "rows": len(store),
        "codes": int(store.frames.sum()) * store.info.num_codebooks * 2,
    }


def _points(found: Sequence[Found], sizes: Sequence[float], key: str = "costs") -> Points:
    return {size: [one[key][i] for one in found] for i, size in enumerate(sizes)}


def measure_training(
    *,
    lengths: Sequence[float],
    counts: Sequence[int],
    tokens: int,
    scale: int,
    layers: int,
    repeats: int,
    threads: int,
    fresh: bool = True,
) -> dict[str, Points]:
    """Curves of the training step."""
    model = {"scale": scale, "layers": layers}
    cases = {
        "seconds": Case(by_seconds, {"lengths": list(lengths), "tokens": tokens} | model),
        "examples": Case(by_examples, {"counts": list(counts), "seconds": 2.0} | model),
    }
    found = alternate(cases, repeats=repeats, threads=threads, fresh=fresh)
    return {
        "clip": _points(found["seconds"], lengths),
        "token": _points(found["seconds"], lengths, "per_token"),
        "examples": _points(found["examples"], counts),
    }


def measure_store(
    folder: Path, sizes: Sequence[int], *, most: int, repeats: int, threads: int, fresh: bool = True
) -> dict[str, Points]:
    """Curves of the store, by part, and its memory."""
    for size in sizes:
        make_store(folder / f"store-{size}", size)
    cases = {str(size): Case(by_utterances, {"folder": str(folder / f"store-{size}"), "most": most}) for size in sizes}
    found = alternate(cases, repeats=repeats, threads=threads, fresh=fresh)
    curves: dict[str, Points] = {
        part: {size: [one["costs"][part] for one in found[str(size)]] for size in sizes} for part in PARTS
    }
    for key in ("memory", "codes"):
        curves[key] = {size: [one[key] for one in found[str(size)]] for size in sizes}
    return curves


def main() -> None:
    """Measure, print, draw, write."""
    options = parser(__doc__ or "", EXAMPLE)
    options.add_argument("--only", choices=("training", "store"), help="one half of it")
    options.add_argument(
        "--figure", type=Path, help="draw there (default: dev/figures/growth.png, and not with --quick)"
    )
    options.add_argument("--with", dest="earlier", type=Path, help="JSON of a run with --only, for its half")
    options.add_argument("--folder", type=Path, help="keep the stores there, and use those of an earlier run")
    given = options.parse_args()
    shared = {"repeats": given.repeats, "threads": given.threads}
    curves = earlier_curves(given.earlier) if given.earlier else {}
    if given.only != "store":
        curves |= measure_training(
            lengths=[1, 2] if given.quick else [10, 15, 20, 30, 45, 60],
            counts=[1, 2] if given.quick else [1, 2, 4, 8, 16, 32, 64],
            tokens=200 if given.quick else 3600,
            scale=16 if given.quick else 8,
            layers=2,
            **shared,
        )
    if given.only != "training":
        with tempfile.TemporaryDirectory() as temporary:
            sizes = [100, 200] if given.quick else [1000, 10_000, 30_000, 100_000]
            most = 100 if given.quick else 4000
            curves |= measure_store(given.folder or Path(temporary), sizes, most=most, **shared)
    figure = given.figure or (None if given.quick or (given.only and not given.earlier) else FIGURE)
    if figure is not None:
        draw(curves, figure)
    slopes = {key: slope(points) for key, points in curves.items() if key != "codes"}
    finish("growth", rows_of(curves), given, curves=curves, slopes=slopes)


if __name__ == "__main__":
    main()
