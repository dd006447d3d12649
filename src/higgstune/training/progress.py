"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = (
    ("audio_loss", "audio {:.3f}"),
    ("text_loss", "text {:.3f}"),
    ("eval_audio_loss", "validation audio {:.3f}"),
    ("eval_text_loss", "validation text {:.3f}"),
    ("eval_wer", "word error rate {:.1%}"),
    ("eval_similarity", "similarity {:.3f}"),
    ("eval_cap_rate", "did not stop {:.0%}"),
    ("learning_rate", "lr {:.1e}"),
    ("tokens_per_second", "{:.0f} tokens/s"),
    ("audio_seconds_per_second", "{:.1f} s of audio/s"),
)


class ProgressReport(TrainerCallback):
    """Draws the progress of one stage on stderr."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.console = Console(stderr=True)
        self.bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, on a terminal and in the first process only; say where a stage is gone on with."""
        if state.is_world_process_zero and state.global_step:
            self.console.print(f"{self.stage} goes on after step {state.global_step}", highlight=False)
        if state.is_world_process_zero and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.stage, total=state.max_steps, completed=state.global_step, numbers="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers: beside the bar, or as a line."""
        numbers = "  ".join(form.format(logs[key]) for key, form in _SHOWN if logs and key in logs)
        if not numbers or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.update(self.task, numbers=numbers)
        else:
            self.console.print(
                f"{self.stage} {state.global_step}/{state.max_steps}  {numbers}", highlight=False, soft_wrap=True
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
