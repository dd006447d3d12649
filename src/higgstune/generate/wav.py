"""Write what was spoken."""

import os
from pathlib import Path

import numpy as np
import soundfile

from higgstune.errors import InputError


def check_wav_name(path: Path) -> None:
    """Raises InputError when speech cannot be written under this name."""
    if path.suffix.lower() != ".wav":
        raise InputError(f"{path}: speech is written as .wav")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int) -> None:
    """[samples] float32 in [-1, 1] -> a 16-bit WAV file, under a temporary name first; folders are made.

    Raises InputError when the name does not end in .wav.
    """
    path = Path(path)
    check_wav_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    soundfile.write(temporary, np.clip(waveform, -1, 1), sample_rate, format="WAV", subtype="PCM_16")
    os.replace(temporary, path)
