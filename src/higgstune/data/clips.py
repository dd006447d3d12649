"""Checks a row of a source: its texts, and its clips, which are recordings or segments of them, read and hashed.

SourceRow -> Checker.check -> Candidate with its clips: target, reference, context
                           or a RowError with the reason
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from higgstune.data.audio import (
    MAX_SECONDS,
    Recording,
    audio_hash,
    mono,
    origin_of,
    peak_of,
    read_audio,
    read_recording,
)
from higgstune.data.importers.transcripts import plain_text
from higgstune.data.manifest import Utterance
from higgstune.data.measures import Kept, Measures
from higgstune.data.messages import Message, audio_parts, check_control_tokens, is_target, target_text
from higgstune.data.readings import FileState, Reading, Readings
from higgstune.data.rejection import RowError
from higgstune.data.rules import NORMALIZED, TextRules
from higgstune.data.source import SourceRow
from higgstune.data.text import is_speakable, spoken_length, without_tags

MIN_FRAMES = 8  # of a clip that is encoded
MAX_REFERENCE = 30.0  # seconds, as of a clip that is not allowed to be long
SILENCE_PEAK = 10 ** (-60 / 20)  # -60 dBFS
_MAX_PEAK = 4.0  # a lossy codec overshoots a little; 16-bit integers stored as floats do not
_MAX_RATE = 60.0  # characters a second: the fastest talkers reach half of it
_DC_LEVEL, _DC_DISTANCE = -70.0, 40.0  # sound below this many dBFS, and so far below the peak, is an offset's noise
_ROUNDING = 1e-6
_END_TOLERANCE = 0.04  # seconds, one frame: manifests round


@dataclass(frozen=True)
class Limits:
    """The limits of a clip's length."""

    frame_rate: float  # frames per second of the codec
    max_seconds: float
    allow_long: bool = False
    advice: str = "cut it, or allow long clips (--allow-long)"  # for one that is too long

    @property
    def longest(self) -> float:
        """Seconds of the longest clip."""
        return MAX_SECONDS if self.allow_long else min(self.max_seconds, MAX_SECONDS)

    def check_length(self, seconds: float) -> None:
        """Raise RowError for a clip that is too short or too long."""
        frames = seconds * self.frame_rate
        if frames < MIN_FRAMES - _ROUNDING:
            raise RowError("too_short", f"{seconds:.2f} s are {int(frames)} frames: a clip needs {MIN_FRAMES}")
        if seconds > self.longest + _ROUNDING:
            raise RowError("too_long", f"{seconds:.1f} s are over {self.longest:g} s: {self.advice}")


@dataclass(frozen=True)
class Segment:
    """A part of a file, in seconds; all of it by default."""

    start: float | None = None
    end: float | None = None
    clamp: bool = False  # whether an end behind the file's end stands for the file's end

    def within(self, recording: Recording) -> "Segment":
        """The segment, without an end where that is the file's. Raises RowError for a part outside of the file."""
        start, whole = self.start or 0.0, recording.seconds
        is_late = self.end is not None and self.end > whole + _END_TOLERANCE and not self.clamp
        if start >= whole or is_late:
            shown = "its end" if self.end is None else f"{self.end:g} s"
            raise RowError("segment_outside", f"{start:g} s to {shown} is outside of its {whole:.2f} s")
        return Segment(self.start, None if self.end is not None and self.end >= whole else self.end)


@dataclass(frozen=True)
class Clip:
    """A file, or a part of it, that is fit to be encoded."""

    path: Path
    segment: Segment
    sha256: str  # of the decoded part
    seconds: float
    recording: Recording  # the whole file
    measures: Measures

    def read(self) -> tuple[np.ndarray, int]:
        """The waveform [samples] float32 and its rate in Hz. Raises RowError where the file has changed."""
        waveform, rate = read_audio(self.path, self.segment.start, self.segment.end)
        if audio_hash(waveform, rate) != self.sha256:
            raise RowError("unreadable_audio", f"{self.path} changed during the preparation: run it again")
        return waveform, rate

    def overlaps(self, other: "Clip") -> bool:
        """Whether both share any audio."""
        if self.recording.sha256 != other.recording.sha256:
            return self.sha256 == other.sha256
        starts = max(self.segment.start or 0.0, other.segment.start or 0.0)
        return starts < min(self.segment.end or math.inf, other.segment.end or math.inf)


class ClipReader:
    """Reads clips; what is known already is not decoded again, and a recording with many segments once as a whole."""

    def __init__(self, limits: Limits, readings: Readings | None = None) -> None:
        """`readings` may be those of earlier runs."""
        self.decoded: dict[str, tuple[np.ndarray, int]] = {}  # waveform and rate of clips, by hash, until one clears it
        self.refused: dict[bytes, RowError] = {}  # files that cannot be decoded, by `FileState.key`
        self._limits = limits
        self._readings = readings or Readings()

    def read(self, path: Path, segment: Segment) -> Clip:
        """Read a clip. Raises RowError, with the reason, for one that is not fit to be encoded."""
        file = FileState.of(path)
        whole = segment.start is None and segment.end is None
        reading = self._whole(file, path, is_clip=whole)
        recording = reading.recording
        if not whole:
            segment = segment.within(recording)
            end = recording.seconds if segment.end is None else segment.end
            self._limits.check_length(end - (segment.start or 0.0))
            reading = self._part(file, path, segment)
        self._limits.check_length(reading.recording.seconds)
        measures = _check_sound(reading.recording.peak, reading.measures)
        return Clip(path, segment, reading.recording.sha256, reading.recording.seconds, recording, measures)

    def is_known(self, file: FileState, segment: Segment) -> bool:
        """Whether reading a clip of this file decodes nothing. Raises RowError for a part outside of the file."""
        reading = self._readings.find(file)
        if reading is None or (segment.start is None and segment.end is None):
            return reading is not None and not self._lacks_measures(reading)
        segment = segment.within(reading.recording)
        return self._readings.find(file, segment.start, segment.end) is not None

    def _whole(self, file: FileState, path: Path, *, is_clip: bool) -> Reading:
        """A whole recording; with its measures where it is a clip."""
        key = file.key(None, None)
        if (known := self.refused.get(key)) is not None:
            raise RowError(known.reason, str(known))
        reading = self._readings.find(file)
        if reading is not None and not (is_clip and self._lacks_measures(reading)):
            return reading
        kept = Kept(self._limits.longest + _ROUNDING) if is_clip else None
        try:
            recording = read_recording(path, None if kept is None else kept.add)
        except RowError as error:
            self.refused[key] = error
            raise
        return self._keep(file, path, Segment(), recording, kept)

    def _part(self, file: FileState, path: Path, segment: Segment) -> Reading:
        """A segment of a recording, which has its measures."""
        if (reading := self._readings.find(file, segment.start, segment.end)) is not None:
            return reading
        kept = Kept(self._limits.longest + _ROUNDING)
        waveform, rate = read_audio(path, segment.start, segment.end, observe=kept.add)
        recording = Recording(audio_hash(waveform, rate), len(waveform), rate, peak_of(waveform), ())
        return self._keep(file, path, segment, recording, kept)

    def _keep(self, file: FileState, path: Path, segment: Segment, recording: Recording, kept: Kept | None) -> Reading:
        reading = Reading(recording, None if kept is None else kept.measures())
        if kept is not None and (samples := kept.samples) is not None:
            self.decoded[recording.sha256] = mono(samples), kept.rate
        if FileState.of(path) == file:
            self._readings.add(file, segment.start, segment.end, reading)
        return reading

    def _lacks_measures(self, reading: Reading) -> bool:
        """Whether a recording was read only as a whole of segments, or under a limit that was lower."""
        recording = reading.recording
        fits = recording.seconds <= self._limits.longest + _ROUNDING
        return reading.measures is None and fits and math.isfinite(recording.peak)


def _check_sound(peak: float, measures: Measures | None) -> Measures:
    """The measures of a clip with this peak of the mono mix. Raises RowError where there is no speech in it."""
    if math.isnan(peak) or measures is None:
        raise RowError("not_finite", "a sample is infinite or not a number")
    if peak > _MAX_PEAK:
        raise RowError("out_of_range", f"the peak is {peak:g}: float samples must be within -1 and 1")
    if peak < SILENCE_PEAK:
        if measures.channels > 1 and 10 ** (measures.peak / 20) > SILENCE_PEAK:
            raise RowError(
                "channels_cancel",
                f"its {measures.channels} channels cancel each other: the loudest reaches {measures.peak:.1f} dBFS, "
                "their mean is silent; one has its polarity reversed: keep one of them, for example with "
                "ffmpeg -i IN.wav -af pan='mono|c0=c0' OUT.wav",
            )
        raise RowError("silent", f"the peak is {peak:.2g}, below -60 dBFS: the clip is silent")
    if measures.level < min(_DC_LEVEL, measures.peak - _DC_DISTANCE):
        raise RowError("silent", f"it holds a constant offset of {measures.dc:.2g} (DC) and no sound: record it again")
    return measures


def read_reference(
    path: str | Path, frame_rate: float, text: str = "", rules: TextRules = NORMALIZED
) -> tuple[np.ndarray, int]:
    """A recording to imitate, checked as `prepare` checks a clip -> (waveform [samples] float32 mono, rate in Hz).

    `frame_rate` is the codec's, in frames a second; `text` is the transcript, if there is one. Raises RowError, with
    the reason, for one that is not fit for it.
    """
    limits = Limits(frame_rate, MAX_REFERENCE, advice="cut it; five to ten clear seconds are a good length")
    try:
        reader = ClipReader(limits)
        waveform, rate = reader.decoded[reader.read(Path(path), Segment()).sha256]
        _check_rate(rules.normalized(text), len(waveform) / rate)
    except RowError as error:
        raise RowError(error.reason, f"the reference {path} cannot be used: {error}") from error
    return waveform, rate


@dataclass(frozen=True)
class Candidate:
    """A row that is fit for the store, as far as it can be judged without the other rows."""

    location: str
    utterance: Utterance
    text: str  # of the target, normalised
    target: Clip
    reference: Clip | None = None
    reference_text: str | None = None
    messages: list[Message] | None = None
    context: list[Clip] = field(default_factory=list)  # audio parts of a conversation before the target
    context_is_target: list[bool] = field(default_factory=list)  # for each, whether it is a target, too

    @property
    def clips(self) -> list[Clip]:
        """Everything that must be encoded for this row, the target first."""
        return [self.target, *([self.reference] if self.reference else []), *self.context]


class Checker:
    """Checks rows one after the other."""

    def __init__(
        self,
        limits: Limits,
        readings: Readings | None = None,
        rules: TextRules = NORMALIZED,
        shortest_reference: float = 0.0,
    ) -> None:
        """`shortest_reference` in seconds, as of a codec (`Codec.reference_seconds`)."""
        self.reader = ClipReader(limits, readings)
        self._rules = rules
        self._shortest_reference = shortest_reference

    def check(self, row: SourceRow) -> Candidate:
        """A row as a candidate; the waveforms that were decoded for it are in `reader.decoded`.

        Raises RowError, with the reason, for one that cannot be used.
        """
        self.reader.decoded.clear()
        if isinstance(row.content, RowError):
            raise row.content
        if row.content.messages is None:
            candidate = self._utterance(row, row.content)
        else:
            candidate = self._conversation(row, row.content, row.content.messages)
        for clip in candidate.clips:
            if (origin := origin_of(clip.path)) is not None:
                raise RowError(
                    "bad_row",
                    f"{clip.path} is speech that {origin.get('family')} has generated, whose licence "
                    f"({origin.get('licence')}) forbids to train other models on it: use recordings",
                )
        if any(candidate.target.overlaps(clip) for clip in candidate.clips[1:]):
            raise RowError(
                "reference_is_target", "the target's own audio is in its reference or context: the model would copy it"
            )
        return candidate

    def unknown_clips(self, row: SourceRow) -> tuple[list[tuple[Path, Segment]], int]:
        """The clips that `check` would decode for a row, and the bytes of the first one's file."""
        if isinstance(row.content, RowError):
            return [], 0
        utterance = row.content
        named = [(part["url"], _segment(part)) for part in audio_parts(utterance.messages or [])]
        if utterance.messages is None:
            named = [(utterance.audio or "", Segment(utterance.start, utterance.end))]
            named += [(name, Segment()) for name in [utterance.reference_audio] if name]
        unknown, sizes = [], [0]
        for name, segment in named:
            with suppress(RowError):  # `check` will say so
                path = row.path(name)
                file = FileState.of(path)
                if not self.reader.is_known(file, segment):
                    unknown.append((path, segment))
                    sizes.append(file.size)
        return unknown, sizes[:2][-1]

    def _utterance(self, row: SourceRow, utterance: Utterance) -> Candidate:
        text = spoken_text(utterance.text or "", "text", self._rules)
        check_control_tokens(utterance.scene or "", "scene")
        reference = reference_text = None
        if utterance.reference_text:
            reference_text = spoken_text(utterance.reference_text, "reference_text", self._rules)
        target = self.reader.read(row.path(utterance.audio or ""), Segment(utterance.start, utterance.end))
        _check_rate(text, target.seconds)
        if utterance.reference_audio:
            reference = self._part(row, "reference_audio", utterance.reference_audio, Segment())
            if reference.seconds < self._shortest_reference:
                raise RowError(
                    "too_short",
                    f"reference_audio has {reference.seconds:.2f} s: a reference needs {self._shortest_reference:g} s",
                )
        return Candidate(row.location, utterance, text, target, reference, reference_text)

    def _conversation(self, row: SourceRow, utterance: Utterance, messages: Sequence[Message]) -> Candidate:
        if not self._rules.conversations:
            raise RowError("bad_row", "the model takes no conversations: give audio, text and reference_audio")
        text = target_text(messages)
        if not is_speakable(text):
            raise RowError("empty_text", "the target has no text, neither its own nor the user's before it")
        clips = [
            self._part(row, f"audio part {number}", part["url"], _segment(part))
            for number, part in enumerate(audio_parts(messages))
        ]
        return Candidate(
            row.location,
            utterance,
            text,
            target=clips[-1],
            messages=_without_segments(messages),
            context=clips[:-1],
            context_is_target=is_target(messages, utterance.start_index)[:-1],
        )

    def _part(self, row: SourceRow, where: str, name: str, segment: Segment) -> Clip:
        """A clip that is not the row's `audio`: errors name its place."""
        try:
            return self.reader.read(row.path(name), segment)
        except RowError as error:
            raise RowError(error.reason, f"{where}: {error}") from error


def _check_rate(text: str, seconds: float) -> None:
    """Raise RowError for a text that nobody can say in this time."""
    if (rate := spoken_length(text) / seconds) > _MAX_RATE:
        raise RowError(
            "text_too_long",
            f"{spoken_length(text)} characters in {seconds:.2f} s are {rate:.0f} a second, over {_MAX_RATE:g}: nobody "
            "speaks so fast; the transcript belongs to another recording, or the recording is cut off",
        )


def spoken_text(text: str, where: str, rules: TextRules = NORMALIZED) -> str:
    """A text as it is spoken by a model with these rules. Raises RowError that names `where` for one that cannot be."""
    check_control_tokens(text, where, rules.tags)
    try:
        plain = plain_text(without_tags(text) if rules.tags else text)
        text = text if rules.verbatim else rules.normalized(plain)
    except RowError as error:
        raise RowError(error.reason, f"{where}: {error}") from error
    if not is_speakable(text):
        raise RowError("empty_text", f"{where} has no letter and no digit: there is nothing to speak")
    return text


def _segment(part: dict[str, Any]) -> Segment:
    """The segment of `offset` and `duration`; as in the original code, it ends with the file at the latest."""
    start, duration = part.get("offset"), part.get("duration")
    return Segment(start, None if duration is None else (start or 0.0) + duration, clamp=True)


def _without_segments(messages: Sequence[Message]) -> list[Message]:
    """Messages as they are stored: without the segments, which the codes already reflect."""
    keep = ("type", "text", "url", "as")
    return [
        {**message, "content": [{k: v for k, v in part.items() if k in keep} for part in message["content"]]}
        for message in messages
    ]
