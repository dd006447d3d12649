"""Memory that does not suffice, and the training that a recipe plans."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_world import examined, failed, told
from tiny_checkpoint import tiny_config, tiny_model, tiny_tokenizer

from higgstune.diagnosis import doctor, memory
from higgstune.model.adapters import AttentionTraining, Lora, add_lora
from higgstune.model.conditioning import Conditioning, add_conditioning


def test_too_little_memory_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 44_400_000  # of the demo's miniature, to speak
    for free, expected in ((needed - 600_000, "failed"), (needed + 2_000_000, "warning")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        report = doctor(adapter=world / "adapter")
        assert failed(report) == ({"memory"} if expected == "failed" else set()), free
        assert report.of("memory", expected)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000)
    report = examined(world)
    assert failed(report) == {"memory"}
    assert "do not fit" in told(report, "generation", "skipped")  # nothing is loaded that does not fit
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
    assert "training a full stage, 8 x" in told(report, "memory", "ok")
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000_000)
    report = doctor(recipe=recipe(world, tmp_path))
    assert failed(report) == {"memory"}
    assert "gradient_checkpointing" in told(report, "memory")
    assert report.of("generation", "ok")  # the weights alone do fit


def test_a_broken_recipe_is_a_finding(world: Path, tmp_path: Path) -> None:
    report = doctor(recipe=recipe(world, tmp_path, seeds=1), model=world / "base")  # the data stay unknown
    assert failed(report) == {"recipe"}
    assert "the nearest one is seed" in told(report, "recipe")
    assert report.of("generation", "ok")
    if not torch.cuda.is_available():
        model = {"checkpoint": str(world / "base"), "device": "cuda"}
        report = doctor(recipe=recipe(world, tmp_path, model=model))
        assert failed(report) == {"recipe"}
        assert "device: device cuda" in told(report, "recipe")


@pytest.mark.parametrize("attention", ["lora", "full"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_plan_counts_what_is_trained(attention: AttentionTraining, dora: bool) -> None:
    model, lora = tiny_model(tiny_config(tiny_tokenizer())), Lora(r=4, dora=dora)
    conditioning = Conditioning(audio_attention=True)
    add_conditioning(model, conditioning)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.audio_attn.o_proj.weight)  # a direction for DoRA
    counted = memory.trained_parameters(model, lora.config("full", conditioning, attention))
    peft_model = add_lora(model, lora, "full", attention=attention)
    assert counted == sum(weight.numel() for weight in peft_model.parameters() if weight.requires_grad)
