"""Recordings and a codec for the tests of data preparation."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from fake_codec import FakeCodec
from scipy.signal import lfilter

RATE = 16_000
FORMATS: dict[str, dict[str, str]] = {
    ".wav": {},
    ".flac": {},
    ".mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    ".ogg": {"format": "OGG", "subtype": "VORBIS"},
    ".opus": {"format": "OGG", "subtype": "OPUS"},
}


def speech(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Noise [samples] with the falling spectrum of speech, so that lossy formats keep it."""
    noise = np.random.default_rng(seed).standard_normal(round(seconds * rate)).cumsum()
    noise -= np.convolve(noise, np.ones(400) / 400, mode="same")
    return (0.3 * noise / np.abs(noise).max()).astype(np.float32)


def babble(seconds: float, seed: int) -> np.ndarray:
    """Something like speech: noise through resonances that change five times a second: [samples] float32."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(round(seconds * 5)):
        sound = rng.standard_normal(RATE // 5)
        for low, high in ((300, 900), (900, 2500), (2500, 4500)):
            frequency, radius = rng.uniform(low, high), 0.97
            sound = lfilter([1.0], [1.0, -2 * radius * np.cos(2 * np.pi * frequency / RATE), radius**2], sound)
        pieces.append(10 ** (rng.uniform(-15, 0) / 20) * sound / sound.std())
    return (0.05 * np.concatenate(pieces)).astype(np.float32)


def write(path: Path, waveform: np.ndarray, rate: int = RATE, **options: Any) -> Path:
    """Write a waveform in the format of the path's suffix; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, rate, **(FORMATS.get(path.suffix, {}) | options))
    return path


def clip(folder: Path, name: str, seed: int, text: str | None = None, seconds: float = 0.5) -> Path:
    """A recording of its own, with a transcript beside it."""
    path = write(folder / name, speech(seconds, seed))
    path.with_suffix(".txt").write_text(f"Sentence number {seed}." if text is None else text, encoding="utf-8")
    return path


class CountingCodec(FakeCodec):
    """Counts the clips that it encodes; may be slow."""

    def __init__(self, revision: str = "fake-1", seconds: float = 0.0) -> None:
        super().__init__()
        self.revision = revision
        self.calls = 0
        self.seconds = seconds

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        assert waveform.dtype == np.float32
        assert np.abs(waveform).max() <= 1
        self.calls += 1
        time.sleep(self.seconds)
        return super().encode(waveform)
