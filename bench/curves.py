"""Curves of growth: sizes and the repeats of their costs, as slopes, as lines of a table and as a figure."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import Row

Points = dict[float, list[float]]  # size -> the repeats of its cost
PARTS = {"opening": "opening", "lengths": "lengths()", "plan": "plan of packs", "pass": "batches of all rows"}


def slope(points: Mapping[float, Sequence[float]]) -> float:
    """Of a line through the medians, in log-log: 1 is linear growth."""
    medians = [statistics.median(costs) for costs in points.values()]
    return float(np.polyfit(np.log(list(points)), np.log(medians), 1)[0])


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
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (
        (
            "Training step by length of clips",
            "length of clips (s)",
            "CPU time for a clip (s)",
            {"clip": "training step"},
        ),
        ("Training step by examples", "examples in a pack", "CPU time for a step (s)", {"examples": "training step"}),
        ("Store by utterances", "utterances in the store", "CPU time (s)", PARTS),
    )
    for axis, (title, x, y, labels) in zip(axes, panels, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        for key, label in labels.items():
            if key in curves:
                _curve(axis, curves[key], label)
        for of_axis in (axis.xaxis, axis.yaxis):
            of_axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.minorticks_off()
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * 2)  # room for the legend
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
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
    axis.set_xticks(sizes)


def earlier_curves(path: Path) -> dict[str, Points]:
    """The curves of an earlier run's JSON."""
    curves = json.loads(path.read_text())["curves"]
    return {key: {int(size): costs for size, costs in points.items()} for key, points in curves.items()}
