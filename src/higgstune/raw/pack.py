"""Regions of speech -> utterances of 3 to 15 s, cut in pauses.

A dynamic programme over the regions of one speaker: long pauses are good places to cut, and lengths near 8 s are best.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from higgstune.raw.speech import Region, level_of, quietest, speech_seconds

BEFORE, BEHIND = 0.15, 0.20  # seconds kept before and behind speech: 0.03 % of speech lies outside of them
_BEST = 8.0  # seconds
_MAX_INNER = 1.5  # seconds of a pause within an utterance
_LONG_INNER = 1.0  # seconds, above which such a pause is taken only to save an utterance that would be too short
_WAIT = 30.0  # cost of a second above that
_SHORT = 40.0  # cost of a second that is missing to the minimum
_LENGTH = 0.05  # cost of a second squared away from the best
_PAUSE = 0.5  # seconds: a longer pause costs nothing to cut in
_AT_CUT, _CLEAR = 0.025, 10.0  # seconds on both sides of a cut, and dB that they should lie below the speech
_CUT = 12.0  # cost of a cut in no pause at all


@dataclass(frozen=True)
class Cut:
    """One utterance of a recording: what is kept, and the speech in it, in seconds."""

    start: float
    end: float
    speech: tuple[Region, ...]
    speaker: int | None = None

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end - self.start


def pack(
    regions: Sequence[Region],
    speakers: Sequence[int | None],
    joined: Sequence[bool],
    levels: np.ndarray,
    seconds: float,
    shortest: float,
    longest: float,
) -> list[Cut]:
    """The utterances of a recording of `seconds`: every region is in exactly one of them.

    `joined` says of each region whether it belongs together with the one before it, as the regions of one cue do.
    Otherwise no utterance has regions of two speakers, or a pause over 1.5 s. One is shorter than `shortest` where its
    neighbours are another speaker's or too far away, and longer than `longest` where a region, or a cue, is.
    """
    first_ones = [index for index in range(len(regions)) if not joined[index]]
    spans = list(pairwise([*first_ones, len(regions)]))
    units = [_Unit(regions[a].start, regions[b - 1].end, _speaker(regions[a:b], speakers[a:b])) for a, b in spans]
    found = _groups(units, shortest, longest)
    owners = [units[first].speaker for first, _ in found]
    groups = [(spans[first][0], spans[last][1] - 1) for first, last in found]
    borders = [_borders(regions, first, last, levels, seconds) for first, last in groups]
    return [
        Cut(start, end, tuple(regions[first : last + 1]), speaker)
        for (first, last), (start, end), speaker in zip(groups, borders, owners, strict=True)
    ]


def is_suspicious(one: Cut, other: Cut, levels: np.ndarray) -> bool:
    """Whether the cut between two neighbours is hardly quieter than their speech: a word may be cut there."""
    if one.end < other.start:
        return False
    speech = [level_of(levels, region.start, region.end) for region in (one.speech[-1], other.speech[0])]
    return level_of(levels, one.end - _AT_CUT, one.end + _AT_CUT) > min(speech) - _CLEAR


@dataclass(frozen=True)
class _Unit:
    """What is not cut: a region, or those of one cue."""

    start: float
    end: float
    speaker: int | None


def _speaker(regions: Sequence[Region], speakers: Sequence[int | None]) -> int | None:
    """Who speaks most of a cue; None where a region of it is of two speakers."""
    if None in speakers:
        return None
    return max(
        dict.fromkeys(speakers),
        key=lambda one: speech_seconds(r for r, s in zip(regions, speakers, strict=True) if s == one),
    )


def _groups(units: Sequence[_Unit], shortest: float, longest: float) -> list[tuple[int, int]]:
    """The first and last unit of each utterance, by the cheapest way to part all of them."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the units up to here: the cost, and the last group's first unit
    for last in range(len(units)):
        options, waits = [], 0.0
        for first in range(last, -1, -1):
            length = units[last].end - units[first].start + BEFORE + BEHIND
            if first < last:
                pause = units[first + 1].start - units[first].end
                waits += _WAIT * max(0.0, pause - _LONG_INNER)
                same = units[first].speaker is not None and units[first].speaker == units[last].speaker
                if not same or pause > _MAX_INNER or length > longest:
                    break
            options.append((best[first][0] + _cost(length, shortest) + _cut_cost(units, first) + waits, first))
        best.append(min(options))
    groups, end = [], len(units)
    while end:
        first = best[end][1]
        groups.append((first, end - 1))
        end = first
    return groups[::-1]


def _cost(length: float, shortest: float) -> float:
    return _LENGTH * (length - _BEST) ** 2 + _SHORT * max(0.0, shortest - length)


def _cut_cost(units: Sequence[_Unit], first: int) -> float:
    """Of a cut before a unit."""
    if not first:
        return 0.0
    return _CUT * max(0.0, 1 - (units[first].start - units[first - 1].end) / _PAUSE) ** 2


def _borders(
    regions: Sequence[Region], first: int, last: int, levels: np.ndarray, seconds: float
) -> tuple[float, float]:
    """What is kept of a group: its margins, or up to the quietest place of a pause that is too short for them."""
    start, end = max(regions[first].start - BEFORE, 0.0), min(regions[last].end + BEHIND, seconds)
    if first and regions[first].start - regions[first - 1].end < BEFORE + BEHIND:
        start = quietest(levels, regions[first - 1].end, regions[first].start)
    if last + 1 < len(regions) and regions[last + 1].start - regions[last].end < BEFORE + BEHIND:
        end = quietest(levels, regions[last].end, regions[last + 1].start)
    return round(start, 3), round(end, 3)
