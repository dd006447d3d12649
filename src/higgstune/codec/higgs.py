"""The Higgs Audio v2 codec of transformers as a `Codec`."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from higgstune import torchaudio_compat
from higgstune.checkpoint_files import malformed_errors, read_json, weight_files
from higgstune.codec.base import checked_codes, whole_frames
from higgstune.errors import CheckpointError

torchaudio_compat.install()  # the codec's module imports torchaudio

from transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer import (  # noqa: E402
    HiggsAudioV2TokenizerModel,
)

# transformers still has a placeholder under this name, from before torchaudio could be imported.
vars(transformers)["HiggsAudioV2TokenizerModel"] = HiggsAudioV2TokenizerModel
REFUSED_KEYS = {"_attn_implementation", "attn_implementation", "quantization_config"}  # they make code load


class HiggsCodec:
    """Implements `Codec`. Not a module: it never becomes part of a trained one and never leaves eval mode."""

    def __init__(
        self,
        model: HiggsAudioV2TokenizerModel,
        revision: str,
        device: str | torch.device = "cpu",
        *,
        fills_frames: bool = True,
        reference_seconds: float = 0.0,
    ) -> None:
        """`fills_frames`: clips are padded with silence to a whole frame, as by the feature extractor of transformers;
        else the exact samples are encoded, and the number of frames is the codec's own.
        """
        self._model = model.eval().requires_grad_(False).to(device)
        config = model.config
        self.sample_rate: int = config.sample_rate
        self.frame_samples: int = config.hop_length
        self.frame_rate = self.sample_rate / self.frame_samples
        self.num_codebooks: int = config.num_quantizers
        self.codebook_size: int = config.codebook_size
        self.revision = revision
        self.reference_seconds = reference_seconds
        self.context: int | None = math.ceil(_reach(self._model.acoustic_decoder) / self.frame_samples) - 1
        self._fills_frames = fills_frames

    @torch.inference_mode()
    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """[samples] float32 at `sample_rate` -> [frames, num_codebooks] uint16.

        One clip at a time: in a padded batch the padding changes the codes. Raises DataError.
        """
        filled = whole_frames(waveform, self.frame_samples if self._fills_frames else 1)
        if len(filled) == 0:
            return np.zeros((0, self.num_codebooks), dtype=np.uint16)
        samples = torch.from_numpy(filled).to(self._model.device)
        with self._float32():
            codes = self._model.encode(samples[None, None], return_dict=False)  # [1, codebooks, frames]
        return codes[0].T.cpu().numpy().astype(np.uint16)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """[frames, num_codebooks] integers -> [frames * frame_samples] float32. Raises DataError."""
        checked = checked_codes(codes, self.num_codebooks, self.codebook_size)
        if len(checked) == 0:
            return np.zeros(0, dtype=np.float32)
        tokens = torch.from_numpy(checked.T.copy()).to(self._model.device)
        with self._float32():
            waveform = self._model.decode(tokens[None], return_dict=False)  # [1, 1, samples]
        return waveform[0, 0].cpu().numpy()

    def decode_part(self, codes: np.ndarray, wanted: slice, **_: Any) -> tuple[np.ndarray, None]:
        """See `StreamingCodec`: convolutions look the same everywhere, and have no state."""
        return self.decode(codes)[wanted.start * self.frame_samples : wanted.stop * self.frame_samples], None

    def _float32(self) -> torch.autocast:
        """Codes must not depend on whether the caller is inside a trainer's autocast."""
        return torch.autocast(self._model.device.type, enabled=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> "HiggsCodec":
        """Read a folder in the layout of transformers, in float32.

        Raises CheckpointError where the folder cannot be read or does not hold every weight.
        """
        _check_folder(Path(folder))
        try:
            loaded: Any = HiggsAudioV2TokenizerModel.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True, local_files_only=True
            )
        except malformed_errors(SafetensorError) as error:
            raise CheckpointError(f"{folder}: the codec cannot be loaded: {error}") from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"{folder}: {len(missing)} weights of the codec are missing, {missing[0]} among them. "
                f"Download the folder again."
            )
        return cls(model, folder_revision(Path(folder)), device)


def _reach(decoder: nn.Module) -> float:
    """How many samples a code changes before its frame, or from the frame's start on: the sum over the convolutions."""
    reach, samples = 0.0, 1
    for layer in reversed([part for part in decoder.modules() if isinstance(part, nn.Conv1d | nn.ConvTranspose1d)]):
        if isinstance(layer, nn.ConvTranspose1d):
            before, stride = int(layer.padding[0]), layer.stride[0]
            reach += samples * max(before, layer.kernel_size[0] - before - stride)
            samples *= stride
        else:
            reach += samples * layer.dilation[0] * (layer.kernel_size[0] - 1) / 2
    return reach + samples


def _check_folder(folder: Path) -> None:
    """Raise CheckpointError for pickled weights, and for whatever makes transformers load code or other weights."""
    weight_files(folder)
    named = keys_of(read_json(folder / "config.json", "a codec's folder needs it")) & REFUSED_KEYS
    if named or (folder / "adapter_config.json").exists():
        what = sorted(named)[0] if named else "an adapter"
        raise CheckpointError(f"{folder}: the codec has {what}, which is not supported. Download the folder again.")


def keys_of(config: Any) -> set[str]:
    """Every key of a configuration and of its parts."""
    if isinstance(config, list):
        return {key for part in config for key in keys_of(part)}
    if not isinstance(config, dict):
        return set()
    return set(config) | {key for part in config.values() for key in keys_of(part)}


def folder_revision(folder: Path) -> str:
    """16 hexadecimal digits over config.json and the weight files, their names included."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
