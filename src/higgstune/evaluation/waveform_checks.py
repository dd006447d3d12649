"""Faults that show in a clip's waveform alone: wrong length, silences, the frame cap, and loops.

A loop is the same stretch of sound several times in a row. It is found in the mel spectrum, by comparing the spectrum
with itself, shifted by each possible period.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from higgstune.codec.mel import Spectrum
from higgstune.data.audio import resample
from higgstune.generate.chunks import FAR_OFF, expected_seconds, frame_cap

# Length and silences
SHORT_SECONDS = 0.3  # nothing worth saying is shorter
FRAME_RATE = 25  # codec frames per second, in which the cap is counted
HOP_SECONDS = 0.01  # of levels
BELOW_LOUD = 35.0  # dB: silence begins this far below a clip's loud parts
MIN_LOUDNESS = -60.0  # dBFS: a clip whose loud parts are below has no sound
_LOUD_HOPS = 10  # the loudest 0.1 s are the loud parts: a click is shorter
_SOUND_HOPS = 3  # a sound of less than 0.03 s does not end a silence

# Loops
RATE = 16_000  # Hz
MIN_PERIOD, MAX_PERIOD = 0.04, 2.0  # seconds
MIN_LOOP = 0.24  # seconds in all: a creaky voice repeats shorter stretches
REPEATS = 3
MAX_DIFFERENCE = 0.35  # of repeats, relative to the movement within them; real speech stays above 0.44
MIN_MOVEMENT = 1.5  # dB, mean over bands of the standard deviation in time
_RANGE = 45.0  # dB below the loudest value of the clip's spectrum; anything lower is treated as noise
_SPECTRUM = Spectrum(RATE, n_fft=400, hop=80, num_mels=32, max_hz=6000)
_HOPS = RATE // _SPECTRUM.hop  # per second
_EDGE = 6  # hops at the joints, where one window covers two pieces


@dataclass(frozen=True)
class Health:
    """Length and silences of a clip, in seconds."""

    seconds: float
    hit_cap: bool
    short: bool  # under 0.3 s, or under a third of what is expected
    silence: float  # the longest between the first and the last sound; for a clip without sound, all of it
    leading_silence: float
    trailing_silence: float
    expected_seconds: float | None  # None: the text has no words
    duration_ratio: float | None


@dataclass(frozen=True)
class Loop:
    """The clearest loop of a clip, in seconds."""

    start: float
    period: float
    difference: float  # between repeats, relative to the movement within them: 0 for exact repeats


def examine(
    waveform: np.ndarray, rate: int, text: str, *, hit_cap: bool | None = None, expected: float | None = None
) -> Health:
    """The health of a clip [samples] at `rate` Hz that should say `text`.

    Without `hit_cap`, a clip that is as long as the frame cap of its text has hit it. `expected` is the expected length
    in seconds, if more is known than the text.
    """
    seconds = len(waveform) / rate
    inner, leading, trailing = silences(waveform, rate)
    if hit_cap is None:
        hit_cap = seconds >= frame_cap(text, FRAME_RATE) / FRAME_RATE
    expected = (expected_seconds(text) if expected is None else expected) or None
    ratio = None if expected is None else seconds / expected
    short = seconds < max(SHORT_SECONDS, (expected or 0.0) / FAR_OFF)
    return Health(seconds, hit_cap, short, inner, leading, trailing, expected, ratio)


def silences(waveform: np.ndarray, rate: int) -> tuple[float, float, float]:
    """Seconds of silence: the longest between the first and the last sound; before the first; after the last."""
    sounding = np.flatnonzero(sounds(waveform, rate))
    seconds = len(waveform) / rate
    if not len(sounding):
        return seconds, seconds, seconds
    gaps = np.diff(sounding) - 1
    inner = float(gaps.max(initial=0)) * HOP_SECONDS
    return inner, float(sounding[0]) * HOP_SECONDS, max(0.0, seconds - (float(sounding[-1]) + 1) * HOP_SECONDS)


def sounds(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Which hops of 10 ms have sound: [hops] bool. Relative to the clip's own loud parts."""
    level = levels(waveform, rate)
    loud = np.sort(level)[-min(_LOUD_HOPS, len(level)) :].min(initial=0.0) if len(level) else -np.inf
    if loud < MIN_LOUDNESS:
        return np.zeros(len(level), dtype=bool)
    sound = level > loud - BELOW_LOUD
    edges = np.flatnonzero(np.diff(np.pad(sound, 1).astype(np.int8)))
    for start, end in edges.reshape(-1, 2):
        if end - start < _SOUND_HOPS:
            sound[start:end] = False
    return sound


def levels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Root mean square of every 10 ms: [hops], dB of full scale; an incomplete last hop is left out."""
    hop = round(HOP_SECONDS * rate)
    power = np.square(waveform[: len(waveform) // hop * hop].astype(np.float64)).reshape(-1, hop).mean(axis=1)
    return 10 * np.log10(np.maximum(power, 1e-12))


def pace(spoken: Iterable[tuple[float, str]]) -> float | None:
    """How slowly a speaker speaks, from recordings (seconds, text): their length over the generally expected one."""
    pairs = [(seconds, expected_seconds(text)) for seconds, text in spoken]
    expected = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / expected if expected else None


def find_loop(waveform: np.ndarray, rate: int) -> Loop | None:
    """The clearest loop of a clip [samples] at `rate` Hz, or None."""
    mel = _decibels(resample(waveform, rate, RATE))
    sums, squares = _running_sums(mel), _running_sums(np.square(mel).mean(axis=1))
    lags = range(round(MIN_PERIOD * _HOPS), min(round(MAX_PERIOD * _HOPS), len(mel) // REPEATS) + 1)
    found = [loop for lag in lags if (loop := _at_lag(mel, sums, squares, lag)) is not None]
    return min(found, key=lambda loop: loop.difference, default=None)


def _decibels(waveform: np.ndarray) -> np.ndarray:
    """[samples] at 16 kHz -> [hops, bands] float32: dB above a floor that is `_RANGE` below the loudest value."""
    mel = _SPECTRUM.mel(waveform[: len(waveform) // _SPECTRUM.hop * _SPECTRUM.hop])
    loudest = float(mel.max(initial=0.0))
    if loudest <= 0:
        return np.zeros_like(mel)
    return np.maximum(20 * np.log10(np.maximum(mel / loudest, 1e-9)) + _RANGE, 0).astype(np.float32)


def _at_lag(mel: np.ndarray, sums: np.ndarray, squares: np.ndarray, lag: int) -> Loop | None:
    """The clearest loop whose period is `lag` hops, of mel [hops, bands] and its running sums."""
    window = max(REPEATS * lag, round(MIN_LOOP * _HOPS)) - _EDGE
    starts = len(mel) - window + 1
    if starts < 1:
        return None
    apart = _running_sums(np.square(mel[lag:] - mel[:-lag]).mean(axis=1))
    difference = _window_means(apart, window - lag)[:starts] / 2  # half: so it is the variance where nothing repeats
    movement = _window_means(squares, window) - np.square(_window_means(sums, window)).mean(axis=1)
    moving = movement >= MIN_MOVEMENT**2
    relative = np.sqrt(np.divide(difference.clip(0), movement, out=np.full(starts, np.inf), where=moving))
    best = int(relative.argmin())
    if relative[best] > MAX_DIFFERENCE:
        return None
    return Loop(best / _HOPS, lag / _HOPS, float(relative[best]))


def _running_sums(values: np.ndarray) -> np.ndarray:
    """[rows, ...] -> [rows + 1, ...], from zero."""
    return np.concatenate([np.zeros_like(values[:1]), values]).cumsum(axis=0, dtype=np.float64)


def _window_means(sums: np.ndarray, length: int) -> np.ndarray:
    """Means over every `length` successive rows, from their running sums."""
    return (sums[length:] - sums[:-length]) / length
