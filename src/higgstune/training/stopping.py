"""SIGTERM and SIGINT: training ends after its step, with a checkpoint; what is not training ends at once."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from higgstune.errors import Interrupted
from higgstune.training.processes import Agreement, Processes

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_KEYPRESS = 1.0  # seconds: a launcher passes on what the terminal has sent already


class StopSignals(TrainerCallback):
    """Ends training where a signal asks for it, in all processes after the same step."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._received = 0
        self._received_at = 0.0
        self._training = False
        self._asked: Agreement | None = None  # about the step before: no step waits for the others

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Signals are handled here inside of it; not in a thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self._received and number == signal.SIGINT and time.monotonic() - self._received_at > _SAME_KEYPRESS
        if not self._received:  # kept: somebody may catch what is raised here, and then training ends after its step
            self._received, self._received_at = number, time.monotonic()
        if not self._training or again:
            raise Interrupted(number)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on steps are finished."""
        self._training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where any process was asked to."""
        if self._processes.count == 1:
            asked = self._received
        else:
            asked = 0 if self._asked is None else self._asked.result()
            self._asked = self._processes.largest(self._received)
        if asked:
            if state.is_world_process_zero:
                _LOG.warning("%s: ending after this step, with a checkpoint", signal.Signals(asked).name)
            control.should_save = True
            control.should_training_stop = True

    def end_training(self) -> None:
        """All processes: raises Interrupted in all of them where any was asked to stop. Signals end the run again."""
        if self._asked is not None:
            self._asked.result()
            self._asked = None
        received = self._processes.largest(self._received).result()
        self._training = False
        if received or self._received:  # also one that came meanwhile
            raise Interrupted(received or self._received)
