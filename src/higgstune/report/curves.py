"""Loss curves of a run as pictures."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

History = Sequence[Mapping[str, Any]]  # what the trainer logged, as in `run.json`


def losses_figure(stages: Mapping[str, History]) -> str:
    """Text and audio loss of training and validation, one panel a stage. A PNG data URL."""
    figure, axes = plt.subplots(1, len(stages), figsize=(5.2 * len(stages), 3.4), squeeze=False)
    for axis, (name, history) in zip(axes[0], stages.items(), strict=True):
        for key, label in (("audio_loss", "audio"), ("text_loss", "text")):
            axis.plot(*_series(history, key), label=label, linewidth=1.4)
            axis.plot(*_series(history, f"eval_{key}"), "o--", label=f"{label}, validation", markersize=3)
        axis.set(title=name, xlabel="step", ylabel="nats per token")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return _data_url(figure)


def codebooks_figure(stages: Mapping[str, History]) -> str:
    """The training loss of each codebook, one panel a stage. A PNG data URL."""
    figure, axes = plt.subplots(1, len(stages), figsize=(5.2 * len(stages), 3.4), squeeze=False)
    for axis, (name, history) in zip(axes[0], stages.items(), strict=True):
        k = 0
        while (series := _series(history, f"audio_loss_{k}"))[0]:
            axis.plot(*series, label=str(k), linewidth=1.1)
            k += 1
        axis.set(title=name, xlabel="step", ylabel="nats per code")
        axis.legend(fontsize=7, title="codebook", ncols=2)
        axis.grid(alpha=0.3)
    return _data_url(figure)


def _series(history: History, key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def _data_url(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
