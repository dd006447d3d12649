"""The memory plan of a run: a warning, the number of recomputed layers, and advice when memory runs out."""

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
# What a dry run may raise with a version of PyTorch or peft that cannot run on fake tensors: training can still work.
_DRY_RUN_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_GENERAL_ADVICE = "Use gradient_checkpointing: true, a smaller batch_tokens, or model.quantize: 4bit"


class RunMemory:
    """The plan of a run, made before anything is loaded: the memory for training is still free."""

    def __init__(self, recipe: Recipe) -> None:
        """Errors of the recipe are not raised: loading raises them, too."""
        self.recipe = recipe
        self._error: Exception | None = None
        self._planner: Planner | None = None
        self._checkpointed: dict[str, int] = {}
        try:
            self._planner = Planner(recipe, machine_for(recipe))
            self._plan = self._planner.plan()
            self._checkpointed = {stage.name: stage.checkpointed for stage in self._plan.stages}
        except Interrupted:
            raise
        except HiggstuneError as error:
            self._error = error
        except _DRY_RUN_ERRORS as error:
            self._error = error
            _LOG.warning("cannot plan the memory of this run (%s: %s)", type(error).__name__, error)

    def warn(self) -> None:
        """Log a warning if the run does not fit."""
        sharded = self.recipe.parallel == "fsdp" and processes() > 1  # the plan is for an unsharded base
        if self._error is None and self._plan.fits is False and not sharded:
            assert self._planner is not None
            _LOG.warning(
                "this run may not fit: it needs %s of %s on %s; `higgstune train --plan` shows changes that would fit",
                format_bytes(self._plan.peak), format_bytes(self._planner.machine.memory or 0),
                self._planner.machine.kind,
            )  # fmt: skip

    def checkpointed(self, stage: Stage) -> int:
        """The number of a stage's recomputed layers. Raises TrainingError for `auto` without a plan."""
        if self._error is None:
            return self._checkpointed[stage.name]
        if self.recipe.gradient_checkpointing == "auto":
            raise TrainingError(
                f"gradient_checkpointing: auto needs a plan, which failed ({self._error}): set it to true or false"
            ) from self._error
        return 2**31 if self.recipe.gradient_checkpointing else 0

    @contextmanager
    def explain_out_of_memory(self, stage: Stage) -> Iterator[None]:
        """Turn PyTorch's out-of-memory error into a TrainingError with changes that would fit."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"stage {stage.name} ran out of memory ({_first_line(error)}). {self._advice()}"
            ) from error

    def _advice(self) -> str:
        if self._error is not None or self._planner is None:
            return _GENERAL_ADVICE
        # If the plan fits, the device had less memory than the plan assumed.
        peak, memory = self._plan.peak, self._planner.machine.memory
        room = int((1 - MARGIN) * peak) if memory is None else min(memory, int((1 - MARGIN) * peak))
        try:
            found = summary(options(self._planner, room=room))
        except _DRY_RUN_ERRORS as error:
            _LOG.warning("cannot plan changes that would fit (%s: %s)", type(error).__name__, error)
            found = _GENERAL_ADVICE
        return f"Its plan needs {format_bytes(peak)} and may use {format_bytes(room)}.\n{found}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or "no further details"
