"""The Higgs codec's real class on random weights, and the choice of a codec by its folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_codec import save_tiny_codec

from higgstune.codec import HiggsCodec, load_codec
from higgstune.codec.base import Codec
from higgstune.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def codec(folder: Path) -> Codec:
    return load_codec(folder)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def test_geometry_comes_from_the_configuration(codec: Codec) -> None:
    assert isinstance(codec, HiggsCodec)
    assert (codec.sample_rate, codec.frame_rate) == (24_000, 25.0)
    assert (codec.num_codebooks, codec.codebook_size) == (8, 1024)


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(0, 0), (1, 1), (960, 1), (961, 2), (24_000, 25), (47_999, 50), (50_001, 53)],
)
def test_twenty_five_frames_a_second(codec: Codec, samples: int, frames: int) -> None:
    codes = codec.encode(noise(samples))
    assert codes.shape == (frames, 8)
    assert codes.dtype == np.uint16
    waveform = codec.decode(codes)
    assert waveform.shape == (frames * 960,)
    assert waveform.dtype == np.float32


def test_codes_follow_the_input_and_nothing_else(codec: Codec, folder: Path) -> None:
    clip = noise(24_000)
    codes = codec.encode(clip)
    assert np.unique(codes[:, 0]).size > 5
    codec.encode(noise(30_000, seed=1))
    torch.manual_seed(5)
    np.testing.assert_array_equal(codec.encode(clip), codes)
    with torch.autocast("cpu", torch.bfloat16):  # as in a trainer's evaluation
        np.testing.assert_array_equal(codec.encode(clip), codes)
    np.testing.assert_array_equal(load_codec(folder).encode(clip), codes)


def test_equals_the_model_called_directly(codec: Codec) -> None:
    clip, model = noise(9_600), codec._model
    with torch.no_grad():
        codes = model.encode(torch.from_numpy(clip)[None, None], return_dict=False)
        waveform = model.decode(codes, return_dict=False)
    np.testing.assert_array_equal(codec.encode(clip), codes[0].T.numpy())
    np.testing.assert_allclose(codec.decode(codes[0].T.numpy()), waveform[0, 0].numpy(), atol=1e-6)


def test_always_in_eval_mode_and_outside_any_module_tree(codec: Codec) -> None:
    owner = torch.nn.Module()
    owner.codec = codec
    owner.train()
    assert not list(owner.parameters())
    assert not any(module.training for module in codec._model.modules())
    assert not any(parameter.requires_grad for parameter in codec._model.parameters())


@pytest.mark.parametrize("integers", [np.uint16, np.int32, np.int64])
def test_decodes_any_integer_type(codec: Codec, integers: type) -> None:
    codes = np.arange(24).reshape(3, 8)
    np.testing.assert_array_equal(codec.decode(codes.astype(integers)), codec.decode(codes))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((3, 8), 1024), "stream BOS"),
        (np.full((3, 8), -1), "0 to 1023"),
        (np.zeros((3, 4), int), r"\[frames, 8\]"),
        (np.zeros((3, 8)), "float64"),
    ],
)
def test_codes_that_no_codebook_has_are_refused(codec: Codec, codes: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        codec.decode(codes)


@pytest.mark.parametrize("waveform", [np.zeros((2, 960), np.float32), np.zeros(960, np.int16)])
def test_stereo_and_integers_are_refused(codec: Codec, waveform: np.ndarray) -> None:
    with pytest.raises(DataError, match="mono waveform"):
        codec.encode(waveform)


def test_revision_names_the_weights(codec: Codec, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load_codec(copy).revision == codec.revision
    tensors = load_file(copy / "model.safetensors")
    tensors["fc.bias"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_codec(copy).revision != codec.revision


def test_missing_weights_are_an_error_and_not_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["fc.bias"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights of the codec are missing, fc\.bias"):
        load_codec(copy)


def test_broken_weights_are_an_error(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_codec(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json is missing"),
        ("{", "not valid JSON"),
        (json.dumps({"model_type": "xcodec"}), "higgs_audio_v2_tokenizer.*higgstune_mel_codec"),
        (json.dumps({"n_filters": 32}), r"\"model_type\" is None.*model\.pth"),
    ],
)
def test_a_folder_without_a_codec_is_refused(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        load_codec(tmp_path)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match="give a folder or a hub id"):
        load_codec("no/such/folder")


def test_a_codec_has_one_revision_wherever_it_comes_from(
    codec: Codec, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached, commit = tmp_path / "models--owner--codec", "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert load_codec("owner/codec", cache_dir=tmp_path).revision == codec.revision


def test_transformers_gives_the_real_class_afterwards(codec: Codec) -> None:
    import transformers

    assert transformers.HiggsAudioV2TokenizerModel.__module__.startswith("transformers.models.")
