"""Long texts: where to split them, how long they may take, and how spoken pieces are joined."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

MAX_CHUNK_SECONDS = 15.0  # expected speech in one piece; the released model drifts on much longer ones
_PAUSE = 0.15  # seconds of silence between pieces
_FADE = 0.01  # seconds; a cut that starts or ends away from zero clicks
_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"')\]]*(?=\s)|[。！？]+[」』”]*|\n|$)", re.DOTALL)
_CLAUSE = re.compile(r".+?(?:[,;:](?=\s)|[，；：、]|$)", re.DOTALL)


def expected_seconds(text: str) -> float:
    """A rough duration of a text: 14 letters or 5 ideographs a second."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return wide / 5 + (len(text) - wide) / 14


def frame_cap(text: str, frame_rate: float) -> int:
    """As many frames may a text take at the most: three times the expected duration and two seconds."""
    return round((3 * expected_seconds(text) + 2) * frame_rate)


def split_text(text: str, max_seconds: float = MAX_CHUNK_SECONDS) -> list[str]:
    """Sentences of a text, joined again up to `max_seconds` of expected speech each.

    A sentence that is longer alone is split at clauses, then at words. Nothing but white space is lost.
    """
    pieces = [piece for sentence in _matches(_SENTENCE, text) for piece in _fitting(sentence, max_seconds)]
    chunks: list[str] = []
    for piece in pieces:
        joined = f"{chunks[-1]} {piece}" if chunks else piece
        if chunks and expected_seconds(joined) <= max_seconds:
            chunks[-1] = joined
        else:
            chunks.append(piece)
    return chunks


def join(waveforms: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
    """Spoken pieces [samples] -> one waveform: each faded in and out, with a short pause between."""
    pause = np.zeros(round(_PAUSE * sample_rate), dtype=np.float32)
    parts: list[np.ndarray] = []
    for waveform in waveforms:
        parts += [pause, _faded(waveform, sample_rate)] if parts else [_faded(waveform, sample_rate)]
    return np.concatenate(parts)


def _fitting(sentence: str, max_seconds: float) -> list[str]:
    if expected_seconds(sentence) <= max_seconds:
        return [sentence]
    clauses = _matches(_CLAUSE, sentence)
    if len(clauses) > 1:
        return [piece for clause in clauses for piece in _fitting(clause, max_seconds)]
    words = sentence.split()
    if len(words) == 1:  # a script without spaces: any place is as good
        middle = len(sentence) // 2
        return _fitting(sentence[:middle], max_seconds) + _fitting(sentence[middle:], max_seconds)
    middle = len(words) // 2
    return [piece for half in (words[:middle], words[middle:]) for piece in _fitting(" ".join(half), max_seconds)]


def _matches(pattern: re.Pattern[str], text: str) -> list[str]:
    return [match.strip() for match in pattern.findall(text) if match.strip()]


def _faded(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    length = min(round(_FADE * sample_rate), len(waveform) // 2)
    faded = waveform.astype(np.float32, copy=True)
    ramp = np.linspace(0, 1, length, dtype=np.float32)
    faded[:length] *= ramp
    faded[len(faded) - length :] *= ramp[::-1]
    return faded
