"""What training and evaluation report, from sums and counts."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from higgstune.errors import TrainingError
from higgstune.files import write_file
from higgstune.kernels.loss import LossWeights, Sums, add_sums, combine
from higgstune.training.checkpoint import part, under

# No model predicts the codes of audio it has never seen this well: real codes carry several nats each.
IMPOSSIBLE_CODE_LOSS = 0.5


def loss_metrics(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: LossWeights) -> dict[str, float]:
    """Sums and counts (see `kernels.loss`) -> losses in nats per label entry, and accuracies.

    `audio_loss` is over all audio label entries, `code_loss` over codes alone, `eos_loss` over stream ends alone.
    """
    audio, eos = counts["audio"].double(), counts["audio_eos"].double()
    loss, eos_loss = sums["audio_loss"].double(), sums["audio_eos_loss"].double()
    per_codebook = loss / audio.clamp(min=1)
    metrics = {
        "loss": combine(sums, counts, weights).item(),
        "audio_loss": per_codebook.mean().item(),
        "code_loss": ((loss - eos_loss).sum() / (audio - eos).sum().clamp(min=1)).item(),
        "eos_loss": (eos_loss.sum() / eos.sum().clamp(min=1)).item(),
        "audio_accuracy": (sums["audio_hits"].double().sum() / audio.sum().clamp(min=1)).item(),
    }
    for k, value in enumerate(per_codebook.tolist()):
        metrics[f"audio_loss_{k}"] = value
        metrics[f"audio_accuracy_{k}"] = (sums["audio_hits"][k] / counts["audio"][k].clamp(min=1)).item()
    if counts["text"].item():
        metrics["text_loss"] = (sums["text_loss"] / counts["text"]).item()
        metrics["text_accuracy"] = (sums["text_hits"] / counts["text"]).item()
    return metrics


def check_possible(code_loss: float, *, step: int) -> None:
    """Raises TrainingError when the loss on clips that were never trained on is lower than it can be."""
    if not math.isnan(code_loss) and code_loss < IMPOSSIBLE_CODE_LOSS:
        raise TrainingError(
            f"step {step}: the audio loss on the validation split is {code_loss:.3f} nats per code, below what unseen "
            f"audio allows ({IMPOSSIBLE_CODE_LOSS}). Suspect that the validation clips are in the training data "
            "(copies under other names, another cut of the same recording), that init_adapter was trained on them, "
            "or that the model sees what it should predict (a changed collator, shift or attention mask)"
        )


def last_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last losses of a stage's log: of the validation split, or, without one, of training."""
    for key in ("eval_audio_loss", "audio_loss"):
        for entry in reversed(history):
            if key in entry:
                wanted = ("audio_loss", "code_loss", "eos_loss", "text_loss", "audio_accuracy", "text_accuracy")
                prefix = key.removesuffix("audio_loss")
                return {prefix + name: entry[prefix + name] for name in wanted if prefix + name in entry}
    return {}


class TrainingWindow:
    """Sums and counts since the last log, kept on the device so that no step waits for them."""

    def __init__(self) -> None:
        self.sums: Sums = {}
        self.counts: Sums = {}
        self._since = time.monotonic()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, seconds: float) -> "TrainingWindow":
        """From what `tensors` gave, with so many seconds behind it."""
        window = cls()
        window.sums, window.counts = part("sums", tensors), part("counts", tensors)
        window._since -= seconds
        return window

    def add(self, sums: Sums, counts: Sums) -> None:
        """Of one micro-batch."""
        detached = {key: value.detach() for key, value in sums.items()}
        self.sums = add_sums([self.sums, detached]) if self.sums else detached
        self.counts = add_sums([self.counts, counts]) if self.counts else counts

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return time.monotonic() - self._since

    def pause(self, seconds: float) -> None:
        """So many seconds until now were not training time."""
        self._since += seconds

    def tensors(self, loss: Tensor) -> dict[str, Tensor]:
        """All of it, and the loss as `Trainer` sums it up, for a checkpoint."""
        return {"loss": loss, **under("sums", self.sums), **under("counts", self.counts)}


MAX_SKIPPED_IN_A_ROW = 10
SKIPPED_STEPS = "skipped_steps.jsonl"  # beside the checkpoints
_ADVICE = (
    "training diverged. Lower the learning rate, or check the data with `higgstune doctor`; the clips of these steps "
    f"are in {SKIPPED_STEPS} beside the checkpoints, and the checkpoints before them are kept"
)


class SkippedSteps:
    """`skipped_steps.jsonl`: each optimizer step that was skipped, with its clips, for a look at them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SKIPPED_STEPS

    def add(self, step: int, clips: Sequence[str]) -> None:
        """A step, counted from 1, and the ids of its clips."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "clips": list(clips)}) + "\n")

    def forget(self, *, after: int) -> None:
        """Remove the steps after this one, which will be taken once more."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have left half a line
            write_file(self._path, "".join(line for line in whole if json.loads(line)["step"] <= after))


class FiniteSteps:
    """Skips optimizer steps with a gradient that is not finite, without waiting for the device.

    A fused optimizer takes a tensor `found_inf` (as gradient scalers give it one) and then changes neither weights nor
    moments. What happened is read when the next step's gradients are there.
    """

    def __init__(self, on_skipped: Callable[[int], None]) -> None:
        """`on_skipped` is called with each skipped step, counted from 0, once that is known."""
        self.skipped = 0  # steps, as far as is known
        self._on_skipped = on_skipped
        self.in_a_row = 0
        self._last: tuple[int, Tensor, Any] | None = None  # which step, was it skipped, and when that is known

    def note(self, norm: Any, optimizer: Any, *, step: int) -> None:
        """Decide about the coming step by the norm [] of all its gradients.

        Raises TrainingError when too many steps before it were skipped.
        """
        self.read()
        if not isinstance(norm, Tensor):
            return  # DeepSpeed clips and skips by itself
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()  # FSDP2 has its share of the norm on each process
        found = (~torch.isfinite(norm)).float()
        getattr(optimizer, "optimizer", optimizer).found_inf = found  # accelerate wraps the optimizer
        if found.device.type != "cuda":
            self._last = step, found, None
            return
        copy = torch.empty((), pin_memory=True).copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._last = step, copy, event

    def read(self) -> None:
        """Read whether the last step was skipped; waits for it. Raises TrainingError as `note`."""
        if self._last is None:
            return
        step, found, event = self._last
        self._last = None
        if event is not None:
            event.synchronize()  # from `note`: of the step before; this step's work is queued behind it already
        if not found.item():
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        self._on_skipped(step)
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(f"the gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row are not finite: {_ADVICE}")

    def check_any_taken(self, *, of: int) -> None:
        """Raises TrainingError when all steps of a stage were skipped, few as they may be."""
        if of and self.skipped >= of:
            raise TrainingError(f"the gradients of all {of} steps are not finite: {_ADVICE}")
