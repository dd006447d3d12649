"""Loading checkpoints of Higgs TTS 3: the released layout, its variants, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_tokenizer
from tts3 import BASE, FOLDER, NEEDED, change_config, copy_base, store, stored

import higgstune
from higgstune.codec import checkpoint_codec, load_codec
from higgstune.errors import CheckpointError
from higgstune.families import read_layout
from higgstune.families.higgs_tts_3.family import FAMILY

pytestmark = NEEDED
PREFIX = "tied.embedding.modality_embeddings.0.model."
HEADS = ("tied.head.text_head.weight", "tied.head.modality_heads.0.weight")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return copy_base(tmp_path / "base")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return higgstune.load_model(folder, device="cpu").state_dict()


def assert_same(found: dict[str, torch.Tensor]) -> None:
    expected = state(BASE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_single_file_without_index_or_heads_loads(base: Path) -> None:
    (base / "model.safetensors.index.json").unlink()
    assert_same(state(base))
    store(base, {key: value for key, value in stored(base).items() if key not in HEADS})
    assert_same(state(base))


@pytest.mark.parametrize("listed", [True, False])
def test_shards_load_with_heads_that_the_index_does_not_list(base: Path, listed: bool) -> None:
    tensors = stored(base)
    (base / "model.safetensors").unlink()
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, (key, value) in enumerate(sorted(tensors.items())):
        shards[(number % 2) if key not in HEADS or listed else 2][key] = value
    where = {}
    for number, shard in enumerate(shards):
        if shard:
            save_file(shard, base / f"model-{number}.safetensors")
        where |= dict.fromkeys(shard, f"model-{number}.safetensors")
    where = {key: name for key, name in where.items() if key not in HEADS}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same(state(base))
    assert load_codec(base).revision == load_codec(BASE).revision
    [number] = [number for number, shard in enumerate(shards) if HEADS[1] in shard]
    save_file(shards[number] | {HEADS[1]: tensors[HEADS[1]] + 1}, base / f"model-{number}.safetensors")
    with pytest.raises(CheckpointError, match=r"modality_heads\.0\.weight differs"):
        state(base)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_differs_is_refused(base: Path, head: str) -> None:
    tensors = stored(base)
    store(base, tensors | {head: tensors[head] * 2})
    with pytest.raises(CheckpointError, match=f"{head} differs from tied.embedding"):
        state(base)


@pytest.mark.parametrize("key", ["body.layers.0.self_attn.q_proj.lora_A.weight", "lm_head.weight"])
def test_an_unknown_tensor_is_refused(base: Path, key: str) -> None:
    store(base, stored(base) | {key: torch.zeros(2)})
    with pytest.raises(CheckpointError, match="missing, unknown or of another shape"):
        state(base)


def test_a_missing_tensor_is_refused(base: Path) -> None:
    tensors = stored(base)
    del tensors["body.layers.1.self_attn.q_norm.weight"]
    store(base, tensors)
    with pytest.raises(CheckpointError, match=r"such as model\.layers\.1\.self_attn\.q_norm\.weight"):
        state(base)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("text_config", "rope_parameters", {"rope_theta": 10_000, "rope_type": "default"}, "rope_theta of 10000"),
        ("text_config", "rope_parameters", {"rope_theta": 1_000_000, "rope_type": "yarn"}, "yarn"),
        ("text_config", "tie_word_embeddings", False, "tie_word_embeddings"),
        ("text_config", "use_sliding_window", True, "use_sliding_window"),
        ("text_config", "head_dim", None, "text_config.head_dim"),
        ("audio_encoder_config", "tie_word_embeddings", False, "audio head"),
        ("audio_encoder_config", "encoder_type", "whisper", "transcription"),
        ("audio_encoder_config", "encoder_type", None, "encoder_type None"),
        ("audio_encoder_config", "use_delay_pattern", False, "delayed"),
        ("audio_encoder_config", "num_codebooks", None, "num_codebooks"),
        ("audio_encoder_config", "out_dim", 32, "32 columns"),
    ],
)
def test_another_configuration_is_refused(base: Path, section: str, key: str, value: object, message: str) -> None:
    change_config(base, section, **{key: value})
    with pytest.raises(CheckpointError, match=message):
        FAMILY.read_config(base)


def test_a_missing_theta_is_that_of_the_release(base: Path) -> None:
    change_config(base, "text_config", rope_parameters=None)
    assert FAMILY.read_config(base).rope_parameters["rope_theta"] == 1_000_000
    frequencies = higgstune.load_model(base, device="cpu", dtype="bfloat16").model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, FAMILY.checks.frequencies(FAMILY.read_config(base)))


def test_another_tokenizer_is_refused(base: Path) -> None:
    tiny_tokenizer().save_pretrained(base)
    with pytest.raises(CheckpointError, match="not that of Higgs TTS 3"):
        higgstune.load_model_and_tokenizers(base, device="cpu")


def test_the_codec_comes_with_the_checkpoint(base: Path) -> None:
    """Its revision is that of its weights, in whatever file they lie; padding is a part of it."""
    codec = load_codec(checkpoint_codec(base))
    assert codec.revision == load_codec(BASE).revision  # whose codec_config.json lies beside the folder
    values = load_file(FOLDER / "codec.safetensors")
    clip = values["waveform"].numpy()
    np.testing.assert_array_equal(codec.encode(clip), values["codes"].numpy())
    filled = codec.encode(np.pad(clip, (0, -len(clip) % 960)))
    assert (filled != values["codes"].numpy()).mean() > 0.1
    assert [len(codec.encode(np.zeros(samples, np.float32))) for samples in (24_001, 24_480)] == [25, 26]
    weights = stored(base)
    key = f"{PREFIX}fc.weight"
    store(base, weights | {key: weights[key] + 1})
    assert load_codec(base).revision != codec.revision


def test_a_codec_without_a_weight_is_refused(base: Path) -> None:
    weights = stored(base)
    del weights[f"{PREFIX}fc.weight"]
    store(base, weights)
    with pytest.raises(CheckpointError, match=r"such as fc\.weight: expected .*, got None"):
        load_codec(base)


def test_a_codec_of_another_size_needs_its_configuration(base: Path) -> None:
    (base / "codec_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"does not fit the configuration of the released codec.*codec_config"):
        load_codec(base)


def test_lora_is_of_the_backbone_alone() -> None:
    layout = read_layout(BASE)
    model, _ = FAMILY.load(layout, FAMILY.read_config(BASE), torch.float32)
    from higgstune.config.recipe import Lora
    from higgstune.model.adapters import adapted_layers, add_lora

    projections = [*(f"self_attn.{x}_proj" for x in "kqvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    expected = sorted(f"model.layers.{layer}.{name}" for layer in range(3) for name in projections)
    assert adapted_layers(add_lora(model, Lora(r=2), "full")) == expected  # type: ignore[call-arg]
