"""Faults of the rotary buffers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_world import examined, failed, messages_of
from tiny_checkpoint import tiny_config, tiny_model, tiny_tokenizer

from higgstune.diagnostics import examine
from higgstune.diagnostics.checkpoint import check_rotary
from higgstune.model.load import load_model


def stretch(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.98)


def cast(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to(torch.bfloat16)


def forget(model: Any) -> None:
    model.model.rotary_emb.original_inv_freq.fill_(torch.nan)


@pytest.mark.parametrize(
    ("fault", "says"), [(stretch, "by up to 2 %"), (cast, "bfloat16"), (forget, "original_inv_freq has NaN")]
)
def test_wrong_rotary_buffers_are_found(
    world: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], None], says: str
) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        model = load_model(*arguments, **options)
        fault(model)
        return model

    monkeypatch.setattr(examine, "load_model", load)
    report = examined(world)
    assert failed(report) == {"rotary"}
    assert says in messages_of(report, "rotary")
    assert "rotary" in messages_of(report, "loss", "skipped")


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rotary_buffers_of_every_kind_are_computed_anew(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_model(tiny_config(tiny_tokenizer(), rope_parameters=rope))
    assert check_rotary(model)[0].status == "ok"
    stretch(model)
    assert check_rotary(model)[0].status == "failed"
