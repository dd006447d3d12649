"""Steps whose gradients are no numbers: left out on the device itself, and told of one step late."""

from typing import Any

import torch
from torch import Tensor

from higgstune.errors import TrainingError

_IN_A_ROW = 10  # so many without a finite one between them end the run


class FiniteSteps:
    """Leaves out optimizer steps with a gradient that is not finite, without waiting for the device.

    A fused optimizer takes a tensor `found_inf` (as gradient scalers give it one) and then changes neither weights nor
    moments. What happened is read when the next step's gradients are there.
    """

    def __init__(self) -> None:
        self.skipped = 0  # steps, as far as is known
        self._in_a_row = 0
        self._last: tuple[Tensor, Any] | None = None  # was it left out, and when that is known

    def note(self, norm: Any, optimizer: Any) -> None:
        """Decide the coming step by the norm [] of all its gradients.

        Raises TrainingError when too many steps before it were left out.
        """
        self._read()
        if not isinstance(norm, Tensor):
            return  # DeepSpeed clips and skips by itself
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()  # FSDP2 has its share of the norm on each process
        found = (~torch.isfinite(norm)).float()
        getattr(optimizer, "optimizer", optimizer).found_inf = found  # accelerate wraps the optimizer
        if found.device.type != "cuda":
            self._last = found, None
            return
        copy = torch.empty((), pin_memory=True).copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._last = copy, event

    def _read(self) -> None:
        if self._last is None:
            return
        found, event = self._last
        if event is not None:
            event.synchronize()  # of the step before; this step's work is queued behind it already
        self._in_a_row = self._in_a_row + 1 if found.item() else 0
        self.skipped += bool(self._in_a_row)
        if self._in_a_row >= _IN_A_ROW:
            raise TrainingError(
                f"the gradients of {_IN_A_ROW} steps in a row are not finite: training went out of bounds. Lower the "
                "learning rate, or look at the data with `higgstune doctor`; the checkpoints before it are kept"
            )
