"""Metrics of systems as rows of tables: values, intervals, differences, and verdicts in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from higgstune.metrics import (
    METRICS,
    NOT_MEASURED,
    Better,
    Difference,
    Estimate,
    Metric,
    by_name,
    is_finite,
    shown,
    verdict,
)

WORDS: dict[Better, str] = {
    "lower": "lower is better",
    "higher": "higher is better",
    "one": "best at 1",
    "zero": "best at 0",
    "none": "",
}
_AT_A_GLANCE = ("wer", "similarity", "cap_rate", "naturalness")


@dataclass(frozen=True)
class System:
    """A column: recordings, the base, an adapter. Metrics that `summary` lacks were not measured."""

    name: str
    summary: Mapping[str, Estimate]  # by metric
    differences: Mapping[str, Difference] = field(default_factory=dict)  # it minus the first system


@dataclass(frozen=True)
class Cell:
    """A value and its interval as text, and its place in the row's plot in percent (None: not measured)."""

    value: str
    interval: str = ""
    clips: int = 0
    place: tuple[float, ...] | None = None  # low, value, high


@dataclass(frozen=True)
class Row:
    """One metric of all systems."""

    label: str
    better: str
    cells: Sequence[Cell]
    ends: tuple[str, str] | None  # of the plot's scale
    goal: float | None  # where the plot has 0 or 1, if that is best


@dataclass(frozen=True)
class Change:
    """A metric before and after, on the same clips; `difference` is None if it was not measured."""

    metric: str
    before: Estimate | None
    after: Estimate | None
    difference: Difference | None
    texts: str = ""  # the set of texts, if the table has several


@dataclass(frozen=True)
class ChangeRow:
    """A change as text."""

    label: str
    better: str
    before: str
    after: str
    difference: str
    interval: str
    p: str
    verdict: str


@dataclass(frozen=True)
class Glance:
    """A number for the top of the page."""

    label: str
    name: str  # of the system
    value: str
    others: Sequence[tuple[str, str]]
    better: str


def metric_rows(systems: Sequence[System]) -> list[Row]:
    """A row for each metric that a system has, in the order of METRICS."""
    names = {name for system in systems for name in system.summary}
    return [_row(metric, [system.summary.get(metric.name) for system in systems]) for metric in by_name(sorted(names))]


def change_rows(changes: Sequence[Change]) -> list[ChangeRow]:
    """Changes for the worse first, then for the better, then unclear ones, then those that were not measured."""
    order = ["worse", "better", "no clear difference", NOT_MEASURED]
    return sorted((_change_row(change) for change in changes), key=lambda row: order.index(row.verdict))


def changes_of(first: System, system: System) -> list[Change]:
    """The differences of a system from the first one, of every metric that either has."""
    names = {*first.summary, *system.summary}
    return [
        Change(m.name, first.summary.get(m.name), system.summary.get(m.name), system.differences.get(m.name))
        for m in by_name(sorted(names))
    ]


def glances(systems: Sequence[System]) -> list[Glance]:
    """The last system's most important numbers, beside those of the others."""
    found = []
    for metric in by_name(_AT_A_GLANCE):
        values = [(system.name, _text(metric, system.summary.get(metric.name))) for system in systems]
        if values and values[-1][1] != NOT_MEASURED:
            others = [(name, value) for name, value in values[:-1] if value != NOT_MEASURED]
            found.append(Glance(metric.label, *values[-1], others, WORDS[metric.better]))
    return found


def metric_of(name: str) -> Metric:
    """The metric of a name. Raises KeyError for another."""
    return {metric.name: metric for metric in METRICS}[name]


def value_text(name: str, value: float | None) -> str:
    """A metric's value as text; "not measured" for None and NaN."""
    return NOT_MEASURED if value is None or not is_finite(value) else _shown(metric_of(name), value)


def _row(metric: Metric, estimates: Sequence[Estimate | None]) -> Row:
    known = [e for e in estimates if e is not None and is_finite(e.value, e.low, e.high)]
    scale = _scale(metric, known)
    cells = [_cell(metric, e, scale) if e in known and e is not None else _bare(metric, e) for e in estimates]
    goal = {"one": 1.0, "zero": 0.0}.get(metric.better)
    ends = None if scale is None else (_shown(metric, scale[0]), _shown(metric, scale[1]))
    place = None if goal is None or scale is None else _percent(goal, scale)
    return Row(metric.label, WORDS[metric.better], cells, ends, place)


def _bare(metric: Metric, estimate: Estimate | None) -> Cell:
    """A cell without a mark in the plot: it has no value, or its interval is unknown."""
    return Cell(_text(metric, estimate), clips=0 if estimate is None else estimate.clips)


def _cell(metric: Metric, estimate: Estimate, scale: tuple[float, float] | None) -> Cell:
    low, high = _plain(metric, estimate.low), _plain(metric, estimate.high)
    ends = (estimate.low, estimate.value, estimate.high)
    place = None if scale is None else tuple(_percent(value, scale) for value in ends)
    return Cell(_shown(metric, estimate.value), f"{low} to {high}", estimate.clips, place)


def _scale(metric: Metric, estimates: Sequence[Estimate]) -> tuple[float, float] | None:
    """Ends of a row's plot: around all intervals and the metric's best value, and from 0 if that is near."""
    if not estimates:
        return None
    ends = [e.low for e in estimates] + [e.high for e in estimates]
    ends += {"one": [1.0], "zero": [0.0]}.get(metric.better, [])
    low, high = min(ends), max(ends)
    if 0 < low < high / 2:
        low = 0.0
    if high > low:
        return low, high
    return (low - 0.5, high + 0.5) if low < 0 else (0.0, 2 * high or 1.0)


def _percent(value: float, scale: tuple[float, float]) -> float:
    """A value's place in the plot in percent, with room at both ends for the marks."""
    return round(4 + 92 * (value - scale[0]) / (scale[1] - scale[0]), 2)


def _change_row(change: Change) -> ChangeRow:
    metric, difference = metric_of(change.metric), change.difference
    label = f"{metric.label}, {change.texts}" if change.texts else metric.label
    outcome = verdict(metric, change.before, change.after, difference)
    before, after = _text(metric, change.before), _text(metric, change.after)
    if difference is None or outcome == NOT_MEASURED:
        return ChangeRow(label, WORDS[metric.better], before, after, NOT_MEASURED, "", "", NOT_MEASURED)
    interval = f"{_signed(metric, difference.low)} to {_signed(metric, difference.high)}"
    value = _signed(metric, difference.value) + (" points" if metric.percent else "")
    return ChangeRow(label, WORDS[metric.better], before, after, value, interval, _p_text(difference.p), outcome)


def _text(metric: Metric, estimate: Estimate | None) -> str:
    return NOT_MEASURED if estimate is None or not is_finite(estimate.value) else _shown(metric, estimate.value)


def _plain(metric: Metric, value: float) -> str:
    """A value without its unit."""
    return _shown(metric, value).split(" ")[0]


def _shown(metric: Metric, value: float) -> str:
    return shown(metric, value).replace("-", "−")


def _signed(metric: Metric, value: float) -> str:
    return ("+" if value >= 0 else "−") + _plain(metric, abs(value))


def _p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
