"""Audio files: read, checked, hashed by their decoded samples, resampled and written, by libsndfile and soxr.

`media` reads what libsndfile does not.
"""

import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from higgstune.data import mpeg, ogg
from higgstune.data.media import MediaFile, open_media
from higgstune.data.rejection import RowError
from higgstune.data.signatures import HEAD, find_container, find_other_kind
from higgstune.files import NOTHING_KEPT, temporary_beside, writing
from higgstune.inputs import check_wav_name

PLAIN_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus")  # libsndfile's
MEDIA_SUFFIXES = (".m4a", ".m4b", ".aac", ".mp4", ".mov", ".webm", ".mkv", ".mka")  # PyAV's
AUDIO_SUFFIXES = PLAIN_SUFFIXES + MEDIA_SUFFIXES
GENERATED_BY = "generated_by"  # in the comment of a file, as JSON
MAX_SECONDS = 3600.0  # of one clip in memory, whatever its header claims
SKETCH_SIZE = 16  # sums in a sketch
_RATES = range(4_000, 768_001)  # Hz; anything else is a damaged header
_MAX_CHANNELS = 64
_MAX_SAMPLES = 1 << 34  # four days at 48 kHz
_MAX_IN_MEMORY = 3600 * 48_000  # samples of one clip
_MAX_DENSITY = 200  # samples a byte: Opus at 6 kbit/s has 64, only silence has more
_CORRECTED_WAV = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)  # in libsndfile's log
_PLACEHOLDER_BYTES = 2_000_000_000  # another one
_UNKNOWN_BYTES = 0x7FFFF000  # the length that a program leaves in a WAV that it writes into a pipe
_WAV = ("WAV", "WAVEX")
_MAX_EMPTY = 1000  # bytes of a file without samples
# The part of the claimed length that makes a file complete: recorders round that of a WAV, encoders estimate an MP3's.
_COMPLETE = {"FLAC": 1.0, "WAV": 0.99, "WAVEX": 0.99}
_BLOCK = 1 << 16  # frames
_MOST = 9  # of a sample in a sketch
_PIECE = 64  # samples of each sum in a piece; all pieces have the same signs, times one of their own

Observer = Callable[[np.ndarray, int], None]  # [samples, channels] float32 as decoded, the rate in Hz


@dataclass(frozen=True)
class Recording:
    """A whole audio file as it decodes."""

    sha256: str
    samples: int
    rate: int  # Hz
    peak: float  # of the mono mix, 1.0 is full scale; NaN where a sample is not finite
    sketch: tuple[float, ...]  # a few sums that nearly equal waveforms share: see `find_near_duplicates`

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.samples / self.rate


def read_recording(path: str | Path, observe: Observer | None = None) -> Recording:
    """Decode a whole file block by block, however long it is, and describe it; `observe` gets every block.

    Raises RowError for a file that cannot be decoded to its end.
    """
    digest, samples, peak, projector = hashlib.sha256(), 0, 0.0, _Projector()
    with _opened(path, whole=True) as file:
        for block in _blocks(file, observe=observe):
            digest.update(block.data)
            largest = peak_of(block)
            projector.add(block, largest)
            peak = float(np.maximum(peak, largest))
            samples += len(block)
        _check_complete(file, samples)
        digest.update(f"rate {file.samplerate}".encode())
        return Recording(digest.hexdigest(), samples, file.samplerate, peak, projector.sketch)


def read_audio(
    path: str | Path,
    start: float | None = None,
    end: float | None = None,
    *,
    max_seconds: float = MAX_SECONDS,
    observe: Observer | None = None,
) -> tuple[np.ndarray, int]:
    """A file, or its part from `start` to `end` in seconds -> (waveform [samples] float32 mono, rate in Hz).

    Channels are averaged; `observe` gets them as they are. Raises RowError for a file that cannot be read, a part that
    lies outside of it, or more than `max_seconds` of audio (nothing of that size is read into memory first). Whether
    the file is whole is checked where all of it is read.
    """
    if not all(value is None or 0 <= value < 1e9 for value in (start, end)):
        raise RowError("segment_outside", f"{path}: the part from {start} to {end} s is impossible")
    with _opened(path, whole=start is None and end is None) as file:
        rate = file.samplerate
        first = 0 if start is None else round(start * rate)
        wanted = None if end is None else round(end * rate) - first
        if first < 0 or (wanted is not None and wanted <= 0):
            raise RowError("segment_outside", f"{path}: the part from {start} to {end} s is empty")
        limit = int(min(max_seconds * rate, _MAX_IN_MEMORY))
        if wanted is not None and wanted > limit:
            raise RowError("too_long", f"{path}: {wanted / rate:.1f} s are requested, the limit is {limit / rate:g} s")
        if first or isinstance(file, MediaFile):  # which may have read another part
            _seek(file, path, first)
        blocks, total = [], 0
        for block in _blocks(file, wanted, observe):
            blocks.append(block)
            total += len(block)
            if total > limit:
                raise RowError("too_long", f"{path}: longer than {limit / rate:g} s")
        if start is None and end is None:
            _check_complete(file, total)
    return np.concatenate([np.empty(0, np.float32), *blocks]), rate


def audio_hash(waveform: np.ndarray, rate: int) -> str:
    """SHA-256 of decoded mono samples and their rate: equal for a WAV and a FLAC of the same samples."""
    digest = hashlib.sha256(np.ascontiguousarray(waveform, np.float32).data)
    digest.update(f"rate {rate}".encode())
    return digest.hexdigest()


def resample(waveform: np.ndarray, rate: int, target: int) -> np.ndarray:
    """[samples] float32 at `rate` Hz -> [samples * target / rate] float32 at `target` Hz (soxr VHQ)."""
    if rate == target:
        return waveform.astype(np.float32, copy=False)
    return soxr.resample(waveform.astype(np.float32, copy=False), rate, target, quality="VHQ")


def peak_of(waveform: np.ndarray) -> float:
    """The largest absolute sample; NaN where one is not finite."""
    if not len(waveform):
        return 0.0
    peak = float(max(waveform.max(), -waveform.min()))
    return peak if math.isfinite(peak) else math.nan


def is_file(path: str | Path) -> bool:
    """Whether a path leads to a regular file; False, too, for paths that cannot exist."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that is too long, a null byte
        return False


def _opened(path: str | Path, *, whole: bool) -> soundfile.SoundFile | MediaFile:
    """An open audio file. Raises RowError where it is missing, of another format, or claims an impossible size.

    With `whole`, also for an Ogg file that is not.
    """
    if not is_file(path):
        raise RowError("missing_audio", f"{path}: there is no such file")
    size, container = _check_head(path, whole=whole)
    max_samples = max(_MAX_IN_MEMORY, size * _MAX_DENSITY)
    file = _sound_file(path) if container is None else open_media(path, container, max_samples, whole=whole)
    claims = file.samplerate, file.channels, file.frames
    possible = claims[0] in _RATES and claims[1] <= _MAX_CHANNELS and claims[2] <= _MAX_SAMPLES
    if possible and claims[2] <= max_samples:
        return file
    file.close()
    if possible:
        hours = claims[2] / claims[0] / 3600
        raise RowError(
            "unreadable_audio", f"{path} has {hours:.1f} h in {size} bytes, as only silence or a damaged header does"
        )
    raise RowError(
        "unreadable_audio",
        f"{path}: its header claims {claims[0]} Hz, {claims[1]} channels and {claims[2]} samples, which is "
        "impossible (or leaves its length open): write the file again, for example with ffmpeg",
    )


def _sound_file(path: str | Path) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:  # .raw needs more arguments
        raise RowError("unreadable_audio", f"{path} cannot be read as audio: {_reason(error)}") from error


def _check_head(path: str | Path, *, whole: bool) -> tuple[int, str | None]:
    """The file's size in bytes, and its format where `media` reads it.

    Raises RowError for another format, and for an RF64 (or a `whole` Ogg) that is cut off.
    For other formats, the length that the header claims is compared with what was read.
    """
    damage = None
    try:
        with open(path, "rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(HEAD)
            if whole and head.startswith(b"OggS"):
                file.seek(0)
                damage = ogg.find_damage(file)
    except OSError as error:
        raise RowError("unreadable_audio", f"{path} cannot be read: {error.strerror}") from error
    if (other := find_other_kind(head, path)) is not None:
        raise RowError("unreadable_audio", f"{path} {other}")
    if damage is not None:
        raise RowError(
            "unreadable_audio",
            f"{path} {damage}; copy it again or, if all of it plays, convert it: ffmpeg -i {Path(path).name} x.flac",
        )
    if head.startswith(b"RF64") and head[12:16] == b"ds64" and len(head) >= 36:
        (claimed,) = struct.unpack_from("<Q", head, 28)
        if _COMPLETE["WAV"] * claimed > size:
            raise RowError("unreadable_audio", f"{path} is cut off after {size} of {claimed} bytes")
    return size, find_container(head)


def _check_complete(file: soundfile.SoundFile | MediaFile, samples: int) -> None:
    """Raise RowError for a file that ends before the length in its header, as an interrupted copy does, or behind it.

    The length of an MP3 in a WAV is only a guess, so it counts up to that of its frames; the WAV has its size in bytes.
    """
    claimed = file.frames
    if file.subtype.startswith("MPEG"):
        with open(file.name, "rb") as content:
            held = mpeg.count_samples(content)
        if held > samples + mpeg.MAX_PADDING:
            raise RowError(
                "unreadable_audio",
                f"{file.name} holds {held} samples, but its header leads to {samples} of them (a variable bit rate "
                "without a Xing header, or files joined end to end): convert it to flac, for example with ffmpeg",
            )
        claimed = min(claimed, held) if file.format in _WAV else claimed
    if corrected := _CORRECTED_WAV.search(file.extra_info):
        written, found = int(corrected[1]), max(int(corrected[2]), 1)
        unknown = written >= _UNKNOWN_BYTES or written == _PLACEHOLDER_BYTES
        claimed = 0 if unknown else claimed * written // found
    if not samples and os.path.getsize(file.name) > _MAX_EMPTY:
        raise RowError(
            "unreadable_audio",
            f"the header of {file.name} says that it is empty, though more follows: write it again, for example with "
            "ffmpeg",
        )
    if samples < _COMPLETE.get(file.format, 0.95) * claimed:
        raise RowError("unreadable_audio", f"{file.name} is cut off after {samples} of {claimed} samples")


def _blocks(
    file: soundfile.SoundFile | MediaFile, frames: int | None = None, observe: Observer | None = None
) -> Iterator[np.ndarray]:
    """[samples] float32 mono, block by block, to the end or for so many frames.

    Raises RowError for a file with a hole: libsndfile reads up to it, and then what is behind it twice.
    """
    left, was_short = frames, False
    while left is None or left > 0:
        size = _BLOCK if left is None else min(_BLOCK, left)
        try:
            block = file.read(size, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError) as error:
            raise RowError("unreadable_audio", f"{file.name} is damaged: {_reason(error)}") from error
        if not len(block):
            return
        if was_short:
            raise RowError("unreadable_audio", f"{file.name} is damaged: parts of it are missing; copy it again")
        was_short = len(block) < size
        left = None if left is None else left - len(block)
        if observe is not None:
            observe(block, file.samplerate)
        yield mono(block)


def mono(samples: np.ndarray) -> np.ndarray:
    """[samples, channels] float32 -> the mean of the channels, [samples] float32."""
    if samples.shape[1] == 1:
        mean = samples[:, 0]
    else:
        with np.errstate(invalid="ignore", over="ignore"):  # float samples may be NaN, which the peak shows
            mean = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mean + np.float32(0)  # -0.0 and 0.0 are the same silence, and must have the same hash


def _seek(file: soundfile.SoundFile | MediaFile, path: str | Path, first: int) -> None:
    try:
        found = file.seek(first)
    except (soundfile.SoundFileError, OSError) as error:
        raise RowError("segment_outside", f"{path} has no sample {first}: {_reason(error)}") from error
    if found != first:  # an MP3 with a damaged frame, even behind its end
        raise RowError("unreadable_audio", f"{path} is damaged: sample {first} cannot be found in it")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "error_string", None) or error).strip().rstrip(".")


class _Projector:
    """Projects a waveform that arrives in blocks onto a few sums with fixed random signs.

    Each sum takes every 16th sample. Distances between such sums approximate those between the waveforms.
    """

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._signs = self._draw(_PIECE)
        self._sum = np.zeros(SKETCH_SIZE)

    def add(self, block: np.ndarray, peak: float) -> None:
        """Add the next samples, with their peak; every block but the last is a full one."""
        if not peak <= _MOST:
            block = np.clip(np.nan_to_num(block), -_MOST, _MOST)
        padded = np.pad(block, (0, -len(block) % self._signs.size))
        pieces = (padded.reshape(-1, *self._signs.shape) * self._signs).sum(axis=1)
        self._sum += (pieces * self._draw(len(pieces))).sum(axis=0)  # random signs, so that equal pieces do not add up

    def _draw(self, rows: int) -> np.ndarray:
        """[rows, sums] of -1 and 1."""
        return (self._random.integers(0, 2, (rows, SKETCH_SIZE)) * 2 - 1).astype(np.float32)

    @property
    def sketch(self) -> tuple[float, ...]:
        """The sums over all samples so far."""
        return tuple(self._sum.astype(np.float32).tolist())


def write_wav(
    path: str | Path, waveform: np.ndarray, sample_rate: int, generated_by: Mapping[str, str] | None = None
) -> None:
    """[samples] float32 in [-1, 1] -> a 16-bit WAV file, under a temporary name first; folders are created.

    `generated_by` goes into its metadata: see `origin_of`.

    Raises InputError when the name does not end in .wav; WorkError where the disk refuses, which leaves nothing of it.
    """
    path = Path(path)
    check_wav_name(path)
    temporary = temporary_beside(path)
    with writing(path, NOTHING_KEPT):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(wav_bytes(waveform, sample_rate, generated_by))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def wav_bytes(waveform: np.ndarray, sample_rate: int, generated_by: Mapping[str, str] | None = None) -> bytes:
    """[samples] float32 in [-1, 1] -> a 16-bit WAV file's content."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", sample_rate, channels=1, format="WAV", subtype="PCM_16") as file:
        if generated_by is not None:
            file.comment = json.dumps({GENERATED_BY: dict(generated_by)})
        file.write(np.clip(waveform, -1, 1))
    return buffer.getvalue()


class WavStream:
    """A 16-bit WAV file that grows: players take it while its length is unknown, which is written at the end."""

    def __init__(self, file: BinaryIO, sample_rate: int, generated_by: Mapping[str, str] | None = None) -> None:
        """`file` may be a pipe, whose header then stays without a length."""
        self._file, self._header = file, bytearray(wav_bytes(np.zeros(0), sample_rate, generated_by))
        self._bytes = 0
        assert self._header[-8:-4] == b"data"
        file.write(self._sized(0xFFFFFFFF))

    def write(self, waveform: np.ndarray) -> None:
        """Append [samples] float32 in [-1, 1]."""
        samples = np.round(np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes()
        self._bytes += len(samples)
        self._file.write(samples)
        self._file.flush()

    def close(self) -> None:
        """Write the length, where the file allows."""
        if self._file.seekable():
            self._file.seek(0)
            self._file.write(self._sized(self._bytes))

    def _sized(self, size: int) -> bytes:
        whole = min(size + len(self._header) - 8, 0xFFFFFFFF)
        self._header[4:8], self._header[-4:] = whole.to_bytes(4, "little"), size.to_bytes(4, "little")
        return bytes(self._header)


def origin_of(path: str | Path) -> dict[str, str] | None:
    """The model family that generated the speech in a file, and the licence that binds it; None where nothing is said.

    Raises RowError for a file that cannot be read.
    """
    with _opened(path, whole=False) as file:
        if not isinstance(file, soundfile.SoundFile):  # nobody wrote a comment of ours into a container
            return None
        try:
            written = json.loads(file.comment)
        except ValueError:
            return None
    found = written.get(GENERATED_BY) if isinstance(written, dict) else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else None
