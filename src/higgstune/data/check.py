"""One row of a source -> a candidate for the store: its texts and recordings read and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from higgstune.data.clips import Clip, ClipReader, Limits, Segment
from higgstune.data.manifest import Utterance
from higgstune.data.message_parts import check_control_tokens
from higgstune.data.messages import Message, audio_parts, is_target, target_text
from higgstune.data.rejection import RowError
from higgstune.data.source import SourceRow
from higgstune.data.text import is_speakable, normalize_text


@dataclass(frozen=True)
class Candidate:
    """A row that is fit for the store, as far as it can be told on its own."""

    location: str
    utterance: Utterance
    text: str  # normalised; what the target says
    target: Clip
    reference: Clip | None = None
    reference_text: str | None = None
    messages: list[Message] | None = None
    context: list[Clip] = field(default_factory=list)  # audio parts of a conversation before the target
    context_is_target: list[bool] = field(default_factory=list)  # for each, whether it is learnt, too

    @property
    def clips(self) -> list[Clip]:
        """Everything that must be encoded for this row, the target first."""
        return [self.target, *([self.reference] if self.reference else []), *self.context]


class Checker:
    """Checks rows one after the other."""

    def __init__(self, limits: Limits) -> None:
        self._clips = ClipReader(limits)

    def check(self, row: SourceRow) -> Candidate:
        """Raises RowError saying why a row cannot be used."""
        if isinstance(row.content, RowError):
            raise row.content
        if row.content.messages is None:
            candidate = self._utterance(row, row.content)
        else:
            candidate = self._conversation(row, row.content, row.content.messages)
        if any(candidate.target.overlaps(clip) for clip in candidate.clips[1:]):
            raise RowError("reference_is_target", "the target's own audio is its reference: it would be copied")
        return candidate

    def _utterance(self, row: SourceRow, utterance: Utterance) -> Candidate:
        text = _spoken(utterance.text or "", "text")
        check_control_tokens(utterance.scene or "", "scene")
        reference = reference_text = None
        if utterance.reference_text:
            reference_text = _spoken(utterance.reference_text, "reference_text")
        target = self._clips.read(row.path(utterance.audio or ""), Segment(utterance.start, utterance.end))
        if utterance.reference_audio:
            reference = self._part(row, "reference_audio", utterance.reference_audio, Segment())
        return Candidate(row.location, utterance, text, target, reference, reference_text)

    def _conversation(self, row: SourceRow, utterance: Utterance, messages: Sequence[Message]) -> Candidate:
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
        """A clip that is not the row's `audio`: errors say what it is."""
        try:
            return self._clips.read(row.path(name), segment)
        except RowError as error:
            raise RowError(error.reason, f"{where}: {error}") from error


def _spoken(text: str, where: str) -> str:
    check_control_tokens(text, where)
    text = normalize_text(text)
    if not is_speakable(text):
        raise RowError("empty_text", f"{where} has nothing to say: no letter and no digit")
    return text


def _segment(part: dict[str, Any]) -> Segment:
    """What `offset` and `duration` say; as in the original code, not more than the file has."""
    start, duration = part.get("offset"), part.get("duration")
    return Segment(start, None if duration is None else (start or 0.0) + duration, clamp=True)


def _without_segments(messages: Sequence[Message]) -> list[Message]:
    """Messages as they are stored: which part of a file a clip was is in its codes."""
    keep = ("type", "text", "url", "as")
    return [
        {**message, "content": [{k: v for k, v in part.items() if k in keep} for part in message["content"]]}
        for message in messages
    ]
