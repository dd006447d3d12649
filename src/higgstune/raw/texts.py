"""The words of each utterance: from a text or from cues with times beside the recording, or as they are recognised.

A given text is the user's own and is kept letter by letter; recognition only says which of its words are in which
utterance, and where both differ.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import numpy as np

from higgstune.data.importers.subtitles import Cue
from higgstune.errors import ConfigError
from higgstune.evaluation.asr_errors import UNSPACED_OR_RUN, count_errors
from higgstune.raw.speech import Region

_WINDOW = 2.0  # seconds by which the time of a cue may be wrong at most
_REACH = 0.6  # cost, in seconds of wrong times, of two cues that are one
_PAUSE, _PAUSE_BONUS = 0.5, 0.4  # a cue ends in a pause: the bonus for a second of it, up to half a second
_MAX_JOINED = 4  # cues
_KEPT_STATES = 24
_MAX_OFFSET, _MIN_OFFSET = 30.0, 0.3  # seconds that all times are off; below, finding the pauses is enough
_NEAR, _STEP = 0.3, 0.02  # seconds from an edge within which a time fits; between the offsets that are tried
_FEW_CUES = 6
_CLEARLY = 4.5  # standard errors that cues fit better; 300 subtitles of something else reached 3.8
_WORDS_A_CUE = 1.2  # up to which cues are words
_MIN_UNSPOKEN = 4  # words in a row that nobody says are not a slip of the ASR
_KEY = re.compile(r"[^\w]+")
_STOPS = ".!?;:,。！？；：，、…"
_OPENING = "\"'([{«„“‘¿¡「『（"


@dataclass(frozen=True)
class Placed:
    """Cues on the regions of a recording."""

    joined: list[bool]  # of each region: whether it belongs to the same cue as the one before it
    texts: list[str | None]  # of each region that begins a cue, its text; None for speech that is in no cue
    speakers: list[str | None]
    unspoken: list[str]  # texts of cues without speech


def place_cues(cues: Sequence[Cue], regions: Sequence[Region]) -> Placed:
    """Which cue each region belongs to, where times may be wrong by half a second.

    The borders of cues lie in pauses, so that both of their times fit best; cues without a pause between them are one.
    """
    owned = _cheapest(cues, regions)
    texts: list[str | None] = [None] * len(regions)
    speakers: list[str | None] = [None] * len(regions)
    joined = [False] * len(regions)
    for own in owned:
        members = cues[own.cue : own.last_cue + 1]
        texts[own.region] = " ".join(cue.text for cue in members)
        for index in range(own.region, own.last_region + 1):
            speakers[index], joined[index] = members[0].speaker, index > own.region
    placed = {index for own in owned for index in range(own.cue, own.last_cue + 1)}
    return Placed(joined, texts, speakers, [cue.text for index, cue in enumerate(cues) if index not in placed])


def find_offset(cues: Sequence[Cue], regions: Sequence[Region]) -> float:
    """By how many seconds all times of cues are late, or early if negative; 0 where that is not clear.

    Cues begin and end at edges of speech beside pauses, so that each offset can be judged by how many do. It is clear
    where they fit far better than as they are, in both halves of the recording.
    """
    if len(cues) < _FEW_CUES or len(regions) < 2:
        return 0.0
    starts, ends = (np.array([getattr(region, name) for region in regions]) for name in ("start", "end"))
    pauses = np.minimum(starts[1:] - ends[:-1], _PAUSE) / _PAUSE
    edges = ((starts, np.r_[1.0, pauses]), (ends, np.r_[pauses, 1.0]))
    times = [np.array([getattr(cue, name) for cue in cues]) for name in ("start", "end")]
    bins = np.zeros(round(2 * _MAX_OFFSET / _STEP) + 1)  # the edges at each distance from a time
    for own, (places, weights) in zip(times, edges, strict=True):
        borders = np.searchsorted(places, [own - _MAX_OFFSET, own + _MAX_OFFSET])
        for time, first, last in zip(own, *borders, strict=True):
            distances = time - places[first:last]
            np.add.at(bins, np.round((distances + _MAX_OFFSET) / _STEP).astype(int), weights[first:last])
    width = round(_NEAR / _STEP)
    offset = int(np.convolve(bins, 1 - np.abs(np.arange(-width, width + 1)) / width, "same").argmax()) * _STEP
    offset -= _MAX_OFFSET

    def fits(by: float) -> np.ndarray:
        return np.stack([_fits(own - by, *known) for own, known in zip(times, edges, strict=True)], 1).ravel()

    gains = fits(offset) - fits(0.0)
    half = len(gains) // 2
    in_both = min(gains[:half].mean(), gains[half:].mean()) > gains.mean() / 2
    is_clear = in_both and gains.mean() > _CLEARLY * gains.std(ddof=1) / np.sqrt(len(gains))
    return round(offset, 2) if is_clear and abs(offset) >= _MIN_OFFSET else 0.0


def _fits(times: np.ndarray, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[times] from 0 to 1: how near an edge each time is, and how long the pause beside that is."""
    behind = np.clip(np.searchsorted(edges, times), 1, len(edges) - 1)
    both = (weights[at] * np.clip(1 - np.abs(times - edges[at]) / _NEAR, 0, None) for at in (behind - 1, behind))
    return np.maximum(*both)


def join_words(cues: Sequence[Cue], regions: Sequence[Region]) -> Sequence[Cue]:
    """Cues that are single words, as of a forced alignment: one cue for all that lie in the same region."""
    if not regions or sum(len(cue.text.split()) for cue in cues) > _WORDS_A_CUE * len(cues):
        return cues
    ends = [region.end for region in regions]
    places = [min(bisect_left(ends, (cue.start + cue.end) / 2), len(regions) - 1) for cue in cues]
    joined = []
    for (_, speaker), members in groupby(zip(places, cues, strict=True), key=lambda pair: (pair[0], pair[1].speaker)):
        words = [cue for _, cue in members]
        joined.append(Cue(words[0].start, words[-1].end, " ".join(cue.text for cue in words), speaker))
    return joined


@dataclass(frozen=True)
class _Owned:
    """Cues and the regions in which they are spoken; the first and last of each."""

    cue: int
    last_cue: int
    region: int
    last_region: int


@dataclass(frozen=True)
class _State:
    """The cheapest way to place the first cues on the first regions."""

    cost: float
    owned: _Owned | None = None
    before: "_State | None" = None


def _cheapest(cues: Sequence[Cue], regions: Sequence[Region]) -> list[_Owned]:
    """The owners of regions, by dynamic programming; what is left without a cue or without speech costs its seconds."""
    starts, ends = [region.start for region in regions], [region.end for region in regions]
    left = [0.0, *accumulate(region.seconds for region in regions)]  # seconds of speech before each region
    states: list[dict[int, _State]] = [{} for _ in range(len(cues) + 1)]  # by cues, and by regions that are done
    states[0][0] = _State(0.0)

    def relax(number: int, done: int, state: _State) -> None:
        if done not in states[number] or state.cost < states[number][done].cost:
            states[number][done] = state

    for number, cue in enumerate(cues):
        entries = sorted(states[number].items(), key=lambda item: item[1].cost - left[item[0]])[:_KEPT_STATES]
        states[number] = {}
        for done, state in entries:
            relax(number + 1, done, _State(state.cost + cue.end - cue.start, None, state))
        for first in _near(starts, cue.start):
            reached = [(state.cost + left[first] - left[done], state) for done, state in entries if done <= first]
            if not reached:
                continue
            cost, state = min(reached, key=lambda item: item[0])
            cost += abs(starts[first] - cue.start)
            for last_cue in range(number, min(number + _MAX_JOINED, len(cues))):
                if last_cue > number:
                    cost += _REACH + max(cues[last_cue].start - cues[last_cue - 1].end, 0.0)
                for last in _near(ends, cues[last_cue].end):
                    if last >= first:
                        pause = starts[last + 1] - ends[last] if last + 1 < len(regions) else _PAUSE
                        whole = cost + abs(ends[last] - cues[last_cue].end) - _PAUSE_BONUS * min(pause, _PAUSE)
                        relax(last_cue + 1, last + 1, _State(whole, _Owned(number, last_cue, first, last), state))
    found: list[_Owned] = []
    step: _State | None = min(states[-1].items(), key=lambda item: item[1].cost + left[-1] - left[item[0]])[1]
    while step is not None:
        if step.owned is not None:
            found.append(step.owned)
        step = step.before
    return found[::-1]


def _near(times: Sequence[float], at: float) -> range:
    """The indices of times, which are in order, that are at most two seconds away."""
    return range(bisect_left(times, at - _WINDOW), bisect_right(times, at + _WINDOW))


def align_text(text: str, recognised: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a text for each utterance, in order, and the stretches of it that nobody says.

    `recognised` is what an ASR understood of each utterance. Every word of the text is in one utterance or
    in one stretch. Raises ConfigError where the extra `asr` is not installed.
    """
    words = _words(text)
    keys = [_key(text[start:end]) for start, end in words]
    said: list[str] = []
    borders = [0]
    for one in recognised:
        said += [_key(one[start:end]) for start, end in _words(one)]
        borders.append(len(said))
    pairs = _matching(keys, said)
    spoken, unspoken = [True] * len(words), []
    for start, end, count in _gaps(pairs, len(words), len(said)):
        if end - start - count >= _MIN_UNSPOKEN:
            spoken[start:end] = [False] * (end - start)
            unspoken.append(text[words[start][0] : words[end - 1][1]])
    places = [_place(border, pairs, keys, text, words) for border in borders]
    places[0], places[-1] = 0, len(words)
    if len(places) == 1:  # nothing was recognised at all
        return [], [*unspoken, *([] if unspoken or not words else [text])]
    return [_slices(text, words, range(a, b), spoken) for a, b in pairwise(places)], unspoken


def keeps_border(left: str, right: str, both: str) -> bool:
    """Whether the words at the border of two recognised texts are side by side in what is recognised of both."""
    sides = [[_key(text[start:end]) for start, end in _words(text)] for text in (left, right, both)]
    first, second, whole = ([word for word in words if word] for words in sides)
    if not first or not second:
        return first + second == whole
    places = dict(_matching(first + second, whole))
    before, behind = places.get(len(first) - 1), places.get(len(first))
    return before is not None and behind == before + 1


def difference(given: str, recognised: str, language: str | None) -> float:
    """Character errors of a recognised text against a given one, as a share of the given one; at most 1."""
    errors = count_errors(given, recognised, language)
    return min(errors.char_errors / max(errors.chars, 1), 1.0)


def _words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end; in scripts without spaces, every character is one."""
    return [
        (found.start() + one.start(), found.start() + one.end())
        for found in re.finditer(r"\S+", text)
        for one in UNSPACED_OR_RUN.finditer(found[0])
    ]


def _slices(text: str, words: Sequence[tuple[int, int]], chosen: range, spoken: Sequence[bool]) -> str:
    """The words that are chosen and spoken, with what stands between neighbours."""
    runs: list[list[int]] = []
    for index in chosen:
        if not spoken[index]:
            continue
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return " ".join(text[words[first][0] : words[last][1]] for first, last in runs)


def _key(word: str) -> str:
    """A word without marks and case; empty for what is not said, such as a dash."""
    return _KEY.sub("", word.casefold())


def _matching(one: Sequence[str], other: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of indices of equal words: as many as there can be in one order. A word that is not said is in none."""
    try:
        from rapidfuzz.distance import Indel
    except ImportError as error:
        raise ConfigError("placing a text on speech needs rapidfuzz: pip install 'higgstune[asr]'") from error
    places = [[index for index, word in enumerate(words) if word] for words in (one, other)]
    blocks = Indel.opcodes([one[index] for index in places[0]], [other[index] for index in places[1]])
    return [
        (places[0][block.src_start + step], places[1][block.dest_start + step])
        for block in blocks
        if block.tag == "equal"
        for step in range(block.src_end - block.src_start)
    ]


def _gaps(pairs: Sequence[tuple[int, int]], words: int, said: int) -> list[tuple[int, int, int]]:
    """Between two pairs: the first and last word of the text that has none, and how many words were said there."""
    ends = [(-1, -1), *pairs, (words, said)]
    return [(a + 1, b, d - c - 1) for (a, c), (b, d) in pairwise(ends) if b > a + 1]


def _place(
    border: int, pairs: Sequence[tuple[int, int]], keys: Sequence[str], text: str, words: Sequence[tuple[int, int]]
) -> int:
    """Where in the text the border before a said word lies: at punctuation, if several places are possible."""
    index = bisect_left(pairs, border, key=lambda pair: pair[1])
    before, said_before = (pairs[index - 1][0] + 1, pairs[index - 1][1] + 1) if index else (0, 0)
    behind = pairs[index][0] if index < len(pairs) else len(words)
    place = min(before + max(border - said_before, 0), behind)
    for other in range(before, behind + 1):
        if other and text[words[other - 1][1] - 1] in _STOPS:
            place = other
            break
    while place < behind and not keys[place] and text[words[place][0]] not in _OPENING:
        place += 1  # a dash belongs to what is before it
    return place
