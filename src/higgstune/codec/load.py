"""From a codec's name to a codec."""

import json
from pathlib import Path

from higgstune.codec import mel
from higgstune.codec.base import Codec
from higgstune.errors import CheckpointError
from higgstune.hub import fetch

DEFAULT_CODEC = "bosonai/higgs-audio-v2-tokenizer"
HIGGS_MODEL_TYPE = "higgs_audio_v2_tokenizer"


def load_codec(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Codec:
    """The codec in a folder or at the hub: the Higgs codec on `device`, or a fitted one, always on the CPU.

    `revision` and `cache_dir` are the hub's. Raises CheckpointError for what is not a codec of these kinds.
    """
    folder = fetch(name_or_path, what="codec", revision=revision, cache_dir=cache_dir)
    model_type = _model_type(folder / mel.CONFIG)
    if model_type == mel.MODEL_TYPE:
        return mel.MelCodec.from_pretrained(folder)
    if model_type == HIGGS_MODEL_TYPE:
        from higgstune.codec.higgs import HiggsCodec  # brings transformers, which a fitted codec can do without

        return HiggsCodec.from_pretrained(folder, device=device)
    raise CheckpointError(
        f'{folder / mel.CONFIG}: "model_type" is {model_type!r}, but a codec has "{HIGGS_MODEL_TYPE}" or '
        f'"{mel.MODEL_TYPE}". The original layout (model.pth) must be converted to that of transformers.'
    )


def _model_type(path: Path) -> object:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: not found, so {path.parent} is not a codec's folder") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Copy or download the codec again.") from error
    return config.get("model_type") if isinstance(config, dict) else None
