"""Codes as they are encoded, one record a clip, so that a killed preparation loses one clip at most."""

import os
import struct
import time
import zlib
from pathlib import Path
from typing import Self

import numpy as np

from higgstune.files import writing

_HEADER = struct.Struct("<32sI")  # SHA-256 of the clip's samples, frames
_CHECKSUM = struct.Struct("<I")
_KEPT = "what is encoded is kept"
_SYNC_SECONDS = 20.0  # what a power cut may cost; a kill costs the clip in work


class CodeJournal:
    """An append-only file of codes by audio hash; a record that was cut short is dropped on opening."""

    def __init__(self, path: Path, num_codebooks: int) -> None:
        """Open or begin the file. Raises WorkError where that fails."""
        self.path = path
        self._num_codebooks = num_codebooks
        self._places: dict[str, tuple[int, int]] = {}  # offset of the codes, frames
        self._synced = time.monotonic()
        with writing(path, _KEPT):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer: what a full disk refuses would be tried again on closing, and fail again.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
            self._file.truncate(self._scan())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._places

    def frames(self, sha256: str) -> int:
        """Frames of a clip that is in the journal."""
        return self._places[sha256][1]

    def read(self, sha256: str) -> np.ndarray:
        """The codes of a clip that is in the journal, [frames, num_codebooks] uint16."""
        offset, frames = self._places[sha256]
        self._file.seek(offset)
        data = self._file.read(self._bytes(frames))
        return np.frombuffer(data, "<u2").reshape(frames, self._num_codebooks).astype(np.uint16)

    def append(self, sha256: str, codes: np.ndarray) -> None:
        """Keep the codes of a clip, [frames, num_codebooks]. Raises WorkError where the disk refuses them."""
        body = _HEADER.pack(bytes.fromhex(sha256), len(codes)) + codes.astype("<u2").tobytes()
        with writing(self.path, _KEPT):
            offset = self._file.seek(0, os.SEEK_END)
            self._write(body + _CHECKSUM.pack(zlib.crc32(body)))
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self._places[sha256] = (offset + _HEADER.size, len(codes))

    def _write(self, record: bytes) -> None:
        """A disk that is almost full takes a part before it refuses the rest."""
        while record:
            record = record[self._file.write(record) :]

    def _scan(self) -> int:
        """Find every whole record; returns the length of the file up to the first that is not."""
        end, size = 0, self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        while len(header := self._file.read(_HEADER.size)) == _HEADER.size:
            sha256, frames = _HEADER.unpack(header)
            if self._bytes(frames) > size:
                break
            codes, checksum = self._file.read(self._bytes(frames)), self._file.read(_CHECKSUM.size)
            if len(checksum) < _CHECKSUM.size or zlib.crc32(header + codes) != _CHECKSUM.unpack(checksum)[0]:
                break
            self._places[sha256.hex()] = (end + _HEADER.size, frames)
            end = self._file.tell()
        return end

    def _bytes(self, frames: int) -> int:
        return frames * self._num_codebooks * 2
