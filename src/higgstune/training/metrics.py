"""What training and evaluation report, from sums and counts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from higgstune.errors import TrainingError
from higgstune.kernels.loss import LossWeights, combine

# No model predicts the codes of audio it has never seen this well: real codes carry several nats each.
IMPOSSIBLE_CODE_LOSS = 0.5


def loss_metrics(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: LossWeights) -> dict[str, float]:
    """Sums and counts (see `model.loss`) -> losses in nats per cell and accuracies.

    `audio_loss` is over all labelled cells, `code_loss` over codes alone and `eos_loss` over the EOS cells.
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


_IN_A_ROW = 10  # so many without a finite one between them end the run
SKIPPED_STEPS = "skipped_steps.jsonl"  # beside the checkpoints: which clips were in steps that were left out
_ADVICE = (
    "training went out of bounds. Lower the learning rate, or look at the data with `higgstune doctor`; the clips of "
    f"these steps are in {SKIPPED_STEPS} beside the checkpoints, and the checkpoints before them are kept"
)


class FiniteSteps:
    """Leaves out optimizer steps with a gradient that is not finite, without waiting for the device.

    A fused optimizer takes a tensor `found_inf` (as gradient scalers give it one) and then changes neither weights nor
    moments. What happened is read when the next step's gradients are there.
    """

    def __init__(self, on_skipped: Callable[[int], None]) -> None:
        """`on_skipped` is called with each step that was left out, counted from 0, once that is known."""
        self.skipped = 0  # steps, as far as is known
        self._on_skipped = on_skipped
        self.in_a_row = 0
        self._last: tuple[int, Tensor, Any] | None = None  # which step, was it left out, and when that is known

    def note(self, norm: Any, optimizer: Any, *, step: int) -> None:
        """Decide the coming step by the norm [] of all its gradients.

        Raises TrainingError when too many steps before it were left out.
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
        """What became of the last step; waits for it. Raises TrainingError as `note`."""
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
        if self.in_a_row >= _IN_A_ROW:
            raise TrainingError(f"the gradients of {_IN_A_ROW} steps in a row are not finite: {_ADVICE}")

    def check_any_taken(self, *, of: int) -> None:
        """Raises TrainingError when all steps of a stage were left out, few as they may be."""
        if of and self.skipped >= of:
            raise TrainingError(f"the gradients of all {of} steps are not finite: {_ADVICE}")
