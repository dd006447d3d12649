"""Codecs: waveform <-> codes, and which codec a checkpoint uses."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from higgstune.checkpoint_files import read_json
from higgstune.codec.base import Codec
from higgstune.environment import choose_device
from higgstune.errors import CheckpointError
from higgstune.hub import fetch

if TYPE_CHECKING:
    from higgstune.codec.higgs import HiggsCodec as HiggsCodec
    from higgstune.codec.mel import MelCodec as MelCodec

__all__ = ["CODEC_FOLDER", "DEFAULT_CODEC", "Codec", "HiggsCodec", "MelCodec", "checkpoint_codec", "load_codec"]

CODEC_FOLDER = "codec"  # the sub-folder in which a checkpoint may bring its codec
DEFAULT_CODEC = "bosonai/higgs-audio-v2-tokenizer"
HIGGS_MODEL_TYPE = "higgs_audio_v2_tokenizer"
BUNDLING = ("higgs_multimodal_qwen3",)  # model types of checkpoints whose own weight files hold their codec
CODEC_PREFIX = "tied.embedding.modality_embeddings.0.model."  # of its tensors there


def load_codec(
    name_or_path: str | Path,
    *,
    device: str | None = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Codec:
    """The codec in a folder or at the hub: the Higgs codec on `device` (None: CUDA where it is available), or a fitted
    one, always on the CPU. A checkpoint with a codec in its own weight files is a codec's folder, too.

    `revision` and `cache_dir` are the hub's. Raises CheckpointError for what is not a codec of these kinds.
    """
    from higgstune.codec import mel  # brings scipy

    folder = fetch(name_or_path, what="codec", revision=revision, cache_dir=cache_dir)
    model_type = read_json(folder / mel.CONFIG, "a codec's folder needs it").get("model_type")
    if model_type == mel.MODEL_TYPE:
        return mel.MelCodec.from_pretrained(folder)
    if model_type in BUNDLING:
        from higgstune.codec.bundled import load_bundled

        return load_bundled(folder, device=choose_device(device))
    if model_type == HIGGS_MODEL_TYPE:
        from higgstune.codec.higgs import HiggsCodec  # imports transformers, which a fitted codec does not need

        return HiggsCodec.from_pretrained(folder, device=choose_device(device))
    raise CheckpointError(
        f'{folder / mel.CONFIG}: "model_type" is {model_type!r}, but a codec has "{HIGGS_MODEL_TYPE}" or '
        f'"{mel.MODEL_TYPE}". Convert the original layout (model.pth) to that of transformers.'
    )


def checkpoint_codec(checkpoint: str | Path | None, codec: str | Path | None = None) -> str:
    """The name or folder of a checkpoint's codec: the given one, else its sub-folder `codec`, else the checkpoint
    itself where its own weight files hold one, else the released codec.

    Raises CheckpointError when the checkpoint is needed and does not exist.
    """
    if codec is not None:
        return str(codec)
    if checkpoint is None:
        return DEFAULT_CODEC
    folder = fetch(checkpoint, what="checkpoint", weights=False)
    if (own := folder / CODEC_FOLDER).is_dir():
        return str(own)
    return str(checkpoint) if bundles_codec(folder) else DEFAULT_CODEC


def brings_codec(folder: Path) -> bool:
    """Whether a checkpoint's folder has its codec, in a sub-folder or in its own weight files."""
    return (folder / CODEC_FOLDER).is_dir() or bundles_codec(folder)


def bundles_codec(folder: Path) -> bool:
    """Whether a checkpoint's own weight files hold its codec, by its config.json."""
    path = folder / "config.json"
    return path.exists() and read_json(path, "").get("model_type") in BUNDLING


def __getattr__(name: str) -> Any:
    """The codecs bring scipy, or torch and transformers, so each is imported on first use."""
    home = {"HiggsCodec": "higgstune.codec.higgs", "MelCodec": "higgstune.codec.mel"}.get(name)
    if home is None:
        raise AttributeError(f"module 'higgstune.codec' has no attribute {name!r}")
    return getattr(import_module(home), name)
