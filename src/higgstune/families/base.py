"""What every model family shares: examples, and what fills their audio parts."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from higgstune.codec.base import WhisperFeatures

TextTargets = Literal["transcript", "assistant", "none"]
Codes = NDArray[Any]
Audio = Codes | WhisperFeatures  # what fills the place of an audio part


@dataclass(frozen=True)
class Example:
    """One conversation, expanded. S positions of which A are rows of audio with K codebooks. Labels are not shifted."""

    prompt: str  # as rendered: each audio is one placeholder
    input_ids: NDArray[np.int64]  # [S]
    audio_mask: NDArray[np.bool_]  # [S] True where a row of audio stands
    audio_input_ids: NDArray[np.int64]  # [A, K]
    text_labels: NDArray[np.int64]  # [S]
    audio_labels: NDArray[np.int64]  # [A, K]
    whisper_features: NDArray[np.float16] | None = None  # [W, d_model]; None: nothing is heard
    feature_positions: NDArray[np.int64] | None = None  # [W] where the features stand: the <|AUDIO|> positions

    def __len__(self) -> int:
        return len(self.input_ids)
