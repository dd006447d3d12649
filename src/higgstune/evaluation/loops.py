"""Stuck repeats: the same piece of sound three times or more in a row, as a model that hangs makes them.

For each lag, the mel spectrum is compared with itself that much later. In a loop of that period the two are the same
for two periods (three repeats), while the spectrum itself moves. A held vowel or a silence is the same at any lag, but
does not move; a word said twice is alike for one period only, and a person never says it three times the same.
"""

from dataclasses import dataclass

import numpy as np

from higgstune.codec.spectrum import Spectrum
from higgstune.data.audio import resample

RATE = 16_000  # Hz
SHORTEST_PERIOD = 0.04  # seconds
LONGEST_PERIOD = 2.0
SHORTEST_LOOP = 0.24  # seconds in all: a creaking voice repeats shorter ones
REPEATS = 3
MOST_DIFFERENT = 0.35  # of repeats, relative to how much the sound moves within them; real speech stays above 0.44
LEAST_MOVEMENT = 1.5  # dB, mean over bands of the standard deviation in time
_RANGE = 45.0  # dB below the clip's loudest cell are heard; what is below is noise
_SPECTRUM = Spectrum(RATE, n_fft=400, hop=80, num_mels=32, max_hz=6000)
_HOPS = RATE // _SPECTRUM.hop  # a second
_EDGE = 6  # hops at the joints, where one window hears two pieces


@dataclass(frozen=True)
class Loop:
    """The clearest loop of a clip, in seconds."""

    start: float
    period: float
    difference: float  # of repeats, relative to the movement within: 0 is the very same


def find_loop(waveform: np.ndarray, rate: int) -> Loop | None:
    """The clearest loop of a clip [samples] at `rate` Hz, or None."""
    mel = _decibels(resample(waveform, rate, RATE))
    sums, squares = _running_sums(mel), _running_sums(np.square(mel).mean(axis=1))
    lags = range(round(SHORTEST_PERIOD * _HOPS), min(round(LONGEST_PERIOD * _HOPS), len(mel) // REPEATS) + 1)
    found = [loop for lag in lags if (loop := _at_lag(mel, sums, squares, lag)) is not None]
    return min(found, key=lambda loop: loop.difference, default=None)


def _decibels(waveform: np.ndarray) -> np.ndarray:
    """[samples] at 16 kHz -> [hops, bands] float32: dB above what is cut off, `_RANGE` below the loudest cell."""
    mel = _SPECTRUM.mel(waveform[: len(waveform) // _SPECTRUM.hop * _SPECTRUM.hop])
    loudest = float(mel.max(initial=0.0))
    if loudest <= 0:
        return np.zeros_like(mel)
    return np.maximum(20 * np.log10(np.maximum(mel / loudest, 1e-9)) + _RANGE, 0).astype(np.float32)


def _at_lag(mel: np.ndarray, sums: np.ndarray, squares: np.ndarray, lag: int) -> Loop | None:
    """The clearest loop whose period is `lag` hops, of mel [hops, bands] and its running sums."""
    heard = max(REPEATS * lag, round(SHORTEST_LOOP * _HOPS)) - _EDGE
    starts = len(mel) - heard + 1
    if starts < 1:
        return None
    apart = _running_sums(np.square(mel[lag:] - mel[:-lag]).mean(axis=1))
    difference = _window_means(apart, heard - lag)[:starts] / 2  # half: so it is the variance where nothing repeats
    movement = _window_means(squares, heard) - np.square(_window_means(sums, heard)).mean(axis=1)
    moving = movement >= LEAST_MOVEMENT**2
    relative = np.sqrt(np.divide(difference.clip(0), movement, out=np.full(starts, np.inf), where=moving))
    best = int(relative.argmin())
    if relative[best] > MOST_DIFFERENT:
        return None
    return Loop(best / _HOPS, lag / _HOPS, float(relative[best]))


def _running_sums(values: np.ndarray) -> np.ndarray:
    """[rows, ...] -> [rows + 1, ...], from zero."""
    return np.concatenate([np.zeros_like(values[:1]), values]).cumsum(axis=0, dtype=np.float64)


def _window_means(sums: np.ndarray, length: int) -> np.ndarray:
    """Means over every `length` successive rows, of their running sums."""
    return (sums[length:] - sums[:-length]) / length
