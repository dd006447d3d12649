"""The measures of a clip: against sounds whose measures are known."""

from typing import Any

import numpy as np
import pytest
from recordings import speech

from higgstune.data.audio import resample
from higgstune.data.measures import Kept, Measures, measure

RATE = 16_000


def voice(seconds: float = 3.0, rate: int = RATE, level: float = 0.1) -> np.ndarray:
    """Bursts of broad noise with pauses of a tenth of a second between them, as syllables have: [samples] float32."""
    time = np.arange(round(seconds * rate)) / rate
    sound = np.random.default_rng(0).standard_normal(len(time))
    return (level * sound * (time % 0.4 < 0.3)).astype(np.float32)


def measured(*channels: np.ndarray, rate: int = RATE) -> Measures:
    return measure(np.stack(channels, axis=1).astype(np.float32), rate)


def noise(samples: int, level: float) -> np.ndarray:
    return level * np.random.default_rng(1).standard_normal(samples)


@pytest.mark.parametrize("floor", [0.0, 1e-4, 3e-3])
def test_silence_around_speech(floor: float) -> None:
    sound = np.concatenate([np.zeros(2 * RATE), voice(3.0), np.zeros(RATE)])
    found = measured(sound + noise(len(sound), floor))
    assert found.leading_silence == pytest.approx(2.0, abs=0.05)
    assert found.trailing_silence == pytest.approx(1.1, abs=0.15)
    assert found.level == pytest.approx(-20, abs=1)


def test_a_pause_within_speech() -> None:
    sound = np.concatenate([voice(), np.zeros(3 * RATE), voice()])
    found = measured(sound + noise(len(sound), 1e-4))
    assert found.longest_pause == pytest.approx(3.1, abs=0.15)  # the voice fades for 0.1 s
    assert measured(voice()).longest_pause == 0.1


def test_a_click_before_speech_is_silence() -> None:
    sound = np.concatenate([np.zeros(2 * RATE), voice()])
    sound[RATE : RATE + 200] = 0.9
    assert measured(sound).leading_silence == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("snr", [30, 20, 10])
def test_noise_under_speech(snr: int) -> None:
    found = measured(voice() + noise(3 * RATE, 0.1 * 10 ** (-snr / 20)))
    assert found.snr == pytest.approx(snr, abs=2.5)
    assert found.noise_floor == pytest.approx(-20 - snr, abs=2)


def test_noise_alone_has_no_speech_above_it() -> None:
    assert measured(noise(RATE, 0.1)).snr < 0


def test_level_and_peak_ignore_an_offset() -> None:
    plain, shifted = measured(voice()), measured(voice() + np.float32(0.25))
    assert shifted.level == plain.level
    assert (plain.dc, shifted.dc) == (pytest.approx(0, abs=0.002), pytest.approx(0.25, abs=0.002))
    assert measured(0.5 * voice()).peak == pytest.approx(plain.peak - 6, abs=0.1)


@pytest.mark.parametrize("gain", [1.0, 0.4])
def test_clipping_is_found_at_any_level(gain: float) -> None:
    cut = np.clip(speech(2.0) * 10, -1, 1)
    share = float((np.abs(cut) == 1).mean())
    found = measured(np.round(gain * cut * 32767) / 32768)
    assert found.clipped == pytest.approx(share, rel=0.2)
    assert share > 0.01


@pytest.mark.parametrize("levels", [32768, 128])
def test_what_is_not_clipped_is_not_called_so(levels: int) -> None:
    tone = 0.3 * np.sin(2 * np.pi * 150 * np.arange(RATE) / RATE)
    for sound in (tone, speech(2.0)):
        assert measured(np.round(sound * levels) / levels).clipped == 0
    assert measured(np.zeros(RATE)).clipped == 0


@pytest.mark.parametrize("rate", [8_000, 12_000])
def test_bandwidth_is_that_of_the_narrowest_step(rate: int) -> None:
    wide = voice(rate=24_000)
    narrow = resample(resample(wide, 24_000, rate), rate, 24_000)
    assert measured(wide, rate=24_000).bandwidth == pytest.approx(12_000, abs=200)
    assert measured(narrow, rate=24_000).bandwidth == pytest.approx(rate / 2, rel=0.07)


@pytest.mark.parametrize(
    ("channels", "silent", "loss"),
    [
        ([voice()], 0, 0.0),
        ([voice(), voice()], 0, 0.0),
        ([voice(), 0 * voice()], 1, 6.0),
        ([voice(), voice() / 100], 1, 5.9),
        ([voice(), noise(3 * RATE, 0.1)], 0, 3.5),
        ([voice(), -0.9 * voice()], 0, 26.0),
    ],
)
def test_channels(channels: list[np.ndarray], silent: int, loss: float) -> None:
    found = measured(*channels)
    assert (found.channels, found.silent_channels) == (len(channels), silent)
    assert found.mix_loss == pytest.approx(loss, abs=0.6)


@pytest.mark.parametrize("samples", [1, 100, 5120])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_any_waveform_has_measures(samples: int, value: float) -> None:
    found = measured(np.full(samples, value))
    assert all(np.isfinite(item) for item in vars(found).values())
    assert found.level == -100


def test_blocks_are_measured_as_one() -> None:
    sound = voice()[:, None]
    kept = Kept(3.0)
    for first in range(0, len(sound), 999):
        kept.add(sound[first : first + 999], RATE)
    assert kept.measures() == measure(sound, RATE)


@pytest.mark.parametrize("blocks", [[], [voice(2.0), voice(1.1), voice(0.1)], [np.array([0.0, np.inf])]])
def test_what_cannot_be_measured_has_none(blocks: list[Any]) -> None:
    kept = Kept(3.0)
    for block in blocks:
        kept.add(block[:, None], RATE)
    assert kept.measures() is None
