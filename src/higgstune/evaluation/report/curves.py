"""Figures of a training run: one small panel per stage or metric, so that any number of them stays readable.

They are inline SVG, in the page's colours, light or dark, and in its font. Matplotlib is imported when one is drawn: it
takes long, and most uses of this package draw none.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from higgstune.evaluation.report.measures import WORDS
from higgstune.metrics import METRICS, Metric

History = Sequence[Mapping[str, Any]]  # entries by step: the trainer's log, as in `run.json`, or evaluations
Series = tuple[list[float], list[float]]  # steps, values

# Matplotlib needs real colours: each stands for a property of the page's style sheet, which has the visible colour.
INK, MUTED, LINE = "#0a0001", "#0a0002", "#0a0003"
SERIES = tuple(f"#0b00{i:02x}" for i in range(6))
CODEBOOKS = tuple(f"#0c00{i:02x}" for i in range(8))
_PROPERTIES = (
    {INK: "--ink", MUTED: "--muted", LINE: "--line"}
    | {colour: f"--s{i}" for i, colour in enumerate(SERIES)}
    | {colour: f"--q{i}" for i, colour in enumerate(CODEBOOKS)}
)
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "higgstune",  # the same figure is the same bytes
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
_VIEW_BOX = re.compile(r'viewBox="([^"]*)"')
_MAX_POINTS = 160  # of a curve; more are averaged in groups
_DASHES = ("", "5 3", "1.5 2", "7 2 1.5 2", "3 1.5", "9 3")
_LOSSES = (("audio_loss", "audio"), ("text_loss", "text"))


@dataclass(frozen=True)
class Key:
    """An entry of a legend, which the page shows above the panels."""

    label: str
    colour: str  # a CSS value
    dashes: str = ""  # as stroke-dasharray
    marker: bool = False


@dataclass(frozen=True)
class Panel:
    """One small plot with its title."""

    title: str
    svg: Markup
    summary: str


@dataclass(frozen=True)
class Figure:
    """Panels that share a legend. False if there is nothing to show."""

    keys: Sequence[Key]
    panels: Sequence[Panel]

    def __bool__(self) -> bool:
        return bool(self.panels)


@dataclass(frozen=True)
class _Curve:
    key: Key
    colour: str  # for matplotlib
    points: Series


def losses_figure(stages: Mapping[str, History]) -> Figure:
    """Text and audio loss of training and validation in nats per token, one panel per stage."""

    def curves(history: History) -> list[_Curve]:
        found: list[_Curve] = []
        for i, (key, label) in enumerate(_LOSSES):
            colour = SERIES[i]
            found.append(_Curve(Key(label, property_of(colour)), colour, _thinned(_series(history, key))))
            name = Key(f"{label}, validation", property_of(colour), _DASHES[1], marker=True)
            found.append(_Curve(name, colour, _thinned(_series(history, f"eval_{key}"))))
        return found

    panels = {_stage_title(name): curves(history) for name, history in stages.items()}
    return _figure("losses", panels, "nats per token")


def codebooks_figure(stages: Mapping[str, History]) -> Figure:
    """The training loss of each codebook in nats per code, one panel per stage."""

    def curves(history: History) -> list[_Curve]:
        found: list[_Curve] = []
        while (points := _series(history, f"audio_loss_{len(found)}"))[0]:
            colour = CODEBOOKS[len(found) % len(CODEBOOKS)]
            key = Key(f"codebook {len(found)}", property_of(colour), _DASHES[len(found) // len(CODEBOOKS) % 6])
            found.append(_Curve(key, colour, _thinned(points)))
        return found

    panels = {_stage_title(name): curves(history) for name, history in stages.items()}
    return _figure("codebooks", panels, "nats per code")


def evaluations_figure(stages: Mapping[str, History], chosen: tuple[str, int] | None = None) -> Figure:
    """Metrics of the clips spoken during training, over each stage's steps: one panel per metric.

    `chosen` is the stage and step of the chosen checkpoint, which is marked.
    """
    panels = {}
    for metric in METRICS:
        percent = 100.0 if metric.percent else 1.0
        curves = []
        for i, (name, history) in enumerate(stages.items()):
            steps, values = _series(history, metric.name)
            points = (steps, [percent * value for value in values])
            curves.append(_Curve(_key(name, i, marker=True), SERIES[i % 6], points))
        panels[_metric_title(metric)] = curves
    figure = _figure("evaluations", panels, "", chosen)
    if chosen is None or all(chosen[0] != key.label for key in figure.keys):
        return figure
    return Figure([*figure.keys, Key("chosen checkpoint", property_of(INK), "1.5 2")], figure.panels)


def overlaid_losses(systems: Mapping[str, Mapping[str, History]]) -> Figure:
    """Losses of several runs, each by stage, over the steps of all stages: one panel per loss."""
    names = [("audio_loss", "audio, training"), ("eval_audio_loss", "audio, validation"),
             ("text_loss", "text, training"), ("eval_text_loss", "text, validation")]  # fmt: skip
    panels = {label: _overlaid(systems, key, 1.0) for key, label in names}
    return _figure("losses", panels, "nats per token", across=True)


def overlaid_evaluations(systems: Mapping[str, Mapping[str, History]]) -> Figure:
    """Metrics of several runs during training, over the steps of all stages: one panel per metric."""
    panels = {_metric_title(m): _overlaid(systems, m.name, 100.0 if m.percent else 1.0) for m in METRICS}
    return _figure("evaluations", panels, "", across=True)


def _metric_title(metric: Metric) -> str:
    unit = "%" if metric.percent else metric.unit
    named = f"{metric.label}, {unit}" if unit else metric.label
    return f"{named}: {WORDS[metric.better]}" if WORDS[metric.better] else named


def _stage_title(name: str) -> str:
    return name if name.lower().startswith("stage") else f"stage {name}"


def _overlaid(systems: Mapping[str, Mapping[str, History]], name: str, factor: float) -> list[_Curve]:
    curves = []
    for i, (system, stages) in enumerate(systems.items()):
        points: Series = ([], [])
        before = 0.0
        for history in stages.values():
            steps, values = _series(history, name)
            points[0].extend(before + step for step in steps)
            points[1].extend(factor * value for value in values)
            before += max((float(entry["step"]) for entry in history if "step" in entry), default=0.0)
        curves.append(_Curve(_key(system, i), SERIES[i % 6], _thinned(points)))
    return curves


def _key(label: str, i: int, *, marker: bool = False) -> Key:
    """The legend entry of the i-th curve: colours repeat after six, with other dashes."""
    return Key(label, property_of(SERIES[i % 6]), _DASHES[(i + i // 6) % 6], marker)


def _figure(
    name: str,
    panels: Mapping[str, Sequence[_Curve]],
    label: str,
    chosen: tuple[str, int] | None = None,
    *,
    across: bool = False,
) -> Figure:
    """Panels and a legend for the curves that have points."""
    keys: dict[str, Key] = {}
    made: list[Panel] = []
    for title, curves in panels.items():
        drawn = [curve for curve in curves if curve.points[0]]
        if drawn:
            keys |= {curve.key.label: curve.key for curve in drawn}
            made.append(_panel(f"{name}-{len(made)}", title, label, drawn, chosen, across))
    return Figure(list(keys.values()), made)


def _panel(
    name: str, title: str, label: str, curves: Sequence[_Curve], chosen: tuple[str, int] | None, across: bool
) -> Panel:
    axis = new_axis()
    for curve in curves:
        dashes = [float(part) for part in curve.key.dashes.split()]
        (line,) = axis.plot(*curve.points, color=curve.colour, marker="o" if curve.key.marker else "", markersize=3.5)
        if dashes:
            line.set_dashes([part / 1.6 for part in dashes])
        if len(curve.points[0]) == 1:
            line.set_marker("o")
        if chosen is not None and curve.key.label == chosen[0]:
            _mark(axis, curve, chosen[1])
    axis.set(xlabel="step, over all stages" if across else "step", ylabel=label)
    axis.locator_params(nbins=5)
    summary = f"{title}. " + "; ".join(_in_words(curve) for curve in curves) + "."
    return Panel(title, inline_svg(axis, name, summary), summary)


def _mark(axis: Any, curve: _Curve, step: int) -> None:
    """A dotted line at the chosen step, and a ring around its value."""
    axis.axvline(step, color=INK, linewidth=1.2, linestyle=(0, (1.5, 2)), zorder=1)
    for x, y in zip(*curve.points, strict=True):
        if x == step:
            axis.plot([x], [y], "o", markersize=9, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6)


def _in_words(curve: _Curve) -> str:
    """A curve in words, for readers who cannot see it."""
    steps, values = curve.points
    if len(steps) == 1:
        return f"{curve.key.label}: {values[0]:.3g} at step {steps[0]:.0f}"
    ends = f"{values[0]:.3g} at step {steps[0]:.0f}, {values[-1]:.3g} at step {steps[-1]:.0f}"
    return f"{curve.key.label}: {ends}, lowest {min(values):.3g}, highest {max(values):.3g}"


def _series(history: History, key: str) -> Series:
    points = [(entry["step"], entry[key]) for entry in history if isinstance(entry.get(key), int | float)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def _thinned(series: Series) -> Series:
    """At most `_MAX_POINTS` points, each the mean of its group: thousands of points would add only noise and bytes."""
    if len(series[0]) <= _MAX_POINTS:
        return series
    groups = [np.array_split(np.array(values), _MAX_POINTS) for values in series]
    return [float(group.mean()) for group in groups[0]], [float(group.mean()) for group in groups[1]]


def property_of(colour: str) -> str:
    """The style sheet's property that a colour of this module stands for, such as `var(--s0)`."""
    return f"var({_PROPERTIES[colour]})"


def new_axis(size: tuple[float, float] = (4.1, 2.7)) -> Any:
    """An axis alone in a figure of this size in inches; the default is as wide as a phone."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]
        axis = Figure(figsize=size, layout="constrained").add_subplot()
        axis.set_axisbelow(True)
        return axis


def inline_svg(axis: Any, name: str, summary: str) -> Markup:
    """The axis' figure as an <svg> element; `name` is unique in the page, `summary` describes the figure in words."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(_STYLE):  # type: ignore[arg-type]
        axis.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, prop in _PROPERTIES.items():
        text = text.replace(colour, f"var({prop})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    start = f'<svg role="img" aria-label="{escape(summary)}" viewBox="{_VIEW_BOX.findall(text)[0]}">'
    return Markup(start + text[text.index(">") + 1 :])  # matplotlib escapes its text; the summary is escaped here
