"""ASR by Whisper, with faster-whisper (CTranslate2) or with transformers.

Both decode greedily and each file by itself, so that a file has the same transcript in any batch.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from higgstune.checkpoint_files import malformed_errors, read_json, weight_files
from higgstune.errors import CheckpointError, ConfigError
from higgstune.evaluation.judges.base import (
    MIN_SAMPLES,
    RATE,
    check_language,
    load_weights,
    model_name,
    read_for_judge,
)
from higgstune.hub import fetch

_WINDOW = 30 * RATE  # samples that Whisper encodes at once
_CTRANSLATE2_WEIGHTS = "model.bin"
_VOCABULARIES = ("tokenizer.json", "vocab.json")


def load_transcriber(name_or_path: str, device: str = "cpu") -> "FasterWhisper | TransformersWhisper":
    """The Whisper of a folder (CTranslate2 or transformers), a hub id of either, or a name of faster-whisper ("base").

    Raises ConfigError if faster-whisper is needed and not installed, CheckpointError for a model that cannot be loaded.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        is_native = not (folder / _CTRANSLATE2_WEIGHTS).is_file()
    elif "/" in name_or_path:
        folder = fetch(name_or_path, what="ASR", weights=False)
        is_native = _is_native(folder)
    else:
        is_native = False
    return (TransformersWhisper if is_native else FasterWhisper)(name_or_path, device=device)


class FasterWhisper:
    """A faster-whisper model by name, hub id or CTranslate2 folder; needs the extra `asr`."""

    def __init__(self, name_or_path: str, *, device: str = "cpu") -> None:
        """Raises ConfigError if the extra is not installed, CheckpointError if the model cannot be loaded."""
        try:
            library = importlib.import_module("faster_whisper")
        except ImportError as error:
            raise ConfigError(f"the ASR {name_or_path} needs faster-whisper: pip install 'higgstune[asr]'") from error
        where = torch.device(device)
        kind = "int8" if where.type == "cpu" else "float16"
        try:
            folder = Path(name_or_path).expanduser()
            folder = folder if folder.is_dir() else Path(library.utils.download_model(name_or_path))
            self._model = library.WhisperModel(
                str(folder), device=where.type, device_index=where.index or 0, compute_type=kind
            )
        except (ValueError, RuntimeError, OSError, HFValidationError) as error:
            raise CheckpointError(
                f"the ASR {name_or_path} cannot be loaded: {error} (a local folder needs no network)"
            ) from error
        self.name = f"{model_name('faster-whisper', folder, [folder / _CTRANSLATE2_WEIGHTS])} {kind}"

    def transcribe(
        self, files: Sequence[Path], *, language: str | None = None, seconds: float | None = None
    ) -> list[str]:
        """One transcript per file. Raises ConfigError for a language that the model does not support."""
        code = check_language(language, self._model.supported_languages, self.name)
        return [self._transcript(read_for_judge(file, seconds=seconds), code) for file in files]

    def _transcript(self, waveform: np.ndarray, language: str | None) -> str:
        if len(waveform) < MIN_SAMPLES:
            return ""
        segments, _ = self._model.transcribe(
            waveform, language=language, beam_size=1, temperature=0.0, condition_on_previous_text=False,
            without_timestamps=len(waveform) <= _WINDOW,  # longer audio needs them to place the next window
        )  # fmt: skip
        return " ".join(segment.text.strip() for segment in segments)


class TransformersWhisper:
    """A Whisper checkpoint of transformers, a folder or hub id with safetensors, in float32."""

    def __init__(self, name_or_path: str, *, device: str = "cpu") -> None:
        """Raises CheckpointError for any other checkpoint, or one that lacks a file or a weight."""
        folder = fetch(name_or_path, what="ASR")
        if not _is_native(folder):
            raise CheckpointError(
                f"{folder} is not an ASR: neither a CTranslate2 folder (with {_CTRANSLATE2_WEIGHTS}) nor a checkpoint "
                "of transformers with the model_type whisper"
            )
        self.name = model_name("transformers", folder, weight_files(folder))
        self._device = torch.device(device)
        self._processor = _processor(folder)
        self._model = load_weights(
            WhisperForConditionalGeneration, folder, "ASR", use_safetensors=True, attn_implementation="sdpa"
        ).to(self._device)
        self._languages = _languages(self._model.generation_config, folder)

    def transcribe(
        self, files: Sequence[Path], *, language: str | None = None, seconds: float | None = None
    ) -> list[str]:
        """One transcript per file. Raises ConfigError for a language that the model does not support."""
        code = check_language(language, self._languages, self.name)
        return [self._transcript(read_for_judge(file, seconds=seconds), code) for file in files]

    @torch.inference_mode()
    def _transcript(self, waveform: np.ndarray, language: str | None) -> str:
        if len(waveform) < MIN_SAMPLES:
            return ""
        window = self._processor.feature_extractor.n_samples
        is_long = len(waveform) > window
        features = self._processor(
            waveform, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True,
            truncation=False, padding="longest" if is_long else "max_length",
        )  # fmt: skip
        options: dict[str, Any] = {"return_timestamps": is_long, "num_beams": 1, "do_sample": False}
        if self._languages != ["en"]:
            options |= {"language": language, "task": "transcribe"}
        tokens = self._model.generate(
            features["input_features"].to(self._device),
            attention_mask=features["attention_mask"].to(self._device),
            **options,
        )
        return str(self._processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()


def _is_native(folder: Path) -> bool:
    """Whether it is a checkpoint of transformers. (A CTranslate2 folder has a config.json too, with other keys.)"""
    config = folder / "config.json"
    return config.is_file() and read_json(config, "").get("model_type") == "whisper"


def _processor(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty one
        raise CheckpointError(f"the ASR {folder} has no {' or '.join(_VOCABULARIES)}: copy its tokenizer too")
    try:
        return WhisperProcessor.from_pretrained(folder, local_files_only=True)
    except malformed_errors() as error:
        raise CheckpointError(f"the ASR {folder} has no usable tokenizer or preprocessor: {error}") from error


def _languages(settings: Any, folder: Path) -> list[str]:
    """The codes of the languages that a model supports, from its generation_config.json."""
    is_multilingual = getattr(settings, "is_multilingual", None)
    codes = [token.strip("<|>") for token in getattr(settings, "lang_to_id", None) or {}]
    if is_multilingual is None or (is_multilingual and not codes):
        raise CheckpointError(
            f"{folder / 'generation_config.json'} does not say which languages the ASR supports: copy the file from "
            "the Whisper that it was trained from"
        )
    return codes if is_multilingual else ["en"]
