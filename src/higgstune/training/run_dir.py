"""The folder of a run: `recipe.yaml`, `run.json` with what the run gives, and a folder for each stage.

It belongs to one job at a time.
"""

import json
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout
from pydantic import TypeAdapter, ValidationError

import higgstune
from higgstune.checkpoint_files import read_json
from higgstune.config.recipe import Recipe, Stage, load_recipe, save_recipe
from higgstune.errors import ConfigError, WorkError
from higgstune.evaluation.verdict import Verdict
from higgstune.files import lock_file, refusal, write_file, writing
from higgstune.inputs import RUN_STATE
from higgstune.model.base_identity import (
    ARCHITECTURE,
    CONFIG_SHA256,
    TOKENIZER_SHA256,
    WeightFile,
    changes,
    read_weight_files,
    unrecorded,
)
from higgstune.training.verify import Verification

_LOG = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
_LOCK = ".lock"
# A run that was killed in its first moment has left no more than these.
_OURS = (RECIPE_FILE, RUN_STATE, _LOCK, f".{RECIPE_FILE}", f".{RUN_STATE}")
# Keys of a recipe that may change when a run resumes: they change nothing of what is trained, but for rounding.
FREE = ("parallel", "gradient_checkpointing", "compile", "save_steps", "save_total_limit", "report_to")
_UNTIL_FREE = 10.0  # seconds that a job before this one may take to end


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
    verdict: Verdict | None = None  # None in runs from before there was one

    def as_json(self) -> dict[str, Any]:
        """As it stands in `run.json`: without `chosen` where there was no choice."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class RunResult:
    """A run that has ended: all stages, or those up to one whose adapter is not usable."""

    folder: Path
    adapter: Path  # of the last stage
    stages: dict[str, StageResult]  # by name

    @property
    def verdict(self) -> Verdict | None:
        """Whether the adapter is usable; None in a run from before there were verdicts."""
        return list(self.stages.values())[-1].verdict

    @property
    def usable(self) -> bool:
        """Whether nothing speaks against the adapter: also without a verdict."""
        return not is_unusable(self.verdict)


@dataclass(frozen=True)
class Holder:
    """The process that has a run's folder."""

    host: str
    pid: int


@dataclass
class RunState:
    """The content of `run.json`."""

    processes: int  # that the run started with: a step's share of the data stays what it was then
    status: Literal["running", "finished", "not usable"] = "running"
    higgstune: str = higgstune.__version__
    stages: dict[str, StageResult] = field(default_factory=dict)  # those that are finished
    adapter: str | None = None  # of the last of them, within the folder
    trained_on: dict[str, Any] = field(default_factory=dict)  # checksums, and the base's `base_identity`
    weights: dict[str, WeightFile] = field(default_factory=dict)  # of the base
    environment: dict[str, str] = field(default_factory=dict)
    held_by: Holder | None = None
    warmup_from: int = 0  # see `HiggsAudioTrainer`; runs from before it was noted had 0

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        """Raises CheckpointError where it is missing or damaged, ConfigError where it is of another version."""
        written = read_json(folder / RUN_STATE, "without it this is not a run's folder")
        try:
            return _RUN_STATE.validate_python(written)
        except ValidationError as error:
            at = ".".join(map(str, error.errors()[0]["loc"]))
            raise ConfigError(
                f"the run {folder} was written by another version of Higgstune ({at} of {RUN_STATE}) and cannot be "
                "resumed: give another --out"
            ) from error

    def to_json(self) -> str:
        """The content of `run.json`, without what is None."""
        tree = asdict(self) | {"stages": {name: stage.as_json() for name, stage in self.stages.items()}}
        return json.dumps({key: value for key, value in tree.items() if value is not None}, indent=2)


_RUN_STATE = TypeAdapter(RunState)


class RunFolder:
    """What a run has done so far, and the right to continue it."""

    def __init__(self, folder: Path, recipe: Recipe, *, is_main: bool, processes: int) -> None:
        self.folder = folder
        self.recipe = recipe
        self.is_main = is_main  # the one of several processes that writes
        self.state = RunState(processes, warmup_from=1)
        self._lock = lock_file(folder / _LOCK)

    def check(self, *, resume: bool) -> None:
        """Raises ConfigError when the folder cannot be taken or resumed; writes nothing but the lock."""
        if not (self.folder / RUN_STATE).exists():
            if self.folder.is_dir() and any(not p.name.startswith(_OURS) for p in self.folder.iterdir()):
                raise ConfigError(f"{self.folder} exists and is not a run: give another --out")
            if resume:
                _LOG.warning("%s holds no run to resume: a new one starts there", self.folder)
            return
        self._hold()
        self.state = RunState.read(self.folder)
        if self.state.status == "finished":
            adapter = self.folder / str(self.state.adapter)
            raise ConfigError(
                f"the run {self.folder} is finished and is not overwritten: its adapter is {adapter}; give another "
                f"--out to train again, with --set init_adapter={self.folder} to start from it"
            )
        if not resume:
            how = "resume it with --resume, or " if self.state.status == "running" else f"it is {self.state.status}: "
            raise ConfigError(f"the run {self.folder} exists already: {how}give another --out")
        before = load_recipe(self.folder / RECIPE_FILE, commands=True)
        changed = _differences(_mathematics(before), _mathematics(self.recipe))
        if changed:
            raise ConfigError(
                f"the run {self.folder} was started with another recipe ({', '.join(changed)} differ): resume it with "
                f"{self.folder / RECIPE_FILE}, of which {', '.join(FREE)} may change, or give another --out"
            )
        self._claim()

    def begin(self, trained_on: Mapping[str, Any], environment: dict[str, str], base: Path) -> None:
        """Take the folder, unless the run has it; `environment` is what it is trained with, now, on the folder `base`.

        Raises ConfigError when another job has taken it meanwhile, or the run was started on another store or base.
        """
        weights = read_weight_files(base, self.state.weights)
        if self.state.trained_on:
            self._check_trained_on(trained_on, weights)
        self.state.trained_on, self.state.weights = dict(trained_on), weights
        self.state.environment = environment
        with writing(self.folder, "nothing was trained"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not self._lock.is_locked:
            self._hold()
            self.check(resume=False)
        save_recipe(self.recipe, self.folder / RECIPE_FILE)  # a resumed run may have other `FREE` values
        self._claim()

    def _check_trained_on(self, now: Mapping[str, Any], weights: Mapping[str, WeightFile]) -> None:
        before = self.state.trained_on
        if CONFIG_SHA256 not in before or not self.state.weights:
            _LOG.warning("%s", unrecorded(f"the run {self.folder}"))
        for name in before.keys() - {ARCHITECTURE, CONFIG_SHA256, TOKENIZER_SHA256}:
            if before[name] != now.get(name):
                raise ConfigError(
                    f"the run {self.folder} was started on another {name}, whose content has changed since: restore "
                    "it, or give another --out"
                )
        problem = changes(before, now)
        files = {name: file.sha256 for name, file in weights.items()}
        if self.state.weights and files != (old := {name: file.sha256 for name, file in self.state.weights.items()}):
            [name, *_] = sorted(name for name in files.keys() | old.keys() if files.get(name) != old.get(name))
            problem = problem or f"{name} has changed"
        if problem is not None:
            raise ConfigError(
                f"the run {self.folder} was started on another base, of which {problem} since: restore it, or give "
                "another --out"
            )

    def release(self) -> None:
        """Let another job have it."""
        if self._lock.is_locked and self.state.held_by is not None:
            self.state.held_by = None
            with suppress(WorkError):  # where the disk is full, which was reported before
                self._save()
        self._lock.release()

    def stage_folder(self, stage: Stage) -> Path:
        return self.folder / stage.name

    def adapter(self, stage: Stage) -> Path:
        return self.stage_folder(stage) / "adapter"

    def packs_per_step(self, stage: Stage) -> int:
        """Of all processes that the run started with together: on any other number a step stays what it was."""
        return stage.gradient_accumulation * self.state.processes

    def has_finished(self, stage: Stage) -> bool:
        return stage.name in self.state.stages

    @property
    def result(self) -> RunResult:
        """Of the stages so far, of which there is one at least."""
        return RunResult(self.folder, self.folder / str(self.state.adapter), self.state.stages)

    def finished(self, stage: Stage, result: StageResult) -> None:
        self.state.stages[stage.name] = result
        self.state.adapter = self.adapter(stage).relative_to(self.folder).as_posix()
        self._save()

    def close(self) -> None:
        self.state.status = "finished" if self.result.usable else "not usable"
        self._save()

    def _hold(self) -> None:
        try:
            self._lock.acquire(timeout=_UNTIL_FREE)
        except Timeout:
            holder = RunState.read(self.folder).held_by
            who = "" if holder is None else f" (process {holder.pid} on {holder.host})"
            raise ConfigError(
                f"another job trains into {self.folder}{who}: wait for it to end or stop it, or give another --out"
            ) from None
        except OSError as error:
            raise WorkError(refusal(self.folder, error, "nothing was trained")) from error

    def _claim(self) -> None:
        """Say who has the folder, for others who want it."""
        self.state.held_by = Holder(socket.gethostname(), os.getpid())
        self._save()

    def _save(self) -> None:
        if self.is_main:
            write_file(self.folder / RUN_STATE, self.state.to_json())


def is_unusable(verdict: Verdict | None) -> bool:
    """Whether an adapter is known to be not usable."""
    return verdict is not None and verdict.outcome == "not usable"


def _mathematics(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.model_dump(mode="json").items() if key not in FREE}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
