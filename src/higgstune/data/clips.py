"""Clips: recordings and parts of them, read, checked and hashed."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from higgstune.data.audio import (
    MAX_SECONDS,
    Recording,
    audio_hash,
    is_file,
    peak_of,
    read_audio,
    read_recording,
)
from higgstune.data.rejection import RowError

MIN_FRAMES = 8
SILENCE_PEAK = 10 ** (-60 / 20)  # -60 dBFS
_MAX_PEAK = 4.0  # a lossy codec overshoots a little; 16-bit integers stored as floats do not
_ROUNDING = 1e-6
_END_TOLERANCE = 0.04  # seconds: manifests round, and a frame is as long


@dataclass(frozen=True)
class Limits:
    """What a clip must keep to."""

    frame_rate: float  # frames per second of the codec
    max_seconds: float
    allow_long: bool = False

    def check_length(self, seconds: float) -> None:
        """Raise RowError for a clip that is too short or too long."""
        frames = seconds * self.frame_rate
        if frames < MIN_FRAMES - _ROUNDING:
            raise RowError("too_short", f"{seconds:.2f} s are {int(frames)} frames, fewer than {MIN_FRAMES}")
        limit = MAX_SECONDS if self.allow_long else min(self.max_seconds, MAX_SECONDS)
        if seconds > limit + _ROUNDING:
            raise RowError("too_long", f"{seconds:.1f} s are over {limit:g} s: cut it, or allow long clips")


@dataclass(frozen=True)
class Segment:
    """Which part of a file, in seconds; all of it by default."""

    start: float | None = None
    end: float | None = None
    clamp: bool = False  # whether an end behind the file's own means the file's own

    def within(self, recording: Recording) -> "Segment":
        """With an end only where the file goes on. Raises RowError for a part that is not inside of it."""
        start, whole = self.start or 0.0, recording.seconds
        is_late = self.end is not None and self.end > whole + _END_TOLERANCE and not self.clamp
        if start >= whole or is_late:
            shown = "its end" if self.end is None else f"{self.end:g} s"
            raise RowError("segment_outside", f"{start:g} s to {shown} is not inside of its {whole:.2f} s")
        return Segment(self.start, None if self.end is not None and self.end >= whole else self.end)


@dataclass(frozen=True)
class Clip:
    """A file, or a part of it, that has been read and found usable."""

    path: Path
    segment: Segment
    sha256: str  # of the decoded part
    seconds: float
    recording: Recording  # the whole file

    def read(self) -> tuple[np.ndarray, int]:
        """The waveform [samples] float32 and its rate in Hz. Raises RowError where the file has changed."""
        waveform, rate = read_audio(self.path, self.segment.start, self.segment.end)
        if audio_hash(waveform, rate) != self.sha256:
            raise RowError("unreadable_audio", f"{self.path} changed while it was prepared: run it again")
        return waveform, rate

    def overlaps(self, other: "Clip") -> bool:
        """Whether there is any audio that both have."""
        if self.recording.sha256 != other.recording.sha256:
            return self.sha256 == other.sha256
        starts = max(self.segment.start or 0.0, other.segment.start or 0.0)
        return starts < min(self.segment.end or math.inf, other.segment.end or math.inf)


class ClipReader:
    """Reads clips; a recording that many of them are cut from is decoded once as a whole."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._recordings: dict[str, Recording | RowError] = {}

    def read(self, path: Path, segment: Segment) -> Clip:
        """A clip that is fit to be encoded. Raises RowError saying why a file or a part of it is not."""
        recording = self._recording(path)
        if segment.start is None and segment.end is None:
            sha256, seconds, peak = recording.sha256, recording.seconds, recording.peak
        else:
            segment = segment.within(recording)
            end = recording.seconds if segment.end is None else segment.end
            self._limits.check_length(end - (segment.start or 0.0))
            waveform, rate = read_audio(path, segment.start, segment.end)
            sha256, seconds, peak = audio_hash(waveform, rate), len(waveform) / rate, peak_of(waveform)
        self._limits.check_length(seconds)
        _check_peak(peak)
        return Clip(path, segment, sha256, seconds, recording)

    def _recording(self, path: Path) -> Recording:
        if not is_file(path):
            raise RowError("missing_audio", f"there is no file {path}")
        key = os.path.realpath(path)
        if key not in self._recordings:
            try:
                self._recordings[key] = read_recording(path)
            except RowError as error:
                self._recordings[key] = error
        known = self._recordings[key]
        if isinstance(known, RowError):
            raise RowError(known.reason, str(known))
        return known


def _check_peak(peak: float) -> None:
    if math.isnan(peak):
        raise RowError("not_finite", "a sample is infinite or not a number")
    if peak > _MAX_PEAK:
        raise RowError("out_of_range", f"the peak is {peak:g}: float samples must be within -1 and 1")
    if peak < SILENCE_PEAK:
        raise RowError("silent", f"the peak is {peak:.2g}, below -60 dBFS: there is nothing to hear")
