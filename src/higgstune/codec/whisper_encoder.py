"""The frozen Whisper encoder: a waveform -> the features that a projector maps into the text pathway.

    mel [bins, 3000] of a chunk of 30 s -> encoder layers -> average pool by 2 -> layer norm -> [750, d_model]

Its layers are those of Whisper. Higgs Audio adds pooling before the last layer norm, and a mask over the padding of a
short chunk, which transformers has as `Qwen2AudioEncoder`. Source: boson_multimodal's `HiggsAudioEncoder`,
`_apply_audio_tower` and sample collator (golden `whisper`).

Like the codec, the encoder is not part of the trained module tree and never leaves eval mode.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from higgstune.checkpoint_files import malformed_errors, read_json, read_weights, weight_files
from higgstune.codec.base import WhisperFeatures
from higgstune.errors import CheckpointError, DataError
from higgstune.hub import fetch

if TYPE_CHECKING:  # imported where an encoder is loaded: most models have none
    from transformers import Qwen2AudioEncoder, WhisperFeatureExtractor

_CONFIG_KEYS = (
    "num_mel_bins", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "d_model", "activation_function",
    "scale_embedding", "max_source_positions",
)  # fmt: skip
# Limits for a preprocessor_config.json: enough for every Whisper, with a spectrogram that fits into memory.
MAX_VALUES = {"feature_size": 1024, "n_fft": 8192, "chunk_length": 60, "hop_length": 8192, "sampling_rate": 192_000}
_PREFIXES = ("model.encoder.", "encoder.", "audio_tower.")  # WhisperForConditionalGeneration, WhisperModel, original


class WhisperTower:
    """A Whisper encoder. It is not a module: it is never trained, saved or moved with the model."""

    def __init__(self, encoder: "Qwen2AudioEncoder", extractor: "WhisperFeatureExtractor", checkpoint: str) -> None:
        """Use `load_whisper` or `tower_from_original`."""
        self._encoder = encoder.eval().requires_grad_(False)
        self._extractor = extractor
        self.checkpoint = checkpoint
        self.revision = _revision(encoder)
        self.sample_rate: int = extractor.sampling_rate
        self.d_model: int = encoder.config.d_model
        self.chunk_frames: int = encoder.config.max_source_positions // 2

    @property
    def config(self) -> dict[str, Any]:
        """The encoder's sizes, under Whisper's names."""
        return {key: getattr(self._encoder.config, key) for key in _CONFIG_KEYS}

    def state(self) -> dict[str, Tensor]:
        """The encoder's weights by name."""
        return dict(self._encoder.state_dict())

    @torch.inference_mode()
    def encode(self, waveform: np.ndarray) -> WhisperFeatures:
        """[samples] float32 mono at `sample_rate`, of any length -> features, chunk by chunk of 30 s.

        They are rounded to float16, the dtype of stored features, so that training on stored features and speaking with
        fresh ones use the same numbers. Raises DataError for a clip that is too short for one position.
        """
        length = self._extractor.n_samples
        parts = [self._chunk(waveform[start : start + length]) for start in range(0, len(waveform), length)]
        if not any(len(part) for part in parts):
            raise DataError(
                f"a clip of {len(waveform)} samples is too short for Whisper, whose positions are 40 ms long"
            )
        features = torch.cat(parts).to(torch.float16).cpu().numpy()
        if not np.isfinite(features).all():
            raise DataError("Whisper returned features that float16 cannot hold: is its checkpoint damaged?")
        return WhisperFeatures(features, tuple(len(part) for part in parts))

    @torch.inference_mode()
    def hidden(self, mel: Tensor, mel_mask: Tensor) -> list[Tensor]:
        """mel [N, bins, frames] and mel_mask [N, frames] -> for each chunk its [positions, d_model] float32."""
        after_convolution = (mel_mask.sum(-1) - 1) // 2 + 1
        positions = (after_convolution - 2) // 2 + 1
        span = torch.arange((mel.shape[-1] - 1) // 2 + 1, device=mel.device)
        visible = (span < after_convolution[:, None])[:, None, None, :]  # [N, 1, 1, frames / 2]
        mask = visible.expand(-1, 1, len(span), -1)
        with torch.autocast(self._encoder.device.type, enabled=False):  # features do not depend on the caller
            pooled = self._encoder(mel.to(self._encoder.device), attention_mask=mask.to(self._encoder.device))
        return [rows[:count] for rows, count in zip(pooled.last_hidden_state, positions.tolist(), strict=True)]

    def _chunk(self, waveform: np.ndarray) -> Tensor:
        extracted = self._extractor(
            waveform.astype(np.float32),
            sampling_rate=self.sample_rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return self.hidden(extracted["input_features"], extracted["attention_mask"])[0]


def load_whisper(
    name: str | Path, *, device: str | torch.device = "cpu", cache_dir: str | Path | None = None
) -> WhisperTower:
    """The encoder of a Whisper checkpoint, a folder or hub id, in float32.

    An original-format checkpoint that brings an encoder will do, too. Raises CheckpointError for any other checkpoint,
    and for one that lacks a weight.
    """
    folder = fetch(name, what="Whisper checkpoint", cache_dir=cache_dir)
    config = read_json(folder / "config.json", "a checkpoint folder needs it")
    if config.get("model_type") == "higgs_audio" and not config.get("skip_audio_tower", True):
        state = read_weights(weight_files(folder))
        return tower_from_original(config.get("audio_encoder_config"), state, folder, device)
    if config.get("model_type") != "whisper":
        raise CheckpointError(
            f"{folder / 'config.json'} has the model_type {config.get('model_type')!r}: name a Whisper checkpoint, "
            "such as openai/whisper-large-v3"
        )
    written = read_json(folder / "preprocessor_config.json", "it defines how a waveform becomes a mel spectrogram")
    for key, limit in MAX_VALUES.items():
        value = written.get(key, 1)
        if not isinstance(value, int) or not 0 < value <= limit:
            raise CheckpointError(f"{folder / 'preprocessor_config.json'}: {key} is {value!r}, at most {limit} is read")
    from transformers import WhisperFeatureExtractor

    try:
        extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"the Whisper feature extractor in {folder} cannot be read: {error}") from error
    encoder = _encoder(config, read_weights(weight_files(folder)), folder)
    mel = (encoder.config.num_mel_bins, 2 * encoder.config.max_source_positions)
    if (made := (extractor.feature_size, extractor.nb_max_frames)) != mel:
        raise CheckpointError(
            f"{folder}: its preprocessor makes mel spectrograms of {made[0]} bins and {made[1]} frames, its encoder "
            f"takes {mel[0]} and {mel[1]}: preprocessor_config.json and config.json are of different checkpoints"
        )
    return WhisperTower(_moved(encoder, device), extractor, str(name))


def tower_from_original(
    config: Mapping[str, Any] | None, state: Mapping[str, Tensor], folder: Path, device: str | torch.device = "cpu"
) -> WhisperTower:
    """The `audio_tower` of an original-format checkpoint; `config` is its `audio_encoder_config`.

    Raises CheckpointError where there is none, or where it does not match the weights.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{folder / 'config.json'} has no audio_encoder_config: copy or download it again")
    from transformers import WhisperFeatureExtractor

    encoder = _encoder(config, state, folder)
    mel_seconds = 2 * encoder.config.max_source_positions / 100  # 100 mel frames a second, halved by a convolution
    extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins, chunk_length=round(mel_seconds))
    return WhisperTower(_moved(encoder, device), extractor, str(folder))


def _encoder(config: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> "Qwen2AudioEncoder":
    from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig

    missing = [key for key in _CONFIG_KEYS if key not in config]
    if missing:
        raise CheckpointError(f"the Whisper config in {folder} has no {missing[0]}")
    weights = {
        key.removeprefix(prefix): value.float()
        for key, value in state.items()
        for prefix in _PREFIXES
        if key.startswith(prefix)
    }
    # On the meta device first: names and shapes are compared before memory is allocated.
    try:
        settings = Qwen2AudioEncoderConfig(**{key: config[key] for key in _CONFIG_KEYS})
        if not 0 < settings.encoder_layers <= len(weights):
            raise ValueError(f"{settings.encoder_layers} layers of {len(weights)} tensors")
        with torch.device("meta"):
            empty = Qwen2AudioEncoder._from_config(settings)
    except malformed_errors() as error:
        raise CheckpointError(
            f"the Whisper encoder in {folder} does not fit its config: {error}; copy it again"
        ) from error
    expected = {key: tuple(value.shape) for key, value in empty.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise CheckpointError(
            f"the Whisper encoder in {folder} does not fit its config: {len(wrong)} tensors missing, unknown or of "
            f"another shape, such as {wrong[0]}; copy or download it again"
        )
    encoder = Qwen2AudioEncoder._from_config(
        settings, attn_implementation="sdpa"
    )  # eager adds a boolean mask to the scores
    encoder.load_state_dict(weights)
    return encoder


def _moved(encoder: "Qwen2AudioEncoder", device: str | torch.device) -> "Qwen2AudioEncoder":
    torch.nn.Module.to(encoder, device)  # type checkers do not understand the `to` of transformers
    return encoder


def _revision(encoder: "Qwen2AudioEncoder") -> str:
    """16 hexadecimal digits over the sizes and all weights."""
    digest = hashlib.sha256(json.dumps({key: getattr(encoder.config, key) for key in _CONFIG_KEYS}).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
