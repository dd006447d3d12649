"""A Whisper encoder for tests that costs nothing: features are the waveform itself."""

import numpy as np

from higgstune.codec.base import Heard


class FakeListener:
    """Implements `Listener`: 25 positions a second."""

    checkpoint = "fake-whisper"
    revision = "fake-1"
    sample_rate = 16_000
    d_model = 640
    chunk_frames = 750

    def encode(self, waveform: np.ndarray) -> Heard:
        positions = len(waveform) // 640
        return Heard(waveform[: positions * 640].reshape(positions, 640).astype(np.float16), (positions,))
