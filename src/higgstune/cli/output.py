"""The output of the command: notes, progress and errors on stderr, results on stdout; libraries are kept quiet."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from higgstune.environment import check_versions
from higgstune.imports import collector_paused

# Plain text: a message quotes what users and strangers wrote, and `[/x]` in it is not markup. No line is broken.
errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
_MIN_WIDTH = 60  # characters; on a narrower terminal the lines are broken by the terminal, and not cut
_ANY_WIDTH = 100_000
# Warnings that no user can act on, by their logger: how each begins.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # of a hub's kernels
    # of the released model's own config, which sets the context shorter than the one that the rotary scaling names
    "transformers.modeling_rope_utils": "`rope_parameters`'s original_max_position_embeddings field must be less",
}


def mute_libraries() -> None:
    """Drop the lines of `_NOISE` and, unless stderr is a terminal, all bars; before libraries are imported."""
    for name, beginning in _NOISE.items():
        logging.getLogger(name).addFilter(_without(beginning))
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # and transformers' bars: lines, not bars, in a log


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(beginning)


@contextmanager
def announced(what: str, as_json: bool = False, *, any_version: bool = False) -> Iterator[None]:
    """Say on stderr what a verb begins with, and quiet transformers. The verb imports what is large inside of this.

    Raises WorkError, before anything is imported, for versions that do not fit unless `any_version`.
    """
    if not any_version:
        check_versions()
    if not as_json and os.environ.get("RANK", "0") == "0":
        errors.print(f"{what} ...")
    with collector_paused():
        if sys.stderr.isatty():  # elsewhere `mute_libraries` has seen to it
            from huggingface_hub.utils import enable_progress_bars
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()  # "Loading weights", "Writing model shards"
            enable_progress_bars()  # of downloads, which the line above has disabled, too
        yield


class Bar:
    """Progress of a verb on stderr: a bar on a terminal, a line at every tenth elsewhere."""

    def __init__(self, *, live: bool = True) -> None:
        self.live = live and sys.stderr.isatty()
        self.progress: Progress | None = None
        self.tasks: dict[str, Any] = {}
        self.tenths: dict[str, int] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        if self.live:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
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
            errors.print(f"{what} {done}/{total}")


def print_result(values: dict[str, Any], as_json: bool) -> None:
    """Print a verb's result on stdout: one JSON object, or a line a key."""
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


def many(count: int, noun: str) -> str:
    """`1 clip`, `2 clips`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def print_next(*command: str, before: str = "") -> None:
    """Print the command that people type next, with words that lead to it."""
    typer.echo(f"next: {before} {shlex.join(command)}" if before else f"next: {shlex.join(command)}")


def print_table(table: Table) -> None:
    """Print a table on stdout with all that is in it: as wide as it is or, on a terminal, with long words broken."""
    for column in table.columns:
        column.overflow = "fold"
    console = Console(markup=False)
    console.width = max(console.width, _MIN_WIDTH) if sys.stdout.isatty() else _ANY_WIDTH
    console.print(table)


def print_error(text: str, who: str = "") -> None:
    """Print the one line that a failed command ends with, on stderr."""
    errors.print(Text.assemble((f"error{who}:", "bold red"), f" {text}"))


def print_measures(evaluations: dict[str, Any], differences: dict[str, Any]) -> None:
    """Print evaluations side by side, the differences of the last from the one before, and what was not measured."""
    from higgstune.metrics import METRICS, shown

    table = Table("", *evaluations, *(["difference", "p"] if differences else []))
    for metric in METRICS:
        estimates = [found.summary.get(metric.name) for found in evaluations.values()]
        if any(estimate is not None for estimate in estimates):
            columns = ["not measured" if e is None else shown(metric, e.value) for e in estimates]
            if differences:
                found = differences.get(metric.name)
                columns += ["", ""] if found is None else [shown(metric, found.value), f"{found.p:.3f}"]
            table.add_row(metric.label, *columns)
    print_table(table)
    missing = list(evaluations.values())[-1].not_measured  # the first are recordings, which lack recordings
    for reason in dict.fromkeys(missing.values()):
        names = ", ".join(name for name, why in missing.items() if why == reason)
        errors.print(f"not measured: {names}: {reason}")


def command_line() -> list[str]:
    """The command as it was typed, for a report."""
    return ["higgstune", *sys.argv[1:]]
