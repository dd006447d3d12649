"""What is spoken and what comes of it: a text with its voice, and a waveform."""

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from higgstune.codec.base import WhisperFeatures
from higgstune.data.audio import wav_bytes, write_wav
from higgstune.data.messages import DEFAULT_SCENE


@dataclass(frozen=True)
class Voice:
    """A reference: its transcript, its codes [frames, K], and its Whisper features if the model uses Whisper."""

    text: str
    codes: np.ndarray
    whisper_features: WhisperFeatures | None = None


@dataclass(frozen=True)
class Request:
    """A text to speak, with its voice, scene, seed and adapter (see `Speaker.add_adapter`).

    >>> Request("Good morning", seed=1)
    Request(text='Good morning', voice=None, scene='Audio is recorded from a quiet room.', seed=1, adapter='')
    """

    text: str
    voice: Voice | None = None
    scene: str | None = DEFAULT_SCENE
    seed: int = 0
    adapter: str = ""  # "": what was loaded


@dataclass(frozen=True)
class Speech:
    """One spoken text, which a notebook plays.

    >>> clip = Speech("Hi.", np.zeros(12_000, np.float32), sample_rate=24_000, hit_cap=False)
    >>> clip.seconds
    0.5
    """

    text: str  # normalised, as the model got it
    waveform: np.ndarray  # [samples] float32
    sample_rate: int
    hit_cap: bool  # the frame cap ended a piece, not the model
    spoken_again: int = 0  # pieces that a check found bad and that were spoken with another seed
    generated_by: dict[str, str] | None = None  # family and licence, which a file carries where a licence requires it

    @property
    def seconds(self) -> float:
        """The duration."""
        return len(self.waveform) / self.sample_rate

    def save(self, path: str | Path) -> Path:
        """Write a 16-bit WAV file, and its folders. Raises InputError when the name does not end in .wav."""
        write_wav(path, self.waveform, self.sample_rate, self.generated_by)
        return Path(path)

    def _repr_html_(self) -> str:
        data = base64.b64encode(wav_bytes(self.waveform, self.sample_rate, self.generated_by)).decode()
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'
