"""What a clip sounds like, in a few numbers: silence, level, noise, clipping, bandwidth, channels.

They are columns of the store. Beyond a limit, a row is listed: see `outliers`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from higgstune.data.rejection import did_you_mean, shown
from higgstune.errors import ConfigError

_FRAME = 0.02  # seconds of sound with one level
_SMOOTHED = 5  # frames: a click is shorter than half of it
_LOUDEST = 10  # frames: the level of a clip's loudest 0.2 s is its top
_FLOOR = 0.05  # the quietest share of frames, which are pauses in any speech
_RANGE = 40.0  # dB below the top, where speech ends at the latest
_SPEECH_SHARE = 0.4  # of the way from floor to top: where speech begins
_SPECTRUM_FRAMES = 200  # of speech, spread over the clip: 4 s are enough for a spectrum
_SPECTRUM_RANGE = 60.0  # dB below the loudest frequency; what resamplers and lossy encoders leave lies deeper
_QUIETEST = 1e-5  # -100 dBFS
_FULL_SCALE = 0.9999  # 16-bit samples reach 0.99997
_NEAR_PEAK = 0.985  # of the peak
_LIMIT = re.compile(r"\s*(\w+)\s*([<>])\s*(-?(?:\d+\.?\d*|\.\d+|inf))\s*")
_SILENT_CHANNEL = 10 ** (-30 / 20)  # of the loudest channel


@dataclass(frozen=True)
class Measures:
    """The measures of one clip. dBFS: 0 is full scale. Speech is what rises above the clip's own pauses."""

    leading_silence: float  # seconds before the first speech
    trailing_silence: float  # seconds after the last
    level: float  # dBFS, root mean square of the speech in the mono mix
    peak: float  # dBFS, of the loudest channel
    clipped: float  # share of samples at full scale, or in a flat run at the clip's own peak
    dc: float  # offset of the channel with the largest, as a share of full scale
    noise_floor: float  # dBFS, level of the quietest twentieth
    snr: float  # dB, speech above the noise floor; -10 and more
    bandwidth: float  # Hz, the highest frequency in the speech
    channels: int
    silent_channels: int  # 30 dB and more below the loudest
    mix_loss: float  # dB, the mono mix below the loudest channel: 3 for two unlike ones, 6 for a silent one beside it
    longest_pause: float  # seconds within the speech


@dataclass(frozen=True)
class Limit:
    """A measure beyond this makes a row an outlier."""

    name: str  # of the measure
    sign: str  # < or >
    value: float
    unit: str
    reason: str

    def __str__(self) -> str:
        """As it is written on the command line, with its unit."""
        return f"{self.name} {self.sign} {self.value:g} {self.unit}".rstrip()

    def excess(self, value: float) -> float:
        """How far a value lies beyond; negative within the limit."""
        return value - self.value if self.sign == ">" else self.value - value


# The worst for training first. `pace` needs 20 rows of a language; without them `characters_per_second` counts.
LIMITS = (
    Limit("pace", ">", 1.75, "", "more text than speech: another clip's text, or a clip that is cut off"),
    Limit("pace", "<", 0.45, "", "less text than speech: words are missing, or the clip holds more than its sentence"),
    Limit("characters_per_second", ">", 30, "", "twice as fast as fast talkers"),
    Limit("characters_per_second", "<", 1.5, "", "slower than any reader"),
    Limit("leading_silence", ">", 1, "s", "the voice learns to wait before it speaks"),
    Limit("trailing_silence", ">", 1, "s", "the voice learns not to stop"),
    Limit("longest_pause", ">", 2, "s", "two sentences, or words that the text lacks: the voice learns to fall silent"),
    Limit("snr", "<", 15, "dB", "noise or music is learnt with the voice; steady sound without speech has under 0"),
    Limit("clipped", ">", 0.001, "", "the recorder was overdriven: the voice learns to crackle"),
    Limit("level", "<", -45, "dBFS", "20 dB and more below usual recordings"),
    Limit("dc", ">", 0.05, "", "an offset as large as the speech: remove it with a high-pass at 20 Hz"),
    Limit("bandwidth", "<", 6000, "Hz", "a telephone, or a low rate: the voice learns to sound muffled"),
    Limit("silent_channels", ">", 0, "", "the mean of the channels is weaker than the one with speech: keep that one"),
    Limit("mix_loss", ">", 7, "dB", "the channels partly cancel each other: keep one of them"),
)  # fmt: skip


def parse_limits(texts: Sequence[str]) -> tuple[Limit, ...]:
    """The default limits, changed by texts such as "leading_silence > 2"; `inf` and `-inf` switch one off.

    Raises ConfigError for a text that is not a limit, and for an unknown measure.
    """
    limits = {(limit.name, limit.sign): limit for limit in LIMITS}
    units = {"peak": "dBFS", "noise_floor": "dBFS"} | {limit.name: limit.unit for limit in LIMITS}
    names = ["pace", "characters_per_second", *(field.name for field in fields(Measures))]
    for text in texts:
        if not (match := _LIMIT.fullmatch(text)):
            raise ConfigError(f'the limit {shown(text)} is not a measure, < or >, and a number, such as "snr < 10"')
        name, sign, value = match[1], match[2], float(match[3])
        if name not in names:
            raise ConfigError(f"there is no measure {shown(name)}; {did_you_mean(name, names)}")
        known = limits.get((name, sign), Limit(name, sign, value, units.get(name, ""), ""))
        limits[name, sign] = Limit(name, sign, value, known.unit, known.reason)
    return tuple(limits.values())


def measure(samples: np.ndarray, rate: int) -> Measures:
    """The measures of a clip: [samples, channels] float32 as decoded, all of them finite, at a rate in Hz."""
    channels = samples.shape[1]
    mono = samples[:, 0] if channels == 1 else samples.mean(axis=1)
    size = min(round(_FRAME * rate), len(mono))
    frames = mono[: len(mono) // size * size].reshape(-1, size)
    levels = _decibels(frames.std(axis=1))  # the standard deviation, so that DC is not sound
    smooth = np.median(sliding_window_view(np.pad(levels, _SMOOTHED // 2, mode="edge"), _SMOOTHED), axis=1)
    top = np.sort(smooth)[-min(_LOUDEST, len(smooth))]
    floor = np.sort(levels)[int(_FLOOR * (len(levels) - 1))]
    speech = np.flatnonzero(smooth >= max(top - _RANGE, floor + _SPEECH_SHARE * (top - floor)))
    power = np.mean(10 ** (smooth[speech] / 10))
    spreads = samples.std(axis=0, dtype=np.float64)
    peak = float(max(samples.max(), -samples.min()))
    mix = spreads[0] if channels == 1 else mono.std(dtype=np.float64)
    return Measures(
        leading_silence=round(float(speech[0]) * _FRAME, 2),
        trailing_silence=round(float(len(smooth) - 1 - speech[-1]) * _FRAME, 2),
        level=round(float(10 * np.log10(power)), 1),
        peak=round(float(_decibels(peak)), 1),
        clipped=round(_clipped(samples, peak), 6),
        dc=round(float(np.abs(samples.mean(axis=0, dtype=np.float64)).max()), 5),
        noise_floor=round(float(floor), 1),
        snr=round(float(10 * np.log10(max(power / 10 ** (floor / 10) - 1, 0.1))), 1),
        bandwidth=float(_bandwidth(frames[speech[:: len(speech) // _SPECTRUM_FRAMES + 1]], rate)),
        channels=channels,
        silent_channels=int((spreads < _SILENT_CHANNEL * spreads.max()).sum()),
        mix_loss=round(float(_decibels(spreads.max()) - _decibels(mix)), 1),
        longest_pause=round(float(np.diff(speech, prepend=speech[0] - 1).max() - 1) * _FRAME, 2),
    )


class Kept:
    """The samples of a clip in all its channels, as they are decoded; none of one that is over `max_seconds` long."""

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._blocks: list[np.ndarray] = []
        self._samples = 0
        self.rate = 1  # Hz

    def add(self, block: np.ndarray, rate: int) -> None:
        """Add the next [samples, channels] at a rate in Hz."""
        self.rate = rate
        self._samples += len(block)
        if self._samples > self._max_seconds * rate:
            self._blocks.clear()
        else:
            self._blocks.append(block)

    @property
    def samples(self) -> np.ndarray | None:
        """What was added, [samples, channels] float32; None where that was nothing, or too long."""
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0] if self._blocks and len(self._blocks[0]) else None

    def measures(self) -> Measures | None:
        """The measures of what was added; None where that was nothing, too long, or not finite."""
        samples = self.samples
        return None if samples is None or not np.isfinite(samples).all() else measure(samples, self.rate)


def _decibels(amplitude: np.ndarray | float) -> np.ndarray:
    return np.asarray(20 * np.log10(np.maximum(amplitude, _QUIETEST)))


def _clipped(samples: np.ndarray, peak: float) -> float:
    """The share of samples at full scale, or in runs of three equal ones and more at the clip's own peak.

    The second kind is what is left of clipping once the gain is lowered. Coarse samples, as of 8 bits, are equal at
    every peak: where none lies just below it, only full scale counts.
    """
    high = np.flatnonzero((np.abs(samples) > _NEAR_PEAK * peak).any(axis=1))
    if not len(high):  # digital silence
        return 0.0
    near = samples[high]
    cut = np.abs(near) >= _FULL_SCALE
    if ((np.abs(near) < 0.998 * peak) & (np.abs(near) > _NEAR_PEAK * peak)).any():
        follows = (np.diff(high) == 1)[:, None]
        equal = (np.abs(np.diff(near, axis=0)) <= 1e-4 * peak) & (np.abs(near[1:]) > 0.99 * peak) & follows
        runs = equal[1:] & equal[:-1]
        for shift in range(3):
            cut[shift : shift + len(runs)] |= runs
    return float(cut.sum() / samples.size)


def _bandwidth(frames: np.ndarray, rate: int) -> float:
    """The highest frequency in Hz that one frame in twenty holds within 60 dB of the loudest one."""
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(frames.shape[1]).astype(np.float32), axis=1))
    usual = np.percentile(spectrum, 95, axis=0)
    if not usual.max() > 0:
        return 0.0
    return np.flatnonzero(usual >= usual.max() * 10 ** (-_SPECTRUM_RANGE / 20))[-1] * rate / frames.shape[1]
