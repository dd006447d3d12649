"""Generation that differs from the training forward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_world import examined, failed, messages_of, rows
from tiny_checkpoint import tiny_prompter
from transformers import DynamicCache

from higgstune import BaseSpec
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.generation import check_generation
from higgstune.families.higgs_v2.decoder import Decoder
from higgstune.families.higgs_v2.family import HiggsV2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_is_compared_in_every_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, prompter = tiny_prompter()
    model = model.to(dtype)
    assert check_generation(model, prompter, rows(), "base")[0].status == "ok"

    class Shifted(Decoder):
        def __init__(self, model: Any, prompts: Any) -> None:
            super().__init__(model, prompts)
            self.lengths = self.lengths + 1  # positions one too far

    monkeypatch.setattr(HiggsV2, "decoder", Shifted)
    assert check_generation(model, prompter, rows(), "base")[0].status == "failed"


def test_a_broken_cache_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = DynamicCache.update

    def forgets(self: DynamicCache, keys: torch.Tensor, values: torch.Tensor, layer: int, *more: Any) -> Any:
        whole = update(self, keys, values, layer, *more)
        return (whole[0], torch.cat([values[:, :, -1:], whole[1][:, :, 1:]], dim=2)) if keys.shape[2] == 1 else whole

    monkeypatch.setattr(DynamicCache, "update", forgets)
    report = examined(world, data=None)
    assert failed(report) == {"generation"}
    assert "KV cache" in messages_of(report, "generation")

    def breaks(self: DynamicCache, *arguments: Any) -> None:
        raise RuntimeError("no cache today")

    monkeypatch.setattr(DynamicCache, "update", breaks)
    report = doctor(BaseSpec(world / "base"))
    assert failed(report) == {"generation"}
    assert "no cache today" in messages_of(report, "generation")
