"""One, two and four processes train the same: data, losses, rates and adapter."""

import json
import math
from pathlib import Path

import pytest
from processes import Together
from tiny_runs import make_recordings
from training_world import RATE, assert_same, history, make_world, shared_recipe, train_unproven

import higgstune
from higgstune.training.run import train

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    Together(world / "logs1", 1, train_unproven, shared_recipe(world, 1), world / "alone").succeeded()
    return world / "alone"


@pytest.mark.parametrize(("processes", "parallel"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_any_number_of_processes_trains_the_same_adapter(
    world: Path, alone: Path, processes: int, parallel: str
) -> None:
    folder = world / f"{parallel}{processes}"
    made = shared_recipe(world, processes, parallel=parallel)
    Together(world / f"logs-{folder.name}", processes, train_unproven, made, folder).succeeded()
    assert_same(folder, alone)
    rates = [entry["learning_rate"] for entry in history(folder) if "learning_rate" in entry]
    assert rates == pytest.approx([RATE * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)], abs=1e-9)
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


def test_recomputed_layers_are_gathered_again(world: Path, tmp_path: Path) -> None:
    made = shared_recipe(world, 2, parallel="fsdp", gradient_checkpointing=True)
    Together(tmp_path / "logs", 2, train_unproven, made, tmp_path / "run").succeeded()
    assert_same(tmp_path / "run", world / "ddp2")


@pytest.mark.parametrize("attention", ["lora", "full"])
def test_audio_attention_is_trained_the_same_where_it_is_sharded(world: Path, tmp_path: Path, attention: str) -> None:
    runs = {}
    for processes in (1, 2):
        made = shared_recipe(world, processes, parallel="fsdp")
        model = made.model.model_copy(update={"audio_attention": attention})
        made = made.model_copy(update={"model": model, "stages": made.stages[1:]})
        runs[processes] = tmp_path / str(processes)
        Together(tmp_path / f"logs{processes}", processes, train_unproven, made, runs[processes]).succeeded()
    assert_same(runs[2], runs[1], ("stage2",))


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
