"""Callbacks of a stage: signals that end training, and its progress on the terminal."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from higgstune.config.recipe import Stage
from higgstune.errors import Interrupted
from higgstune.evaluation.verdict import Verdict, growth_warning, has_grown, is_warmup_too_long, warmup_warning
from higgstune.training.distributed import PendingReduce, Processes

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_KEYPRESS = 1.0  # seconds: a launcher passes on a signal that the terminal has sent already


class StopSignals(TrainerCallback):
    """SIGTERM and SIGINT: training ends after its step, with a checkpoint, in all processes; the rest ends at once."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._received = 0
        self._received_at = 0.0
        self._training = False
        self._pending: PendingReduce | None = None  # of the step before: no step waits for other processes

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals within it; in another thread than the main one Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        repeated = self._received and number == signal.SIGINT and time.monotonic() - self._received_at > _SAME_KEYPRESS
        if not self._received:  # kept: where the error below is caught, training ends after its step
            self._received, self._received_at = number, time.monotonic()
        if not self._training or repeated:
            raise Interrupted(number)

    @override
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """From now on the running step is finished first."""
        self._training = True

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where any process has received a signal."""
        if self._processes.count == 1:
            number = self._received
        else:
            number = 0 if self._pending is None else self._pending.result()
            self._pending = self._processes.all_reduce_max(self._received)
        if number:
            if state.is_world_process_zero:
                _LOG.warning("%s: ending after this step, with a checkpoint", signal.Signals(number).name)
            control.should_save = True
            control.should_training_stop = True

    def end_training(self) -> None:
        """From now on a signal ends the run at once.

        Raises Interrupted in all processes where any of them has received one.
        """
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        received = self._processes.all_reduce_max(self._received).result()
        self._training = False
        if received or self._received:  # also one that came meanwhile
            raise Interrupted(received or self._received)


class LossWatch(TrainerCallback):
    """Warns while a stage is trained of what its verdict will warn of."""

    def __init__(self, stage: Stage, path: str) -> None:
        self.stage = stage
        self.path = path
        self._warned = False

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of a warm-up that takes all steps."""
        warmup = args.get_warmup_steps(state.max_steps)
        if state.is_world_process_zero and is_warmup_too_long(warmup, state.max_steps):
            _LOG.warning("%s: %s", self.stage.name, warmup_warning(self.path, warmup, state.max_steps))

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warn once of a loss that has grown."""
        if state.is_world_process_zero and not self._warned and has_grown(state.log_history, self.stage):
            self._warned = True
            warning = growth_warning(self.path, self.stage.learning_rate)
            _LOG.warning("%s, step %d: %s", self.stage.name, state.global_step, warning)


def show_verdict(stage: str, verdict: Verdict) -> None:
    """Print the last line of a stage on stderr."""
    Console(stderr=True).print(f"{stage}: {verdict}", highlight=False, soft_wrap=True, markup=False)


_SHOWN = (
    ("audio_loss", "audio {:.3f}"),
    ("text_loss", "text {:.3f}"),
    ("eval_audio_loss", "validation audio {:.3f}"),
    ("eval_text_loss", "validation text {:.3f}"),
    ("eval_wer", "word error rate {:.1%}"),
    ("eval_similarity", "similarity {:.3f}"),
    ("eval_cap_rate", "did not stop {:.0%}"),
    ("eval_short_rate", "too short {:.0%}"),
    ("learning_rate", "lr {:.1e}"),
    ("tokens_per_second", "{:.0f} tokens/s"),
    ("audio_seconds_per_second", "{:.1f} s of audio/s"),
)


_SPEED_PERIOD = 600.0  # seconds of steps from which the time left is estimated: a validation is a long pause


class ProgressReport(TrainerCallback):
    """Draws the progress of one stage on stderr."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.console = Console(stderr=True)
        self.bar: Progress | None = None

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, on a terminal and in the first process only; say where a stage resumes."""
        if state.is_world_process_zero and state.global_step:
            self.console.print(f"{self.stage} resumes after step {state.global_step}", highlight=False)
        if state.is_world_process_zero and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps,"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self.bar = Progress(*columns, console=self.console, speed_estimate_period=_SPEED_PERIOD)
            self.bar.start()
            self.task = self.bar.add_task(self.stage, total=state.max_steps, completed=state.global_step)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers as a line, on a terminal above the bar."""
        numbers = "  ".join(form.format(logs[key]) for key, form in _SHOWN if logs and key in logs)
        if not numbers or not state.is_world_process_zero:
            return
        line = f"{self.stage} {state.global_step}/{state.max_steps}  {numbers}"
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    @override
    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Release the terminal, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
