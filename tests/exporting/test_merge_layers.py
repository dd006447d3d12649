"""The arithmetic of merging: every variant of LoRA, in float32 whatever the base's dtype, on every kind of base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import card
from export_world import adapted_logits, gap, logits, make_adapter
from on_cpu import CPU
from safetensors.torch import load_file, save_file

from higgstune import BaseSpec, export
from higgstune.errors import CheckpointError, ConfigError
from higgstune.exporting import verify as check
from higgstune.exporting.merge import merge_layers
from higgstune.families.base import Conditioning
from higgstune.families.higgs_v2.family import FAMILY
from higgstune.families.higgs_v2.original import original_config, original_state
from higgstune.families.higgs_v2.prompt import AUDIO_EOS, AUDIO_IN
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model, load_tokenizer


@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}, {"attention": "full"}, {}])
def test_every_variant_gives_the_logits_of_base_and_adapter(
    world: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    has = Conditioning(audio_attention=True) if "attention" in variant else None
    adapter = make_adapter(world, tmp_path / "adapter", conditioning=has, **variant)
    result = export(adapter, tmp_path / "out", base=CPU)
    found = logits(load_model(result.folder, device="cpu", dtype="float32"), world)
    assert gap(found, adapted_logits(world, adapter)) < 5e-5
    assert gap(found, logits(load_model(world / "base", device="cpu", dtype="float32"), world)) > 0.1


def test_a_bfloat16_base_is_merged_in_float32(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    weights = {key: value.bfloat16() for key, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(world, tmp_path / "adapter", base=base)
    result = export(adapter, tmp_path / "out", base=CPU)
    assert result.dtype == result.check.dtype == "bfloat16"
    assert json.loads((result.folder / "config.json").read_text())["dtype"] == "bfloat16"
    trained = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.audio_mlp.up_proj"
    a, b = (trained[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    key = f"{name}.weight"
    written = load_file(result.folder / "model.safetensors")[key]
    assert torch.equal(written, (weights[key].float() + 2.0 * (b @ a)).bfloat16())
    assert not torch.equal(written, weights[key] + (2.0 * (b @ a)).bfloat16())


def test_no_more_than_one_layer_is_in_float32_at_a_time(world: Path) -> None:
    model = load_adapter(load_model(world / "base", device="cpu", dtype="bfloat16"), world / "plain" / "adapter")
    wide: list[int] = []

    def count(what: str, done: int, total: int) -> None:
        weights = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear)]
        wide.append(sum(weight.dtype == torch.float32 and weight.shape[0] > 4 < weight.shape[1] for weight in weights))

    merged = merge_layers(model, torch.bfloat16, count)
    assert len(wide) == 30
    assert max(wide) == 0
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_the_dtype_of_what_is_written_can_be_chosen(world: Path, merged: Path, tmp_path: Path) -> None:
    result = export(world / "plain" / "adapter", tmp_path / "out", dtype="bfloat16", base=CPU)
    written = load_file(result.folder / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    # From the float32 base, rounded once at the end.
    exact = load_file(merged / "model.safetensors")
    assert all(torch.equal(written[key], value.bfloat16()) for key, value in exact.items())
    assert 0 < result.check.from_adapter <= check.TOLERANCE["bfloat16"]
    with pytest.raises(ConfigError, match="int8"):
        export(world / "plain" / "adapter", tmp_path / "other", dtype="int8")


def test_a_half_precision_base_needs_a_dtype(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    weights = {key: value.half() for key, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(world, tmp_path / "adapter", base=base)
    with pytest.raises(CheckpointError, match=r"stored as F16.*--dtype"):
        export(adapter, tmp_path / "out", base=CPU)
    assert export(adapter, tmp_path / "out", dtype="float32", base=CPU).dtype == "float32"


def test_a_run_that_was_begun_on_a_merged_checkpoint_is_merged_into_it(
    world: Path, merged: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(world, tmp_path / "adapter", base=merged)
    result = export(adapter, tmp_path / "out", base=CPU)
    found = logits(load_model(result.folder, device="cpu"), world)
    assert gap(found, logits(load_adapter(load_model(merged, device="cpu"), adapter), world)) < 5e-5
    assert card(result.folder)["merged"]["base_merged"] == card(merged)["merged"]


def test_a_base_in_the_original_layout_is_the_same_base(world: Path, merged: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    model = load_model(world / "base", device="cpu", dtype="float32")
    save_file(original_state(model.state_dict()), base / "model.safetensors")
    tokenizer = load_tokenizer(world / "base", FAMILY, model.config)
    tokens = {token: tokenizer.convert_tokens_to_ids(token) for token in (AUDIO_IN, AUDIO_EOS)}
    (base / "config.json").write_text(json.dumps(original_config(model.config, tokens=tokens)))
    for format in ("native", "boson"):
        result = export(
            world / "plain" / "adapter", tmp_path / format, format=format, base=BaseSpec(base, device="cpu")
        )
        expected = load_file(merged / "model.safetensors")
        if format == "boson":
            expected = original_state(expected)
        written = load_file(result.folder / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], value) for key, value in expected.items())
