"""Faults of a codec."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doctor_world import failed, messages_of
from fake_codec import FakeCodec
from tiny_checkpoint import tiny_prompter
from tiny_codec import tiny_codec

from higgstune import BaseSpec
from higgstune.codec.higgs import HiggsCodec
from higgstune.diagnostics import examine
from higgstune.diagnostics.codec import check_codes, check_fit, check_modes
from higgstune.diagnostics.examine import doctor
from higgstune.families.higgs_v2.checkpoint import spec_of


def test_a_codec_in_train_mode_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> HiggsCodec:
        codec = HiggsCodec(tiny_codec(), "tiny")
        codec._model.train()
        return codec

    monkeypatch.setattr(examine, "load_codec", load)
    report = doctor(BaseSpec(world / "base"))
    assert failed(report) == {"codec"}
    assert "in train mode" in messages_of(report, "codec")
    assert "gives different codes" in messages_of(report, "codec")


def test_the_real_codec_class_passes() -> None:
    codec = HiggsCodec(tiny_codec(), "tiny")
    before = torch.random.get_rng_state()
    assert [f.status for f in check_modes(codec) + check_codes(codec)] == ["ok", "ok"]
    assert torch.equal(torch.random.get_rng_state(), before)


class Faulty(FakeCodec):
    """A codec with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(codebook_size=512 if fault == "range" else 1024)
        self.fault = fault
        self.frame_rate = 50.0 if fault == "rate" else 25.0

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        codes = super().encode(waveform)
        if self.fault == "random":
            codes = codes + torch.randint(0, 2, codes.shape).numpy().astype(np.uint16)
        return codes + np.uint16(600) if self.fault == "range" else codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return super().decode(codes)[: -960 if self.fault == "length" else None]


@pytest.mark.parametrize(
    ("fault", "says"),
    [("random", "different codes"), ("rate", "50 frames"), ("range", "outside of 0 to 511"), ("length", "decode to")],
)
def test_a_faulty_codec_is_found(fault: str, says: str) -> None:
    assert check_codes(FakeCodec())[0].status == "ok"
    assert says in check_codes(Faulty(fault))[0].message


def test_a_codec_inside_the_model_and_one_of_another_kind_are_found() -> None:
    codec, (model, _) = HiggsCodec(tiny_codec(), "tiny"), tiny_prompter()
    assert check_modes(codec, model)[0].status == "ok"
    model.add_module("codec", codec._model)
    assert "module tree" in check_modes(codec, model)[0].message
    assert check_fit(codec, spec_of(model.config))[0].status == "ok"
    assert "8 of 64" in check_fit(codec, spec_of(tiny_prompter(codes=64)[0].config))[0].message
