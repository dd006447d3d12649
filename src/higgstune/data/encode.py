"""Encodes each clip once: codes come from the store, the journal of an interrupted preparation, or the codec.

With its codes a clip gets its print, by which the same speech is found in other clips: see `duplicates`.
"""

import hashlib
import os
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from higgstune.codec.base import Codec
from higgstune.data.audio import resample
from higgstune.data.clips import MIN_FRAMES, Candidate, Clip
from higgstune.data.duplicates import print_of
from higgstune.data.rejection import RowError
from higgstune.data.shard_reader import PARTIAL_NAME
from higgstune.data.store import CodeStore
from higgstune.errors import CheckpointError
from higgstune.files import writing

_HEADER = struct.Struct("<32sII")  # SHA-256 of the clip's samples, frames, bytes of its print
_CHECKSUM = struct.Struct("<I")
_KEPT = "the clips encoded so far are kept"
_SYNC_SECONDS = 20.0  # of work that a power cut may cost; a kill costs the clip that is being encoded


class CodeJournal:
    """An append-only file of codes and prints by audio hash; opening it drops a record that was cut short."""

    def __init__(self, path: Path, num_codebooks: int) -> None:
        """Open or create the file. Raises WorkError where that fails."""
        self.path = path
        self._num_codebooks = num_codebooks
        self._places: dict[str, tuple[int, int, int]] = {}  # offset of the codes, frames, bytes of the print
        self._synced = time.monotonic()
        with writing(path, _KEPT):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer: closing would retry, and fail, to write what a full disk refused.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
            self._file.truncate(self._scan())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._places

    def __len__(self) -> int:
        return len(self._places)

    def frames(self, sha256: str) -> int:
        """The number of frames of a clip in the journal."""
        return self._places[sha256][1]

    def read(self, sha256: str) -> np.ndarray:
        """The codes of a clip in the journal, [frames, num_codebooks] uint16."""
        offset, frames, _ = self._places[sha256]
        self._file.seek(offset)
        data = self._file.read(self._bytes(frames))
        return np.frombuffer(data, "<u2").reshape(frames, self._num_codebooks).astype(np.uint16)

    def print(self, sha256: str) -> bytes:
        """The print of a clip in the journal."""
        offset, frames, size = self._places[sha256]
        self._file.seek(offset + self._bytes(frames))
        return self._file.read(size)

    def append(self, sha256: str, codes: np.ndarray, print: bytes = b"") -> None:
        """Record the codes of a clip, [frames, num_codebooks], and its print. Raises WorkError where the disk refuses
        them.
        """
        body = _HEADER.pack(bytes.fromhex(sha256), len(codes), len(print)) + codes.astype("<u2").tobytes() + print
        with writing(self.path, _KEPT):
            offset = self._file.seek(0, os.SEEK_END)
            self._write(body + _CHECKSUM.pack(zlib.crc32(body)))
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self._places[sha256] = (offset + _HEADER.size, len(codes), len(print))

    def _write(self, record: bytes) -> None:
        """Write all of a record: a disk that is almost full accepts a part before it refuses the rest."""
        while record:
            record = record[self._file.write(record) :]

    def _scan(self) -> int:
        """Find every whole record; returns the length of the file up to the first incomplete one."""
        end, size = 0, self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        while len(header := self._file.read(_HEADER.size)) == _HEADER.size:
            sha256, frames, print_size = _HEADER.unpack(header)
            if (length := self._bytes(frames) + print_size) > size:
                break
            content, checksum = self._file.read(length), self._file.read(_CHECKSUM.size)
            if len(checksum) < _CHECKSUM.size or zlib.crc32(header + content) != _CHECKSUM.unpack(checksum)[0]:
                break
            self._places[sha256.hex()] = (end + _HEADER.size, frames, print_size)
            end = self._file.tell()
        return end

    def _bytes(self, frames: int) -> int:
        return frames * self._num_codebooks * 2


class Encoder:
    """Codes and prints by audio hash. `encoded` and `reused` count clips."""

    def __init__(self, codec: Codec, journal: CodeJournal, store: CodeStore | None) -> None:
        self.encoded = 0
        self.reused = 0
        self._codec = codec
        self._journal = journal
        self._store = store
        self._stored = {} if store is None else _stored_clips(store)
        self._frames = None if store is None else store.frames
        self._prints = {} if store is None else store.prints()
        self._seen: set[str] = set()

    def encode_decoded(self, candidate: Candidate, decoded: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Encode the clips of a row that have no codes and whose waveforms, with rates, are at hand, by audio hash."""
        for clip in candidate.clips:
            if clip.sha256 in decoded and not self.has_codes(clip.sha256):
                self._encode(clip, decoded[clip.sha256])

    def encode(self, candidate: Candidate) -> Candidate:
        """Make sure that every clip of a row has codes. Raises RowError where a clip turns out to be too short."""
        for clip in candidate.clips:
            if not self.has_codes(clip.sha256):
                self._encode(clip, clip.read())
            elif clip.sha256 not in self._seen:
                self.reused += 1
                self._seen.add(clip.sha256)
            frames = self.frames(clip.sha256)
            if frames < MIN_FRAMES:
                raise RowError("too_short", f"{clip.path}: {frames} frames: a clip needs {MIN_FRAMES}")
        return candidate

    def has_codes(self, sha256: str) -> bool:
        """Whether nothing is left to encode for a clip."""
        return sha256 in self._journal or sha256 in self._stored

    def _encode(self, clip: Clip, sound: tuple[np.ndarray, int]) -> None:
        self._journal.append(clip.sha256, *encode_clip(self._codec, clip, *sound))
        self.encoded += 1
        self._seen.add(clip.sha256)

    def codes(self, sha256: str) -> np.ndarray:
        """The codes of a clip, [frames, num_codebooks] uint16."""
        if sha256 in self._journal:
            return self._journal.read(sha256)
        assert self._store is not None
        index, column, number = self._stored[sha256]
        codes = self._store.codes_in(index, column)
        return codes if number is None else codes[number]

    def print(self, sha256: str) -> bytes | None:
        """The print of a clip; None where an earlier version encoded it."""
        return self._journal.print(sha256) if sha256 in self._journal else self._prints.get(sha256)

    def frames(self, sha256: str) -> int:
        """The number of frames of a clip."""
        if sha256 in self._journal:
            return self._journal.frames(sha256)
        assert self._frames is not None
        index, column, _ = self._stored[sha256]
        # A column is read sooner than codes.
        return int(self._frames[index]) if column == "codes" else len(self.codes(sha256))


def encode_clip(codec: Codec, clip: Clip, waveform: np.ndarray, rate: int) -> tuple[np.ndarray, bytes]:
    """The codes of a clip with this waveform [samples], at a rate in Hz, [frames, num_codebooks] uint16; its print.

    Raises CheckpointError where a codec returns something else.
    """
    waveform = np.clip(resample(waveform, rate, codec.sample_rate), -1.0, 1.0)
    codes = np.asarray(codec.encode(waveform))
    is_table = codes.ndim == 2 and codes.shape[1] == codec.num_codebooks
    if not is_table or not np.issubdtype(codes.dtype, np.integer):
        raise CheckpointError(f"the codec returned codes of shape {codes.shape} and type {codes.dtype} for {clip.path}")
    if codes.size and not 0 <= codes.min() <= codes.max() < codec.codebook_size:
        raise CheckpointError(f"the codec returned codes outside of 0 to {codec.codebook_size - 1} for {clip.path}")
    return codes.astype(np.uint16), print_of(waveform, codec.sample_rate, coarse=True)


def journal_path(folder: Path, codec: Codec) -> Path:
    """The journal of an unfinished preparation with this codec."""
    name = hashlib.sha256(f"{codec.revision}\n{codec.num_codebooks}".encode()).hexdigest()[:16]
    return folder / PARTIAL_NAME / f"codes-{name}.bin"


def _stored_clips(store: CodeStore) -> dict[str, tuple[int, str, int | None]]:
    """The place of the codes of every clip of a store: row, column, index in a list."""
    places: dict[str, tuple[int, str, int | None]] = {}
    columns = [store.metadata[name].to_pylist() for name in ("context_sha256", "reference_sha256", "audio_sha256")]
    for index, (context, reference, audio) in enumerate(zip(*columns, strict=True)):
        places.update({sha256: (index, "context_codes", number) for number, sha256 in enumerate(context)})
        if reference is not None:
            places[reference] = (index, "reference_codes", None)
        places[audio] = (index, "codes", None)
    return places
