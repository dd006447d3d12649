"""Faults of an adapter: in its files, on its base, and where it is applied."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_world import change_weights, examined, failed, messages_of, rewrite, rows, save_adapter, write_card
from foreign_adapters import renamed, save_foreign
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint, tiny_prompter
from tiny_runs import DEMO_CODEC

from higgstune import BaseSpec
from higgstune.diagnostics.adapter import (
    check_applied,
    check_card,
    check_effect,
    check_files,
    check_plain_peft,
    check_trained_on,
)
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.generation import collate
from higgstune.diagnostics.prompt import as_trained
from higgstune.model.adapters import AttentionTraining, load_adapter
from higgstune.model.load import load_model


def zero_everything(folder: Path) -> None:
    rewrite(folder, lambda key, value: value * 0 if "lora_B" in key else value)


def zero_one(folder: Path) -> None:
    rewrite(folder, lambda key, value: value * 0 if "layers.2.mlp.up_proj.lora_B" in key else value)


def flip_byte(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def drop_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    save_file(weights, path)
    write_card(folder, json.loads((folder / "higgstune.json").read_text()))


def forget_zero_card(folder: Path) -> None:
    (folder / "higgstune.json").write_text("{")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (zero_everything, "zero in 50 of 50 modules"),
        (zero_one, "model.layers.2.mlp.up_proj"),
        (flip_byte, "its checksum differs"),
        (drop_tensor, "it has no tensor"),
        (lambda folder: rewrite(folder, lambda key, value: value * torch.nan), "NaN or infinity"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"0" * 100), "truncated"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing"),
        (forget_zero_card, "not valid JSON"),
        (shutil.rmtree, "neither an adapter"),
    ],
)
def test_a_broken_adapter_is_found(world: Path, adapter: Path, fault: Any, says: str) -> None:
    fault(adapter)
    report = examined(world, adapter=adapter, data=None)
    assert failed(report) == {"adapter"}
    assert says in messages_of(report, "adapter")
    assert report.of("generation", "ok")  # of the base


def test_an_adapter_of_another_base_is_found(world: Path, base: Path) -> None:
    change_weights(base, lambda w: w["model.norm.weight"].mul_(1.05))
    report = examined(world, model=base, data=None)
    assert failed(report) == {"adapter"}
    assert "fingerprint" in messages_of(report, "adapter")
    report = doctor(BaseSpec(save_tiny_checkpoint(base / "tiny"), codec=DEMO_CODEC), adapter=world / "adapter")
    assert failed(report) == {"adapter"}
    assert "hidden_size" in messages_of(report, "adapter")


def test_files_and_base_are_compared_before_anything_is_loaded(world: Path, adapter: Path) -> None:
    assert check_files(adapter)[0].status == "ok"
    flip_byte(adapter)
    assert "checksum" in check_files(adapter)[0].message
    model = load_model(world / "base", dtype="bfloat16", device="cpu")
    assert check_trained_on(model, adapter)[0].status == "ok"  # the same base in another dtype
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    assert "fingerprint" in check_trained_on(model, adapter)[0].message


def test_an_adapter_of_another_codec_is_found(world: Path, adapter: Path) -> None:
    card = json.loads((adapter / "higgstune.json").read_text())
    write_card(adapter, card | {"codec_revision": "another"})
    report = examined(world, adapter=adapter, data=None)
    assert failed(report) == {"codec"}
    assert "another" in messages_of(report, "codec")


def test_an_adapter_without_a_card_is_warned_of(world: Path, adapter: Path) -> None:
    (adapter / "higgstune.json").unlink()
    report = examined(world, adapter=adapter, data=None)
    assert report.passed, failed(report)
    assert "has no higgstune.json" in messages_of(report, "adapter", "warning")
    assert check_card(adapter)[0].status == "warning"


def test_what_a_recipe_teaches_nothing_may_be_zero(adapter: Path) -> None:
    rewrite(adapter, lambda key, value: value * 0 if "layers.4.mlp.up_proj.lora_B" in key else value)
    assert check_files(adapter)[0].status == "failed"
    card = json.loads((adapter / "higgstune.json").read_text())
    card["recipe"]["stages"] = [{"name": "voice", "text_weight": 0.0, "audio_weight": 1.0}]
    write_card(adapter, card)
    assert check_files(adapter)[0].status == "ok"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("attention", ["lora", "full"])
def test_plain_peft_that_leaves_modules_out_is_found(world: Path, tmp_path: Path, attention: AttentionTraining) -> None:
    folder = save_adapter(world / "base", tmp_path / "adapter", attention=attention)
    report = examined(world, adapter=folder, data=None)
    assert report.passed, failed(report)
    tensors = 5 * 4 * 2 if attention == "lora" else 5 * 5
    assert f"would drop {tensors} tensors" in messages_of(report, "adapter", "warning")
    assert "modules of the adapter have an effect" in messages_of(report, "adapter", "ok")
    plain = load_model(world / "base", dtype="float32", device="cpu")
    loaded = PeftModel.from_pretrained(plain, str(folder))
    finding = check_applied(loaded, folder)
    assert finding.status == "failed"
    assert f"{tensors} of the adapter's" in finding.message
    assert "audio_attn" in finding.message
    ours = load_adapter(load_model(world / "base", dtype="float32", device="cpu"), folder)
    assert check_applied(ours, folder).status == "ok"


def test_an_adapter_that_was_changed_after_loading_is_found(world: Path) -> None:
    model = load_model(world / "base", dtype="float32", device="cpu")
    assert check_trained_on(model, world / "adapter")[0].status == "ok"
    assert check_plain_peft(model, world / "adapter") == []
    loaded = load_adapter(model, world / "adapter")
    prompter = tiny_prompter()[1]
    batch = collate(loaded, [as_trained(prompter, row, text_targets="transcript") for row in rows()])
    assert check_effect(loaded, batch)[0].status == "ok"
    layer = loaded.base_model.model.model.layers[3].audio_mlp.gate_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert "model.layers.3.audio_mlp.gate_proj" in check_applied(loaded, world / "adapter").message
    assert "1 of 50 modules of the adapter have no effect" in check_effect(loaded, batch)[0].message
    loaded.base_model.disable_adapter_layers()
    assert "50 of 50 modules" in check_effect(loaded, batch)[0].message


def as_other_trainers_write(key: str) -> str:
    return f"module.{key.replace('model.model.', 'model.')}"


def test_an_adapter_of_another_trainer_is_examined_as_it_is_used(world: Path, tmp_path: Path) -> None:
    plain = save_foreign(world / "base", tmp_path / "plain", in_full=["embed_audio_tokens.embed_audio_tokens"])
    named = renamed(plain, tmp_path / "named", as_other_trainers_write, modules_to_save=["embed_audio_tokens"])
    report = examined(world, adapter=named, data=None, codec=world / "base" / "codec")
    assert report.passed, failed(report)
    assert "would drop 21 tensors" in messages_of(report, "adapter", "warning")
    assert "Higgstune itself loads them all" in messages_of(report, "adapter", "warning")
    unknown = renamed(plain, tmp_path / "unknown", lambda key: key.replace("self_attn", "attention"))
    report = examined(world, adapter=unknown, data=None, codec=world / "base" / "codec")
    assert failed(report) == {"adapter"}
    assert "model.layers.0.attention.q_proj" in messages_of(report, "adapter")
    found = f"{messages_of(report, 'adapter')} {messages_of(report, 'adapter', 'warning')}"
    assert "speak" not in found
    assert "load_adapter" not in found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_names_that_plain_peft_does_not_read_are_found_after_loading(world: Path, tmp_path: Path) -> None:
    plain = save_foreign(world / "base", tmp_path / "plain")
    named = renamed(plain, tmp_path / "named", as_other_trainers_write)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(load_model(world / "base", dtype="float32", device="cpu"), str(named))
    finding = check_applied(model, named)
    assert finding.status == "failed"
    assert "plain peft does not read the names" in str(finding.advice)


def test_a_merged_base_is_named(world: Path, base: Path, tmp_path: Path) -> None:
    plain = save_foreign(base, tmp_path / "plain")
    checksum = hashlib.sha256((plain / "adapter_model.safetensors").read_bytes()).hexdigest()
    for sha256, status, says in (("0" * 64, "warning", "contain another adapter"), (checksum, "failed", "twice")):
        (base / "higgstune.json").write_text(json.dumps({"merged": {"adapter_sha256": sha256, "fingerprint": "x"}}))
        report = examined(world, model=base, adapter=plain, data=None)
        assert says in messages_of(report, "adapter", status)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", lambda c: c["rope_parameters"].update(rope_theta=5e6), "rope_parameters.rope_theta is 5000000"),
        ("config.json", lambda c: c.update(rms_norm_eps=0.1), "rms_norm_eps is 0.1"),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update(a=78, b=77), "tokenizer.json has changed"),
    ],
)
def test_a_base_that_changed_below_the_adapter_is_found(
    world: Path, base: Path, file: str, change: Any, says: str
) -> None:
    content = json.loads((base / file).read_text())
    change(content)
    (base / file).write_text(json.dumps(content))
    report = examined(world, model=base, data=None)
    assert "adapter" in failed(report)
    assert says in messages_of(report, "adapter")


def test_an_older_card_is_warned_of(world: Path, adapter: Path) -> None:
    card = json.loads((adapter / "higgstune.json").read_text())
    del card["base_identity"]
    write_card(adapter, card)
    report = examined(world, adapter=adapter, data=None)
    assert report.passed, failed(report)
    assert "lacks base_identity" in messages_of(report, "adapter", "warning")
