"""Rows that a person should look at: a measure beyond a limit, or the same audio with another text."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from higgstune.data.duplicates import find_duplicates
from higgstune.data.entry import Entry, stored_entries
from higgstune.data.measures import Limit, parse_limits
from higgstune.data.shard_writer import PrintOf
from higgstune.data.splits import find_near_duplicates
from higgstune.data.store import CodeStore
from higgstune.data.text import is_wide

SAME_AUDIO = "the same audio as another row, with another text"
_MIN_ROWS = 20  # of a language, for a median
_SAME_SPEECH = 0.85  # of the longer one's; the ends of prints match less well
_PAUSE = 0.5  # seconds that every clip may add to its speech: short ones differ by them alone


@dataclass(frozen=True)
class Outlier:
    """One reason to look at a row."""

    id: str
    kind: str  # the limit, or SAME_AUDIO
    value: float | None
    text: str
    other: str | None = None  # the row with the same audio


@dataclass(frozen=True)
class OutlierReport:
    """The outliers of a store by kind, the worst first."""

    outliers: list[Outlier]
    rows: int  # of the store
    not_measured: list[str]  # ids of rows from earlier versions, which have no measures


def store_outliers(folder: str | Path, limits: Sequence[str] | None = None) -> OutlierReport:
    """The outliers of a store; `limits` as those of `prepare`, None for those that it was last prepared with.

    Raises DataError for a store that cannot be read, ConfigError for a limit.
    """
    store = CodeStore.open(folder)
    entries = stored_entries(store)
    texts = store.info.settings.get("limits", ()) if limits is None else limits
    outliers = find_outliers(entries, parse_limits(texts), store.prints().get)
    return OutlierReport(outliers, len(entries), not_measured(entries))


def not_measured(entries: Iterable[Entry]) -> list[str]:
    """The ids of rows without measures."""
    return [entry.id for entry in entries if entry.measures is None]


def find_outliers(entries: Sequence[Entry], limits: Sequence[Limit], print_of: PrintOf) -> list[Outlier]:
    """Every row beyond a limit, by limit and the worst first; then rows with the same audio and another text.

    `print_of` gives the print of a clip by its audio hash, None where there is none.
    """
    values = [_values(entry, typical) for entry, typical in zip(entries, _medians(entries), strict=True)]
    found = []
    for limit in limits:
        beyond = [
            (limit.excess(value), entry, value)
            for entry, own in zip(entries, values, strict=True)
            if (value := own.get(limit.name)) is not None and limit.excess(value) > 0
        ]
        beyond.sort(key=lambda item: -item[0])
        found += [Outlier(entry.id, str(limit), value, entry.text) for _, entry, value in beyond]
    return found + list(_same_audio(entries, print_of))


def _values(entry: Entry, typical: float | None) -> dict[str, Any]:
    """The measures of a row by name; `typical` is the median of characters a second in its language."""
    values: dict[str, Any] = {} if entry.measures is None else dict(vars(entry.measures))
    rate = entry.characters_per_second
    if typical is None or rate is None:
        return values | {"characters_per_second": rate}
    silence = values.get("leading_silence", 0.0) + values.get("trailing_silence", 0.0)
    expected = rate * entry.duration / typical
    return values | {"pace": round((expected + _PAUSE) / (max(0.0, entry.duration - silence) + _PAUSE), 3)}


def _medians(entries: Sequence[Entry]) -> list[float | None]:
    """For each row the median of characters a second in its language; None where too few rows have that language.

    Ideographs and syllables hold more than letters do: a language that is not named is split by its script.
    """
    groups = [((entry.language or "").lower(), is_wide(entry.text)) for entry in entries]
    rates = defaultdict(list)
    for group, entry in zip(groups, entries, strict=True):
        if (rate := entry.characters_per_second) is not None:
            rates[group].append(rate)
    medians = {group: median(found) for group, found in rates.items() if len(found) >= _MIN_ROWS}
    return [medians.get(group) for group in groups]


def _same_audio(entries: Sequence[Entry], print_of: PrintOf) -> Iterator[Outlier]:
    """Each row whose audio is that of another row, or nearly so, with other words."""
    clips: dict[str, list[Entry]] = defaultdict(list)  # by audio hash
    for entry in entries:
        clips[entry.audio_sha256].append(entry)
    near = find_near_duplicates(entry.recording for entry in entries if entry.audio_sha256 == entry.recording_sha256)
    for first, second in _same_speech(clips, print_of):
        near.setdefault(first, set()).add(second)
        near.setdefault(second, set()).add(first)
    for entry in entries:
        hashes = (entry.audio_sha256, *sorted(near.get(entry.audio_sha256, ())))
        alike = (other for sha256 in hashes for other in clips[sha256])
        other = next((other for other in alike if _words(other) != _words(entry)), None)
        if other is not None:
            yield Outlier(entry.id, SAME_AUDIO, None, entry.text, other.id)


def _same_speech(clips: Mapping[str, Sequence[Entry]], print_of: PrintOf) -> Iterator[tuple[str, str]]:
    """Pairs of clips, by audio hash, with the same speech from its beginning to its end, of 1.5 s and more."""
    prints = {sha256: found for sha256 in clips if (found := print_of(sha256))}
    hashes = list(prints)
    for pair in find_duplicates(list(prints.values()), whole=True):
        one, other = hashes[pair.first], hashes[pair.second]
        if pair.overlap >= _SAME_SPEECH * max(_speech_seconds(clips[one][0]), _speech_seconds(clips[other][0])):
            yield one, other


def _speech_seconds(entry: Entry) -> float:
    """From the first speech of a clip to its last."""
    measures = entry.measures
    return entry.duration - (measures.leading_silence + measures.trailing_silence if measures else 0.0)


def _words(entry: Entry) -> str:
    return "".join(character for character in entry.text.casefold() if character.isalnum())
