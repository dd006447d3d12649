"""Naturalness by DistillMOS, a small model that learned from XLS-R how people rate speech (its weights are inside)."""

import importlib
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch

from higgstune import torchaudio_compat
from higgstune.errors import ConfigError
from higgstune.evaluation.hearing import RATE, SHORTEST, WORST, hear, model_name

_MODEL = "distillmos"
_MOST = 60 * RATE  # samples, so that memory is bounded: it takes all windows of a clip at once


class DistillMos:
    """Mean opinion scores, 1 to 5; needs the extra `naturalness`."""

    def __init__(self, *, device: str = "cpu") -> None:
        """Raises ConfigError when the extra is not installed."""
        torchaudio_compat.install()  # it imports torchaudio, for files that we read ourselves
        try:
            library = importlib.import_module("distillmos.sqa")
        except ImportError as error:
            raise ConfigError(f"{_MODEL} needs more: pip install 'higgstune[naturalness]' [{error}]") from error
        with redirect_stdout(io.StringIO()):  # it says which weights it has loaded
            self._model = library.ConvTransformerSQAModel().eval().to(device)
        self._device = torch.device(device)
        weights = Path(library.DEFAULT_WEIGHTS_CHKPT)
        self.name = model_name(_MODEL, weights.stem, [weights])

    @torch.inference_mode()
    def rate(self, files: Sequence[Path]) -> dict[str, list[float]]:
        """A score a file, of its first minute; 1.0, the worst, for one under 0.1 s, in which there is no speech."""
        return {_MODEL: [self._score(file) for file in files]}

    def _score(self, file: Path) -> float:
        waveform = hear(file, seconds=_MOST / RATE)
        if len(waveform) < SHORTEST:
            return WORST
        return float(self._model(torch.from_numpy(waveform)[None].to(self._device)))
