"""The fitted codec: fitting, its folder, and how well the shipped one carries speech."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from higgstune.codec import MelCodec, load_codec
from higgstune.codec.mel import MelCodecConfig, Spectrum
from higgstune.errors import CheckpointError, DataError

ASSETS = Path(str(files("higgstune.demo"))) / "assets"
SMALL = MelCodecConfig(components=16, num_codebooks=3, codebook_size=32)


@pytest.fixture(scope="module")
def shipped() -> MelCodec:
    return MelCodec.from_pretrained(ASSETS / "codec")


def speech(name: str) -> np.ndarray:
    """A clip of the sample dataset: [samples] float32 at 24 kHz."""
    waveform, rate = soundfile.read(ASSETS / "voices" / name, dtype="float32")
    return soxr.resample(waveform, rate, 24_000).astype(np.float32)


def sweep(seconds: float, start: float) -> np.ndarray:
    time = np.arange(int(seconds * 24_000)) / 24_000
    return (0.3 * np.sin(2 * np.pi * (start + 300 * time) * time)).astype(np.float32)


def decibels(codec: MelCodec, waveform: np.ndarray) -> np.ndarray:
    """[mel columns, bands]"""
    return 20 / np.log(10) * codec.features(waveform).reshape(-1, codec.config.num_mels)


def test_the_shipped_codec_has_the_geometry_of_the_higgs_codec(shipped: MelCodec) -> None:
    assert (shipped.sample_rate, shipped.frame_rate) == (24_000, 25.0)
    assert (shipped.num_codebooks, shipped.codebook_size) == (8, 1024)
    assert load_codec(ASSETS / "codec").revision == shipped.revision


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 1), (960, 1), (961, 2), (24_001, 26)])
def test_twenty_five_frames_a_second(shipped: MelCodec, samples: int, frames: int) -> None:
    codes = shipped.encode(np.zeros(samples, np.float32))
    assert codes.shape == (frames, 8)
    assert codes.dtype == np.uint16
    assert shipped.decode(codes).shape == (frames * 960,)


@pytest.mark.parametrize("name", ["rms/rms-05.opus", "hibari/hibari-05.opus"])
def test_speech_survives_the_round_trip(shipped: MelCodec, name: str) -> None:
    clip = speech(name)
    codes = shipped.encode(clip)
    decoded = shipped.decode(codes)
    np.testing.assert_array_equal(shipped.decode(codes), decoded)
    assert np.abs(decoded).max() < 1
    wanted, found = decibels(shipped, clip), decibels(shipped, decoded)
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.97
    # Column by column, so that the right average spectrum alone does not pass.
    loud = wanted.mean(1) > wanted.mean()
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(wanted[loud], found[loud], strict=True)]
    assert np.median(columns) > 0.96
    assert abs(wanted[loud].mean() - found[loud].mean()) < 2  # loudness


def test_each_codebook_brings_the_result_nearer(shipped: MelCodec) -> None:
    clip = speech("rms/rms-07.opus")
    codes, wanted = shipped.encode(clip), decibels(shipped, clip)
    errors = []
    for used in (1, 4, 8):
        partial = shipped.encode(clip)
        partial[:, used:] = codes[0, used:]
        errors.append(np.abs(decibels(shipped, shipped.decode(partial)) - wanted).mean())
    assert errors[0] > errors[1] > errors[2]


def test_griffin_lim_finds_a_signal_with_the_wanted_spectrum() -> None:
    spectrum = Spectrum(24_000, 1024, 240, 80, 8000.0)
    clip = sweep(0.8, 300)
    mel = spectrum.mel(clip)
    rebuilt = spectrum.invert(mel, iterations=32, momentum=0.99)
    assert rebuilt.shape == clip.shape
    assert np.linalg.norm(spectrum.mel(rebuilt) - mel) < 0.15 * np.linalg.norm(mel)


def test_a_fit_is_repeatable_and_survives_its_folder(tmp_path: Path) -> None:
    clips = [sweep(1, start) for start in (100, 200, 400, 800)]
    fitted = MelCodec.fit(clips, seed=3, config=SMALL)
    fitted.save_pretrained(tmp_path)
    read = load_codec(tmp_path)
    repeated = MelCodec.fit(clips, seed=3, config=SMALL)
    assert read.revision == fitted.revision == repeated.revision
    assert MelCodec.fit(clips, seed=4, config=SMALL).revision != fitted.revision
    codes = fitted.encode(clips[0])
    assert codes.shape == (25, 3)
    np.testing.assert_array_equal(read.encode(clips[0]), codes)
    np.testing.assert_array_equal(read.decode(codes), fitted.decode(codes))


def test_too_little_speech_to_fit_is_an_error() -> None:
    with pytest.raises(DataError, match="25 frames are too few"):
        MelCodec.fit([sweep(1, 100)], config=SMALL)


def test_a_broken_folder_is_named(shipped: MelCodec, tmp_path: Path) -> None:
    shipped.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text = config.read_text()
    config.write_text(text.replace('"components": 64', '"components": 32'))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: holds .* requires"):
        MelCodec.from_pretrained(tmp_path)
    config.write_text(text.replace('"components"', '"componets"'))
    with pytest.raises(CheckpointError, match=r"config\.json: .*componets"):
        MelCodec.from_pretrained(tmp_path)
    config.write_text(text)
    weights.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        MelCodec.from_pretrained(tmp_path)
    config.write_text('{"model_type": "dac"}')
    with pytest.raises(CheckpointError, match="not a fitted codec"):
        MelCodec.from_pretrained(tmp_path)
