"""The codec's small vocoder: its signals, how far it sees, and its folder."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from higgstune.codec import MelCodec
from higgstune.codec import source_filter as sf
from higgstune.codec.source_filter import SourceFilterDecoder
from higgstune.errors import CheckpointError

ASSETS = Path(str(files("higgstune.demo"))) / "assets"


@pytest.fixture(scope="module")
def shipped() -> MelCodec:
    return MelCodec.from_pretrained(ASSETS / "codec")


def decoder_of(codec: MelCodec) -> SourceFilterDecoder:
    assert codec.decoder is not None
    return codec.decoder


def log_mel(codec: MelCodec, name: str) -> np.ndarray:
    """[T, num_mels] of a clip of the sample dataset, after its codes."""
    waveform, rate = soundfile.read(ASSETS / "voices" / name, dtype="float32")
    return codec.log_mel(codec.encode(soxr.resample(waveform, rate, 24_000).astype(np.float32)))


def test_overlap_add_inverts_the_spectrum_but_for_the_ends() -> None:
    waveform = np.random.default_rng(0).standard_normal(sf.HOP * 20).astype(np.float32)
    inner = slice(2 * sf.HOP, -2 * sf.HOP)
    np.testing.assert_allclose(sf.overlap_add(sf.stft(waveform))[inner], waveform[inner], atol=1e-5)


def test_noise_depends_on_its_place_alone() -> None:
    long = sf.noise(20_000)
    np.testing.assert_array_equal(sf.noise(9_001), long[:9_001])
    assert abs(long.std() - 1) < 0.02
    assert len(sf.noise(0)) == 0


@pytest.mark.parametrize("hertz", [80.0, 200.0, 400.0])
def test_pulses_have_every_harmonic_of_their_pitch_and_rest_where_unvoiced(hertz: float) -> None:
    columns = 100
    voiced = np.ones(columns, np.float32)
    voiced[60:] = 0
    pulses = sf.excitation(np.full(columns, hertz, np.float32), voiced)
    assert not pulses[62 * sf.HOP :].any()
    second = pulses[: 50 * sf.HOP]
    assert abs(np.sqrt((second**2).mean()) - 1) < 0.05
    spectrum = np.abs(np.fft.rfft(second * np.hanning(len(second))))
    at = np.fft.rfftfreq(len(second), 1 / sf.SAMPLE_RATE)
    for harmonic in (1, 2, 7):
        near = (at > (harmonic - 0.5) * hertz) & (at < (harmonic + 0.5) * hertz)
        assert abs(at[near][spectrum[near].argmax()] - harmonic * hertz) < 3


def test_the_mean_pitch_lies_between_bins() -> None:
    scores = np.full((1, len(sf.PITCH_BINS)), -20.0, np.float32)
    scores[0, 40:42] = 5.0
    assert sf.PITCH_BINS[40] < sf.mean_pitch(scores)[0] < sf.PITCH_BINS[41]


@pytest.mark.parametrize(("name", "low", "high"), [("rms/rms-05.opus", 80, 130), ("hibari/hibari-05.opus", 150, 240)])
def test_the_shipped_decoder_knows_the_pitch_of_its_voices(shipped: MelCodec, name: str, low: int, high: int) -> None:
    mel = (log_mel(shipped, name) + sf.MEL_SHIFT) / sf.MEL_SCALE
    f0, voiced = decoder_of(shipped).pitch(mel.astype(np.float32))
    assert 0.3 < voiced.mean() < 0.95
    assert low < np.median(f0[voiced > 0]) < high


def test_what_comes_later_than_its_context_changes_no_sample(shipped: MelCodec) -> None:
    """So that it can stream: the networks see so far ahead, and a column's spectrum reaches two hops to each side."""
    decoder, mel = decoder_of(shipped), log_mel(shipped, "rms/rms-05.opus")
    changed = mel.copy()
    changed[100] += 2.0
    whole, other = decoder(mel), decoder(changed)
    first = (100 - sf.PITCH_CONTEXT - sf.FILTER_CONTEXT - 2) * sf.HOP
    np.testing.assert_array_equal(whole[:first], other[:first])
    assert np.abs(whole[100 * sf.HOP : 102 * sf.HOP] - other[100 * sf.HOP : 102 * sf.HOP]).max() > 1e-3


def test_codes_do_not_depend_on_the_decoder(shipped: MelCodec, tmp_path: Path) -> None:
    shipped.save_pretrained(tmp_path)
    without = MelCodec.from_pretrained(tmp_path)
    assert without.decoder is None
    assert without.revision == shipped.revision
    codes = np.zeros((4, 8), np.uint16)
    assert without.decode(codes).shape == shipped.decode(codes).shape == (4 * 960,)


@pytest.mark.parametrize("content", [b"", b"damaged", b"cut"])
def test_a_damaged_decoder_is_named(shipped: MelCodec, tmp_path: Path, content: bytes) -> None:
    shipped.save_pretrained(tmp_path)
    whole = (ASSETS / "codec" / sf.WEIGHTS).read_bytes()
    (tmp_path / sf.WEIGHTS).write_bytes(whole[:-100] if content == b"cut" else content)
    with pytest.raises(CheckpointError, match=sf.WEIGHTS):
        MelCodec.from_pretrained(tmp_path)
