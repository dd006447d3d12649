"""The sound of an utterance for the page: as it lies in its recording, with half a second on both sides.

Where the recording cannot be found any more, it is the clip alone.
"""

import io
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from higgstune.data.rejection import RowError
from higgstune.errors import DataError
from higgstune.raw.edits import Item
from higgstune.raw.names import CACHE
from higgstune.raw.recording import Samples, decode

CONTEXT = 0.5  # seconds
_MAX_SECONDS = 120.0  # of an utterance: what is longer is shown up to here
_PEAK = 0.7  # to which what has no gain of its own is raised
_MAX_RAISE = 30.0  # dB
_OPEN = 8  # recordings that are kept open: a long MP3 needs 0.4 s to find a place for the first time, and then 15 ms


@dataclass(frozen=True)
class Sound:
    """A WAV file, and where the utterance begins and ends in it, in seconds."""

    wav: bytes
    start: float
    end: float
    has_context: bool


class Sounds:
    """Reads the recordings of a data set, `raw` being their folder or the only one of them."""

    def __init__(self, folder: Path, raw: str | None) -> None:
        self._folder = folder.resolve()
        self._raw = None if raw is None else (folder / raw).resolve()
        self._decoded: dict[Path, Samples] = {}
        self._open: dict[Path, soundfile.SoundFile] = {}
        self._lock = threading.Lock()
        self._place: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Close the recordings, and remove what was decoded as a whole."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()
        if self._place is not None:
            self._place.cleanup()

    def recording(self, name: str) -> Path | None:
        """The recording of that name, which may lie nowhere but in the folder of recordings."""
        if self._raw is None:
            return None
        if self._raw.is_file():
            return self._raw if self._raw.name == name else None
        path = (self._raw / name).resolve()
        return path if path.is_relative_to(self._raw) and path.is_file() else None

    def sound(self, item: Item, row: dict[str, Any]) -> Sound:
        """The sound of an utterance. Raises DataError where neither recording nor clip can be read."""
        path = self.recording(item.recording)
        if path is not None:
            start, end = max(item.start - CONTEXT, 0.0), min(item.end, item.start + _MAX_SECONDS) + CONTEXT
            samples, rate = self._span(path, start, end)
            gain = (row.get("measures") or {}).get("gain")
            return Sound(_wav(samples, rate, gain), item.start - start, min(item.end, end) - start, True)
        clip = self._clip(row)
        if item.made_of or clip is None:
            raise DataError(f"the recording {item.recording} is not where it was, so that this has no sound")
        with soundfile.SoundFile(clip) as file:
            samples, rate = _read(file, 0.0, _MAX_SECONDS)
        return Sound(_wav(samples, rate, 0.0), 0.0, len(samples) / rate, False)

    def _clip(self, row: dict[str, Any]) -> Path | None:
        audio = row.get("audio")
        if not isinstance(audio, str):
            return None
        path = (self._folder / audio).resolve()
        return path if path.is_relative_to(self._folder) and path.is_file() else None

    def _span(self, path: Path, start: float, end: float) -> tuple[np.ndarray, int]:
        known = self._decoded.get(path)
        if known is None:
            try:
                return self._read_open(path, start, end)
            except soundfile.LibsndfileError:
                known = self._decode(path)
        return known.read(start, end), known.rate

    def _read_open(self, path: Path, start: float, end: float) -> tuple[np.ndarray, int]:
        with self._lock:
            file = self._open.pop(path, None) or soundfile.SoundFile(path)
            self._open[path] = file  # the last one used is the last one to be closed
            if len(self._open) > _OPEN:
                self._open.pop(next(iter(self._open))).close()
            return _read(file, start, end)

    def _decode(self, path: Path) -> Samples:
        """Decode a recording that cannot be read in parts; once."""
        with self._lock:
            if path not in self._decoded:
                if self._place is None:
                    cache = self._folder / CACHE
                    cache.mkdir(exist_ok=True)
                    self._place = tempfile.TemporaryDirectory(prefix="review-", dir=cache)
                folder = Path(self._place.name, str(len(self._decoded)))
                folder.mkdir(exist_ok=True)
                try:
                    self._decoded[path] = decode(path, folder).full
                except RowError as error:
                    raise DataError(f"{path.name} cannot be read: {error}") from error
            return self._decoded[path]


def _read(file: soundfile.SoundFile, start: float, end: float) -> tuple[np.ndarray, int]:
    """[samples] float32, all channels mixed, and their rate in Hz."""
    rate: int = file.samplerate
    first, last = (min(max(round(at * rate), 0), file.frames) for at in (start, end))
    file.seek(first)
    return file.read(last - first, dtype="float32", always_2d=True).mean(axis=1), rate


def _wav(samples: np.ndarray, rate: int, gain: float | None) -> bytes:
    """A file of 16 bits at a gain in dB; without one, speech is raised so that it can be understood."""
    if gain is None:
        peak = float(np.abs(samples).max(initial=0.0))
        gain = min(20 * np.log10(_PEAK / peak), _MAX_RAISE) if 0 < peak < _PEAK else 0.0
    loud = np.clip(samples * np.float32(10 ** (gain / 20)), -1, 1)
    file = io.BytesIO()
    soundfile.write(file, loud, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()
