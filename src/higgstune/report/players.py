"""Clips to listen to side by side, with what was heard in them."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import soxr

from higgstune.errors import DataError
from higgstune.report.words import marked

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
