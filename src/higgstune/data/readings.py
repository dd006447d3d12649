"""What decoding showed, by file and segment, so that a recording that has not changed is not decoded again.

The store's folder keeps it in `.readings`, which may be deleted at any time. A file counts as unchanged while its path,
size and times are the same.
"""

import hashlib
import os
import stat
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Self

import soundfile

from higgstune.data.audio import SKETCH_SIZE, Recording
from higgstune.data.measures import Measures
from higgstune.data.rejection import RowError

READINGS_NAME = ".readings"
# A new number whenever a hash, a sketch or a measure of the same file changes.
_HEAD = f"higgstune readings 1, libsndfile {soundfile.__libsndfile_version__}".encode().ljust(64)[:64]
_RECORD = struct.Struct(f"<16s3q2i32sqd{SKETCH_SIZE}f{len(fields(Measures))}d")
_CHECKSUM = struct.Struct("<I")
_SIZE = _RECORD.size + _CHECKSUM.size
_COARSE = 2_000_000_000  # nanoseconds between two times of a file system that does not know better
_PIECE = 1 << 14  # records that are looked through at once
_NAMES = [field.name for field in fields(Measures)]
_WHOLE = [field.name for field in fields(Measures) if field.type in (int, "int")]


@dataclass(frozen=True)
class FileState:
    """A file as it was found."""

    path: str
    size: int  # bytes
    modified: int  # nanoseconds since 1970
    changed: int  # of its inode, which no copy sets back

    @classmethod
    def of(cls, path: Path) -> Self:
        """Raises RowError where there is no regular file."""
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # a name that is too long, a null byte
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise RowError("missing_audio", f"there is no file {path}")
        return cls(os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def key(self, start: float | None, end: float | None) -> bytes:
        """A name for the file, or for a part of it in seconds: a hash, so that a store reveals no path."""
        name = f"{self.path}\n{start}\n{end}".encode(errors="surrogateescape")
        return hashlib.blake2b(name, digest_size=16).digest()


@dataclass(frozen=True)
class Reading:
    """A decoded file, or a segment of one, which has no sketch."""

    recording: Recording
    measures: Measures | None  # None: not needed, too long, or a sample is not finite


class Readings:
    """An append-only file of readings; of several for the same file or segment, the last counts."""

    def __init__(self, path: Path | None = None) -> None:
        """Open or create the file, or keep readings in memory. Raises OSError."""
        # Without a buffer: closing would retry, and fail, to write what a full disk refused.
        self._file: BinaryIO = BytesIO() if path is None else open(path, "a+b", buffering=0)  # noqa: SIM115
        self._places: dict[bytes, int | bytes] = {}  # by key, in the file; or the record itself
        self._is_full = False
        self.added: list[bytes] | None = None  # a list collects the records that are added
        self._scan()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def find(self, file: FileState, start: float | None = None, end: float | None = None) -> Reading | None:
        """What is known about a file, or about a part of it in seconds; None where it has changed since."""
        key = file.key(start, end)
        record = self._places.get(key)
        if isinstance(record, int):
            self._file.seek(record)
            record = self._file.read(_SIZE)
        if record is None or not _is_whole(record):
            return None
        found, size, modified, changed, rate, is_measured, sha256, samples, peak, *numbers = _RECORD.unpack_from(record)
        if (found, size, modified, changed) != (key, file.size, file.modified, file.changed):
            return None
        sketch, measures = tuple(numbers[:SKETCH_SIZE]), numbers[SKETCH_SIZE:]
        recording = Recording(sha256.hex(), samples, rate, peak, sketch)
        return Reading(recording, _measures(measures) if is_measured else None)

    def add(self, file: FileState, start: float | None, end: float | None, reading: Reading) -> None:
        """Keep a reading of a file that was in this state before it was decoded."""
        known, measures = reading.recording, reading.measures
        record = _RECORD.pack(
            *(file.key(start, end), file.size, file.modified, file.changed, known.rate, measures is not None),
            *(bytes.fromhex(known.sha256), known.samples, known.peak, *(known.sketch or (0.0,) * SKETCH_SIZE)),
            *((0.0,) * len(fields(Measures)) if measures is None else astuple(measures)),
        )
        self.add_record(record + _CHECKSUM.pack(zlib.crc32(record)))

    def add_record(self, record: bytes) -> None:
        """Keep what another `Readings` has collected in `added`."""
        if self.added is not None:
            self.added.append(record)
        key, _, modified, changed, *_ = _RECORD.unpack_from(record)
        if self._is_full or max(modified, changed) > time.time_ns() - _COARSE:
            self._places[key] = record  # the file may change again within the same time: known in this run alone
            return
        place = self._file.seek(0, os.SEEK_END)
        # A disk that refuses it refuses the codes, too, which is an error; without this, a file is read again.
        with suppress(OSError):
            self._is_full = self._file.write(record) < len(record)
            self._places[key] = record if self._is_full else place
            return
        self._is_full, self._places[key] = True, record

    def _scan(self) -> None:
        """Find the readings of earlier runs, without those of files that were changed just before they were read."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        if self._file.read(len(_HEAD)) != _HEAD:
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(_HEAD)
            return
        whole = len(_HEAD) + (size - len(_HEAD)) // _SIZE * _SIZE
        self._file.truncate(whole)
        self._file.seek(len(_HEAD))
        place = len(_HEAD)
        while piece := self._file.read(_PIECE * _SIZE):
            for offset in range(0, len(piece), _SIZE):
                self._places[piece[offset : offset + 16]] = place + offset
            place += len(piece)


def _is_whole(record: bytes) -> bool:
    return len(record) == _SIZE and _CHECKSUM.pack(zlib.crc32(record[: _RECORD.size])) == record[_RECORD.size :]


def _measures(numbers: list[float]) -> Measures:
    """Measures from numbers that are all floats."""
    values: dict[str, Any] = dict(zip(_NAMES, numbers, strict=True))
    return Measures(**values | {name: int(values[name]) for name in _WHOLE})
