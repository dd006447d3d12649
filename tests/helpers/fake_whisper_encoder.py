"""A Whisper encoder for tests that costs nothing: features are the waveform itself."""

import numpy as np

from higgstune.codec.base import WhisperFeatures


class FakeWhisperEncoder:
    """Implements `WhisperEncoder`: 25 feature frames a second."""

    checkpoint = "fake-whisper"
    revision = "fake-1"
    sample_rate = 16_000
    d_model = 640
    chunk_frames = 750

    def encode(self, waveform: np.ndarray) -> WhisperFeatures:
        frames = len(waveform) // 640
        return WhisperFeatures(waveform[: frames * 640].reshape(frames, 640).astype(np.float16), (frames,))
