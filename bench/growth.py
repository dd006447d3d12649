"""How cost grows: with the length of clips, with the examples in a pack, with the utterances in the store."""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import BENCH, Case, Found, Meter, Row, alternate, finish, parser, peak_bytes
from stores import demo_prompter, make_store

from higgstune.batch.loader import PackLoader
from higgstune.batch.packing import PackSize, pack_indices
from higgstune.data.store import CodeStore
from higgstune.prompt.rows import RowExamples

EXAMPLE = "python bench/growth.py --json growth.json --figure docs/figures/growth.png"
FIGURE = BENCH.parent / "docs" / "figures" / "growth.png"
BATCH_TOKENS = 4096
Points = dict[float, list[float]]  # size -> the repeats of its cost
PARTS = {"opening": "opening", "lengths": "lengths()", "plan": "plan of packs", "pass": "batches of all rows"}


def by_seconds(lengths: Sequence[float], tokens: int, scale: int, layers: int) -> Found:
    """CPU-seconds of a training step for a clip, at about as many positions a pack whatever the clips' length."""
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
    from higgstune.batch.packed import pack

    batch = pack(examples)
    training.step(batch)  # memory for tensors of these shapes is found once
    with Meter() as meter:
        training.step(batch)
    return meter.cpu_seconds


def by_utterances(folder: str, most: int) -> Found:
    """CPU-seconds of what a stage does with a whole store, and memory; batches of at most so many rows are made,
    in the order of an epoch, and their cost is scaled to all rows.
    """
    prompter = demo_prompter()
    before = peak_bytes()
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
    memory = peak_bytes() - before
    return {"costs": costs, "memory": memory, "codes": int(store.frames.sum()) * store.info.num_codebooks * 2}


def slope(points: Mapping[float, Sequence[float]]) -> float:
    """Of a line through the medians, in log-log: 1 is linear growth."""
    medians = [statistics.median(costs) for costs in points.values()]
    return float(np.polyfit(np.log(list(points)), np.log(medians), 1)[0])


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


def rows_of(curves: Mapping[str, Points]) -> list[Row]:
    """The largest size of each curve, against what the smallest one makes of it if cost grows linearly."""
    names = {
        "clip": ("training step, a clip of {} s", "CPU-s/clip"),
        "examples": ("training step, {} examples in a pack", "CPU-s"),
        **{part: (f"{label}, {{}} utterances", "CPU-s") for part, label in PARTS.items()},
    }
    rows = []
    for key, (name, unit) in names.items():
        if key in curves:
            sizes = list(curves[key])
            linear = [cost * sizes[-1] / sizes[0] for cost in curves[key][sizes[0]]]
            rows.append(
                Row(f"{name.format(sizes[-1])}: slope {slope(curves[key]):.2f}", linear, curves[key][sizes[-1]], unit)
            )
    if "memory" in curves:
        sizes = list(curves["memory"])
        ours = [value / 1e6 for value in curves["memory"][sizes[-1]]]
        codes = [value / 1e6 for value in curves["codes"][sizes[-1]]]
        rows.append(Row(f"memory for {sizes[-1]} utterances, against their codes", codes, ours, "MB"))
    return rows


def draw(curves: Mapping[str, Points], path: Path) -> None:
    """Three panels in log-log; dashed is what linear growth makes of the smallest size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (
        ("Training step by length of clips", "seconds a clip", "CPU-seconds a clip", {"clip": "training step"}),
        ("Training step by examples", "examples in a pack", "CPU-seconds a step", {"examples": "training step"}),
        ("Store by utterances", "utterances in the store", "CPU-seconds", PARTS),
    )
    for axis, (title, x, y, labels) in zip(axes, panels, strict=True):
        for key, label in labels.items():
            if key in curves:
                _curve(axis, curves[key], label)
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve(axis: Any, points: Points, label: str) -> None:
    sizes = np.array(list(points), dtype=float)
    medians = np.array([statistics.median(costs) for costs in points.values()])
    (line,) = axis.plot(sizes, medians, marker="o", label=f"{label}: slope {slope(points):.2f}")
    axis.fill_between(sizes, *zip(*[(min(c), max(c)) for c in points.values()], strict=True), alpha=0.2)
    axis.plot(sizes, medians[0] * sizes / sizes[0], linestyle="--", linewidth=1, color=line.get_color())
    axis.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axis.minorticks_off()


def main() -> None:
    """Measure, print, draw, write."""
    asked = parser(__doc__ or "", EXAMPLE)
    asked.add_argument("--only", choices=("training", "store"), help="one half of it")
    asked.add_argument(
        "--figure", type=Path, help="draw there (default: docs/figures/growth.png, and not with --quick)"
    )
    asked.add_argument("--folder", type=Path, help="keep the stores there, and use those of an earlier run")
    given = asked.parse_args()
    shared = {"repeats": given.repeats, "threads": given.threads}
    curves: dict[str, Points] = {}
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
            sizes = [100, 200] if given.quick else [1000, 3000, 10_000, 30_000, 100_000]
            most = 100 if given.quick else 5000
            curves |= measure_store(given.folder or Path(temporary), sizes, most=most, **shared)
    figure = given.figure or (None if given.quick or given.only else FIGURE)
    if figure is not None:
        draw(curves, figure)
    slopes = {key: slope(points) for key, points in curves.items() if key != "codes"}
    finish("growth", rows_of(curves), given, curves=curves, slopes=slopes)


if __name__ == "__main__":
    main()
