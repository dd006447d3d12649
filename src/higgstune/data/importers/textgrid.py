"""Praat TextGrids: the intervals of every tier, and the tiers that hold what is said."""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from higgstune.data.rejection import RowError, shown

BEGINNING = re.compile(r'(?:File type\s*=\s*)?"ooTextFile(?: short)?"')
# Praat's manual, "TextGrid file formats": only free-standing numbers, quoted texts and flags count, the rest is for
# people. So the long and the short form are read alike.
_TOKEN = re.compile(
    r'"(?P<text>[^"]*+(?:""[^"]*+)*+)"|(?P<open>")|\[[^\]\n]*\]|(?<!\S)!.*|<(?P<flag>exists|absent)>'
    r"|(?<!\S)(?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?!\S)"
)
_KINDS = {
    "utterances": ("utterance", "utt", "sentence", "phrase", "transcript", "transcription", "text", "orthography"),
    "words": ("word", "token", "ort-mau", "kan-mau"),
    "phones": ("phone", "phoneme", "syllable", "mau", "ipa", "sampa"),
    "speakers": ("speaker", "spk", "talker"),
    "other": ("note", "comment", "noise", "event", "silence", "gloss", "translation"),
}
_KIND_OF = {name + plural: kind for kind, names in _KINDS.items() for name in names for plural in ("", "s")}
_SPEAKER_AND_KIND = re.compile(r"(.+?) ?[-_:/] ?([^\W_]+)")  # `anna - words`, as the Montreal Forced Aligner writes it
_DETECTED = {"silent", "sounding"}  # of Praat's "To TextGrid (silences)"
_SAME_TIME = 0.001  # seconds
_NEAR = 0.5  # seconds between the beginnings, or the ends, of tiers with the same words
_SHARED_STARTS = 0.8  # of the starts of one tier that are also another's: both are about the same speech


@dataclass(frozen=True)
class Interval:
    """A stretch of a tier with its text."""

    start: float  # seconds
    end: float
    text: str
    line: int  # of its file
    speaker: str | None = None


@dataclass(frozen=True)
class Tier:
    """The intervals of a tier that have a text; of a point tier none are kept."""

    name: str
    intervals: tuple[Interval, ...]
    is_points: bool = False

    @property
    def kind(self) -> tuple[str | None, str]:
        """The speaker in its name, and what it holds: a key of _KINDS, or "" where the name does not say."""
        name = self.name.strip().casefold()
        if {interval.text.strip() for interval in self.intervals} <= _DETECTED:
            return None, "other"
        if name in _KIND_OF:
            return None, _KIND_OF[name]
        found = _SPEAKER_AND_KIND.fullmatch(self.name.strip())
        kind = _KIND_OF.get(found[2].casefold(), "") if found else ""
        return (found[1] if found and kind else None), kind


def parse_textgrid(text: str, name: str) -> list[Tier]:
    """The tiers of a TextGrid in Praat's long or short text form. Raises RowError with the line where it is not one."""
    tokens = _Tokens(text, name)
    tokens.text("ooTextFile", "ooTextFile short")
    tokens.text("TextGrid")
    tokens.times()
    tiers = []
    for _ in range(tokens.count()):
        kind, tier = tokens.text("IntervalTier", "TextTier"), tokens.text()
        tokens.times()
        intervals = []
        for _ in range(tokens.count()):
            line = tokens.line()
            start, end = tokens.times() if kind == "IntervalTier" else (tokens.number(),) * 2
            if content := tokens.text().strip():
                intervals.append(Interval(start, end, content, line))
        tiers.append(Tier(tier, () if kind == "TextTier" else tuple(intervals), kind == "TextTier"))
    return tiers


def spoken_intervals(tiers: Sequence[Tier], name: str) -> tuple[list[Interval], list[str]]:
    """The intervals with what is said, and the names of the tiers that they come from.

    Names decide (utterances before words, never phones); tiers without a known name are one a speaker, unless they are
    about the same speech. A tier of speakers names those of the others' intervals. Raises RowError where it is not
    certain which tier is spoken.
    """
    filled = [(tier, *tier.kind) for tier in tiers if tier.intervals]
    for wanted in ("utterances", "", "words"):
        chosen = [(tier, speaker) for tier, speaker, kind in filled if kind == wanted]
        if not chosen:
            continue
        for (one, _), (other, _) in combinations(list(chosen), 2):
            if (left_out := _same_speech(one, other, name)) is not None:
                chosen = [(tier, speaker) for tier, speaker in chosen if tier is not left_out]
        if wanted == "" and len(chosen) > 1:
            chosen = [(tier, tier.name.strip()) for tier, _ in chosen]
        turns = [tier.intervals for tier, _, kind in filled if kind == "speakers"]
        found = [
            Interval(one.start, one.end, one.text, one.line, speaker or _speaker_at(one, turns))
            for tier, speaker in chosen
            for one in tier.intervals
        ]
        return found, [tier.name for tier, _ in chosen]
    return [], []


def _same_speech(one: Tier, other: Tier, name: str) -> Tier | None:
    """Of two tiers about the same speech the one to leave out, that with shorter intervals; None for two speakers."""
    coarse, fine = sorted((one, other), key=lambda tier: len(tier.intervals))
    ends = (abs(coarse.intervals[0].start - fine.intervals[0].start),
            abs(coarse.intervals[-1].end - fine.intervals[-1].end))  # fmt: skip
    if max(ends) < _NEAR and _letters(coarse) == _letters(fine):
        return fine
    starts = sorted(interval.start for interval in fine.intervals)
    shared = sum(_has_near(starts, interval.start) for interval in coarse.intervals)
    if shared >= _SHARED_STARTS * len(coarse.intervals):
        raise RowError(
            "no_transcript",
            f"{name}: the tiers {shown(one.name)} and {shown(other.name)} are about the same speech, and which of them "
            'is spoken is not certain: name that one "utterances"',
        )
    return None


def _letters(tier: Tier) -> str:
    return "".join(c for interval in tier.intervals for c in interval.text.casefold() if c.isalnum())


def _has_near(starts: Sequence[float], time: float) -> bool:
    place = bisect_left(starts, time - _SAME_TIME)
    return place < len(starts) and starts[place] <= time + _SAME_TIME


def _speaker_at(interval: Interval, tiers: Sequence[Sequence[Interval]]) -> str | None:
    """Who speaks in most of an interval, by tiers of speakers, whose intervals do not overlap."""
    shares: defaultdict[str, float] = defaultdict(float)  # seconds
    for turns in tiers:
        first = bisect_right(turns, interval.start, key=lambda turn: turn.end)
        last = bisect_left(turns, interval.end, key=lambda turn: turn.start)
        for turn in turns[first:last]:
            shares[turn.text] += min(turn.end, interval.end) - max(turn.start, interval.start)
    return max(shares, key=lambda name: shares[name], default=None)


class _Tokens:
    """The free-standing texts and numbers of a TextGrid, one after the other."""

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._found = [found for found in _TOKEN.finditer(text) if found.lastgroup]
        self._next = 0
        self._text = text
        self._line, self._counted = 1, 0  # lines up to a place

    def line(self) -> int:
        """The line of the next token, counted from 1."""
        place = self._found[self._next].start() if self._next < len(self._found) else len(self._text)
        self._line += self._text.count("\n", self._counted, place)
        self._counted = place
        return self._line

    def text(self, *wanted: str) -> str:
        """The next token, which must be a text, and one of those wanted if there are any."""
        found = self._take("text", " or ".join(f'"{w}"' for w in wanted) or "a text in quotes", wanted)
        return found.replace('""', '"')

    def number(self) -> float:
        """The next token, which must be a number."""
        return float(self._take("number", "a number"))

    def times(self) -> tuple[float, float]:
        """The next two tokens, a start and an end in seconds."""
        return self.number(), self.number()

    def count(self) -> int:
        """How many tiers or intervals follow; 0 where a flag says that there are none."""
        if self._next < len(self._found) and (flag := self._found[self._next]["flag"]) is not None:
            self._next += 1
            if flag == "absent":
                return 0
        line, number = self.line(), self.number()
        if not 0 <= number <= len(self._found) or number != int(number):
            raise self._error(line, f"{number:g} stands where a number of tiers or intervals should")
        return int(number)

    def _take(self, kind: str, words: str, wanted: Sequence[str] = ()) -> str:
        line = self.line()
        if self._next == len(self._found):
            raise self._error(line, f"it ends where {words} should stand")
        found = self._found[self._next]
        if found.lastgroup == "open":
            raise self._error(line, "a quote is not closed (one inside a text is written twice)")
        if found.lastgroup != kind or (wanted and found[kind] not in wanted):
            raise self._error(line, f"{shown(found[0])} stands where {words} should")
        self._next += 1
        return str(found[kind])

    def _error(self, line: int, words: str) -> RowError:
        return RowError("no_transcript", f"{self._name}:{line}: {words}: save it in Praat as a text file again")
