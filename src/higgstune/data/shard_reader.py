"""The format of a code store, and its reader, which checks every byte.

    STORE/store.json                  the index: how the store was made, and its shards with their checksums
    STORE/SPLIT-NNNNN-HASH.parquet    a shard, with the columns of `store_schema`

Parquet has checksums for the values of its pages, but not for their headers nor for the footer, where a flipped bit can
turn into other values. So opening a shard reads it once as a whole, compares it with the SHA-256 in the index, and
keeps a checksum of each block; whatever is read later is compared with these. There is no memory map: a mapped file
that is cut short kills the process that reads it.
"""

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from higgstune.errors import DataError
from higgstune.inputs import INDEX_NAME, check_store

SCHEMA_VERSION = 1
_MAX_INDEX = 1 << 28  # bytes: that of a million rows has thirty thousand
REJECTED_NAME = "rejected.jsonl"
PARTIAL_NAME = ".partial"
LENGTHS_PREFIX = ".lengths-"  # of files with the lengths of examples: see `batch.lengths`
SPLITS = ("train", "validation")
SHARD_NAME = re.compile(r"(train|validation)-\d{5}-[0-9a-f]{12}\.parquet")
CODE_COLUMNS = ("codes", "reference_codes", "context_codes")
PRINT = "print"  # the column of prints
ROWS_PER_GROUP = 64  # the rows that one random access has to decode
ROWS_PER_SHARD = 8192
_BLOCK = 1 << 16  # bytes of a file with a checksum of their own


@dataclass(frozen=True)
class DroppedRow:
    """A row that was taken out of a store, and does not come back with its source. It holds no text."""

    id: str
    audio_sha256: str
    text_sha256: str
    source_key: str


@dataclass(frozen=True)
class StoreInfo:
    """How a code store was made, and how much is in it."""

    codec: str  # its name or folder, as it was given
    codec_revision: str
    sample_rate: int  # Hz
    frame_rate: float  # frames per second
    num_codebooks: int
    codebook_size: int
    text_normalization: str
    higgstune_version: str
    rows: dict[str, int]  # by split
    hours: dict[str, float]  # by split
    settings: dict[str, Any] = field(default_factory=dict)  # of the last preparation
    model_type: str | None = None  # of the checkpoint that it was prepared for; None: Higgs Audio v2, or not named
    dropped: list[DroppedRow] = field(default_factory=list)


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a store."""

    name: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreIndex:
    """`store.json`: the shards that belong to the store, and how they were made. No other file belongs to it."""

    info: StoreInfo
    shards: list[Shard]

    def to_json(self) -> str:
        """The content of `store.json`."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


_STORE_INDEX = TypeAdapter(StoreIndex)


def read_index(folder: Path) -> StoreIndex:
    """The index of the store in a folder. Raises DataError where it is missing, damaged or of another version."""
    check_store(folder)
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_MAX_INDEX))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): prepare the store again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}, but this Higgstune reads {SCHEMA_VERSION}: prepare it again"
        )
    try:
        shards = [Shard(**shard) for shard in data["shards"]]
        dropped = [DroppedRow(**row) for row in data["info"].get("dropped", [])]
        index = StoreIndex(StoreInfo(**data["info"] | {"dropped": dropped}), shards)
        _STORE_INDEX.validate_json(json.dumps(asdict(index)), strict=True)  # types, also of what is in lists
    except (AttributeError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{path} is damaged ({error}): prepare the store again") from error
    settings = index.info.settings
    limits = settings.get("limits", [])
    if not isinstance(settings.get("model"), str | None):
        raise DataError(f"{path} is damaged (info.settings.model must be a string): prepare the store again")
    if not isinstance(limits, list) or not all(isinstance(limit, str) for limit in limits):
        raise DataError(f"{path} is damaged (info.settings.limits must be a list of strings): prepare the store again")
    if foreign := [shard.name for shard in shards if not SHARD_NAME.fullmatch(shard.name)]:
        raise DataError(f"{path} names {foreign[0]}, which is not a shard of a store: prepare the store again")
    if odd := [shard.name for shard in shards if not shard.name.startswith(f"{shard.split}-")]:
        raise DataError(f"{path} has {odd[0]} in another split than its name: prepare the store again")
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} lists {twice} twice: prepare the store again")
    held = {split: sum(shard.rows for shard in shards if shard.split == split) for split in SPLITS}
    claimed = {split: index.info.rows.get(split, 0) for split in SPLITS}
    if claimed != held:
        raise DataError(f"{path} is damaged (it has {claimed} rows, its shards {held}): prepare the store again")
    return index


def store_schema(num_codebooks: int) -> pa.Schema:
    """The columns of a shard. Codes are [frames, num_codebooks] uint16."""
    codes = pa.list_(pa.list_(pa.uint16(), num_codebooks))
    part = pa.struct({"type": pa.string(), "text": pa.string(), "url": pa.string(), "as": pa.string()})
    message = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    columns: dict[str, pa.DataType] = {
        "id": pa.string(),
        "text": pa.string(),
        "speaker": pa.string(),
        "language": pa.string(),
        "scene": pa.string(),
        "duration": pa.float64(),  # seconds of the recording, before the codec rounds it to frames
        "frames": pa.int32(),
        "codes": codes,
        "reference_id": pa.string(),  # the row of the same store that is the reference
        "reference_text": pa.string(),
        "reference_codes": codes,  # null where the row of `reference_id` has them
        "messages": pa.list_(message),
        "start_index": pa.int32(),
        "context_codes": pa.list_(codes),
        "context_frames": pa.int32(),  # of the reference or of all context audio
        "audio_sha256": pa.string(),  # of the decoded segment
        "recording_sha256": pa.string(),  # of the whole decoded file
        "reference_sha256": pa.string(),  # of an explicit reference; null for a paired one
        "context_sha256": pa.list_(pa.string()),
        "target_recordings": pa.list_(pa.string()),  # recordings of all targets of this row
        "linked_recordings": pa.list_(pa.string()),  # recordings of its explicit reference and other context audio
        "recording_samples": pa.int64(),
        "recording_rate": pa.int32(),  # Hz
        "recording_sketch": pa.list_(pa.float32()),  # see `splits.find_near_duplicates`
        "source_key": pa.string(),  # names the row in its source
        "characters_per_second": pa.float64(),  # spoken ones, see `text.spoken_length`
        # What follows is described in `measures.Measures`, and null where an earlier version stored the row.
        "leading_silence": pa.float64(),  # seconds
        "trailing_silence": pa.float64(),
        "level": pa.float64(),  # dBFS
        "peak": pa.float64(),
        "clipped": pa.float64(),  # share of samples
        "dc": pa.float64(),  # share of full scale
        "noise_floor": pa.float64(),  # dBFS
        "snr": pa.float64(),  # dB
        "bandwidth": pa.float64(),  # Hz
        "channels": pa.int32(),
        "silent_channels": pa.int32(),
        "mix_loss": pa.float64(),  # dB
        "longest_pause": pa.float64(),  # seconds
        PRINT: pa.binary(),  # of the target, see `duplicates.print_of`
        # What is stated of the recordings, null where nothing is.
        "source": pa.string(),
        "licence": pa.string(),
        "consent": pa.string(),
    }
    return pa.schema(list(columns.items()))


class CheckedFile(io.RawIOBase):
    """The bytes of a file as they were when it was opened; a change is an OSError.

    The open file outlives its name: a file that is deleted or replaced can still be read to the end. Forked processes
    may read it at the same time.
    """

    def __init__(self, path: Path, size: int, sha256: str) -> None:
        """Raises OSError where the file is not the one in the index: its size in bytes, the SHA-256 of the whole."""
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        super().__init__()
        self._at = 0
        self._checksums: list[int] = []
        self._last: tuple[int, bytes] = (-1, b"")  # small columns are next to each other
        try:
            self._size = os.fstat(self._file).st_size
            if self._size != size:
                raise OSError(f"{self._size} bytes, but the store's index says {size}")
            self._check_whole(sha256)
        except OSError:
            self.close()
            raise

    def _check_whole(self, sha256: str) -> None:
        whole = hashlib.sha256()
        for offset in range(0, self._size, _BLOCK):
            block = _read_at(self._file, offset)
            whole.update(block)
            self._checksums.append(zlib.crc32(block))
        if whole.hexdigest() != sha256:
            raise OSError("its SHA-256 is not the one in the store's index")

    def readable(self) -> bool:
        """As for every file."""
        return True

    def seekable(self) -> bool:
        """As for every file."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As for every file."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """As for every file."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As for every file. Raises OSError where the file has changed since it was opened."""
        end = self._size if size < 0 else min(self._at + size, self._size)
        first = self._at // _BLOCK
        blocks = [self._block(number) for number in range(first, -(-end // _BLOCK))]
        data = b"".join(blocks)[self._at - first * _BLOCK : end - first * _BLOCK]
        self._at = max(self._at, end)
        return data

    def _block(self, number: int) -> bytes:
        if self._last[0] != number:
            block = _read_at(self._file, number * _BLOCK)
            if zlib.crc32(block) != self._checksums[number]:
                raise OSError("it has changed since it was opened")
            self._last = (number, block)
        return self._last[1]

    def close(self) -> None:
        """Close the file."""
        if not self.closed and hasattr(self, "_file"):  # none where the path could not be opened
            os.close(self._file)
        super().close()


def codes_of(value: pa.Scalar) -> Any:
    """A value of a codes column: [frames, num_codebooks] uint16, a list of such arrays, or None."""
    if not value.is_valid:
        return None
    values = value.values
    if pa.types.is_list(values.type):
        return [codes_of(inner) for inner in values]
    return np.array(values.flatten(), dtype=np.uint16).reshape(-1, values.type.list_size)


def read_metadata(folder: Path, shards: list[Shard], files: list[pq.ParquetFile]) -> pa.Table:
    """Every column but codes and prints, of all shards in order. Raises DataError for a store without rows."""
    tables = []
    for shard, file in zip(shards, files, strict=True):
        names = [name for name in file.schema_arrow.names if name not in (*CODE_COLUMNS, PRINT)]
        with named_in_errors(folder, shard):
            tables.append(file.read(columns=names, use_threads=False))
    if not tables:
        raise DataError(f"{folder} is a code store without rows: prepare it again")
    # An earlier version's shards lack columns.
    return pa.concat_tables(tables, promote_options="default").combine_chunks()


def open_shard(folder: Path, shard: Shard) -> pq.ParquetFile:
    """Open one shard and check all of it. Raises DataError where it is missing or not the one in the index."""
    path = folder / shard.name
    with named_in_errors(folder, shard):
        file = pq.ParquetFile(CheckedFile(path, shard.bytes, shard.sha256))
    if file.metadata.num_rows != shard.rows:
        raise DataError(f"{path} has {file.metadata.num_rows} rows, but the store's index says {shard.rows}")
    return file


@contextmanager
def named_in_errors(folder: Path, shard: Shard) -> Iterator[None]:
    """Turn the errors of a shard's file into a DataError that names it."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder / shard.name} is missing or damaged ({error}): copy or prepare it again") from error


def _read_at(file: int, offset: int) -> bytes:
    """A block of a file, or what there is of it, without moving the position of other readers."""
    if hasattr(os, "pread"):
        return os.pread(file, _BLOCK, offset)
    os.lseek(file, offset, os.SEEK_SET)  # Windows, where no forked process has the same file
    return os.read(file, _BLOCK)
