"""Reading the Parquet files of a store, none of whose bytes is believed without a check.

Parquet has checksums for the values of its pages, not for their headers nor for the footer, where a bit that flips can
pass for other values. So a shard is read once as a whole when it is opened, against the SHA-256 in the store's index,
and a checksum of each block is kept: what is read later is compared with it. There is no memory map: a mapped file that
is cut short kills the process that looks at it.
"""

import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from higgstune.data.schema import CODE_COLUMNS, Shard
from higgstune.errors import DataError

_BLOCK = 1 << 16  # bytes


class CheckedFile(io.RawIOBase):
    """A file's bytes, as they were when it was opened; other ones are an OSError.

    The open file outlives its name: one that is deleted or replaced can be read to the end. Processes that are forked
    may read it at the same time.
    """

    def __init__(self, path: Path, size: int, sha256: str) -> None:
        """Raises OSError where the file is not the one of the index: `size` in bytes, `sha256` of all of it."""
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        super().__init__()
        self._at = 0
        self._checksums: list[int] = []
        self._last: tuple[int, bytes] = (-1, b"")  # small columns are next to each other
        try:
            self._size = os.fstat(self._file).st_size
            if self._size != size:
                raise OSError(f"{self._size} bytes, not as long as the store's index says: {size}")
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
        """As every file's."""
        return True

    def seekable(self) -> bool:
        """As every file's."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As every file's."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """As every file's."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As every file's. Raises OSError where the file has changed since it was opened."""
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
        """Let the file go."""
        if not self.closed and hasattr(self, "_file"):  # there is none where the path could not be opened
            os.close(self._file)
        super().close()


def codes_of(cell: pa.Scalar) -> Any:
    """A cell of a codes column: [frames, num_codebooks] uint16, a list of such arrays, or None."""
    if not cell.is_valid:
        return None
    values = cell.values
    if pa.types.is_list(values.type):
        return [codes_of(inner) for inner in values]
    return np.array(values.flatten(), dtype=np.uint16).reshape(-1, values.type.list_size)


def read_light_columns(folder: Path, shards: list[Shard], files: list[pq.ParquetFile]) -> pa.Table:
    """Everything but the codes, of all shards in order. Raises DataError for a store without any."""
    tables = []
    for shard, file in zip(shards, files, strict=True):
        names = [name for name in file.schema_arrow.names if name not in CODE_COLUMNS]
        with named_in_errors(folder, shard):
            tables.append(file.read(columns=names, use_threads=False))
    if not tables:
        raise DataError(f"{folder} is a code store without a row: prepare it again")
    return pa.concat_tables(tables).combine_chunks()


def open_shard(folder: Path, shard: Shard) -> pq.ParquetFile:
    """Open one shard, and check all of it. Raises DataError where it is missing or is not what the index says."""
    path = folder / shard.name
    with named_in_errors(folder, shard):
        file = pq.ParquetFile(CheckedFile(path, shard.bytes, shard.sha256))
    if file.metadata.num_rows != shard.rows:
        raise DataError(f"{path} has {file.metadata.num_rows} rows, the store's index says {shard.rows}")
    return file


@contextmanager
def named_in_errors(folder: Path, shard: Shard) -> Iterator[None]:
    """Turn what goes wrong with a shard's file into a DataError that names it."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder / shard.name} is missing or damaged ({error}): copy or prepare it again") from error


def _read_at(file: int, offset: int) -> bytes:
    """A block of a file, or what there is of it; the place of other readers stays where it is."""
    if hasattr(os, "pread"):
        return os.pread(file, _BLOCK, offset)
    os.lseek(file, offset, os.SEEK_SET)  # Windows, where no forked process has the same file
    return os.read(file, _BLOCK)
