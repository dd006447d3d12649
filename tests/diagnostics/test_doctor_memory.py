"""Memory that does not suffice, and the training that a recipe plans."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_world import examined, failed, messages_of

from higgstune import BaseSpec
from higgstune.diagnostics import machine as memory
from higgstune.diagnostics.examine import doctor


def test_too_little_memory_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 51_500_000  # of the demo's miniature, to speak
    for free, expected in ((needed - 600_000, "failed"), (needed + 2_000_000, "warning")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        report = doctor(adapter=world / "adapter")
        assert failed(report) == ({"memory"} if expected == "failed" else set()), free
        assert report.of("memory", expected)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000)
    report = examined(world)
    assert failed(report) == {"memory"}
    assert "do not fit" in messages_of(report, "generation", "skipped")  # nothing is loaded that does not fit
    assert report.of("prompt", "ok")


def recipe(world: Path, folder: Path, **changes: Any) -> Path:
    stage = {"name": "voice", "kind": "full", "max_steps": 3, "batch_size": 8}
    tree = {
        "model": {"checkpoint": str(world / "base"), "device": "cpu"}, "data": {"store": str(world / "data")},
        "stages": [stage],
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree | changes))  # JSON is YAML
    return path


def test_a_recipe_names_the_rest_and_its_training_is_planned(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = doctor(recipe=recipe(world, tmp_path))
    assert report.passed, failed(report)
    assert report.of("loss")
    assert "training a full stage, packs of up to" in messages_of(report, "memory", "ok")
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000_000)
    report = doctor(recipe=recipe(world, tmp_path))
    assert failed(report) == {"memory"}
    assert "gradient_checkpointing" in messages_of(report, "memory")
    assert report.of("generation", "ok")  # the weights alone do fit


def test_a_broken_recipe_is_a_finding(world: Path, tmp_path: Path) -> None:
    report = doctor(BaseSpec(world / "base"), recipe=recipe(world, tmp_path, seeds=1))  # the data stay unknown
    assert failed(report) == {"recipe"}
    assert "the nearest one is seed" in messages_of(report, "recipe")
    assert report.of("generation", "ok")
    if not torch.cuda.is_available():
        model = {"checkpoint": str(world / "base"), "device": "cuda"}
        report = doctor(recipe=recipe(world, tmp_path, model=model))
        assert failed(report) == {"recipe"}
        assert "device: device cuda" in messages_of(report, "recipe")
