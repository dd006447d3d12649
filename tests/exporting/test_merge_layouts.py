"""Layouts: what carries audio attention and Whisper, and what is lost where it does not."""

import json
from pathlib import Path

import pytest
import yaml
from adapter_folders import copy_of
from export_world import adapted_logits, batch_of, gap, logits, make_adapter, nothing_is_left, whisper_spec_of
from on_cpu import CPU
from tiny_whisper import save_tiny_whisper
from transformers import AutoModel, HiggsAudioV2ForConditionalGeneration

from higgstune import export
from higgstune.errors import CheckpointError, ConfigError
from higgstune.families.base import Conditioning
from higgstune.families.higgs_v2.extensions import conditioning_of
from higgstune.generate.speaker import load
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model, load_model_and_tokenizers
from higgstune.training.verify import probe_logits, write_probe


def test_extensions_go_to_the_extended_layout(world: Path, tmp_path: Path) -> None:
    adapter = world / "both" / "adapter"
    result = export(adapter, tmp_path / "out", base=CPU)
    assert result.format == "extended"
    config = json.loads((result.folder / "config.json").read_text())
    assert config["model_type"] == "higgs_audio_v2_extended"
    for plain in (HiggsAudioV2ForConditionalGeneration, AutoModel):  # neither leaves out what it does not know
        with pytest.raises(ValueError, match=r"higgstune\.load_model|higgs_audio_v2_extended"):
            plain.from_pretrained(result.folder)
    model = load_model(result.folder, device="cpu")
    assert conditioning_of(model).audio_attention
    assert gap(logits(model, world), adapted_logits(world, adapter)) < 5e-5
    text = (result.folder / "README.md").read_text()
    assert "references in the scene" in text
    assert load(result.folder, device="cpu").reference_place == "scene"
    assert "audio self-attention and a projector for features of the Whisper encoder whisper" in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "higgstune"


def test_extensions_go_to_the_original_layout_with_their_encoder(world: Path, tmp_path: Path) -> None:
    adapter = world / "both" / "adapter"
    result = export(adapter, tmp_path / "out", format="boson", base=CPU)
    loaded = load_model_and_tokenizers(result.folder, device="cpu")
    assert gap(logits(loaded.model, world), adapted_logits(world, adapter)) < 5e-5
    assert loaded.whisper is not None
    assert loaded.whisper.revision == whisper_spec_of(world).revision
    # A merged original checkpoint can be the base of another run, and of another merge.
    further = make_adapter(world, tmp_path / "further", base=result.folder)
    again = export(further, tmp_path / "again", format="boson", base=CPU)
    assert load_model_and_tokenizers(again.folder, device="cpu").whisper is not None


@pytest.mark.parametrize(("encoder", "message"), [("gone", "includes the Whisper"), ("other", "is not the one")])
def test_a_missing_or_changed_encoder_is_refused(world: Path, tmp_path: Path, encoder: str, message: str) -> None:
    save_tiny_whisper(tmp_path / "other", seed=3)
    shape = whisper_spec_of(world).model_copy(update={"checkpoint": str(tmp_path / encoder)})
    has = Conditioning(audio_attention=True, whisper=shape)
    changes = {"conditioning": has.model_dump(), "data": {}, "recipe": {}}  # no store: compared on the probe
    adapter = copy_of(world / "both" / "adapter", tmp_path / "s" / "adapter", **changes)
    model = load_adapter(load_model(world / "base", device="cpu"), adapter)
    (tmp_path / "s" / "verify").mkdir()
    batch = batch_of(model, world)
    write_probe(batch, probe_logits(model, batch), tmp_path / "s" / "verify" / "probe.safetensors")
    assert export(adapter, tmp_path / "extended", base=CPU).format == "extended"  # it only names the encoder
    with pytest.raises(CheckpointError, match=message):
        export(adapter, tmp_path / "out", format="boson", base=CPU)
    assert nothing_is_left(tmp_path / "out")


def test_extensions_that_only_higgstune_loads_are_not_loaded_in_few_bits(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--base-bits has no effect: only Higgstune"):
        export(world / "both" / "adapter", tmp_path / "out", base_bits=4, base=CPU)
    assert nothing_is_left(tmp_path / "out")


def test_native_takes_no_extensions_unless_they_are_dropped(world: Path, tmp_path: Path) -> None:
    adapter, out = world / "both" / "adapter", tmp_path / "out"
    with pytest.raises(ConfigError, match=r"model\.layers\.\*\.audio_attn.*audio_encoder_proj.*--drop-modules"):
        export(adapter, out, format="native", base=CPU)
    assert nothing_is_left(out)
    result = export(adapter, out, format="native", drop_modules=True, base=CPU)
    assert result.dropped == (
        "model.layers.*.audio_attn", "model.layers.*.audio_post_audio_attn_layer_norm", "model.audio_encoder_proj",
    )  # fmt: skip
    assert result.loss is not None
    assert result.loss.with_modules != result.loss.without_modules
    text = (out / "README.md").read_text()
    assert "It is not all that was trained" in text
    assert f"{result.loss.without_modules:.3f} without" in text
    HiggsAudioV2ForConditionalGeneration.from_pretrained(out, use_text_head=True)
    assert not conditioning_of(load_model(out, device="cpu"))
