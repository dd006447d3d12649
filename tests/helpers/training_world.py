"""A tiny run in two stages, for what happens to runs: on several processes, and when it is interrupted."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import DEMO_CODEC, make_recordings, recipe

import higgstune
from higgstune.config.recipe import Recipe, Stage, parse_recipe
from higgstune.evaluation import verdict
from higgstune.training import run, stage
from higgstune.training.run import train
from higgstune.training.verify import Verification

STAGES = ("stage1", "stage2")
# Adam divides a gradient by its own size: where one is all but zero, rounding moves its weight by a share of the rate.
# At 5e-3 that was 2.6e-5 for one weight of thousands, on one kind of CPU.
RATE = 1e-3
STEP = "higgstune.training.trainer:HiggsAudioTrainer.training_step"


def make_world(folder: Path) -> Path:
    """A base with a codec, and a store of 16 clips, in a folder."""
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

    def explain_out_of_memory(self, _: Stage) -> AbstractContextManager[None]:
        return nullcontext()


def train_unproven(made: Recipe, out: Path, resume: bool = False) -> None:
    """What has tests of its own is left out: its plan, its proof, its report, and that random weights are at chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "verify_in_fresh_process", proven)
        patch.setattr(run, "RunMemory", Unplanned)
        patch.setattr(run, "write_run_report", lambda folder: folder)
        patch.setattr(verdict, "NEAR_CHANCE", -1.0)
        train(made, out, resume=resume)


def shared_recipe(world: Path, processes: int, **changes: Any) -> Recipe:
    """Four packs of two clips a step, whatever the number of processes."""
    shape = {"max_steps": 5, "learning_rate": RATE, "batch_size": 2, "gradient_accumulation": 4 // processes}
    stages = [{"name": "stage1", "kind": "text", **shape}, {"name": "stage2", "kind": "full", **shape}]
    return recipe(world, stages=stages, **{"log_steps": 1, "save_steps": 3, **changes})


def adapter(folder: Path, stage: str = "stage2") -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "adapter" / "adapter_model.safetensors")


def history(folder: Path, stage: str = "stage2") -> list[dict[str, Any]]:
    return json.loads((folder / "run.json").read_text())["stages"][stage]["history"]


def faulty_recipe(world: Path, **changes: Any) -> Recipe:
    """Odd numbers: nothing is logged, validated and saved at the same step; dropout draws random numbers."""
    shape = {"max_steps": 7, "learning_rate": 5e-3, "batch_size": 2, "gradient_accumulation": 2}
    tree = shared_recipe(world, 1, log_steps=3, eval_steps=4, save_steps=2).model_dump(mode="json")
    tree["stages"] = [{"name": "stage1", "kind": "text", **shape}, {"name": "stage2", "kind": "full", **shape}]
    tree["lora"]["dropout"] = 0.1
    return parse_recipe(tree | changes, where="test")


def assert_same(found: Path, expected: Path, stages: Sequence[str] = STAGES, *, atol: float = 1e-5) -> None:
    """Adapters and what was logged of losses, rates and gradients, but for rounding: `atol` is right for `RATE`."""
    for name in stages:
        for key, value in adapter(expected, name).items():
            torch.testing.assert_close(adapter(found, name)[key], value, rtol=1e-5, atol=atol, msg=f"{name} {key}")
        for mine, other in zip(history(found, name), history(expected, name), strict=True):
            assert mine.keys() == other.keys()
            assert mine["step"] == other["step"]
            for key in mine:
                measured = key.startswith("eval_") and "second" not in key
                if measured or "loss" in key or key in ("learning_rate", "grad_norm"):
                    assert mine[key] == pytest.approx(other[key], abs=1e-5), f"{name} step {mine['step']} {key}"


def assert_identical(found: Path, expected: Path) -> None:
    """Bit by bit: adapters, and all that was logged but for times."""
    for name in STAGES:
        for key, value in adapter(expected, name).items():
            assert torch.equal(adapter(found, name)[key], value), f"{name} {key}"
        timeless = [
            [
                {k: v for k, v in entry.items() if "second" not in k and "runtime" not in k}
                for entry in history(run, name)
            ]
            for run in (found, expected)
        ]
        assert timeless[0] == timeless[1]


def on_call(path: str, nth: int, act: Callable[[], None]) -> None:
    """Do something before the nth call of `module:Class.function`."""
    module, _, names = path.partition(":")
    *parents, name = names.split(".")
    owner: Any = import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, name), 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            act()
        return real(*arguments, **options)

    setattr(owner, name, watched)


def train_with_signal(
    made: Recipe, out: Path, number: int, at: str, nth: int, rank: int = 0, resume: bool = False
) -> None:
    if os.environ.get("RANK", "0") == str(rank):
        on_call(at, nth, lambda: os.kill(os.getpid(), number))
    train_unproven(made, out, resume)
