"""The progress of a stage on stderr: a bar with the time left on a terminal, lines elsewhere."""

import io
import re
import sys

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from higgstune.training import callbacks
from higgstune.training.callbacks import ProgressReport


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    """What is printed on 80 columns for a stage of four steps that logs at the second one."""
    stream = io.StringIO()

    def console(**_: object) -> Console:
        return Console(file=stream, force_terminal=terminal, width=80, color_system=None)

    monkeypatch.setattr(callbacks, "Console", console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    report, state, control = ProgressReport("voice"), TrainerState(), TrainerControl()
    arguments = TrainingArguments.__new__(TrainingArguments)
    state.max_steps, state.is_world_process_zero = 4, True
    report.on_train_begin(arguments, state, control)
    for step in range(1, 5):
        state.global_step = step
        report.on_step_end(arguments, state, control)
        if step == 2:
            report.on_log(arguments, state, control, {"audio_loss": 5.25, "learning_rate": 1e-4})
    report.on_train_end(arguments, state, control)
    return stream.getvalue()


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", line).strip()
        for line in re.split(r"[\r\n]", shown(monkeypatch, terminal=True))
    ]
    bars = [line for line in lines if "left" in line]
    assert re.fullmatch(r"voice ━+ 4/4 steps, \d:\d\d:\d\d left", bars[-1])
    assert "voice 2/4  audio 5.250  lr 1.0e-04" in lines
    assert max(map(len, lines)) <= 80


def test_a_log_gets_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False) == "voice 2/4  audio 5.250  lr 1.0e-04\n"
