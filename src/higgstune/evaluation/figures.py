"""Pictures of speech."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from higgstune.codec.spectrum import Spectrum

_DECIBELS = 80.0  # below the loudest that is drawn


def mel_image(clips: Sequence[tuple[str, np.ndarray, int]]) -> np.ndarray:
    """Mel spectrograms one below the other, of (text, waveform [samples], sample rate in Hz): [height, width, 3] uint8.

    Without texts at the axes' ticks, which take longer to draw than all else.
    """
    figure = Figure(figsize=(8, 1.5 * len(clips)), dpi=80)
    canvas = FigureCanvasAgg(figure)
    for number, (text, waveform, rate) in enumerate(clips):
        height = 1 / len(clips)
        axis = figure.add_axes((0.01, 1 - (number + 0.97) * height, 0.98, 0.8 * height))
        mel = _decibels(waveform, rate)
        axis.imshow(mel.T, origin="lower", aspect="auto")
        axis.set_axis_off()
        shown = text if len(text) <= 90 else f"{text[:87]}..."
        axis.set_title(f"{shown} ({len(waveform) / rate:.1f} s)", fontsize=8, loc="left", parse_math=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _decibels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """[samples] -> [T, bands], the loudest at 0."""
    hop = rate // 100
    mel = Spectrum(rate, 4 * hop, hop, 80, min(8000.0, rate / 2)).mel(waveform[: len(waveform) // hop * hop])
    decibels = 20 * np.log10(np.maximum(mel, 1e-8))
    return np.clip(decibels - decibels.max(initial=-160.0), -_DECIBELS, 0.0)
