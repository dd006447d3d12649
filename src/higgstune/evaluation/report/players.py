"""Players: clips side by side, each with its faults, its numbers, and its transcript with the errors marked.

`Section` -> `section_view`, which the templates show. A clip becomes an MP3 data URL.
"""

import base64
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import soundfile
import soxr

from higgstune.data.audio import read_audio
from higgstune.errors import DataError
from higgstune.metrics import ClipRow

_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_MAX_TRANSCRIPT_WORDS = 80  # an ASR that loops fills pages
_WAVE_BARS, _WAVE_HEIGHT = 110, 40
_MIN_RIGHT = 0.3  # share of words; below it nothing is marked as right
# Scripts without spaces are compared by character.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"([{_UNSPACED}]|[^\s{_UNSPACED}]+)(\s*)")


@dataclass(frozen=True)
class Take:
    """One clip: its file, its transcript (None: there was no ASR), and notes about it."""

    file: Path
    transcript: str | None = None
    notes: Sequence[str] = ()
    link: str | None = None  # to the file from the page, which embeds it otherwise


@dataclass(frozen=True)
class Item:
    """One text, and a clip (or None) of it in each column."""

    text: str
    takes: Sequence[Take | None]
    language: str | None = None  # ISO 639-1
    detail: str = ""  # speaker, seed
    why: str = ""  # why it is among the worst


@dataclass(frozen=True)
class Section:
    """Clips side by side, in the given order; those after the first `open_at_first` are folded."""

    title: str
    columns: Sequence[str]
    items: Sequence[Item]
    note: str = ""
    open_at_first: int = 8


@dataclass(frozen=True)
class Piece:
    """A stretch of words: right, wrong (in the transcript only), or missed (in the text only)."""

    kind: Literal["right", "wrong", "missed"]
    words: str
    space: str = " "  # after it


def section_view(section: Section, prefix: str) -> dict[str, Any]:
    """A section for the template; `prefix` makes the ids of its players unique in the page."""
    items = [item_view(item, section.columns, f"{prefix}-{i}") for i, item in enumerate(section.items)]
    shown, folded = items[: section.open_at_first], items[section.open_at_first :]
    return {"title": section.title, "note": section.note, "id": prefix, "items": shown, "folded": folded}


def has_transcripts(sections: Sequence[Section]) -> bool:
    """Whether any clip has a transcript."""
    takes = [take for section in sections for item in section.items for take in item.takes]
    return any(take is not None and take.transcript is not None for take in takes)


def take_of(row: ClipRow, file: Path) -> Take:
    """A clip with the transcript from its row of an `Evaluation`, and with faults and numbers as notes."""
    notes = complaints(row)
    if (similarity := row.get("similarity")) is not None:
        notes.append(f"similarity {float(similarity):.2f}")
    if (naturalness := row.get("naturalness")) is not None:
        notes.append(f"naturalness {float(naturalness):.1f}")
    transcript = row.get("transcript")
    return Take(file, None if transcript is None else str(transcript), notes)


def badness(row: ClipRow) -> tuple[float, float]:
    """A key to sort clips by, largest for the worst: number of faults plus error rate, then distance of the voice."""
    others = sum(1 for words in complaints(row) if not words.startswith("word error rate"))
    return others + (error_rate(row) or 0.0), -float(row.get("similarity") or 0.0)


def complaints(row: ClipRow) -> list[str]:
    """A clip's faults in words, from its row of an `Evaluation`."""
    found = []
    if (errors := error_rate(row)) is not None and errors > 0:
        found.append(f"word error rate {100 * errors:.0f} %")
    for column, words in (
        ("hit_cap", "did not stop"),
        ("short", "under a third of its length"),
        ("loops", "stuck in a loop"),
        ("leaks", "begins with the reference's words"),
    ):
        if row.get(column):
            found.append(words)
    if row.get("right_speaker") == 0:
        found.append("nearer to another speaker")
    return found


def error_rate(row: ClipRow) -> float | None:
    """The word error rate of a clip's row, as a fraction; None if its text has no words or there was no ASR."""
    errors, words = row.get("word_errors"), row.get("words")
    return float(errors) / float(words) if errors is not None and words else None


def audio_url(file: Path) -> tuple[str, float]:
    """A clip as a data URL, and its length in seconds. Raises DataError for a file that cannot be read."""
    clip = _audio(file)
    return clip.url, clip.seconds


class _Audio(NamedTuple):
    url: str  # a link, or MP3, which every browser plays and which keeps a page small
    seconds: float
    wave: str  # an SVG path of 2 * _WAVE_BARS by _WAVE_HEIGHT


def _audio(file: Path, link: str | None = None) -> _Audio:
    try:
        mono, rate = read_audio(file)
    except DataError as error:
        raise DataError(f"{file} cannot be put into a page: {error}") from error
    seconds = len(mono) / rate
    if link is not None:
        return _Audio(link, seconds, _wave(mono))
    if rate not in _MP3_RATES:
        mono, rate = soxr.resample(mono, rate, 24_000), 24_000
    buffer = io.BytesIO()
    soundfile.write(buffer, mono, rate, format="MP3")
    return _Audio("data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), seconds, _wave(mono))


def _wave(waveform: np.ndarray) -> str:
    """Vertical bars as high as the loudest sample of each stretch, the loudest of all in full height."""
    peaks = [float(np.abs(part).max(initial=0)) for part in np.array_split(waveform, _WAVE_BARS)]
    loudest = max([*peaks, 1e-6])
    middle = _WAVE_HEIGHT // 2
    heights = [max(0.5, middle * peak / loudest) for peak in peaks]
    return "".join(f"M{2 * i + 1} {middle - height:.1f}v{2 * height:.1f}" for i, height in enumerate(heights))


def marked(text: str, transcript: str, *, at_most: int) -> list[Piece]:
    """A transcript as stretches of words, with missed words inserted where they are missing.

    Case, punctuation and the encoding of accents do not count. If little is right, all of it is wrong: words that match
    by chance would only confuse. After `at_most` words it ends with the number of words left.
    """
    want, got = _tokens(text), _tokens(transcript)
    matcher = SequenceMatcher(None, [key for key, _, _ in want], [key for key, _, _ in got], autojunk=False)
    if got and matcher.ratio() < _MIN_RIGHT:
        return _shortened("wrong", got, 0, len(got), at_most)
    pieces: list[Piece] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal" and b > a:
            pieces.append(_piece("missed", want[a:b]))
        if d > c:
            pieces += _shortened("right" if kind == "equal" else "wrong", got, c, d, at_most)
        if d > at_most:
            break
    return pieces


def item_view(item: Item, columns: Sequence[str], prefix: str) -> dict[str, Any]:
    """A text with its clips for the template; `prefix` makes the ids of its players unique in the page."""
    takes = [
        None if take is None else {"column": column, "id": f"{prefix}-{i}", **_take_view(item.text, take)}
        for i, (column, take) in enumerate(zip(columns, item.takes, strict=True))
    ]
    longest = max((take["seconds"] for take in takes if take is not None), default=0.0)
    return {"item": item, "columns": columns, "takes": takes, "longest": longest or 1.0}


def _take_view(text: str, take: Take) -> dict[str, Any]:
    audio = _audio(take.file, take.link)
    pieces = None if take.transcript is None else marked(text, take.transcript, at_most=_MAX_TRANSCRIPT_WORDS)
    return {**audio._asdict(), "pieces": pieces, "notes": take.notes}


def _shortened(
    kind: Literal["right", "wrong"], words: Sequence[tuple[str, str, str]], start: int, end: int, at_most: int
) -> list[Piece]:
    """The words from `start` to `end` as one piece, cut at `at_most`; then a second piece says how many are left."""
    pieces = [_piece(kind, words[start : min(end, at_most)])] if start < at_most else []
    if end > at_most:
        pieces.append(Piece("wrong", f"… and {len(words) - at_most} more"))
    return pieces


def _tokens(text: str) -> list[tuple[str, str, str]]:
    """For each word its key for comparing, its spelling, and the space after it. Punctuation alone is not a word."""
    found = [(_key(word), word, " " if space else "") for word, space in _TOKEN.findall(text)]
    return [token for token in found if token[0]]


def _key(word: str) -> str:
    folded = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


def _piece(kind: Literal["right", "wrong", "missed"], tokens: Sequence[tuple[str, str, str]]) -> Piece:
    written = "".join(word + space for _, word, space in tokens)
    spaced = any(space for _, _, space in tokens) or not re.fullmatch(rf"[{_UNSPACED}\W]*", written)
    return Piece(kind, written.strip(), " " if spaced else "")
