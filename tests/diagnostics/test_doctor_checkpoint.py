"""Faults of a checkpoint: each is found by its own check and by no other."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_world import change_config, change_weights, cut_off, examined, failed, messages_of
from golden_values import Golden
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_checkpoint import tiny_config, tiny_tokenizer
from tiny_runs import DEMO_CODEC

from higgstune import BaseSpec
from higgstune.diagnostics.checkpoint import check_config
from higgstune.diagnostics.examine import doctor
from higgstune.families.higgs_v2.family import FAMILY


def flip_recorded_byte(base: Path) -> None:
    higgstune_json = {"files": {"model.safetensors": hashlib.sha256(b"as it was written").hexdigest()}}
    (base / "higgstune.json").write_text(json.dumps(higgstune_json))


NAME = "model.layers.1.audio_mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (cut_off, "truncated"),
        (lambda base: change_weights(base, lambda w: w.pop(NAME)), f"1 of 75 tensors are missing: {NAME}"),
        (lambda base: change_weights(base, lambda w: w.pop("text_lm_head.weight")), "without its text head"),
        (lambda base: change_weights(base, lambda w: w.update({NAME: w[NAME][:5].clone()})), "shape"),
        (lambda base: change_weights(base, lambda w: w[NAME].fill_(torch.nan)), f"NaN or infinity: {NAME}"),
        (lambda base: change_weights(base, lambda w: w["audio_lm_head.weight"].zero_()), "zero throughout: audio_lm"),
        (flip_recorded_byte, "is not the file that was written"),
        (lambda base: change_config(base, audio_delay_token_id=1 << 20), "outside the vocabulary"),
        (lambda base: change_config(base, audio_stream_eos_id=1020), "stream ids"),
        (lambda base: change_config(base, model_type="llama"), "'llama'"),
        (lambda base: change_config(base, hidden_size="x"), "does not describe a model"),
        (lambda base: change_config(base, rope_parameters={"rope_type": "nope", "rope_theta": 1.0}), "'nope'"),
        (lambda base: (base / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_a_broken_checkpoint_is_found(world: Path, base: Path, fault: Any, says: str) -> None:
    fault(base)
    report = examined(world, model=base)
    assert failed(report) == {"checkpoint"}
    assert says in messages_of(report, "checkpoint")
    assert report.of("data", "ok")  # what does not need the checkpoint is still examined
    assert report.of("codec", "ok")


def test_what_does_not_need_the_weights_is_still_examined(world: Path, base: Path) -> None:
    cut_off(base)
    report = examined(world, model=base)
    for check in ("codec", "data", "prompt", "memory"):
        assert report.of(check, "ok"), check
    assert report.of("adapter", "ok")  # its files
    for check in ("rotary", "loss", "generation"):
        assert report.of(check, "skipped"), check


def test_an_extra_tensor_and_copied_pathways_are_warned_of(world: Path, base: Path) -> None:
    def copy(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(5):
            name = f"model.layers.{layer}.{{}}.down_proj.weight"
            weights[name.format("audio_mlp")] = weights[name.format("mlp")].clone()
        weights["model.something.weight"] = torch.ones(2)

    change_weights(base, copy)
    report = doctor(BaseSpec(base))
    assert report.passed
    assert "layers.0.audio_mlp is mlp" in messages_of(report, "checkpoint", "warning")
    assert "model.something.weight" in messages_of(report, "checkpoint", "warning")


def test_an_original_checkpoint_is_examined(tmp_path: Path) -> None:
    golden = Golden("base")
    folder = golden.save_original_checkpoint(tmp_path / "original")
    report = doctor(BaseSpec(folder, codec=DEMO_CODEC))
    assert failed(report) == {"checkpoint", "codec"}  # it has no tokenizer, and smaller codebooks than the demo's codec
    assert "original layout" in messages_of(report, "checkpoint", "ok")
    assert report.of("rotary", "ok")
    golden.weights["rotary_emb.inv_freq"] = torch.ones(8)
    golden.save_original_checkpoint(folder)
    assert "rope_parameters" in messages_of(doctor(BaseSpec(folder, codec=DEMO_CODEC)), "rotary")


def test_a_missing_checkpoint_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor(BaseSpec("/no/where"))
    assert failed(report) == {"checkpoint"}
    assert "/no/where does not exist" in messages_of(report, "checkpoint")

    def unreachable(name: str, **options: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    report = doctor(BaseSpec("owner/name"))
    assert failed(report) == {"checkpoint"}
    assert len([f for f in report.findings if f.status == "failed"]) == 1
    assert "hf download owner/name" in messages_of(report, "checkpoint")


def test_a_folder_that_is_not_a_checkpoint_is_one_finding(tmp_path: Path) -> None:
    report = doctor(BaseSpec(tmp_path))
    assert [f.check for f in report.findings if f.status == "failed"] == ["checkpoint"]
    assert "config.json is missing" in messages_of(report, "checkpoint")


def test_default_frequencies_are_warned_of(base: Path) -> None:
    change_config(base, rope_parameters=None)
    assert "no rope_parameters" in messages_of(doctor(BaseSpec(base)), "rotary", "warning")


def test_special_ids_that_are_the_same_are_found() -> None:
    config = tiny_config(tiny_tokenizer())
    assert check_config(FAMILY, config)[0].status == "ok"
    config.audio_delay_token_id = config.audio_token_id
    assert "are the same" in check_config(FAMILY, config)[0].message
