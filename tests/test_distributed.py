"""One, two and four processes train the same: data, losses, rates and adapter."""

import json
import math
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Together
from safetensors.torch import load_file
from test_run import DEMO_CODEC, make_recordings, recipe
from tiny_checkpoint import save_tiny_checkpoint

import higgstune
from higgstune.training import run, stage
from higgstune.training.recipe import Recipe, Stage
from higgstune.training.run import train
from higgstune.training.verify import Verification


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_checkpoint(folder / "base")
    shutil.copytree(DEMO_CODEC, folder / "base" / "codec")
    higgstune.prepare(
        make_recordings(folder / "recordings", clips=16), folder / "data", codec=folder / "base" / "codec",
        validation_fraction=0.2,
    )  # fmt: skip
    return folder


def proven(**_: Any) -> Verification:
    """In place of the proof in a fresh process, where it is not the point."""
    return Verification("float32", 1e-5, 0.0, 1.0)


class Unplanned:
    """In place of the plan of a run's memory, which takes as long as these runs."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def warn(self) -> None: ...

    def checkpointed(self, _: Stage) -> int:
        return 0

    def explained(self, _: Stage) -> AbstractContextManager[None]:
        return nullcontext()


def train_unproven(made: Recipe, out: Path, resume: bool = False) -> None:
    """What has tests of its own is left out: its plan and its proof."""
    stage.verify_in_fresh_process = proven
    run.RunMemory = Unplanned  # type: ignore[misc, assignment]
    train(made, out, resume=resume)


def shared_recipe(world: Path, processes: int, **changes: Any) -> Recipe:
    """Four packs of two clips a step, whatever the number of processes."""
    shape = {"max_steps": 5, "learning_rate": 5e-3, "batch_size": 2, "gradient_accumulation": 4 // processes}
    stages = [{"name": "stage1", "kind": "text", **shape}, {"name": "stage2", "kind": "full", **shape}]
    return recipe(world, stages=stages, **{"log_steps": 1, "save_steps": 3, **changes})


def adapter(folder: Path, stage: str = "stage2") -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "adapter" / "adapter_model.safetensors")


def history(folder: Path, stage: str = "stage2") -> list[dict[str, Any]]:
    return json.loads((folder / "run.json").read_text())["stages"][stage]["history"]


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    Together(world / "logs1", 1, train_unproven, shared_recipe(world, 1), world / "alone").succeeded()
    return world / "alone"


def assert_same(found: Path, expected: Path) -> None:
    for name in ("stage1", "stage2"):
        for key, value in adapter(expected, name).items():
            torch.testing.assert_close(adapter(found, name)[key], value, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")
        for mine, other in zip(history(found, name), history(expected, name), strict=True):
            assert mine.keys() == other.keys()
            assert mine["step"] == other["step"]
            for key in mine:
                if "loss" in key or key in ("learning_rate", "grad_norm") or key.startswith("eval_"):
                    assert mine[key] == pytest.approx(other[key], abs=1e-5), f"{name} step {mine['step']} {key}"


@pytest.mark.parametrize(("processes", "parallel"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_any_number_of_processes_trains_the_same_adapter(
    world: Path, alone: Path, processes: int, parallel: str
) -> None:
    folder = world / f"{parallel}{processes}"
    made = shared_recipe(world, processes, parallel=parallel)
    Together(world / f"logs-{folder.name}", processes, train_unproven, made, folder).succeeded()
    assert_same(folder, alone)
    rates = [entry["learning_rate"] for entry in history(folder) if "learning_rate" in entry]
    assert rates == pytest.approx([5e-3 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)], abs=1e-9)
    for result in json.loads((folder / "run.json").read_text())["stages"].values():
        # On a CPU the usual way to FSDP stays DDP in silence: weights must be DTensors at the end of training.
        assert (result["sharded_parameters"] > result["layers"] * 3) == (parallel == "fsdp")


def test_what_fsdp_gives_is_proven_by_processes_that_shard_it_again(world: Path, tmp_path: Path) -> None:
    made = shared_recipe(world, 2, parallel="fsdp")
    made = made.model_copy(update={"stages": made.stages[1:]})
    Together(tmp_path / "logs", 2, train, made, tmp_path / "run").succeeded()
    verification = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["stage2"]["verification"]
    assert verification["from_trained"] <= 1e-5
    assert verification["from_base"] > 1e-3


def test_layers_that_are_computed_again_are_gathered_again(world: Path, tmp_path: Path) -> None:
    made = shared_recipe(world, 2, parallel="fsdp", gradient_checkpointing=True)
    Together(tmp_path / "logs", 2, train_unproven, made, tmp_path / "run").succeeded()
    assert_same(tmp_path / "run", world / "ddp2")


@pytest.mark.parametrize("clips", [1, 3])
def test_fewer_clips_than_processes(world: Path, tmp_path: Path, clips: int) -> None:
    higgstune.prepare(
        make_recordings(tmp_path / "recordings", clips=clips), tmp_path / "data", codec=world / "base" / "codec",
        validation_fraction=0.0,
    )  # fmt: skip
    store = {"data": {"store": str(tmp_path / "data")}}
    four = Together(tmp_path / "logs", 4, train_unproven, shared_recipe(world, 4, **store), tmp_path / "four")
    four.succeeded()
    assert f"{3 if clips == 1 else 2} of 4 processes have nothing to do" in four.log()
    assert "have nothing to do" not in four.log(1)  # said once
    Together(tmp_path / "log", 1, train_unproven, shared_recipe(world, 1, **store), tmp_path / "one").succeeded()
    assert_same(tmp_path / "four", tmp_path / "one")
