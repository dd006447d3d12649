"""Clips to listen to side by side, with what was heard in them."""

import base64
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

import soundfile
import soxr

from higgstune.errors import DataError

# Scripts without spaces are compared by character.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_ALIKE = 0.3  # of the words, at least
_TOKEN = re.compile(rf"([{_UNSPACED}]|[^\s{_UNSPACED}]+)(\s*)")


@dataclass(frozen=True)
class Piece:
    """A stretch of words: as they should be, wrong (heard, but not in the text), or missed (in the text alone)."""

    kind: Literal["right", "wrong", "missed"]
    words: str
    space: str = " "  # after it


def marked(text: str, heard: str, *, at_most: int) -> list[Piece]:
    """What was heard as stretches, with the words that were missed where they are missing.

    Case, punctuation and accents' encoding do not count. Where little is right, all that was heard is wrong: words that
    match by chance would only confuse. After `at_most` words it ends with how many are left.
    """
    want, got = _tokens(text), _tokens(heard)
    matcher = SequenceMatcher(None, [key for key, _, _ in want], [key for key, _, _ in got], autojunk=False)
    if got and matcher.ratio() < _ALIKE:
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


def _shortened(
    kind: Literal["right", "wrong"], words: Sequence[tuple[str, str, str]], start: int, end: int, at_most: int
) -> list[Piece]:
    """The words from `start` to `end` as one piece; where they reach beyond `at_most`, how many are left is another."""
    pieces = [_piece(kind, words[start : min(end, at_most)])] if start < at_most else []
    if end > at_most:
        pieces.append(Piece("wrong", f"… and {len(words) - at_most} more"))
    return pieces


def _tokens(text: str) -> list[tuple[str, str, str]]:
    """Each word as it is compared, as it is written, and the space after it. Punctuation alone is no word."""
    found = [(_key(word), word, " " if space else "") for word, space in _TOKEN.findall(text)]
    return [token for token in found if token[0]]


def _key(word: str) -> str:
    folded = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


def _piece(kind: Literal["right", "wrong", "missed"], tokens: Sequence[tuple[str, str, str]]) -> Piece:
    written = "".join(word + space for _, word, space in tokens)
    spaced = any(space for _, _, space in tokens) or not re.fullmatch(rf"[{_UNSPACED}\W]*", written)
    return Piece(kind, written.strip(), " " if spaced else "")


_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_WORDS_OF_WHAT_WAS_HEARD = 80  # a judge that loops fills pages


@dataclass(frozen=True)
class Take:
    """One clip: its file, what the ASR heard in it (None: nobody listened), and notes about it."""

    file: Path
    heard: str | None = None
    notes: Sequence[str] = ()


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
    """Clips to listen to side by side, in the order given; those after the first `open_at_first` are folded away."""

    title: str
    columns: Sequence[str]
    items: Sequence[Item]
    note: str = ""
    open_at_first: int = 8


def complaints(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a clip, in words, from its row of an `Evaluation`; empty where nothing stands out."""
    found = []
    if (errors := error_rate(row)) is not None and errors > 0:
        found.append(f"word error rate {100 * errors:.0f} %")
    for column, words in (
        ("hit_cap", "did not stop"),
        ("short", "shorter than 0.3 s"),
        ("loops", "stuck in a loop"),
        ("leaks", "begins with the reference's words"),
    ):
        if row.get(column):
            found.append(words)
    if row.get("right_speaker") == 0:
        found.append("nearer to another speaker")
    return found


def badness(row: Mapping[str, Any]) -> tuple[float, float]:
    """How bad a clip is, to sort by, the worst the largest: faults and error rate, then how far the voice is."""
    others = sum(1 for words in complaints(row) if not words.startswith("word error rate"))
    return others + (error_rate(row) or 0.0), -float(row.get("similarity") or 0.0)


def take_of(row: Mapping[str, Any], file: Path) -> Take:
    """A clip with its row of an `Evaluation`: what was heard, and its numbers as notes."""
    notes = complaints(row)
    if row.get("similarity") is not None:
        notes.append(f"similarity {row['similarity']:.2f}")
    if row.get("naturalness") is not None:
        notes.append(f"naturalness {row['naturalness']:.1f}")
    return Take(file, row.get("heard"), notes)


def error_rate(row: Mapping[str, Any]) -> float | None:
    """The word error rate of a clip's row, a share; None where it has no words or nobody listened."""
    errors, words = row.get("word_errors"), row.get("words")
    return errors / words if errors is not None and words else None


def section_view(section: Section, prefix: str) -> dict[str, Any]:
    """A section as the template shows it; `prefix` begins the ids of its players, which are unique in the page."""
    items = [_item_view(item, section.columns, f"{prefix}-{i}") for i, item in enumerate(section.items)]
    shown, folded = items[: section.open_at_first], items[section.open_at_first :]
    return {"title": section.title, "note": section.note, "id": prefix, "items": shown, "folded": folded}


def heard(sections: Sequence[Section]) -> bool:
    """Whether any clip comes with what was heard in it."""
    takes = [take for section in sections for item in section.items for take in item.takes]
    return any(take is not None and take.heard is not None for take in takes)


def audio_url(file: Path) -> tuple[str, float]:
    """An MP3 data URL, which every browser plays and which keeps a page small, and the clip's seconds.

    Raises DataError for a file that cannot be read.
    """
    try:
        waveform, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"{file} cannot be put into a page: {error}") from error
    mono, seconds = waveform.mean(axis=1), len(waveform) / rate
    if rate not in _MP3_RATES:
        mono, rate = soxr.resample(mono, rate, 24_000), 24_000
    buffer = io.BytesIO()
    soundfile.write(buffer, mono, rate, format="MP3")
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), seconds


def _item_view(item: Item, columns: Sequence[str], prefix: str) -> dict[str, Any]:
    takes = [
        None if take is None else {"column": column, "id": f"{prefix}-{i}", **_take_view(item.text, take)}
        for i, (column, take) in enumerate(zip(columns, item.takes, strict=True))
    ]
    return {"item": item, "columns": columns, "takes": takes}


def _take_view(text: str, take: Take) -> dict[str, Any]:
    url, seconds = audio_url(take.file)
    pieces = None if take.heard is None else marked(text, take.heard, at_most=_WORDS_OF_WHAT_WAS_HEARD)
    return {"url": url, "seconds": seconds, "heard": take.heard, "pieces": pieces, "notes": take.notes}
