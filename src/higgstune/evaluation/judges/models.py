"""The models for voices and for quality: WavLM x-vectors, and DistillMOS.

`WavLM` compares voices by a WavLM with an x-vector head, trained to verify speakers (microsoft/wavlm-base-plus-sv).
`DistillMos` estimates mean opinion scores; it needs the extra `naturalness`. Whisper is in `asr`,
CAM++ in `campplus`.
"""

import importlib
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch.nn.functional import normalize
from transformers import Wav2Vec2FeatureExtractor, WavLMForXVector

from higgstune import torchaudio_compat
from higgstune.checkpoint_files import malformed_errors, read_json, weight_files
from higgstune.errors import CheckpointError, ConfigError
from higgstune.evaluation.judges.base import (
    MIN_SAMPLES,
    RATE,
    WORST,
    Voices,
    load_weights,
    model_name,
    read_for_judge,
    short_name,
)
from higgstune.hub import fetch

_WHAT = "speaker judge"
_PICKLED = "pytorch_model.bin"
XVECTOR_SAMPLES = RATE  # a shorter clip is repeated: the x-vector layers take half a second at once
MAX_MOS_SAMPLES = 60 * RATE  # DistillMOS takes all windows of a clip at once, so this bounds its memory
_DISTILLMOS = "distillmos"


class WavLM(Voices):
    """Embeds voices by x-vectors."""

    def __init__(self, name_or_path: str, *, device: str = "cpu") -> None:
        """A folder or hub id. Raises CheckpointError for any other checkpoint, or for one that lacks a weight."""
        super().__init__()
        folder = fetch(name_or_path, what=_WHAT)
        config = read_json(folder / "config.json", "every checkpoint folder has one")
        if config.get("model_type") != "wavlm":
            raise CheckpointError(
                f"{folder / 'config.json'} has the model_type {config.get('model_type')!r}: name a WavLM for speaker "
                "verification, such as microsoft/wavlm-base-plus-sv, or a command"
            )
        weights = _weights(folder, name_or_path)
        self.model = short_name(folder)
        self.name = model_name("transformers", folder, weights)
        self._device = torch.device(device)
        self._model = load_weights(
            WavLMForXVector, folder, _WHAT, use_safetensors=weights[0].name != _PICKLED, weights_only=True,
            attn_implementation="eager",
        ).to(self._device)  # fmt: skip
        try:
            self._extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)
        except malformed_errors() as error:
            raise CheckpointError(f"the {_WHAT} {folder} has no usable preprocessor_config.json: {error}") from error

    @torch.inference_mode()
    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """[samples] float32 mono at 16 kHz, 0.1 s or more -> [xvector dim] float32 of length 1."""
        if len(waveform) < XVECTOR_SAMPLES:
            waveform = np.resize(waveform, XVECTOR_SAMPLES)  # repeats it
        values = self._extractor(waveform, sampling_rate=RATE, return_tensors="pt")["input_values"]
        found = self._model(values.to(self._device)).embeddings[0].float().cpu()
        embedding: np.ndarray = normalize(found, dim=0).numpy()
        return embedding


def _weights(folder: Path, name: str) -> tuple[Path, ...]:
    """The weight files: safetensors, or the single pickled file that the published model has.

    torch reads only tensors from it (`weights_only`), so it runs no code.
    """
    if not any(folder.glob("*.safetensors")):
        if not Path(name).expanduser().is_dir():
            folder = _with_pickled(name)
        if (folder / _PICKLED).is_file():
            return (folder / _PICKLED,)
    return weight_files(folder)


def _with_pickled(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", _PICKLED]))
    except OSError as error:
        raise CheckpointError(f"the weights of the {_WHAT} {name} cannot be downloaded: {error}") from error


class DistillMos:
    """Estimates mean opinion scores, 1 to 5; needs the extra `naturalness`."""

    def __init__(self, *, device: str = "cpu") -> None:
        """Raises ConfigError if the extra is not installed."""
        torchaudio_compat.install()  # distillmos imports torchaudio to read files, which we do ourselves
        try:
            library = importlib.import_module("distillmos.sqa")
        except ImportError as error:
            raise ConfigError(f"{_DISTILLMOS} needs more: pip install 'higgstune[naturalness]' [{error}]") from error
        with redirect_stdout(io.StringIO()):  # it prints which weights it has loaded
            self._model = library.ConvTransformerSQAModel().eval().to(device)
        self._device = torch.device(device)
        weights = Path(library.DEFAULT_WEIGHTS_CHKPT)
        self.name = model_name(_DISTILLMOS, weights.stem, [weights])

    @torch.inference_mode()
    def rate(self, files: Sequence[Path]) -> dict[str, list[float]]:
        """A score per file, of its first minute. A file under 0.1 s has no speech and gets 1.0, the worst."""
        return {_DISTILLMOS: [self._score(file) for file in files]}

    def _score(self, file: Path) -> float:
        waveform = read_for_judge(file, seconds=MAX_MOS_SAMPLES / RATE)
        if len(waveform) < MIN_SAMPLES:
            return WORST
        return float(self._model(torch.from_numpy(waveform)[None].to(self._device)))
