"""The measures of utterances: against sounds whose measures are known, and on recordings with known faults."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.signal import lfilter

from higgstune.data.audio import resample
from higgstune.raw.measure import HumMeter, UtteranceMeasures, gain, measure

RATE = 16_000
RAW = Path(__file__).parents[3] / "shared" / "raw"
SPEECH = [(0.3, 1.5), (1.9, 3.0)]  # in a sound of 3.3 s


def voice(rate: int = RATE, level: float = 0.1, seed: int = 0) -> np.ndarray:
    """Noise below 1 kHz that swells and fades in the spans of SPEECH, pauses of silence: [samples] float64."""
    time = np.arange(round(3.3 * rate)) / rate
    sound = lfilter([1.0], [1.0, -np.exp(-6000 / rate)], np.random.default_rng(seed).standard_normal(len(time)))
    spoken = sum((time >= start) & (time < end) for start, end in SPEECH)
    sound *= spoken * (1.2 + np.sin(2 * np.pi * 3 * time))
    return level * sound / np.sqrt(np.square(sound[spoken > 0]).mean())


def measured(sound: np.ndarray, rate: int = RATE, bits: int = 16, **keywords: Any) -> UtteranceMeasures:
    samples = np.round(sound * 2 ** (bits - 1)) / 2 ** (bits - 1)
    return measure(samples.astype(np.float32), rate, **({"speech": SPEECH, "lossless": True} | keywords))


def test_loudness_and_true_peak_of_a_sine() -> None:
    """EBU Tech 3341, cases 1 and 15: -23 dBFS in both channels is -23 LUFS, in one 3 less; peaks between samples."""
    time = np.arange(3 * 48_000) / 48_000
    found = measured(10 ** (-23 / 20) * np.sin(2 * np.pi * 1000 * time), 48_000, speech=[(0, 3)])
    assert found.loudness == pytest.approx(-26, abs=0.1)
    assert found.true_peak == pytest.approx(-23, abs=0.1)
    between = measured(0.5 * np.sin(2 * np.pi * 12_000 * time + np.pi / 4), 48_000, speech=[(0, 3)])
    assert between.true_peak == pytest.approx(-6, abs=0.3)  # its samples reach -9


def test_what_cannot_be_measured_is_none() -> None:
    short = measured(voice(), speech=[(0.4, 0.7)])
    assert short.loudness is None
    assert measured(voice()[4800:8000], speech=[(0, 0.2)]).snr is None
    smeared = measured(np.clip(voice(), -0.1, 0.1), lossless=False)
    assert (smeared.clipped, smeared.clipped_runs) == (None, None)
    silent = measured(np.zeros(RATE), speech=[(0.3, 0.8)])
    assert (silent.loudness, silent.true_peak, silent.clipped) == (None, -100, 0)


@pytest.mark.parametrize("speech", [[], [(-0.1, 1)], [(1, 2), (0, 0.5)], [(1, 1)], [(5, 6)]])
def test_spans_outside_of_the_sound_are_refused(speech: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="spans of speech"):
        measured(voice(), speech=speech)


@pytest.mark.parametrize("snr", [5, 10, 20, 30])
@pytest.mark.parametrize("color", [[1.0], [1.0, -0.98]], ids=["white", "red"])
def test_noise_is_measured_in_the_pauses(snr: float, color: list[float]) -> None:
    found = []
    for seed in range(5):
        noise = lfilter([1.0], color, np.random.default_rng(100 + seed).standard_normal(round(3.3 * RATE)))
        noise *= 0.1 * 10 ** (-snr / 20) / noise.std()
        found.append(measured(voice(seed=seed) + noise).snr)
    assert np.median(np.array(found, float)) == pytest.approx(snr, abs=1)


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("ceiling", [0.999, 0.3, 0.02])
@pytest.mark.parametrize("offset", [0.0, 0.01])
def test_clipping_is_found_at_any_level_and_beside_an_offset(rate: int, ceiling: float, offset: float) -> None:
    sound = voice(rate)
    limit = np.quantile(np.abs(sound[sound != 0]), 0.99)
    clipped = np.clip(sound, -limit, limit)
    found = measured(0.98 * ceiling * clipped / limit + offset * ceiling, rate)
    share = np.mean(np.abs(clipped[sound != 0]) == limit)
    assert found.clipped == pytest.approx(share, rel=0.1)
    assert found.clipped_runs is not None
    assert found.clipped_runs > 10


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("bits", [8, 16, 24])
@pytest.mark.parametrize("level", [0.1, 0.003])
def test_smooth_peaks_are_not_clipped(rate: int, bits: int, level: float) -> None:
    for seed in range(3):
        found = measured(resample(voice(level=level, seed=seed).astype(np.float32), RATE, rate), rate, bits)
        assert (found.clipped, found.clipped_runs) == (0, 0)


def test_a_second_limit_in_the_same_utterance_is_found() -> None:
    sound = np.clip(voice(), -0.2, 0.2)
    sound[round(1.7 * RATE) :] *= 0.4
    half = measured(sound, speech=SPEECH[:1]).clipped, measured(sound, speech=SPEECH[1:]).clipped
    both = measured(sound).clipped
    assert min(half) > 0.001
    assert min(half) < both < max(half)


def test_an_offset_is_measured_against_speech_and_changes_nothing_else() -> None:
    plain, shifted = measured(voice() + 1e-4), measured(voice() + 0.05)
    assert shifted.dc == pytest.approx(20 * np.log10(0.05 / 0.1), abs=0.3)
    assert plain.dc < -45
    assert (shifted.loudness, shifted.true_peak, shifted.snr) == pytest.approx(
        (plain.loudness, plain.true_peak, plain.snr), abs=0.11
    )


def test_the_gain_stops_at_the_ceiling() -> None:
    assert gain(-30, -12) == 7
    assert gain(-40, -12) == 11
    assert gain(-20, -0.5) == -3
    assert gain(-30, -12, target=-20, ceiling=-3) == 9


@pytest.mark.parametrize("mains", [49.9, 60.1])
def test_hum_of_the_mains(mains: float) -> None:
    time = np.arange(20 * RATE) / RATE
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(time))
    hum = sum(0.003 / k * np.sin(2 * np.pi * mains * k * time + k) for k in (1, 2, 3, 5))
    meters = [HumMeter(RATE) for _ in range(3)]
    for start in range(0, len(time), 7001):
        meters[0].add((noise + hum)[start : start + 7001].astype(np.float32))
        meters[1].add(noise[start : start + 7001].astype(np.float32))
    meters[2].add((noise + hum)[: 9 * RATE].astype(np.float32))
    found, clean, short = [meter.hum() for meter in meters]
    assert found is not None
    assert clean is not None
    assert (found.frequency, short) == (round(mains, -1), None)
    assert found.prominence > 15 > 8 > clean.prominence


def raw_recordings() -> list[tuple[dict[str, Any], np.ndarray]]:
    if not RAW.is_dir():
        pytest.skip("needs recordings with known truth at ../shared/raw")
    import soundfile

    found = []
    for path in sorted(RAW.glob("*.json")):
        truth = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(truth, dict):
            samples, _ = soundfile.read(RAW / truth["audio"], dtype="float32", always_2d=True)
            found.append((truth, samples.mean(axis=1)))
    return found


def utterances(truth: dict[str, Any], samples: np.ndarray) -> list[tuple[str, UtteranceMeasures]]:
    """Every utterance of a recording, with 0.3 s of its pauses, or up to its neighbours."""
    found, rate = [], truth["rate"]
    edges = [0.0, *(edge for row in truth["utterances"] for edge in (row["start"], row["end"])), truth["seconds"]]
    for index, row in enumerate(truth["utterances"]):
        start = max(row["start"] - 0.3, edges[2 * index])
        end = min(row["end"] + 0.3, edges[2 * index + 3])
        speech = [(first - start, last - start) for first, last in row["speech"]]
        cut = samples[round(start * rate) : round(end * rate)]
        found.append((row["id"], measure(cut, rate, speech, lossless=True)))
    return found


def test_faults_of_real_recordings_are_found_and_no_others() -> None:
    for truth, samples in raw_recordings():
        clipped = {event["id"] for event in truth["events"].get("clipped", [])}
        rows = utterances(truth, samples)
        assert {name for name, row in rows if row.clipped_runs} == clipped
        for event in truth["events"].get("clipped", []):
            share = dict(rows)[event["id"]].clipped
            assert share == pytest.approx(event["share_of_samples"], rel=0.5)
        meter = HumMeter(truth["rate"])
        meter.add(samples)
        hum = meter.hum()
        assert hum is not None
        assert (hum.prominence > 12) == ("hum" in truth["events"])
        offsets = np.median([row.dc for _, row in rows])
        assert (offsets > -20) == ("dc" in truth["events"])
