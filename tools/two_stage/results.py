"""The study's tables and figures, from what `study.py` measured."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from higgstune.evaluation.statistics import difference_interval, permutation_p, ratio

CONTROL = "full-full"
COMPARED = (CONTROL, "text-full", "both-full")
YARDSTICKS = ("both-full-fast", "full", "rest")  # see `study.recipe_for`
KINDS = ("trained", "unseen")
OTHERS = ("base", "recordings")
COLOURS = dict(zip(COMPARED, ("tab:blue", "tab:orange", "tab:green"), strict=True))
Row = Mapping[str, Any]
Group = tuple[str, float, str]  # setting, share of stage 1, arm
Shown = Callable[[float], str]


@dataclass(frozen=True)
class Measure:
    """A ratio of two sums over clips, as in `higgstune.metrics`."""

    label: str
    top: Callable[[Row], float]
    bottom: Callable[[Row], float] = lambda row: 1.0
    percent: bool = False

    def sums(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Numerators and denominators: each [clips]."""
        return np.array([self.top(row) for row in rows]), np.array([self.bottom(row) for row in rows])

    def of(self, rows: Sequence[Row]) -> float:
        """The measure over clips."""
        return ratio(*self.sums(rows))

    def shown(self, value: float, *, sign: bool = False) -> str:
        """A value, or a difference, as text."""
        plus = "+" if sign else ""
        return f"{100 * value:{plus}.0f}" if self.percent else f"{value:{plus}.2f}"


def _ill(row: Row) -> float:
    return float(bool(row["short"] or row["hit_cap"] or row["loops"]))


# A clip has at most as many errors as words: words that an ASR invents for noise (149 for 5) must not decide.
MEASURES = {
    "wer": Measure("WER, %", lambda row: min(row["word_errors"], row["words"]), lambda row: row["words"], percent=True),
    "cer": Measure("CER, %", lambda row: min(row["char_errors"], row["chars"]), lambda row: row["chars"], percent=True),
    "resemblyzer": Measure("similarity, resemblyzer", lambda row: row["similarity resemblyzer"]),
    "campplus": Measure("similarity, CAM++", lambda row: row["similarity campplus"]),
    "ill": Measure("too short, endless or looping, %", _ill, percent=True),
    "length": Measure("length over the recording's", lambda row: row["duration_ratio"]),
}


def write_results(out: Path) -> None:
    """Write results.json, results.md and the figures, from all measurements below `out`."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*/*/measured.json"))]
    groups: dict[Group, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["arm"] not in OTHERS:
            groups[run["setting"], run["share"], run["arm"]].append(run)
    others = {(run["setting"], run["arm"]): run for run in runs if run["arm"] in OTHERS}
    ordered = dict(sorted(groups.items(), key=lambda item: (*item[0][:2], (*COMPARED, *YARDSTICKS).index(item[0][2]))))
    table = [entry(group, found, ordered) for group, found in ordered.items()]
    limits = [
        {"setting": setting, "arm": arm, **values_of([run], kind)}
        for (setting, arm), run in others.items()
        for kind in KINDS
    ]
    content = {"judges": runs[0]["judges"], "arms": table, "limits": limits}
    (out / "results.json").write_text(json.dumps(content, indent=1))
    (out / "results.md").write_text("\n".join([*loss_table(table), "", *speech_table(table, limits), ""]))
    draw_curves(out / "two_stage_curves.png", ordered)
    draw_speech(out / "two_stage_speech.png", table, limits)
    draw_shares(out / "two_stage_share.png", table)


def entry(
    group: Group, found: Sequence[dict[str, Any]], groups: Mapping[Group, list[dict[str, Any]]]
) -> dict[str, Any]:
    """An arm's losses and measures by seed, and its differences from the control on the same sentences."""
    setting, share, arm = group
    control = groups.get((setting, share, CONTROL), [])
    seeds = {run["seed"] for run in found} & {run["seed"] for run in control}
    before, after = ([run for run in some if run["seed"] in seeds] for some in (control, found))
    return {
        "setting": setting, "share": share, "arm": arm, "seeds": [run["seed"] for run in found],
        "after_first": [run["after_first"] for run in found],
        "last": [run["curve"][-1][1] for run in found],
        "best": [min(point[1] for point in run["curve"]) for run in found],
        "speech": [values_of(found, kind) for kind in KINDS],
        "differences": {kind: differences(before, after, kind) for kind in KINDS} if seeds and arm != CONTROL else {},
    }  # fmt: skip


def values_of(runs: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Each measure, by seed, over the sentences of a kind."""
    rows = [rows_of(run, kind) for run in runs]
    return {"kind": kind, "clips": len(rows[0])} | {
        name: [measure.of(some) for some in rows] for name, measure in MEASURES.items()
    }


def differences(control: Sequence[dict[str, Any]], arm: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Arm minus control, interval and p over sentences: of each sentence the sums over the seeds.

    Raises ValueError if the two spoke different sentences.
    """
    spoken = [[row["id"] for row in rows_of(run, kind)] for run in (*control, *arm)]
    if any(ids != spoken[0] for ids in spoken):
        raise ValueError(f"runs spoke other sentences: {spoken}")
    found = {}
    for name, measure in MEASURES.items():
        a, b = (over_seeds(measure, [rows_of(run, kind) for run in runs]) for runs in (control, arm))
        low, high = difference_interval(a, b, seed=0)
        found[name] = {
            "value": ratio(*b) - ratio(*a), "low": low, "high": high, "p": permutation_p(a, b, seed=0),
        }  # fmt: skip
    return found


def over_seeds(measure: Measure, runs: Sequence[Sequence[Row]]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators, each [sentences], summed over seeds."""
    tops, bottoms = zip(*(measure.sums(rows) for rows in runs), strict=True)
    return np.sum(tops, axis=0), np.sum(bottoms, axis=0)


def rows_of(run: Mapping[str, Any], kind: str) -> list[Row]:
    """The clips of one kind of sentences, in the order of their ids."""
    return sorted((row for row in run["rows"] if row["id"].startswith(kind)), key=lambda row: row["id"])


def loss_table(table: Sequence[dict[str, Any]]) -> list[str]:
    """Validation losses."""
    lines = ["| data | stage 1 | arm | loss after stage 1 | at the end | lowest |", "|---|---|---|---|---|---|"]
    for row in table:
        columns = [spread(row[name], "{:.3f}".format) for name in ("after_first", "last", "best")]
        lines.append(_line([row["setting"], f"{row['share']:.0%}", row["arm"], *columns]))
    return lines


def speech_table(table: Sequence[dict[str, Any]], limits: Sequence[dict[str, Any]]) -> list[str]:
    """Measures of the speech: mean (lowest to highest seed), and for arms the difference from the control."""
    labels = [measure.label for measure in MEASURES.values()]
    lines = ["| data | stage 1 | sentences | arm | " + " | ".join(labels) + " |", "|---" * (len(labels) + 4) + "|"]
    for row, kind in product(table, range(len(KINDS))):
        values, apart = row["speech"][kind], row["differences"].get(KINDS[kind], {})
        columns = [spread(values[name], measure.shown) for name, measure in MEASURES.items()]
        lines.append(
            _line([row["setting"], f"{row['share']:.0%}", f"{values['clips']} {KINDS[kind]}", row["arm"], *columns])
        )
        if apart:
            columns = [against(apart[name], measure) for name, measure in MEASURES.items()]
            lines.append(_line(["", "", "", f"minus {CONTROL}", *columns]))
    for row in limits:
        columns = [measure.shown(row[name][0]) for name, measure in MEASURES.items()]
        lines.append(_line([row["setting"], "-", f"{row['clips']} {row['kind']}", row["arm"], *columns]))
    return lines


def _line(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |"


def spread(values: Sequence[float], shown: Shown) -> str:
    """Mean (lowest to highest)."""
    return f"{shown(float(np.mean(values)))} ({shown(min(values))} to {shown(max(values))})"


def against(found: Mapping[str, float], measure: Measure) -> str:
    """A difference with its interval and p."""
    value, low, high = (measure.shown(found[key], sign=True) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}], p {found['p']:.3f}"


def draw_curves(path: Path, groups: Mapping[Group, list[dict[str, Any]]], share: float = 0.3) -> None:
    """Validation audio loss by step, a panel for each setting: mean, and lowest to highest seed."""
    settings = list(dict.fromkeys(setting for setting, at, arm in groups if at == share and arm in COMPARED))
    if not settings:
        return
    figure, axes = plt.subplots(1, len(settings), figsize=(4.6 * len(settings), 3.8), squeeze=False)
    for axis, setting in zip(axes[0], settings, strict=True):
        for arm in COMPARED:
            runs = groups.get((setting, share, arm), [])
            if not runs:
                continue
            steps = [point[0] for point in runs[0]["curve"]]
            losses = np.array([[point[1] for point in run["curve"]] for run in runs])
            axis.plot(steps, losses.mean(0), label=arm, marker=".", color=COLOURS[arm])
            axis.fill_between(steps, losses.min(0), losses.max(0), alpha=0.2, color=COLOURS[arm])
            axis.axvline(share * steps[-1], color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=setting, xlabel="steps over both stages")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("audio loss of unseen sentences, nats")
    axes[0][0].legend(fontsize=9)
    _save(figure, path)


def draw_speech(
    path: Path, table: Sequence[dict[str, Any]], limits: Sequence[dict[str, Any]], share: float = 0.3
) -> None:
    """Error rate and similarity of each arm: a bar for the mean, a dot for each seed; lines: base and recordings."""
    rows = {(row["setting"], row["arm"]): row for row in table if row["share"] == share and row["arm"] in COMPARED}
    settings = list(dict.fromkeys(setting for setting, _ in rows))
    columns = list(product(settings, range(len(KINDS))))
    if not columns:
        return
    names = ("wer", "resemblyzer", "campplus")
    size = (2.5 * len(columns), 2.6 * len(names))
    figure, axes = plt.subplots(len(names), len(columns), figsize=size, sharey="row", squeeze=False)
    for (line, name), (column, (setting, kind)) in product(enumerate(names), enumerate(columns)):
        axis = axes[line][column]
        for place, arm in enumerate(COMPARED):
            if (setting, arm) in rows:
                values = rows[setting, arm]["speech"][kind][name]
                axis.bar(place, np.mean(values), color=COLOURS[arm], alpha=0.6)
                axis.scatter([place] * len(values), values, color="black", s=12, zorder=3)
        for other, style in zip(OTHERS, (":", "--"), strict=True):
            for limit in limits:
                if (limit["setting"], limit["arm"], limit["kind"]) == (setting, other, KINDS[kind]):
                    axis.axhline(limit[name][0], color="grey", linestyle=style, linewidth=1, label=other)
        axis.set_xticks(range(len(COMPARED)), COMPARED, rotation=30, fontsize=8)
        axis.grid(alpha=0.3, axis="y")
        if line == 0:
            axis.set_title(f"{setting}, {KINDS[kind]} sentences", fontsize=9)
        if column == 0:
            axis.set_ylabel(MEASURES[name].label.replace(", %", ""))
    axes[0][0].legend(fontsize=7)
    _save(figure, path)


def draw_shares(path: Path, table: Sequence[dict[str, Any]], setting: str = "few", kind: str = "trained") -> None:
    """Error rate and similarity by the share of stage 1: mean, lowest to highest seed."""
    names = ("wer", "resemblyzer")
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.4))
    for (axis, name), arm in product(zip(axes, names, strict=True), COMPARED):
        rows = [row for row in table if (row["setting"], row["arm"]) == (setting, arm)]
        values = [row["speech"][KINDS.index(kind)][name] for row in rows]
        means = np.array([np.mean(some) for some in values])
        reach = [means - [min(some) for some in values], [max(some) for some in values] - means]
        shares = [100 * row["share"] for row in rows]
        axis.errorbar(shares, means, yerr=reach, marker="o", capsize=3, label=arm, color=COLOURS[arm])
        label = MEASURES[name].label.replace(", %", "")
        axis.set(xlabel="stage 1, % of the steps", title=f"{label}: {setting}, {kind} sentences")
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
