"""The codec inside a checkpoint's own weight files: its weights are there, in bfloat16, and not its configuration.

It computes in float32 and encodes the exact samples of a clip, as the servers of such a checkpoint do: filling a clip
up to whole frames, or computing in bfloat16, gives other codes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import HiggsAudioV2TokenizerConfig

from higgstune.checkpoint_files import malformed_errors, read_json, safetensors_keys, weight_files
from higgstune.codec import CODEC_PREFIX
from higgstune.codec.higgs import REFUSED_KEYS, HiggsAudioV2TokenizerModel, HiggsCodec, keys_of
from higgstune.errors import CheckpointError

CODEC_CONFIG = "codec_config.json"  # in the checkpoint's folder or beside it, where the codec is not the released one
REFERENCE_SECONDS = 1.0  # every server fills a shorter reference up with silence
_UNUSED = "semantic_model.masked_spec_embed"  # of HuBERT's pre-training
_RATIOS = [8, 5, 4, 2, 3]
_RELEASED: dict[str, Any] = {
    "target_bandwidths": [0.5, 1, 1.5, 2],
    "acoustic_model_config": {"model_type": "dac", "downsampling_ratios": _RATIOS, "upsampling_ratios": _RATIOS},
}
_AGAIN = "copy or download the checkpoint again"


def load_bundled(folder: Path, *, device: str | torch.device = "cpu") -> HiggsCodec:
    """The codec in a checkpoint's folder. Raises CheckpointError where its weights are not exactly those of its
    configuration.
    """
    written, place = codec_settings(folder)
    stored = codec_tensors(folder)
    try:
        model = HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig(**written))
    except malformed_errors() as error:
        raise CheckpointError(f"{place} does not describe a codec ({type(error).__name__}: {error})") from error
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in stored.items() if key != _UNUSED}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise CheckpointError(
            f"the codec in {folder} does not fit {place}: {len(wrong)} of its weights are missing, unknown or of "
            f"another shape, such as {wrong[0]}: expected {expected.get(wrong[0])}, got {found.get(wrong[0])}; {_AGAIN}"
            f", or put its {CODEC_CONFIG} into the folder"
        )
    model.load_state_dict({key: value.float() for key, value in stored.items() if key != _UNUSED})
    revision = _revision(written, stored)
    return HiggsCodec(model, revision, device, fills_frames=False, reference_seconds=REFERENCE_SECONDS)


def codec_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """The codec's configuration, and its place in words: the released codec's where none is written."""
    for path in (folder / CODEC_CONFIG, folder.parent / CODEC_CONFIG):
        if path.exists():
            written = read_json(path, "")
            if refused := sorted(keys_of(written) & REFUSED_KEYS):
                raise CheckpointError(f"{path}: the codec has {refused[0]}, which is not supported")
            return {key: value for key, value in written.items() if key != "model_type"}, str(path)
    return _RELEASED, "the configuration of the released codec"


def codec_tensors(folder: Path) -> dict[str, Tensor]:
    """The codec's tensors as they are stored, without their prefix. Raises CheckpointError."""
    found = {}
    for file in weight_files(folder):
        safetensors_keys(file)  # a truncated file has a message of its own
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                if key.startswith(CODEC_PREFIX):
                    found[key.removeprefix(CODEC_PREFIX)] = weights.get_tensor(key)
    return found


def _revision(written: dict[str, Any], stored: dict[str, Tensor]) -> str:
    """16 hexadecimal digits over configuration, weights and the rule of padding, in whatever file they lie."""
    digest = hashlib.sha256(json.dumps([written, "exact samples"], sort_keys=True).encode())
    for key, value in sorted(stored.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
