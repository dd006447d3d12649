"""Generation that differs from the training forward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_world import examined, failed, messages_of, rows
from tiny_checkpoint import tiny_prompter

from higgstune import BaseSpec
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.generation import check_generation
from higgstune.generate.stack import Stack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_is_compared_in_every_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, prompter = tiny_prompter()
    model = model.to(dtype)
    assert check_generation(model, prompter, rows(), "base")[0].status == "ok"

    prefill = Stack.prefill

    def shifted(self: Stack, *arguments: Any, **more: Any) -> torch.Tensor:
        logits = prefill(self, *arguments, **more)
        self._end += 1  # positions one too far
        return logits

    monkeypatch.setattr(Stack, "prefill", shifted)
    assert check_generation(model, prompter, rows(), "base")[0].status == "failed"


def test_a_broken_cache_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Stack.step

    def forgets(self: Stack, rows: torch.Tensor) -> torch.Tensor:
        self._cache[:, :, 3] = 0
        return step(self, rows)

    monkeypatch.setattr(Stack, "step", forgets)
    report = examined(world, data=None)
    assert failed(report) == {"generation"}
    assert "KV cache" in messages_of(report, "generation")

    def breaks(self: Stack, rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no cache today")

    monkeypatch.setattr(Stack, "step", breaks)
    report = doctor(BaseSpec(world / "base"))
    assert failed(report) == {"generation"}
    assert "no cache today" in messages_of(report, "generation")
