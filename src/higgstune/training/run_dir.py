"""The folder of a run: `recipe.yaml`, `run.json`, and a folder for each stage. One job at a time has it."""

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

import higgstune
from higgstune.checkpoint_files import read_json
from higgstune.config.recipe import Recipe, Stage, load_recipe, save_recipe
from higgstune.errors import ConfigError, WorkError
from higgstune.files import lock_file, refusal, write_file, writing
from higgstune.model.adapter_folder import RUN_STATE

RECIPE_FILE = "recipe.yaml"
_LOCK = ".lock"
# A run that was killed in its first moment has left no more than these.
_OURS = (RECIPE_FILE, RUN_STATE, _LOCK, f".{RECIPE_FILE}", f".{RUN_STATE}")
# What a run that goes on may have otherwise than it began: it changes nothing of what is trained, but for rounding.
FREE = ("parallel", "gradient_checkpointing", "compile", "save_steps", "save_total_limit", "report_to")
# A process that was killed lets go of the lock at once, but for those that build its examples: they notice after 5 s.
_UNTIL_FREE = 10.0  # seconds


class RunFolder:
    """What a run has done so far, and the right to go on with it."""

    def __init__(self, folder: Path, recipe: Recipe, *, is_main: bool, processes: int) -> None:
        self.folder = folder
        self.recipe = recipe
        self.is_main = is_main  # the one of several processes that writes
        self.state: dict[str, Any] = {
            "status": "running",
            "higgstune": higgstune.__version__,
            "processes": processes,  # that it began with: a step's share of the data stays what it was then
            "stages": {},
        }
        self._lock = lock_file(folder / _LOCK)

    def check(self, *, resume: bool) -> None:
        """Raises ConfigError when the folder cannot be taken or gone on with; writes nothing but the lock."""
        if not (self.folder / RUN_STATE).exists():
            if self.folder.is_dir() and any(not p.name.startswith(_OURS) for p in self.folder.iterdir()):
                raise ConfigError(f"{self.folder} exists and is no run: give another --out")
            return
        self._hold()
        self.read()
        if self.state["status"] == "finished":
            adapter = self.folder / str(self.state.get("adapter"))
            raise ConfigError(
                f"the run {self.folder} is finished and is not overwritten: its adapter is {adapter}; give another "
                "--out to train again"
            )
        if not resume:
            raise ConfigError(
                f"the run {self.folder} was begun already: continue it with --resume, or give another --out"
            )
        begun_with = load_recipe(self.folder / RECIPE_FILE, commands=True)
        changed = _differences(_mathematics(begun_with), _mathematics(self.recipe))
        if changed:
            raise ConfigError(
                f"the run {self.folder} was begun with another recipe ({', '.join(changed)} differ): continue it with "
                f"{self.folder / RECIPE_FILE}, of which {', '.join(FREE)} may change, or give another "
                "--out"
            )
        self._claim()

    def read(self) -> None:
        """What the folder says of the run."""
        self.state = read_json(self.folder / RUN_STATE, "it is no run's folder without it")

    def begin(self, trained_on: dict[str, Any], environment: dict[str, str]) -> None:
        """Take the folder, unless the run has it; `environment` is what it is trained with, now.

        Raises ConfigError when another job has taken it meanwhile, or the run was begun on another store or base.
        """
        for name, before in self.state.get("trained_on", {}).items():
            if before != trained_on[name]:
                raise ConfigError(
                    f"the run {self.folder} was begun on another {name}: its content has changed since. Put it back to "
                    "go on, or give another --out"
                )
        self.state["trained_on"] = trained_on
        self.state["environment"] = environment
        with writing(self.folder, "nothing was trained"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not self._lock.is_locked:
            self._hold()
            self.check(resume=False)
        save_recipe(self.recipe, self.folder / RECIPE_FILE)  # a run that goes on may have other `FREE` values
        self._claim()

    def release(self) -> None:
        """Another job may have it."""
        if self._lock.is_locked and self.state.pop("held_by", None) is not None:
            with suppress(WorkError):  # where the disk is full, which has been said
                self._save()
        self._lock.release()

    def stage_folder(self, stage: Stage) -> Path:
        return self.folder / stage.name

    def adapter(self, stage: Stage) -> Path:
        return self.stage_folder(stage) / "adapter"

    def packs_per_step(self, stage: Stage) -> int:
        """Of all processes that it began with together: on any other number a step stays what it was."""
        processes: int = self.state.get("processes", 1)
        return stage.gradient_accumulation * processes

    def has_finished(self, stage: Stage) -> bool:
        return stage.name in self.state["stages"]

    def finished(self, stage: Stage, result: dict[str, Any]) -> None:
        self.state["stages"][stage.name] = result
        self.state["adapter"] = self.adapter(stage).relative_to(self.folder).as_posix()
        self._save()

    def close(self) -> None:
        self.state["status"] = "finished"
        self._save()

    def _hold(self) -> None:
        try:
            self._lock.acquire(timeout=_UNTIL_FREE)
        except Timeout:
            self.read()
            holder = self.state.get("held_by", {})
            raise ConfigError(
                f"another job trains into {self.folder} (process {holder.get('pid')} on {holder.get('host')}): wait "
                "for its end or stop it, or give another --out"
            ) from None
        except OSError as error:
            raise WorkError(refusal(self.folder, error, "nothing was trained")) from error

    def _claim(self) -> None:
        """Say who has the folder, for others who want it."""
        self.state["held_by"] = {"host": socket.gethostname(), "pid": os.getpid()}
        self._save()

    def _save(self) -> None:
        if self.is_main:
            write_file(self.folder / RUN_STATE, json.dumps(self.state, indent=2))


def _mathematics(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.model_dump(mode="json").items() if key not in FREE}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
