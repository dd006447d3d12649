"""A prepared code store: its rows by index, by split, without their codes, and mixed with rows of another store."""

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa

from higgstune.data.origin import ORIGIN, Origin, not_stated
from higgstune.data.shard_reader import (
    CODE_COLUMNS,
    PRINT,
    ROWS_PER_GROUP,
    SPLITS,
    StoreIndex,
    codes_of,
    named_in_errors,
    open_shard,
    read_index,
    read_metadata,
)
from higgstune.errors import DataError

_METADATA_FIELDS = (
    *("id", "text", "speaker", "language", "scene", "duration", "reference_id", "reference_text"),
    *("reference_sha256", "context_sha256", "start_index", "audio_sha256", "recording_sha256"),
)
_VALUES = (*_METADATA_FIELDS, "messages", "frames", "context_frames")
_CACHED_GROUPS = 256  # about 0.3 MB each for clips of ten seconds
_READING = Lock()  # loaders read in threads of their own, and a file has one position


@dataclass(frozen=True)
class Row:
    """One training row. Codes are [frames, num_codebooks] uint16; `codes` is the target's."""

    id: str
    text: str  # the words of the target
    speaker: str | None
    language: str | None
    scene: str | None
    split: str
    duration: float  # seconds
    codes: np.ndarray
    reference_id: str | None  # the row of the store that is the reference, where it is one
    reference_text: str | None
    reference_codes: np.ndarray | None
    messages: list[dict[str, Any]] | None  # a full conversation with the target; None for an utterance
    context_codes: list[np.ndarray]  # a conversation's audio without the target, in order of appearance
    start_index: int | None  # the first message of a conversation whose audio is a target
    audio_sha256: str
    recording_sha256: str
    reference_sha256: str | None = None  # audio hash of the reference
    context_sha256: list[str] = field(default_factory=list)  # audio hashes of `context_codes`


@dataclass(frozen=True)
class Context:
    """The reference and context audio of a row, by audio hash."""

    messages: list[dict[str, Any]] | None
    reference_sha256: str | None
    context_sha256: list[str]


class SplitView(Sequence[Row]):
    """A range of a store's rows, as a data set for a trainer."""

    def __init__(self, store: "CodeStore", indices: range) -> None:
        self.store = store
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "SplitView": ...
    def __getitem__(self, index: int | slice) -> "Row | SplitView":
        if isinstance(index, slice):
            return SplitView(self.store, self.indices[index])
        return self.store.row(self.indices[index])

    @property
    def frames(self) -> np.ndarray:
        """The frames of each target, [rows] int64, without reading codes."""
        return self._lengths("frames")

    @property
    def context_frames(self) -> np.ndarray:
        """The frames of each row's reference or context audio, [rows] int64, without reading codes."""
        return self._lengths("context_frames")

    def outline(self, index: int) -> Row:
        """One row without its codes, see `outlines`."""
        return self.store.outline_of(self.indices[index])

    def outlines(self) -> Iterator[Row]:
        """The rows with placeholders for codes, of the right shape; only for conversations the codes are read.

        For code that needs only lengths: a hundred times as fast as reading the rows.
        """
        for index in range(len(self)):
            yield self.outline(index)

    def _lengths(self, column: str) -> np.ndarray:
        # Its `to_numpy` would import pandas, which takes longer than opening a store.
        values = np.from_dlpack(self.store.metadata[column].combine_chunks())
        return values.astype(np.int64)[self.indices.start : self.indices.stop : self.indices.step]


class CodeStore(SplitView):
    """Rows of all splits: `store[i]`, `store.split("train")[i]`; train first, in order of preparation."""

    def __init__(self, folder: Path, index: StoreIndex) -> None:
        """Use `CodeStore.open`."""
        self.folder = folder
        self.info = index.info
        self.shards = sorted(index.shards, key=lambda shard: (SPLITS.index(shard.split), shard.name))
        # All are opened now and stay open: preparing the store again, or deleting it, does not affect a running reader.
        self._files = {number: open_shard(folder, shard) for number, shard in enumerate(self.shards)}
        self.metadata = read_metadata(folder, self.shards, list(self._files.values()))  # but codes and prints
        self._ends = list(accumulate(shard.rows for shard in self.shards))
        self._ids: dict[str, int] | None = None
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        super().__init__(self, range(self.metadata.num_rows))

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the store in a folder and read all of it once. Raises DataError where it is missing or damaged."""
        folder = Path(folder)
        index = read_index(folder)
        try:
            return cls(folder, index)
        except DataError:
            newer = read_index(folder)
            if newer == index:
                raise
            return cls(folder, newer)  # a preparation ended in the meantime and deleted the old shards

    def split(self, name: str) -> SplitView:
        """The rows of one split, which may be empty. Raises DataError for an unknown split."""
        if name not in SPLITS:
            raise DataError(f"there is no split {name!r}: one of {', '.join(SPLITS)}")
        rows = sum(shard.rows for shard in self.shards if shard.split == name)
        first = 0 if name == SPLITS[0] else len(self) - rows
        return SplitView(self, range(first, first + rows))

    def rows(self, split: str | None = None) -> Iterator[Row]:
        """Every row, or those of one split, in order."""
        yield from self if split is None else self.split(split)

    def index_of(self, row_id: str) -> int:
        """The index of a row by its id. Raises DataError where there is none."""
        if self._ids is None:
            self._ids = {key: index for index, key in enumerate(self.metadata["id"].to_pylist())}
        if row_id not in self._ids:
            raise DataError(f"{self.folder} has no row with the id {row_id!r}")
        return self._ids[row_id]

    def codes(self, index: int) -> np.ndarray:
        """The target's codes of a row, [frames, num_codebooks] uint16."""
        codes = self.codes_in(index, "codes")
        assert isinstance(codes, np.ndarray)
        return codes

    def row(self, index: int) -> Row:
        """One row by its index, with its reference's codes.

        Raises DataError, with the row and the file, for a shard that was damaged since the store was opened.
        """
        values = self._values(index)
        try:
            reference_codes = self.codes_in(index, "reference_codes")
            if reference_codes is None and values["reference_id"] is not None:
                reference_codes = self.codes(self.index_of(values["reference_id"]))
            context_codes = self.codes_in(index, "context_codes") or []
            return self._row(index, values, self.codes(index), reference_codes, context_codes)
        except DataError as error:
            split = self.shards[self._shard_of(index)].split
            raise DataError(f"row {values['id']} of the {split} split: {error}") from error

    def outline_of(self, index: int) -> Row:
        """One row by its index, see `outlines`."""
        values = self._values(index)
        if values["messages"] is not None:
            return self.row(index)
        reference = self._shape_only(values["context_frames"]) if values["context_frames"] else None
        return self._row(index, values, self._shape_only(values["frames"]), reference, [])

    def _values(self, index: int) -> dict[str, Any]:
        """Everything but codes, with text and hash of a reference that is a row itself."""
        # Value by value: a slice of the whole table costs three times as much.
        values = {name: self.metadata[name][index].as_py() for name in _VALUES}
        if values["reference_id"] is not None:
            other = self.index_of(values["reference_id"])
            values["reference_text"] = values["reference_text"] or self.metadata["text"][other].as_py()
            values["reference_sha256"] = self.metadata["audio_sha256"][other].as_py()
        return values

    def _shape_only(self, frames: int) -> np.ndarray:
        return np.broadcast_to(np.uint16(0), (frames, self.info.num_codebooks))

    def _row(
        self,
        index: int,
        values: dict[str, Any],
        codes: np.ndarray,
        reference_codes: np.ndarray | None,
        context_codes: list[np.ndarray],
    ) -> Row:
        return Row(
            **{name: values[name] for name in _METADATA_FIELDS},
            split=self.shards[self._shard_of(index)].split,
            codes=codes,
            reference_codes=reference_codes,
            messages=_without_nulls(values["messages"]),
            context_codes=context_codes,
        )

    def origin(self) -> Origin:
        """What is stated of the recordings."""
        found = not_stated(len(self))
        for name in set(ORIGIN) & set(self.metadata.column_names):  # an earlier version had none of these columns
            counts = self.metadata[name].value_counts().to_pylist()
            found[name] = Counter({item["values"]: item["counts"] for item in counts})
        return found

    def contexts(self) -> Iterator[Context]:
        """The reference and context audio of every row, in order, without reading codes."""
        hashes = self.metadata["audio_sha256"].to_pylist()
        columns = ("messages", "reference_id", "reference_sha256", "context_sha256")
        for values in self.metadata.select(columns).to_pylist():
            reference = values["reference_sha256"]
            if reference is None and values["reference_id"] is not None:
                reference = hashes[self.index_of(values["reference_id"])]
            yield Context(_without_nulls(values["messages"]), reference, values["context_sha256"])

    def prints(self) -> dict[str, bytes]:
        """The prints of clips by audio hash, see `duplicates.print_of`; without those that an earlier version stored.

        Raises DataError for a shard that was damaged since the store was opened.
        """
        found: dict[str, bytes | None] = {}
        for number, file in self._files.items():
            if PRINT in file.schema_arrow.names:
                with _READING, named_in_errors(self.folder, self.shards[number]):
                    table = file.read(columns=["audio_sha256", PRINT], use_threads=False)
                found |= zip(*(column.to_pylist() for column in table.columns), strict=True)
        return {sha256: value for sha256, value in found.items() if value is not None}

    def _shard_of(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def codes_in(self, index: int, column: str) -> Any:
        """The codes of a row in `codes`, `reference_codes` (an array or None) or `context_codes` (a list of arrays)."""
        shard = self._shard_of(index)
        local = index - (self._ends[shard] - self.shards[shard].rows)
        table = self._group(shard, local // ROWS_PER_GROUP)
        return codes_of(table[column].chunk(0)[local % ROWS_PER_GROUP])

    def _group(self, shard: int, group: int) -> pa.Table:
        key = (shard, group)
        with _READING:
            if key not in self._groups:
                if shard not in self._files:
                    self._files[shard] = open_shard(self.folder, self.shards[shard])
                with named_in_errors(self.folder, self.shards[shard]):
                    table = self._files[shard].read_row_group(group, list(CODE_COLUMNS), use_threads=False)
                self._groups[key] = table.combine_chunks()
            self._groups.move_to_end(key)
            while len(self._groups) > _CACHED_GROUPS:
                self._groups.popitem(last=False)
            return self._groups[key]

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and what was read from them, when a store is pickled for another process."""
        return self.__dict__ | {"_files": {}, "_groups": OrderedDict()}


def _without_nulls(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Messages whose parts have only their own keys: a Parquet structure has every column in every part."""
    if messages is None:
        return None
    return [
        {
            "role": message["role"],
            "content": [{k: v for k, v in part.items() if v is not None} for part in message["content"]],
        }
        for message in messages
    ]


class MixedRows(Sequence[Row]):
    """All rows of one split, then as many rows of another store as make a given share of the whole.

    The rows of the other store are drawn once, by the seed, and none twice before all were drawn: every epoch has the
    same rows.
    """

    def __init__(self, own: SplitView, replayed: SplitView, *, share: float, seed: int) -> None:
        """`share` is in (0, 1), of all rows; at least one row is replayed."""
        self.own = own
        self.replayed = replayed
        wanted = max(1, round(len(own) * share / (1 - share)))
        generator = np.random.default_rng((seed, 1))
        rounds = [generator.permutation(len(replayed)) for _ in range(-(-wanted // len(replayed)))]
        self.drawn: list[int] = np.concatenate(rounds)[:wanted].tolist()

    def __len__(self) -> int:
        return len(self.own) + len(self.drawn)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> "Row | list[Row]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        own = len(self.own)
        return self.own[position] if position < own else self.replayed[self.drawn[position - own]]

    def outlines(self) -> Iterator[Row]:
        """As `SplitView.outlines`."""
        yield from self.own.outlines()
        for index in self.drawn:
            yield self.replayed.outline(index)
