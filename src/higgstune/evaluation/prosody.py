"""Pitch and loudness of a clip against a speaker's recordings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from higgstune.data.audio import resample
from higgstune.evaluation.waveform_checks import HOP_SECONDS, levels, sounds

PITCH_JUDGE = "higgstune YIN 1"  # raise it when a result changes
MIN_PITCH, MAX_PITCH = 60.0, 500.0  # Hz
RATE = 16_000  # Hz
MAX_APERIODICITY = 0.2  # of a voiced frame
MIN_VOICED = 0.2  # seconds of voiced sound that a pitch needs
OUTLIER = 12.0  # semitones from the clip's median: an octave error
_WINDOW = 640  # samples, 40 ms: at least two periods
_CHUNK = 500  # hops, 5 s, so that memory does not grow with the recording
_MIN_LAG, _MAX_LAG = int(RATE / MAX_PITCH), int(RATE / MIN_PITCH)  # samples


@dataclass(frozen=True)
class Prosody:
    """The prosody of one recording."""

    pitch: float  # median of voiced frames, semitones above 1 Hz
    pitch_spread: float  # standard deviation over voiced frames, semitones
    energy_spread: float  # standard deviation of the level of hops with sound, dB


def prosody(waveform: np.ndarray, rate: int) -> Prosody | None:
    """Pitch and loudness of a recording [samples]; None if it has less than 0.2 s of voiced sound."""
    level = levels(waveform, rate)[sounds(waveform, rate)]
    hertz = fundamental(waveform, rate)
    voiced = 12 * np.log2(hertz[hertz > 0])
    if len(voiced) * HOP_SECONDS < MIN_VOICED:
        return None
    near = voiced[np.abs(voiced - np.median(voiced)) < OUTLIER]
    return Prosody(float(np.median(near)), float(near.std()), float(level.std()))


def average(recordings: Sequence[Prosody]) -> Prosody:
    """A speaker's usual prosody: the mean of each number over recordings."""
    return Prosody(
        *(float(np.mean([getattr(one, name) for one in recordings])) for name in Prosody.__dataclass_fields__)
    )


def against(clip: Prosody, speaker: Prosody) -> dict[str, float]:
    """Columns of a clip's row: pitch in semitones above the speaker's, and spreads divided by the speaker's."""
    found = {"f0_shift": clip.pitch - speaker.pitch}
    if speaker.pitch_spread > 0:
        found["f0_spread"] = clip.pitch_spread / speaker.pitch_spread
    if speaker.energy_spread > 0:
        found["energy_spread"] = clip.energy_spread / speaker.energy_spread
    return found


def fundamental(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Fundamental frequency every 10 ms: [hops], Hz, 0 where there is no voice.

    YIN (de Cheveigné and Kawahara 2002): the first dip of the cumulative mean normalised difference below
    `MAX_APERIODICITY`, refined by a parabola. Silent hops are unvoiced, and so is a single voiced hop
    between unvoiced ones.
    """
    sound = sounds(waveform, rate)
    frames = _frames(resample(waveform, rate, RATE), len(sound))
    hertz = np.zeros(len(sound))
    hops = np.flatnonzero(sound)
    for first in range(0, len(hops), _CHUNK):
        some = hops[first : first + _CHUNK]
        hertz[some] = _yin(frames[some])
    voiced = np.pad(hertz > 0, 1)
    hertz[~(voiced[:-2] | voiced[2:])] = 0
    return hertz


def _frames(waveform: np.ndarray, count: int) -> np.ndarray:
    """[samples] -> [count, window + longest lag], each centred on its hop."""
    length, hop = _WINDOW + _MAX_LAG, round(HOP_SECONDS * RATE)
    before = (length - hop) // 2
    padded = np.pad(waveform, (before, length + hop))
    if len(padded) < (count - 1) * hop + length:
        padded = np.pad(padded, (0, (count - 1) * hop + length - len(padded)))
    return np.lib.stride_tricks.sliding_window_view(padded, length)[::hop][:count]


def _yin(frames: np.ndarray) -> np.ndarray:
    """[frames, window + longest lag] -> Hz, or 0."""
    normal = _normalised_difference(frames)
    inside = normal[:, _MIN_LAG:_MAX_LAG]
    dips = (inside < MAX_APERIODICITY) & (inside <= normal[:, _MIN_LAG - 1 : _MAX_LAG - 1]) & (
        inside < normal[:, _MIN_LAG + 1 : _MAX_LAG + 1])  # fmt: skip
    lag = dips.argmax(axis=1) + _MIN_LAG
    rows = np.arange(len(frames))
    before, at, after = (normal[rows, lag + step] for step in (-1, 0, 1))
    bend = before - 2 * at + after
    shift = np.divide(before - after, 2 * bend, out=np.zeros(len(frames)), where=bend > 0)
    return np.where(dips.any(axis=1), RATE / (lag + shift), 0.0)


def _normalised_difference(frames: np.ndarray) -> np.ndarray:
    """YIN's d'(lag): [frames, lags 0 .. longest]."""
    from scipy import fft  # slow to import

    frames = frames.astype(np.float64)
    size = fft.next_fast_len(frames.shape[1] + _WINDOW, real=True)
    spectrum = fft.rfft(frames, size) * fft.rfft(frames[:, :_WINDOW], size).conj()
    together = fft.irfft(spectrum, size)[:, : _MAX_LAG + 1]
    energy = np.cumsum(np.pad(np.square(frames), ((0, 0), (1, 0))), axis=1)
    power = energy[:, _WINDOW : _WINDOW + _MAX_LAG + 1] - energy[:, : _MAX_LAG + 1]
    difference = np.maximum(power[:, :1] + power - 2 * together, 0)
    total = np.cumsum(difference[:, 1:], axis=1)
    lags = np.arange(1, _MAX_LAG + 1)
    rest = np.divide(difference[:, 1:] * lags, total, out=np.ones_like(total), where=total > 1e-12)
    return np.concatenate([np.ones((len(frames), 1)), rest], axis=1)
