"""What every codec offers: waveform -> codes -> waveform."""

from typing import Protocol

import numpy as np


class Codec(Protocol):
    """An audio tokenizer. 24 kHz mono, 25 frames a second and 8 codebooks of 1024 for all that exist today."""

    sample_rate: int  # Hz
    frame_rate: float  # frames per second
    num_codebooks: int
    codebook_size: int  # codes in one codebook, without stream BOS and EOS
    revision: str  # names the weights: equal revisions give equal codes

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """[samples] float32 in [-1, 1] at `sample_rate` -> [frames, num_codebooks] uint16."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """[frames, num_codebooks] of any integer type -> [samples] float32 at `sample_rate`."""
        ...
