"""The plan of a run while it trains: a warning before, the number of recomputed layers, help when memory ends."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from higgstune.config.recipe import Recipe, Stage
from higgstune.errors import HiggstuneError, Interrupted, TrainingError
from higgstune.files import format_bytes
from higgstune.planning.plan import Planner
from higgstune.planning.suggestions import options, summary
from higgstune.planning.survey import MARGIN, machine_for, processes

_LOG = logging.getLogger(__name__)
# Errors of a dry run that a version of PyTorch or peft cannot do without values; training starts all the same.
_ACCIDENTS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_USUAL = "Use gradient_checkpointing: true, a smaller batch_tokens, or model.quantize: 4bit"


class RunMemory:
    """Made before anything is loaded, when the memory that training may take is still free."""

    def __init__(self, recipe: Recipe) -> None:
        """An error of the recipe is left to the loading that follows, which finds it as well."""
        self.recipe = recipe
        self._error: Exception | None = None
        self._planner: Planner | None = None
        self._again: dict[str, int] = {}
        try:
            self._planner = Planner(recipe, machine_for(recipe))
            self._plan = self._planner.plan()
            self._again = {stage.name: stage.checkpointed for stage in self._plan.stages}
        except Interrupted:
            raise
        except HiggstuneError as error:
            self._error = error
        except _ACCIDENTS as error:
            self._error = error
            _LOG.warning("the memory of this run could not be planned (%s: %s)", type(error).__name__, error)

    def warn(self) -> None:
        """A line in the log when the run will hardly fit."""
        sharded = self.recipe.parallel == "fsdp" and processes() > 1  # the plan is that of a whole base
        if self._error is None and self._plan.fits is False and not sharded:
            assert self._planner is not None
            _LOG.warning(
                "this run will hardly fit: its peak is %s of %s on %s; `higgstune train --plan` says what would",
                format_bytes(self._plan.peak), format_bytes(self._planner.machine.memory or 0),
                self._planner.machine.kind,
            )  # fmt: skip

    def checkpointed(self, stage: Stage) -> int:
        """The number of recomputed layers of a stage. Raises TrainingError when `auto` has no plan to follow."""
        if self._error is None:
            return self._again[stage.name]
        if self.recipe.gradient_checkpointing == "auto":
            raise TrainingError(
                f"gradient_checkpointing: auto needs a plan, which could not be made ({self._error}): say true or false"
            ) from self._error
        return 2**31 if self.recipe.gradient_checkpointing else 0

    @contextmanager
    def explained(self, stage: Stage) -> Iterator[None]:
        """Raises TrainingError with what would fit, in place of an out-of-memory error of PyTorch."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"stage {stage.name} ran out of memory ({_first_line(error)}). {self._help()}"
            ) from error

    def _help(self) -> str:
        if self._error is not None or self._planner is None:
            return _USUAL
        # Where the plan said that it would fit, the device had less than the plan knew of.
        peak, memory = self._plan.peak, self._planner.machine.memory
        room = int((1 - MARGIN) * peak) if memory is None else min(memory, int((1 - MARGIN) * peak))
        try:
            found = summary(options(self._planner, room=room))
        except _ACCIDENTS as error:
            _LOG.warning("what would fit could not be planned (%s: %s)", type(error).__name__, error)
            found = _USUAL
        return f"Its plan takes {format_bytes(peak)}; {format_bytes(room)} is what it may take.\n{found}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or "no more was said"
