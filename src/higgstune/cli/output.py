"""What the command shows: progress and errors on stderr, results on stdout."""

import json
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

errors = Console(stderr=True)


class Bar:
    """Progress of a verb: a bar on a terminal, a line at every tenth elsewhere; on stderr, stdout is the result's."""

    def __init__(self, *, live: bool = True) -> None:
        self.live = live and sys.stderr.isatty()
        self.progress: Progress | None = None
        self.tasks: dict[str, Any] = {}
        self.tenths: dict[str, int] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        if self.live:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=errors)
            self.progress.start()
        return self._show

    def __exit__(self, *exception: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def _show(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            if what not in self.tasks:
                self.tasks[what] = self.progress.add_task(what, total=total)
            self.progress.update(self.tasks[what], completed=done, total=total)
        elif (tenth := 10 * done // max(1, total)) != self.tenths.get(what, 0):
            self.tenths[what] = tenth
            errors.print(f"{what} {done}/{total}", highlight=False)


def print_result(values: dict[str, Any], as_json: bool) -> None:
    """A verb's result on stdout: one JSON object, or a line a key."""
    if as_json:
        typer.echo(json.dumps(values, ensure_ascii=False, default=str))
        return
    for key, value in values.items():
        typer.echo(f"{key}: {_plain(value)}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def escape(text: str) -> str:
    """Text that is to be shown as it is, brackets too."""
    return text.replace("[", r"\[")


def print_measures(evaluations: dict[str, Any], differences: dict[str, Any]) -> None:
    """A table of evaluations side by side, with the differences of the last from the one before; what is missing."""
    from higgstune.metrics import METRICS, shown

    table = Table("", *evaluations, *(["difference", "p"] if differences else []))
    for metric in METRICS:
        estimates = [found.summary.get(metric.name) for found in evaluations.values()]
        if any(estimate is not None for estimate in estimates):
            cells = ["not measured" if e is None else shown(metric, e.value) for e in estimates]
            if differences:
                found = differences.get(metric.name)
                cells += ["", ""] if found is None else [shown(metric, found.value), f"{found.p:.3f}"]
            table.add_row(metric.label, *cells)
    Console().print(table)
    missing = list(evaluations.values())[-1].not_measured  # recordings, the first, have no recordings
    for reason in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, why in missing.items() if why == reason)
        errors.print(f"not measured: {names}: {escape(reason)}", highlight=False, soft_wrap=True)


def told_stage(stage: dict[str, Any]) -> str:
    """What a stage of a run came to, in one line; `--json` has all of it."""
    parts = [f"{stage['kind']}, {stage['steps']} steps"]
    if stage.get("compiled"):
        parts.append("layers compiled")
    if stage.get("stopped_early"):
        parts.append("stopped early: nothing better for as many validations as evaluation.patience says")
    if chosen := stage.get("chosen"):
        parts.append(f"ends with step {chosen['step']}: {chosen['rule']}")
    return "; ".join(parts)


def measured(error_rate: float | None, similarity: dict[str, float]) -> str:
    """Figures of a set of clips in one line."""
    rate = "error rate not measured" if error_rate is None else f"word error rate {100 * error_rate:.1f} %"
    return ", ".join([rate, *(f"{judge} {value:.3f}" for judge, value in similarity.items())])


def command_line() -> list[str]:
    """The words that were typed, for a report to repeat."""
    return ["higgstune", *sys.argv[1:]]
