"""Steps whose gradients are no numbers: left out on the device itself, and told of one step late."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from higgstune.errors import TrainingError

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
