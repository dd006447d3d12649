"""A codec for tests that has no quality and no cost: codes are hashes of the frames."""

import numpy as np


class FakeCodec:
    """Implements `Codec`: 24 kHz, 25 frames a second, 8 codebooks."""

    sample_rate = 24_000
    frame_rate = 25.0
    num_codebooks = 8
    revision = "fake-1"
    reference_seconds = 0.0

    def __init__(self, codebook_size: int = 1024) -> None:
        self.codebook_size = codebook_size

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        frames = -(-len(waveform) // 960)
        padded = np.pad(waveform, (0, frames * 960 - len(waveform))).reshape(frames, 8, 120)
        return (np.abs(padded).sum(-1) * 1e4 % self.codebook_size).astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        level = np.asarray(codes, dtype=np.float32).mean(1) / self.codebook_size - 0.5
        return np.repeat(level, 960) * np.sin(np.arange(len(level) * 960) / 10).astype(np.float32)
