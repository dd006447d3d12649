"""ASR by Whisper, with faster-whisper (CTranslate2) or with transformers.

Both decode files greedily and each by itself, so that a file has the same transcript in any batch. Clips are
transcribed together, which takes half the time: see `stretches`.
"""

import importlib
import math
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
    Transcript,
    check_language,
    load_weights,
    model_name,
    read_for_judge,
)
from higgstune.evaluation.judges.stretches import Word, transcribe_packed, vote_on_language
from higgstune.hub import fetch

_WINDOW = 30 * RATE  # samples that Whisper encodes at once
_NO_SPEECH, _UNSURE = 0.6, -1.0  # Whisper's own rule: above this probability and below this log-probability, no speech
_MIN_PROBABILITY = 1e-10  # of a word: its logarithm stays finite
_UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")  # languages whose words have no space between them
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
        self._library = library
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

    def transcribe_clips(self, waveforms: Sequence[np.ndarray], language: str | None) -> list[Transcript]:
        """One transcript per clip, in stretches: see `stretches`. Raises ConfigError as `transcribe` does."""
        code = check_language(language, self._model.supported_languages, self.name)
        if code is None and any(len(waveform) >= MIN_SAMPLES for waveform in waveforms):
            code = self.detect_language(waveforms)
        return transcribe_packed(waveforms, lambda waveform: self._words(waveform, code))

    def detect_language(self, waveforms: Sequence[np.ndarray]) -> str:
        """By vote of a few stretches. Raises DataError if no clip has 0.1 s."""
        return vote_on_language(waveforms, lambda waveform: dict(self._model.detect_language(waveform)[2]))

    def _words(self, waveform: np.ndarray, language: str | None) -> list[Word]:
        options = {
            "language": language, "beam_size": 5, "temperature": 0.0, "condition_on_previous_text": False,
            "word_timestamps": True,
        }  # fmt: skip
        if len(waveform) < _WINDOW:
            # Exactly one window: `WhisperModel.transcribe` would continue behind the last word, and its timestamps end
            # a stretch at a silence. A pipeline holds the time of the last word, so each window has a new one.
            segments, _ = self._library.BatchedInferencePipeline(self._model).transcribe(
                waveform, vad_filter=False, without_timestamps=True, **options
            )
        else:
            segments, _ = self._model.transcribe(waveform, **options)
        return [
            Word(word.word, word.start, word.end, math.log(max(word.probability, _MIN_PROBABILITY)))
            for segment in segments
            if segment.no_speech_prob <= _NO_SPEECH or segment.avg_logprob >= _UNSURE
            for word in segment.words
        ]

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
        settings = self._model.generation_config
        self._languages = _languages(settings, folder)
        self._window = int(self._processor.feature_extractor.n_samples)
        self._has_times = _has_times(self._model)
        self._special = frozenset(self._processor.tokenizer.all_special_ids)

    def transcribe(
        self, files: Sequence[Path], *, language: str | None = None, seconds: float | None = None
    ) -> list[str]:
        """One transcript per file. Raises ConfigError for a language that the model does not support."""
        code = check_language(language, self._languages, self.name)
        return [self._transcript(read_for_judge(file, seconds=seconds), code) for file in files]

    def transcribe_clips(self, waveforms: Sequence[np.ndarray], language: str | None) -> list[Transcript]:
        """One transcript per clip; in stretches (see `stretches`) if generation_config.json has `alignment_heads`.

        Raises ConfigError as `transcribe` does.
        """
        code = check_language(language, self._languages, self.name)
        if code is None and any(len(waveform) >= MIN_SAMPLES for waveform in waveforms):
            code = self.detect_language(waveforms)
        return transcribe_packed(waveforms, lambda waveform: self._words(waveform, code), pack=self._has_times)

    def detect_language(self, waveforms: Sequence[np.ndarray]) -> str:
        """By vote of a few stretches. Raises DataError if no clip has 0.1 s."""
        return vote_on_language(waveforms, self._language_probabilities)

    def _transcript(self, waveform: np.ndarray, language: str | None) -> str:
        if len(waveform) < MIN_SAMPLES:
            return ""
        return self._text(self._generate(waveform, language)[0])

    def _words(self, waveform: np.ndarray, language: str | None) -> list[Word]:
        seconds = len(waveform) / RATE
        if len(waveform) > self._window:
            return [Word(self._transcript(waveform, language), 0.0, seconds)]
        found = self._generate(
            waveform, language, return_dict_in_generate=True, return_token_timestamps=self._has_times,
            temperature=0.0, logprob_threshold=-math.inf,  # never met: it makes `generate` return the scores
        )  # fmt: skip
        scores = torch.stack(found["scores"]).float().log_softmax(-1)[:, 0].cpu()  # [tokens, vocabulary]
        tokens = found["sequences"][0, -len(scores) :].cpu()
        logprobs = scores.gather(1, tokens[:, None])[:, 0]
        no_speech = self._model.generation_config.no_timestamps_token_id - 1  # as in all of Whisper's vocabularies
        if logprobs.mean() < _UNSURE and self._start(waveform).softmax(-1)[no_speech] > _NO_SPEECH:
            return []
        if not self._has_times:
            return [Word(self._text(tokens), 0.0, seconds, float(logprobs.mean()))]
        ends = found["token_timestamps"][0, -len(scores) :].tolist()
        return self._merged(tokens.tolist(), [0.0, *ends], logprobs.tolist(), language or "en")

    def _merged(
        self, tokens: Sequence[int], times: Sequence[float], logprobs: Sequence[float], language: str
    ) -> list[Word]:
        """The words of tokens, between whose `times` they lie. A word begins with a space or, in a language without
        spaces, with each character that is whole."""
        pieces: list[tuple[str, int, int]] = []  # text, first token, token behind the last
        first = 0
        for at, token in enumerate(tokens):
            if token in self._special:
                first = at + 1
                continue
            text = self._processor.tokenizer.decode(tokens[first : at + 1])
            if text.endswith("\ufffd"):  # a part of a character
                continue
            if pieces and language not in _UNSPACED and not text.startswith(" "):
                before, first, _ = pieces.pop()
                text = before + text
            pieces.append((text, first, at + 1))
            first = at + 1
        return [Word(text, times[a], times[b], float(np.mean(logprobs[a:b]))) for text, a, b in pieces]

    @torch.inference_mode()
    def _generate(self, waveform: np.ndarray, language: str | None, **more: Any) -> Any:
        is_long = len(waveform) > self._window
        options: dict[str, Any] = {"return_timestamps": is_long, "num_beams": 1, "do_sample": False}
        if self._languages != ["en"]:
            options |= {"language": language, "task": "transcribe"}
        return self._model.generate(**self._features(waveform), **options, **more)

    @torch.inference_mode()
    def _start(self, waveform: np.ndarray) -> torch.Tensor:
        """[vocabulary] logits of what comes first, the language or the mark of no speech; of the first window."""
        first = torch.tensor([[self._model.generation_config.decoder_start_token_id]], device=self._device)
        features = self._features(waveform[: self._window])
        logits: torch.Tensor = self._model(**features, decoder_input_ids=first).logits[0, -1].float().cpu()
        return logits

    def _features(self, waveform: np.ndarray) -> dict[str, torch.Tensor]:
        found = self._processor(
            waveform, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True,
            truncation=False, padding="longest" if len(waveform) > self._window else "max_length",
        )  # fmt: skip
        return {name: found[name].to(self._device) for name in ("input_features", "attention_mask")}

    def _text(self, tokens: torch.Tensor) -> str:
        return str(self._processor.decode(tokens, skip_special_tokens=True)).strip()

    def _language_probabilities(self, waveform: np.ndarray) -> dict[str, float]:
        if self._languages == ["en"]:
            return {"en": 1.0}
        ids = self._model.generation_config.lang_to_id
        chances = self._start(waveform)[list(ids.values())].softmax(-1).tolist()
        return {token.strip("<|>"): chance for token, chance in zip(ids, chances, strict=True)}


def _is_native(folder: Path) -> bool:
    """Whether it is a checkpoint of transformers. (A CTranslate2 folder has a config.json too, with other keys.)"""
    config = folder / "config.json"
    return config.is_file() and read_json(config, "").get("model_type") == "whisper"


def _has_times(model: Any) -> bool:
    """Whether its generation_config.json names heads of attention, which the model has, that follow the speech."""
    heads = getattr(model.generation_config, "alignment_heads", None) or []
    layers, width = model.config.decoder_layers, model.config.decoder_attention_heads
    return bool(heads) and all(layer < layers and head < width for layer, head in heads)


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
