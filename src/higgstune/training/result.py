"""What a run gives: typed, saved in its `run.json`, and read from there."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from higgstune.training.verify import Verification


@dataclass(frozen=True)
class Candidate:
    """An evaluated step, with which a stage may end."""

    step: int
    measures: dict[str, float]  # of its samples, and its validation loss
    broken: list[str]  # the conditions that it does not meet
    rank: float


@dataclass(frozen=True)
class ChosenStep:
    """The step that a stage ends with, and why."""

    step: int
    rule: str
    healthy: bool  # whether the best candidate meets all conditions
    candidates: list[Candidate]


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """A stage that was trained."""

    kind: str
    steps: int
    layers: int  # with LoRA
    compiled: bool
    checkpointed_layers: int  # which are recomputed in the backward pass
    parameters: int  # that are trained
    sharded_parameters: int  # tensors that are spread over the processes
    history: list[dict[str, int | float]]  # each entry has its step
    stopped_early: bool = False  # because patience ran out
    chosen: ChosenStep | None = None  # None: the stage spoke no samples, and ends with its last step


@dataclass(frozen=True, kw_only=True)
class StageResult(TrainedStage):
    """A stage that was trained, saved and verified."""

    verification: Verification

    def as_json(self) -> dict[str, Any]:
        """As it stands in `run.json`: without `chosen` where there was no choice."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    adapter: Path  # of the last stage
    stages: dict[str, StageResult]  # by name
