"""What is said in the cues of a recording: without captions that roll, marks, dashes and labels of speakers."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from higgstune.data.text import find_marks, is_wide

_SQUARE, _ROUND = re.compile(r"\[[^\[\]]*\]"), re.compile(r"\([^()]*\)")
_ANGLE = re.compile(r"<[^<>]*>")
_SONG = re.compile(r"[♪♫♬].*|#\s.*\s#", re.DOTALL)
_SILENCES = ("sil", "sp", "spn", "pau")
_DASH = re.compile(r"(?:>{2,}|[-\u2010-\u2015]{1,2}(?![-\s]*\d))\s*")
_NAMED = re.compile(r"(?:\[(SPEAKER[_ ]?\d+)\]|([^\W\d_][\w.'\u2019 -]{0,30}?))\s?:\s+(?=\S)")
_NUMBERED = re.compile(r"(?:speaker|person)[ _]?(?:\d+|[A-Z])", re.IGNORECASE)
_MAX_NAME = 3  # words
_ALONE = 3  # cues that begin with the only name
_TOUCHING = 0.1  # seconds between a rolling caption and the next
_ROLLING_WORDS = 3  # repeated in a file, at least; fewer may have been said twice
_ROLLING_LINES = 8


@dataclass
class RawCue:
    """A cue as its file has it."""

    start: float
    end: float
    place: str  # for messages
    lines: list[str] = field(default_factory=list)
    speakers: list[str] = field(default_factory=list)


def unrolled(raws: list[RawCue]) -> list[RawCue]:
    """Captions that roll show a line again in the next cue, above new words: each is kept where it came first.

    A file counts as such where at least a third of its cues repeat what the one before them shows, and add to it.
    """
    raws = sorted(raws, key=lambda raw: raw.start)
    shown_words = [[line.split() for line in raw.lines if line.strip()] for raw in raws]
    repeated = [0] * bool(raws) + [
        _repeated([word for line in a for word in line], b) if second.start <= first.end + _TOUCHING else 0
        for first, second, a, b in zip(raws, raws[1:], shown_words, shown_words[1:], strict=False)
    ]
    adding = [count for count, lines in zip(repeated, shown_words, strict=True) if 0 < count < sum(map(len, lines))]
    if len(adding) * 3 < len(raws) - 1 or sum(adding) < _ROLLING_WORDS:
        return raws
    kept = []
    for raw, count, lines in zip(raws, repeated, shown_words, strict=True):
        if count and count == sum(map(len, lines)):
            continue
        left = []
        for words in lines:
            left.append(" ".join(words[count:]))
            count = max(0, count - len(words))
        raw.lines = left
        kept.append(raw)
    return kept


def _repeated(before: Sequence[str], lines: Sequence[Sequence[str]]) -> int:
    """How many words at the beginning of a cue are the last ones of the cue before: whole lines, or all of it."""
    words = [word for line in lines for word in line]
    sizes = {len(before)} | {sum(map(len, lines[:count])) for count in range(1, min(len(lines), _ROLLING_LINES) + 1)}
    fitting = (size for size in sizes if 0 < size <= min(len(before), len(words)))
    return max((size for size in fitting if list(before[len(before) - size :]) == words[:size]), default=0)


def speech_of(line: str, is_name: Callable[[str, str], bool]) -> tuple[str, bool, str | None]:
    """A line without the dash and the speaker's label before it, whether it has a dash, and the label."""
    dash = _DASH.match(line)
    rest = line[dash.end() :] if dash else line
    named = _NAMED.match(rest)
    if named and is_name(named[1] or named[2], rest[named.end() :]):
        return rest[named.end() :], dash is not None, named[1] or named[2]
    return rest, dash is not None, None


def speaker_labels(raws: Sequence[RawCue]) -> Callable[[str, str], bool]:
    """Whether a beginning such as `ANNA:` of a text is a speaker's label, by all cues of the file.

    `Remember: ...` is said. So a label is a numbered speaker; or in capitals before a text that is not, where the file
    has one of them twice; or up to three words that begin with capitals, where such labels that occur twice begin at
    least half of the cues (three, where it is one name).
    """
    capitals: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for raw in raws:
        for line in raw.lines[:1]:
            rest, _, name = speech_of(line, lambda *_: True)
            if name and not _NUMBERED.fullmatch(name):
                (capitals if _is_loud(name, rest) else words)[name] += 1
    has_capitals = max(capitals.values(), default=0) > 1
    usual = {name for name, count in (capitals + words).items() if count > 1 and _is_title(name)}
    begun = sum((capitals + words)[name] for name in usual)
    if begun * 2 < len(raws) or (len(usual) == 1 and begun < _ALONE):
        usual = set()

    def is_name(name: str, text: str) -> bool:
        return bool(_NUMBERED.fullmatch(name)) or name in usual or (has_capitals and _is_loud(name, text))

    return is_name


def _is_loud(name: str, text: str) -> bool:
    """Whether a name is in capitals and the text behind it is not."""
    return len(name) > 1 and name.isupper() and _is_title(name) and not text.isupper()


def _is_title(name: str) -> bool:
    parts = name.split()
    return len(parts) <= _MAX_NAME and all(part[0].isupper() or part[0].isdecimal() for part in parts)


def is_mark(text: str, are_subtitles: bool) -> bool:
    """Whether a text says nothing: marks such as `[music]`, songs, silences of a TextGrid, no letter at all.

    In subtitles all in round brackets is a sound; elsewhere `(as he said)` may be spoken.
    """
    if not text:
        return False
    if text.lower() in _SILENCES or _SONG.fullmatch(text):
        return True
    rest = _ANGLE.sub("", _SQUARE.sub("", _ROUND.sub("", text) if are_subtitles else text))
    return sum(map(str.isalnum, rest)) == sum(map(str.isalnum, "".join(find_marks(rest))))


def joined(lines: Sequence[str]) -> str:
    """Lines as one text: without a space where the script has none."""
    parts = list(lines[:1])
    for before, line in pairwise(lines):
        parts += ["" if _has_no_spaces(before[-1]) and _has_no_spaces(line[0]) else " ", line]
    return "".join(parts)


def _has_no_spaces(character: str) -> bool:
    """Whether a character is of Chinese or Japanese; Korean has spaces."""
    return is_wide(character) and not "\uac00" <= character <= "\ud7a3"
