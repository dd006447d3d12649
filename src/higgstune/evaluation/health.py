"""Whether a clip stops as speech does: its length, its silences, the frame cap. All from the waveform."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from higgstune.generate.chunks import expected_seconds, frame_cap

SHORT_SECONDS = 0.3  # nothing worth saying is shorter
FRAME_RATE = 25  # codec frames per second, in which the cap is counted
HOP_SECONDS = 0.01  # of levels
BELOW_LOUD = 35.0  # dB: as far below a clip's loud parts silence begins
QUIETEST_SOUND = -60.0  # dBFS: a clip whose loud parts are below has no sound
_LOUD_HOPS = 10  # the loudest 0.1 s are the loud parts: a click is shorter
_SOUND_HOPS = 3  # a sound of less than 0.03 s does not end a silence


@dataclass(frozen=True)
class Health:
    """Lengths in seconds."""

    seconds: float
    hit_cap: bool
    short: bool
    silence: float  # the longest between the first and the last sound; of a clip without sound, all of it
    leading_silence: float
    trailing_silence: float
    expected_seconds: float | None  # None: its text has nothing to say
    duration_ratio: float | None


def examine(
    waveform: np.ndarray, rate: int, text: str, *, hit_cap: bool | None = None, expected: float | None = None
) -> Health:
    """The health of a clip [samples] at `rate` Hz that should say `text`.

    `hit_cap` where it is known, else a clip that is as long as the cap of its text has hit it. `expected` is its
    expected length in seconds where more is known than the text.
    """
    seconds = len(waveform) / rate
    inner, leading, trailing = silences(waveform, rate)
    if hit_cap is None:
        hit_cap = seconds >= frame_cap(text, FRAME_RATE) / FRAME_RATE
    expected = (expected_seconds(text) if expected is None else expected) or None
    ratio = None if expected is None else seconds / expected
    return Health(seconds, hit_cap, seconds < SHORT_SECONDS, inner, leading, trailing, expected, ratio)


def silences(waveform: np.ndarray, rate: int) -> tuple[float, float, float]:
    """Seconds of silence: the longest between the first and the last sound, before, and behind them."""
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
    if loud < QUIETEST_SOUND:
        return np.zeros(len(level), dtype=bool)
    sound = level > loud - BELOW_LOUD
    edges = np.flatnonzero(np.diff(np.pad(sound, 1).astype(np.int8)))
    for start, end in edges.reshape(-1, 2):
        if end - start < _SOUND_HOPS:
            sound[start:end] = False
    return sound


def levels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Root mean square of each 10 ms: [hops], dB of full scale; a last part that is shorter is left out."""
    hop = round(HOP_SECONDS * rate)
    power = np.square(waveform[: len(waveform) // hop * hop].astype(np.float64)).reshape(-1, hop).mean(axis=1)
    return 10 * np.log10(np.maximum(power, 1e-12))


def pace(spoken: Iterable[tuple[float, str]]) -> float | None:
    """How slowly a speaker speaks, from recordings (seconds, text): their length over what is expected of anyone."""
    pairs = [(seconds, expected_seconds(text)) for seconds, text in spoken]
    expected = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / expected if expected else None
