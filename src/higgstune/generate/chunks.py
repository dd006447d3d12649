"""Long texts: splits them, caps the length of their pieces, and joins the spoken pieces."""

import re
import time
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

MAX_CHUNK_SECONDS = 16.0  # expected speech in one piece; the released model drifts on much longer ones
MIN_SECONDS = 1.0  # the shortest expectation: "No." is as often said in half a second as in one
FAR_OFF = 3.0  # speech of less than a third, or more than three times, of its expected duration is wrong
_DIGIT = 5  # characters
_PAUSE = 0.15  # seconds of silence between pieces
_FADE = 0.01  # seconds; a cut that starts or ends away from zero clicks
_SHORTEST, _LONGEST = 0.2, 1.0  # seconds of a part that is given out while speech is made
_MARGIN = 1.25  # of time, for speech that is longer than expected and for what else the machine does
# A sentence ends at a mark of its script: before white space, or between characters of a script without spaces.
_WIDE = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"
_BETWEEN_WIDE = rf"(?<=[{_WIDE}].)(?=[{_WIDE}])"
_SENTENCE = re.compile(rf".+?(?:[.!?…।۔؟։።]+[\"')\]]*(?=\s|$|{_BETWEEN_WIDE})|[。！？]+[」』”]*|\n|$)\s*", re.DOTALL)
_CLAUSE = re.compile(rf".+?(?:[,;:،؛](?=\s|{_BETWEEN_WIDE})|[，；：、]|$)\s*", re.DOTALL)


def expected_seconds(text: str) -> float:
    """A rough duration of a spoken text, at least a second: 14 characters, spaces too, or 5 ideographs a second.

    A digit counts as the five characters of its word and a space, in any script. Only an empty text takes 0 s.
    """
    if not text.strip():
        return 0.0
    digits = sum(unicodedata.category(c).startswith("N") for c in text)  # an ideograph such as 一 is a letter
    wide = sum(unicodedata.east_asian_width(c) in "WF" and not unicodedata.category(c).startswith("N") for c in text)
    return max(MIN_SECONDS, wide / 5 + (_DIGIT * digits + len(text) - wide - digits) / 14)


def frame_cap(text: str, frame_rate: float) -> int:
    """The maximum number of frames of a text: three times the expected duration plus two seconds."""
    return round((FAR_OFF * expected_seconds(text) + 2) * frame_rate)


def split_text(text: str, max_seconds: float = MAX_CHUNK_SECONDS) -> list[str]:
    """The pieces of a text: neighbouring sentences with up to `max_seconds` of expected speech together.

    A longer sentence is split at clauses, then at words. The text within a piece is unchanged, line breaks included,
    because training sees them; only white space between pieces is lost.
    """
    pieces = [piece for sentence in _SENTENCE.findall(text) for piece in _fitting(sentence, max_seconds)]
    chunks: list[str] = []
    for piece in pieces:
        if chunks and expected_seconds((chunks[-1] + piece).strip()) <= max_seconds:
            chunks[-1] += piece
        else:
            chunks.append(piece)
    return [chunk.strip() for chunk in chunks if chunk.strip()]


def join(waveforms: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
    """Spoken pieces [samples] -> one waveform: each faded in and out, with a short pause between."""
    parts: list[np.ndarray] = []
    for waveform in waveforms:
        parts += [pause(sample_rate), faded(waveform, sample_rate)] if parts else [faded(waveform, sample_rate)]
    return np.concatenate(parts)


def pause(sample_rate: int) -> np.ndarray:
    """The silence between two pieces [samples]."""
    return np.zeros(round(_PAUSE * sample_rate), dtype=np.float32)


class Pace:
    """When to give out speech that is still being made, so that whoever plays it never waits for more.

    The first part is short where speech is made faster than it plays, and waits for what it must where it is not; later
    ones are longer, as far as what is yet to be played allows.
    """

    def __init__(self, expected: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`expected`: seconds of speech in all."""
        self._expected, self._clock, self._start = expected, clock, clock()
        self._given, self._playing_since = 0.0, 0.0

    def is_due(self, made: float) -> bool:
        """Whether to give out all of the `made` seconds of speech."""
        now, new = self._clock(), made - self._given
        if new < _SHORTEST:
            return False
        a_second = (now - self._start) / made  # takes this long to make
        if not self._given:
            return _MARGIN * (self._expected - made) * a_second <= self._expected
        left = self._given - (now - self._playing_since)
        return new >= min(_LONGEST, left / _MARGIN / max(a_second, 1e-9) / 2)

    def give(self, made: float) -> None:
        """All of the `made` seconds were given out."""
        if not self._given:
            self._playing_since = self._clock()
        self._given = made


def _fitting(sentence: str, max_seconds: float) -> list[str]:
    if expected_seconds(sentence.strip()) <= max_seconds:
        return [sentence]
    parts = _CLAUSE.findall(sentence)
    if len(parts) == 1:
        parts = re.findall(r"\S+\s*|\s+", sentence)
    if len(parts) == 1:  # a script without spaces: split anywhere
        parts = list(sentence)
    if len(parts) == 1:
        return parts
    middle = len(parts) // 2
    return [piece for half in (parts[:middle], parts[middle:]) for piece in _fitting("".join(half), max_seconds)]


def faded(waveform: np.ndarray, sample_rate: int, *, start: bool = True, end: bool = True) -> np.ndarray:
    """A copy of a waveform [samples] that rises from zero and falls to it."""
    length = min(round(_FADE * sample_rate), len(waveform) // 2)
    found = waveform.astype(np.float32, copy=True)
    ramp = np.linspace(0, 1, length, dtype=np.float32)
    if start:
        found[:length] *= ramp
    if end:
        found[len(found) - length :] *= ramp[::-1]
    return found
