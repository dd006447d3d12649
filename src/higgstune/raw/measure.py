"""What an utterance of a recording sounds like: loudness, true peak, noise, clipping, offset; and a recording's hum.

Of the recording as it was decoded: before the offset is removed, and with the pauses around the utterance, in which the
noise is measured. A clip of a store has other measures: see `higgstune.data.measures`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from higgstune.errors import ConfigError

_QUIETEST = 1e-5  # -100 dBFS
_GUARD = 0.1  # seconds beside speech that belong to no pause: onsets, releases, reverberation
_NOISE_FRAME = 0.02  # seconds; longer ones leave too few in short pauses, shorter ones read pink noise 0.6 dB too low
_LEAST_PAUSE = 0.1  # seconds of pauses in all, guards left out; less says nothing about noise
_LOUDNESS_BLOCK = 0.4  # seconds, of ITU-R BS.1770
_OVERSAMPLED = 4  # of ITU-R BS.1770, annex 2
_NEAR_PEAK = 0.995  # of the peak of a span of speech
_FLAT = 1e-4  # of the peak: how far neighbours on a plateau may differ
_EDGE = 6  # times the resolution: how far a plateau's neighbours lie below it. A smooth peak falls by 4 at the most
_ROUNDING = 2e-7  # of float32 samples; less is not a step of the recording's format
_HUM_WINDOW = 2.0  # seconds: bins of 0.5 Hz
_LEAST_HUM_WINDOWS = 5  # in fewer, the pitch of a voice looks like hum
_MAINS = (50, 60)  # Hz
_HARMONICS = (1, 2, 3, 5)  # 4 is weak in most hum, and 200 and 240 Hz are pitches of voices
_DRIFT = 0.01  # share of its frequency by which the mains, or a tape, may be off
_BESIDE = 10.0  # Hz on either side, against which a line of hum stands out


@dataclass(frozen=True)
class UtteranceMeasures:
    """The measures of one utterance. Speech is the spans that sound; None is what could not be measured."""

    loudness: float | None  # LUFS of ITU-R BS.1770, from the first span to the last; None under 0.4 s and for silence
    true_peak: float  # dBTP, of all samples without their offset
    snr: float | None  # dB, speech above the pauses; None with too few of them
    clipped: float | None  # share of the samples in speech that lie on plateaus; None where they may be smeared
    clipped_runs: int | None  # plateaus of three samples and more
    dc: float  # dB, the offset against the speech


def measure(
    samples: np.ndarray, rate: int, speech: Sequence[tuple[float, float]], *, lossless: bool
) -> UtteranceMeasures:
    """The measures of one utterance.

    samples: [samples] float32 as decoded, all of them finite, in mono, at a rate in Hz: the utterance, and up to 0.3 s
    on either side that hold no other speech.
    speech: the spans that sound, in seconds within `samples`, in order; at least one.
    lossless: whether the recording is in a format that keeps samples as they were: lossy ones smear plateaus.

    Raises ConfigError without pyloudnorm, ValueError for spans that are not within the samples or in order.
    """
    spans = _to_samples(speech, rate, len(samples))
    sound = samples.astype(np.float64)
    offset = sound.mean()
    sound -= offset
    energies = [np.square(sound[start:end]).sum() for start, end in spans]
    voiced = sum(end - start for start, end in spans)
    power = float(sum(energies)) / voiced
    clipped, runs = _clipped([samples[start:end] for start, end in spans]) if lossless else (None, None)
    return UtteranceMeasures(
        loudness=_loudness(sound[spans[0][0] : spans[-1][1]], rate),
        true_peak=round(true_peak_of(sound, rate), 1),
        snr=_snr(sound, rate, spans, power),
        clipped=None if clipped is None else round(clipped / voiced, 6),
        clipped_runs=runs,
        dc=round(_decibels(abs(offset)) - _decibels(np.sqrt(power)), 1),
    )


def gain(loudness: float, true_peak: float, target: float = -23.0, ceiling: float = -1.0) -> float:
    """The gain in dB to a target in LUFS; less where the true peak, in dBTP, would pass the ceiling: no limiter."""
    return min(target - loudness, ceiling - true_peak)


@dataclass(frozen=True)
class Hum:
    """What the mains left in a recording."""

    frequency: int  # Hz: 50 or 60, whichever stands out more
    prominence: float  # dB, mean over harmonics 1, 2, 3 and 5, above what lies beside them


class HumMeter:
    """Takes a recording block by block. Keeps the spectrum below 310 Hz of every two seconds: 4 MB an hour."""

    def __init__(self, rate: int) -> None:
        """A meter of mono samples at a rate in Hz."""
        self._size = round(_HUM_WINDOW * rate)
        self._resolution = rate / self._size  # Hz a bin
        top = max(_MAINS) * max(_HARMONICS) * (1 + _DRIFT) + _BESIDE
        self._bins = int(top / self._resolution) + 1
        self._window = np.hanning(self._size).astype(np.float32)
        self._left = np.empty(0, np.float32)
        self._spectra: list[np.ndarray] = []

    def add(self, samples: np.ndarray) -> None:
        """Add the next samples, [samples] float32 of any number, all of them finite."""
        sound = np.concatenate([self._left, samples])
        whole = len(sound) // self._size * self._size
        for window in sound[:whole].reshape(-1, self._size):
            spectrum = np.abs(np.fft.rfft((window - window.mean()) * self._window)[: self._bins])
            self._spectra.append(spectrum.astype(np.float32))
        self._left = sound[whole:].copy()

    def hum(self) -> Hum | None:
        """The hum of what was added, by the median spectrum; None under ten seconds."""
        if len(self._spectra) < _LEAST_HUM_WINDOWS:
            return None
        spectrum = np.median(self._spectra, axis=0)
        levels = 20 * np.log10(np.maximum(spectrum / self._window.sum(), _QUIETEST / 100))
        found = {mains: self._prominence(levels, mains) for mains in _MAINS}
        strongest = max(found, key=found.__getitem__)
        return Hum(strongest, round(found[strongest], 1))

    def _prominence(self, levels: np.ndarray, mains: int) -> float:
        """The mean over harmonics of how far the highest bin near each lies above the median of those beside it."""
        found = []
        for harmonic in _HARMONICS:
            center, drift = mains * harmonic / self._resolution, _DRIFT * mains * harmonic / self._resolution
            width = 2 + drift  # bins: the main lobe of a Hann window
            first, last = round(center - width), round(center + width)
            beside = round(_BESIDE / self._resolution)
            around = np.concatenate([levels[first - beside : first], levels[last + 1 : last + 1 + beside]])
            found.append(levels[first : last + 1].max() - np.median(around))
        return float(np.mean(found))


def _to_samples(speech: Sequence[tuple[float, float]], rate: int, samples: int) -> list[tuple[int, int]]:
    """Spans in samples, none of them empty."""
    spans = [(round(start * rate), min(round(end * rate), samples)) for start, end in speech]
    edges = [edge for span in spans for edge in span]
    if not spans or spans[0][0] < 0 or edges != sorted(edges) or any(start == end for start, end in spans):
        raise ValueError(f"spans of speech must be in order and within {samples / rate:g} s: {list(speech)}")
    return spans


def _decibels(amplitude: float) -> float:
    return float(20 * np.log10(max(amplitude, _QUIETEST)))


@lru_cache(maxsize=8)
def _meter(rate: int) -> Any:
    try:
        import pyloudnorm  # imports scipy.signal
    except ModuleNotFoundError as error:
        raise ConfigError("loudness needs pyloudnorm: pip install 'higgstune[collect]'") from error
    return pyloudnorm.Meter(rate, block_size=_LOUDNESS_BLOCK)


def _loudness(sound: np.ndarray, rate: int) -> float | None:
    if len(sound) < _LOUDNESS_BLOCK * rate:
        return None
    loudness = float(_meter(rate).integrated_loudness(sound))
    return round(loudness, 1) if np.isfinite(loudness) else None  # all of it below the gate of -70


def true_peak_of(sound: np.ndarray, rate: int) -> float:
    """dBTP: of the sound at four times its rate, and of its own samples, which a resampler may fall short of."""
    import soxr

    dense = soxr.resample(sound.astype(np.float32), rate, _OVERSAMPLED * rate)
    return _decibels(float(max(np.abs(dense).max(initial=0), np.abs(sound).max())))


def _snr(sound: np.ndarray, rate: int, spans: list[tuple[int, int]], power: float) -> float | None:
    """The power of speech without the noise in it, above the median of pauses. It is limited to -10 dB."""
    guard, size = round(_GUARD * rate), round(_NOISE_FRAME * rate)
    ends, starts = [-guard, *(end for _, end in spans)], [*(start for start, _ in spans), len(sound) + guard]
    pauses = [sound[end + guard : max(start - guard, 0)] for end, start in zip(ends, starts, strict=True)]
    frames = [pause[: len(pause) // size * size].reshape(-1, size) for pause in pauses]
    powers = np.concatenate([np.square(frame).mean(axis=1) for frame in frames])
    if len(powers) * size < _LEAST_PAUSE * rate:
        return None
    noise = max(float(np.median(powers)), _QUIETEST**2)
    return round(float(10 * np.log10(max(power / noise - 1, 0.1))), 1)


def _clipped(spans: list[np.ndarray]) -> tuple[int, int]:
    """How many samples of spans are clipped, and how many plateaus have three samples and more.

    Both polarities of every span are searched, each with its own peak: an offset moves them apart, and an utterance
    may be clipped at one level here and at another there. A plateau of three proves that there is a limit; all that
    reaches a limit is clipped, then, also for one or two samples.
    """
    plateaus = [_plateaus(side) for span in spans for side in (span, -span)]
    limits = [(limit, tolerance) for number, limit, tolerance in plateaus if number]
    samples = 0
    for span in spans if limits else []:
        near = [np.abs(np.abs(span) - limit) <= tolerance for limit, tolerance in limits]
        samples += int(np.any(near, axis=0).sum())
    return samples, sum(number for number, _, _ in plateaus)


def _plateaus(side: np.ndarray) -> tuple[int, float, float]:
    """The number of plateaus near the maximum of some sound, their level, and how near to it clipped samples lie.

    On a plateau, three neighbours and more are equal, and those beside it lie clearly lower. At high rates, and in
    quiet or coarse recordings, the samples at a smooth peak are equal, too, but there the sound falls slowly: like a
    parabola, by four times the resolution beside three equal samples, by less beside more.
    """
    peak = float(side.max())
    near = np.flatnonzero(side >= _NEAR_PEAK * peak)
    flat = _FLAT * peak
    equal = (np.diff(near) == 1) & (np.abs(np.diff(side[near])) <= flat)
    turns = np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8))
    first, last = near[np.flatnonzero(turns == 1)], near[np.flatnonzero(turns == -1)]
    long = (last - first >= 2) & (first > 0) & (last < len(side) - 1)
    first, last = first[long], last[long]
    if peak <= 0 or not len(first):
        return 0, peak, flat
    steps = np.abs(np.diff(side))
    resolution = max(flat, float(steps[steps > _ROUNDING].min()))
    sharp = side[first] - (side[first - 1] + side[last + 1]) / 2 > _EDGE * resolution
    limit = float(np.median(side[first[sharp]])) if sharp.any() else peak
    return int(sharp.sum()), limit, 2 * flat
