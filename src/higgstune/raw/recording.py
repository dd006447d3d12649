"""Raw recordings: found below a folder, and decoded once into files from which any span is read.

    talk.mp3 -> decode -> Samples at its own rate (mono) and at 16 kHz, without DC

A recording may last for hours, so its samples never are in memory as a whole.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soxr

from higgstune.data.audio import AUDIO_SUFFIXES, read_recording
from higgstune.data.rejection import RowError
from higgstune.data.source import FOREIGN_SUFFIXES
from higgstune.files import writing

RATE = 16_000  # Hz, at which speech is found, recognised and compared
LOSSLESS = (".wav", ".flac")
_HIGH_PASS = 20.0  # Hz: below it there is DC, and no speech
_MIN_SECONDS = 0.5
_MOST_BROKEN = 0.01  # share of samples that are not finite
_CANCELLED = 1e-3  # share of the loudest channel's energy
_KEPT = "what was computed before is kept"


@dataclass(frozen=True)
class Samples:
    """A mono waveform in a file of float32."""

    path: Path
    rate: int  # Hz
    count: int

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.count / self.rate

    def read(self, start: float, end: float) -> np.ndarray:
        """[samples] float32 from `start` to `end` in seconds; what lies outside of the recording is left out."""
        first, last = (min(max(round(at * self.rate), 0), self.count) for at in (start, end))
        return np.fromfile(self.path, np.float32, count=max(last - first, 0), offset=4 * first)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """All samples, `size` at a time; the last block may be shorter."""
        with open(self.path, "rb") as file:
            while len(block := np.fromfile(file, np.float32, count=size)):
                yield block


@dataclass(frozen=True)
class Decoded:
    """A recording as it decodes."""

    sha256: str  # of its samples, all channels mixed
    full: Samples  # at its own rate, as it is
    speech: Samples  # at 16 kHz, above 20 Hz
    channels: int
    damage: str | None  # why its end is missing, if it is
    broken: int  # samples that are not finite, which count as silence

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.full.seconds


def find_recordings(raw: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The recordings of a folder and below it, or the one that is named, in order; what is not read, with reasons.

    Links are followed only to files inside of the folder, so that nothing is found twice and no loop is entered.
    """
    if raw.is_file():
        return [raw], []
    found: list[Path] = []
    refused: list[tuple[Path, str]] = []
    for root, folders, names in os.walk(raw):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            path, suffix = Path(root, name), Path(name).suffix.lower()
            if name.startswith(".") or suffix not in (*AUDIO_SUFFIXES, *FOREIGN_SUFFIXES):
                continue
            if not _is_utf8(path):
                readable = Path(os.fsencode(path).decode(errors="backslashreplace"))
                refused.append((readable, "its path is not UTF-8: rename it"))
            elif path.is_symlink() and raw.resolve() not in path.resolve().parents:
                refused.append((path, "it is a link that leads out of the folder: copy the file there"))
            elif suffix in FOREIGN_SUFFIXES:
                refused.append((path, f"{suffix} is not read: ffmpeg -i {name} {path.stem}.flac"))
            elif not path.is_file():
                refused.append((path, "it is a broken link, or not a file"))
            else:
                found.append(path)
    return found, refused


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def decode(path: Path, folder: Path) -> Decoded:
    """Decode a recording into two files in `folder`, which the caller removes.

    Of a file that is damaged at a place, what precedes it is kept. Raises RowError where nothing of it can be used.
    """
    full, speech = folder / "full.f32", folder / "speech.f32"
    with open(full, "wb") as out, open(speech, "wb") as analysis:
        writer = _Writer(out, analysis)
        damage = None
        try:
            sha256 = read_recording(path, writer.add).sha256
        except RowError as error:
            if writer.count < _MIN_SECONDS * max(writer.rate, 1):
                raise
            damage, sha256 = str(error), ""
        writer.finish()
    if not sha256:
        sha256 = _hash_of(full, writer.rate)
    if writer.broken > _MOST_BROKEN * writer.count:
        raise RowError("not_finite", f"{writer.broken} samples are infinite or not numbers: write the file again")
    if writer.cancels:
        raise RowError(
            "channels_cancel",
            "its channels cancel each other, one has its polarity reversed: keep one of them, for example with "
            "ffmpeg -i IN.wav -af pan='mono|c0=c0' OUT.wav",
        )
    if writer.count < _MIN_SECONDS * max(writer.rate, 1):
        raise RowError("too_short", f"{writer.count / max(writer.rate, 1):.2f} s are too short for speech")
    return Decoded(
        sha256,
        Samples(full, writer.rate, writer.count),
        Samples(speech, RATE, os.path.getsize(speech) // 4),
        writer.channels,
        damage,
        writer.broken,
    )


class _Writer:
    """Writes decoded blocks as mono at their own rate, and as 16 kHz above 20 Hz."""

    def __init__(self, full: BinaryIO, speech: BinaryIO) -> None:
        self._full, self._speech = full, speech
        self.rate = self.count = self.channels = 0
        self.broken = 0  # samples that are not finite
        self._energy, self._loudest = 0.0, np.zeros(1)  # of the mean of the channels, and of each of them

    def add(self, block: np.ndarray, rate: int) -> None:
        """The next [samples, channels] float32 at a rate in Hz."""
        from scipy.signal import butter, sosfilt, sosfilt_zi

        if not self.rate:
            self.rate, self.channels = rate, block.shape[1]
            self._resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
            self._filter = butter(2, _HIGH_PASS, "highpass", fs=RATE, output="sos")
            self._sosfilt = sosfilt
        finite = np.isfinite(block)
        if not finite.all():
            self.broken += int((~finite).any(axis=1).sum())
            block = np.where(finite, block, np.float32(0))
        mono = np.ascontiguousarray(block.mean(axis=1, dtype=np.float64), dtype=np.float32)
        self._energy += float(np.square(mono, dtype=np.float64).sum())
        self._loudest = np.add(self._loudest, np.square(block, dtype=np.float64).sum(axis=0))
        _put(self._full, mono)
        if not self.count:
            self._state = sosfilt_zi(self._filter) * float(mono[:rate].mean())  # as if it had lasted for ever
        self.count += len(mono)
        self._write_speech(self._resampler.resample_chunk(mono))

    @property
    def cancels(self) -> bool:
        """Whether the channels are far louder than their mean: one has its polarity reversed."""
        return self._energy < _CANCELLED * self._loudest.max()

    def finish(self) -> None:
        """Write what the resampler still holds."""
        if self.rate:
            self._write_speech(self._resampler.resample_chunk(np.empty(0, np.float32), last=True))
        for file in (self._full, self._speech):
            with writing(Path(file.name), _KEPT):
                file.flush()

    def _write_speech(self, block: np.ndarray) -> None:
        if len(block):
            block, self._state = self._sosfilt(self._filter, block, zi=self._state)
            _put(self._speech, block.astype(np.float32))


def _put(file: BinaryIO, block: np.ndarray) -> None:
    with writing(Path(file.name), _KEPT):
        file.write(block.data)  # `tofile` would not say why the disk refuses


def _hash_of(path: Path, rate: int) -> str:
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    digest.update(f"rate {rate}".encode())
    return digest.hexdigest()
