"""Loading checkpoints: golden parity of original-format ones, and one clear error for whatever is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_values import Golden
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint
from transformers import (
    HiggsAudioV2ForConditionalGeneration,
)

import higgstune
from higgstune.environment import choose_device, choose_dtype
from higgstune.errors import CheckpointError, ConfigError
from higgstune.model.load import load_model, load_model_and_tokenizers

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DEMO_CODEC = Path(higgstune.__file__).parent / "demo" / "assets" / "codec"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny native checkpoint that brings its codec."""
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    shutil.copytree(DEMO_CODEC, folder / "codec")
    return folder


def golden_difference(folder: Path, golden: Golden) -> tuple[float, float]:
    """The largest difference of text and audio logits on unpadded positions."""
    model = load_model(folder, dtype="float32", device="cpu")
    inputs = golden.native_inputs()
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        text = model.text_lm_head(hidden)
        audio = model.audio_lm_head(hidden).unflatten(-1, (model.config.num_codebooks, -1))
    real, rows = inputs["attention_mask"].bool(), golden.values["audio_out_mask"].bool()
    return (
        (text - golden.values["text_logits"])[real].abs().max().item(),
        (audio[rows] - golden.values["audio_logits"]).abs().max().item(),
    )


def test_an_original_checkpoint_gives_the_reference_logits(tmp_path: Path) -> None:
    golden = Golden("base")
    assert max(golden_difference(golden.save_original_checkpoint(tmp_path), golden)) < 1e-5


def test_halves_are_joined_and_buffers_dropped(tmp_path: Path) -> None:
    golden = Golden("base")
    names = {
        "embed_tokens.weight": "embed_tokens.embedding_{}.weight",
        "audio_decoder_proj.audio_lm_head.weight": "audio_decoder_proj.audio_lm_head.linear_{}.weight",
        "audio_decoder_proj.text_lm_head.weight": "audio_decoder_proj.text_lm_head.linear_{}.weight",
    }
    for whole, half in names.items():
        weight = golden.weights.pop(whole)
        golden.weights[half.format("frozen")], golden.weights[half.format("trainable")] = weight[:200], weight[200:]
    golden.weights["audio_codebook_weights"] = torch.ones(8)
    golden.weights["rotary_emb.inv_freq"] = torch.ones(8)
    assert max(golden_difference(golden.save_original_checkpoint(tmp_path), golden)) < 1e-5


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    golden = Golden("base")
    folder = golden.save_original_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    names = sorted(golden.weights)
    shards = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for shard, keys in shards.items():
        save_file({key: golden.weights[key].clone() for key in keys}, folder / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert max(golden_difference(folder, golden)) < 1e-5
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        load_model(folder)


def test_what_a_config_leaves_out_is_llamas_default(tmp_path: Path) -> None:
    golden = Golden("base")
    folder = golden.save_original_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for key in ("head_dim", "hidden_act", "attention_bias", "mlp_bias"):  # as Llama has them by default
        config["text_config"].pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    assert max(golden_difference(folder, golden)) < 1e-5


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = Golden("fast_forward").save_original_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="dual_ffn_fast_forward"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"use_audio_out_self_attention": True}, r"tensors missing.*audio_attn"),
        ({"encode_whisper_embed": True}, "its encoder is missing"),
        ({"skip_audio_tower": False}, "Whisper encoder in .* does not fit"),
        ({"audio_decoder_proj_num_layers": 1}, "extra decoder layers"),
        ({"use_delay_pattern": False}, "delay pattern"),
        ({"audio_num_codebooks": 4}, "another shape"),
    ],
)
def test_an_original_checkpoint_that_would_lose_something_is_refused(
    tmp_path: Path, change: dict[str, Any], names: str
) -> None:
    folder = Golden("base").save_original_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=names):
        load_model(folder)


def test_a_native_checkpoint_loads_with_its_text_head(checkpoint: Path) -> None:
    loaded = load_model_and_tokenizers(checkpoint, device="cpu")
    written = load_file(checkpoint / "model.safetensors")
    assert isinstance(loaded.model, HiggsAudioV2ForConditionalGeneration)
    assert torch.equal(loaded.model.text_lm_head.weight, written["text_lm_head.weight"])
    assert not loaded.model.training
    assert loaded.config.num_codebooks == loaded.audio_tokenizer.num_codebooks == 8
    assert not any(module is loaded.audio_tokenizer for module in loaded.model.modules())
    assert loaded.tokenizer.convert_tokens_to_ids("<|AUDIO_OUT|>") == loaded.config.audio_token_id


@pytest.mark.parametrize("original", [False, True])
def test_bfloat16_weights_keep_float32_rotary_buffers(checkpoint: Path, tmp_path: Path, original: bool) -> None:
    folder = Golden("base").save_original_checkpoint(tmp_path / "original") if original else checkpoint
    half = load_model(folder, dtype="bfloat16", device="cpu")
    full = load_model(folder, dtype="float32", device="cpu")
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(half.model.rotary_emb.inv_freq, full.model.rotary_emb.inv_freq)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop_text_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("text_lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.audio_mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: edit_config(f, model_type="llama"), "'llama'"),
        (lambda f: (f / "model.safetensors").unlink(), "weights are missing"),
        (lambda f: truncate(f / "model.safetensors"), "truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "truncated or not a safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(POINTER), r"a pointer of Git LFS: .*git lfs pull"),
        (lambda f: (f / "config.json").write_bytes(POINTER), r"a pointer of Git LFS: .*git lfs pull"),
        (pickle_only, "pickled"),
        (drop_text_head, r"text_lm_head\.weight"),
        (drop_layer, "do not fill the model"),
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda f: edit_config(f, audio_token_id=3), "not of the same checkpoint"),
        (lambda f: edit_config(f, audio_bos_token_id=3), "not of the same checkpoint"),
        (lambda f: edit_config(f, audio_stream_bos_id=512), "8 codebooks of 1024"),
        (lambda f: shutil.rmtree(f), "does not exist"),
    ],
)
def test_whatever_is_wrong_is_one_clear_error(checkpoint: Path, damage: Any, names: str) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=names):
        load_model_and_tokenizers(checkpoint, device="cpu")


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (GatedRepoError, "accept its licence"),
        (RepositoryNotFoundError, "check the spelling"),
        (LocalEntryNotFoundError, "hf download owner/name"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: type[Exception], names: str) -> None:
    downloads: dict[str, Any] = {}

    def fail(name: str, **options: Any) -> None:
        downloads.update(options)
        raise error.__new__(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=names):
        load_model("owner/name", revision="abc", cache_dir="somewhere")
    assert downloads["revision"] == "abc"
    assert downloads["cache_dir"] == "somewhere"
    assert "*.bin" not in downloads["allow_patterns"]


def test_devices_and_dtypes_are_chosen_or_refused() -> None:
    cpu = choose_device("cpu")
    assert choose_dtype(None, cpu) == choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(ConfigError, match="unknown dtype"):
        choose_dtype("int3", cpu)
    with pytest.raises(ConfigError, match="unknown device"):
        choose_device("toaster")
    if not torch.cuda.is_available():
        assert choose_device() == cpu
        with pytest.raises(ConfigError, match="no CUDA device"):
            choose_device("cuda")
