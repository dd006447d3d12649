"""Higgs TTS 3 on two processes, with its weights spread over them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Together
from tiny_runs import make_recordings
from training_world import RATE, adapter, assert_same, history, train_unproven
from tts3 import NEEDED, copy_base

import higgstune
from higgstune.config.recipe import Recipe, parse_recipe
from higgstune.training.run import train

pytestmark = [NEEDED, pytest.mark.processes]
STAGES = "lora", "table"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tts3")
    copy_base(folder / "base")
    higgstune.prepare(
        make_recordings(folder / "recordings", clips=16), folder / "data", model=folder / "base",
        validation_fraction=0.2,
    )  # fmt: skip
    return folder


def recipe(world: Path, processes: int, **changes: Any) -> Recipe:
    """Four packs of two clips a step; the table is trained in the second stage."""
    shape = {"max_steps": 3, "learning_rate": RATE, "batch_size": 2, "gradient_accumulation": 4 // processes}
    tree: dict[str, Any] = {
        "model": {"family": "higgs_tts_3", "checkpoint": str(world / "base"), "device": "cpu", "dtype": "float32"},
        "data": {"store": str(world / "data")},
        "lora": {"r": 4, "alpha": 8},
        "stages": [{"name": "lora", **shape}, {"name": "table", "audio_embedding": "full", **shape}],
        "evaluation": {"clips": 0},
        "parallel": "fsdp", "log_steps": 1, "eval_steps": 2, "save_steps": 2,
    }  # fmt: skip
    return parse_recipe(tree | changes, where="test")


@pytest.mark.parametrize("again", [False, True])
def test_two_processes_that_share_the_weights_train_the_adapter_of_one(
    world: Path, tmp_path: Path, again: bool
) -> None:
    runs = {}
    for processes in (1, 2):
        runs[processes] = tmp_path / str(processes)
        made = recipe(world, processes, gradient_checkpointing=again)
        Together(tmp_path / f"logs{processes}", processes, train_unproven, made, runs[processes]).succeeded()
    assert_same(runs[2], runs[1], ("lora",))
    for key, value in adapter(runs[1], "table").items():
        torch.testing.assert_close(adapter(runs[2], "table")[key], value, rtol=1e-5, atol=1e-5, msg=key)
    for one, two in zip(history(runs[1], "table"), history(runs[2], "table"), strict=True):
        for key in one.keys() & {"loss", "eval_loss", "grad_norm"}:
            # Of a table of half a million numbers PyTorch's norm is 1e-5 off on a CPU, of its shares less.
            assert two[key] == pytest.approx(one[key], rel=1e-4 if key == "grad_norm" else 1e-6), (one["step"], key)
    for result in json.loads((runs[2] / "run.json").read_text())["stages"].values():
        assert result["sharded_parameters"] > result["layers"] * 3


def test_what_is_spread_over_processes_is_proven_and_speaks(world: Path, tmp_path: Path) -> None:
    made = recipe(world, 2, evaluation={"clips": 1})
    Together(tmp_path / "logs", 2, train, made, tmp_path / "run").succeeded()
    for result in json.loads((tmp_path / "run" / "run.json").read_text())["stages"].values():
        assert result["verification"]["from_trained"] <= 1e-5
        assert result["verification"]["from_base"] > 1e-4
    spoken = [path for stage in STAGES for path in (tmp_path / "run" / stage / "samples").rglob("*.wav")]
    assert len(spoken) >= 2
