"""What a store holds, for the person who made it: all of it in numbers, one row, and how a row sounds."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from higgstune.data.entry import Entry, stored_entries
from higgstune.data.measures import Measures
from higgstune.data.origin import origin_as_json
from higgstune.data.outliers import Outlier, store_outliers
from higgstune.data.shard_reader import REJECTED_NAME, SPLITS, StoreInfo
from higgstune.data.store import CodeStore
from higgstune.errors import CheckpointError, ConfigError, DataError

_TEXTS = 3
_REFUSED = 3
_BARS = 8
_WIDTHS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds of a bar


@dataclass(frozen=True)
class Amount:
    """Some of a store's rows."""

    rows: int
    seconds: float


@dataclass(frozen=True)
class StoreOverview:
    """A store as a whole; `dataclasses.asdict` gives JSON."""

    splits: dict[str, Amount]
    speakers: dict[str, Amount]  # the one with the most rows first; "" where none is named
    languages: dict[str, Amount]
    lengths: list[float]  # seconds: the shortest, the quartiles, the longest
    histogram: list[tuple[float, float, int]]  # seconds from, to; rows
    texts: dict[str, str]  # of a few rows spread over the store, by id
    refused: dict[str, int]  # of the last source, by reason
    first_refused: list[tuple[str, str]]  # where, and why
    outliers: dict[str, int]  # by limit
    outlier_rows: int
    origin: dict[str, list[dict[str, Any]]]  # what is stated of the recordings, as `origin_as_json`


@dataclass(frozen=True)
class RowOverview:
    """One row; `dataclasses.asdict` gives JSON."""

    number: int
    rows: int  # of the store
    id: str
    split: str
    text: str
    seconds: float
    speaker: str | None
    language: str | None
    scene: str | None
    reference: str | None  # the id of the row that is its reference
    turns: int | None  # messages of the conversation that it is taken from
    characters_per_second: float | None
    measures: Measures | None  # None: not measured, as an earlier version stored the row


def store_overview(folder: str | Path) -> StoreOverview:
    """The store in a folder as a whole. Raises DataError for one that cannot be read."""
    store = CodeStore.open(folder)
    entries = stored_entries(store)
    outliers = store_outliers(folder).outliers
    refused, first = _refused(store.folder)
    step = max(1, len(entries) // _TEXTS)
    lengths = np.array([entry.duration for entry in entries])
    return StoreOverview(
        splits={split: _amount(e for e in entries if e.split == split) for split in SPLITS},
        speakers=_by([(entry.speaker or "", entry) for entry in entries]),
        languages=_by([(entry.language or "", entry) for entry in entries]),
        lengths=[round(float(value), 2) for value in np.percentile(lengths, (0, 25, 50, 75, 100))],
        histogram=_histogram(lengths),
        texts={entry.id: entry.text for entry in entries[::step][:_TEXTS]},
        refused=refused,
        first_refused=first,
        outliers=dict(Counter(outlier.kind for outlier in outliers)),
        outlier_rows=_rows_of(outliers),
        origin=origin_as_json(store.origin()),
    )


def row_overview(folder: str | Path, row: int | str) -> RowOverview:
    """One row of the store in a folder, by number (train rows first) or id. Raises DataError, ConfigError."""
    store = CodeStore.open(folder)
    number = row_index(store, row)
    entry = stored_entries(store)[number]
    return RowOverview(
        number=number,
        rows=len(store),
        id=entry.id,
        split=str(entry.split),
        text=entry.text,
        seconds=entry.duration,
        speaker=entry.speaker,
        language=entry.language,
        scene=entry.scene,
        reference=entry.reference_id,
        turns=None if entry.messages is None else len(entry.messages),
        characters_per_second=entry.characters_per_second,
        measures=entry.measures,
    )


def row_waveform(folder: str | Path, row: int | str, codec: str | None = None) -> tuple[np.ndarray, int]:
    """How a row sounds after the codec that the store was encoded with: [samples] float32, and their rate in Hz.

    `codec` names it where it has moved. Raises DataError, ConfigError, CheckpointError.
    """
    from higgstune.codec import load_codec  # may bring torch

    store = CodeStore.open(folder)
    number = row_index(store, row)
    info: StoreInfo = store.info
    try:
        loaded = load_codec(codec or info.codec)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nName the codec that {folder} was encoded with by --codec") from error
    if loaded.revision != info.codec_revision:
        raise CheckpointError(
            f"{folder} was encoded with another codec ({info.codec}, revision {info.codec_revision}) than "
            f"{codec or info.codec} (revision {loaded.revision}): name that one with --codec"
        )
    return loaded.decode(store.codes(number)), loaded.sample_rate


def row_index(store: CodeStore, row: int | str) -> int:
    """The index of a row by its number or its id. Raises ConfigError for a number, DataError for an id that is not."""
    if not str(row).removeprefix("-").isdecimal() or len(str(row)) > 18:
        return store.index_of(str(row))
    if not 0 <= int(row) < len(store):
        raise ConfigError(f"--row {row}: {store.folder} has the rows 0 to {len(store) - 1}")
    return int(row)


def _amount(entries: Iterable[Entry]) -> Amount:
    found = [entry.duration for entry in entries]
    return Amount(len(found), round(sum(found), 2))


def _by(named: list[tuple[str, Entry]]) -> dict[str, Amount]:
    groups = defaultdict(list)
    for name, entry in named:
        groups[name].append(entry)
    return {name: _amount(groups[name]) for name in sorted(groups, key=lambda name: -len(groups[name]))}


def _histogram(lengths: np.ndarray) -> list[tuple[float, float, int]]:
    """Bars of one width, which is round, over all lengths."""
    spread = float(lengths.max() - lengths.min())
    width = next((width for width in _WIDTHS if spread / width <= _BARS - 1), spread / (_BARS - 1))
    first = np.floor(lengths.min() / width)
    bars = np.bincount((lengths // width - first).astype(int))
    return [(round((first + i) * width, 2), round((first + i + 1) * width, 2), int(n)) for i, n in enumerate(bars)]


def _refused(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    path = folder / REJECTED_NAME
    reasons: Counter[str] = Counter()
    first: list[tuple[str, str]] = []
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    found = json.loads(line)
                    reasons[found["reason"]] += 1
                    if len(first) < _REFUSED:
                        first.append((found["audio"] or found["location"], found["message"]))
                except (ValueError, LookupError, TypeError) as error:
                    raise DataError(f"{path} is damaged: prepare the source again") from error
    return dict(reasons.most_common()), first


def _rows_of(outliers: Iterable[Outlier]) -> int:
    return len({outlier.id for outlier in outliers})
