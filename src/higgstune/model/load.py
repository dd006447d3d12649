"""Load a checkpoint: the model of its family, and everything that belongs to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from higgstune.checkpoint_files import check_checksums
from higgstune.codec import Codec, checkpoint_codec, load_codec
from higgstune.codec.whisper_encoder import WhisperTower
from higgstune.config.recipe import Quantize
from higgstune.environment import choose_device, choose_dtype
from higgstune.errors import CheckpointError
from higgstune.families import load_family, read_layout
from higgstune.families.base import Family, Layout, Prompter, Spec
from higgstune.hub import fetch
from higgstune.inputs import ADAPTER_CONFIG
from higgstune.kernels.quantize import check_quantize, quantize_layers
from higgstune.model.adapter_folder import UNQUANTIZED_FINGERPRINT, base_fingerprint
from higgstune.model.tokenizer import read_tokenizer


@dataclass(frozen=True)
class ModelAndTokenizers:
    """A checkpoint with all that training and speaking need. The codec is not part of the model's module tree."""

    model: Any  # of its family's class
    tokenizer: Any
    audio_tokenizer: Codec
    config: Any
    checkpoint: str  # as named by the user, with `revision`
    revision: str | None
    codec: str  # as named by the user or found
    family: Family
    whisper: WhisperTower | None = None  # the encoder that an original-format checkpoint brings
    folder: Path | None = None  # where the checkpoint lies on this disk

    @property
    def spec(self) -> Spec:
        """The numbers of the checkpoint."""
        return self.family.spec(self.config)

    @property
    def prompter(self) -> Prompter:
        """What turns conversations into examples for it."""
        return self.family.prompter(self.tokenizer, self.config)


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    quantize: Quantize | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """The model of a checkpoint's family (for Higgs Audio v2 the native class, with text head), in eval mode, from a
    folder in any of the family's layouts or a hub id.

    `dtype` and `device` are chosen where not given: see `choose_device`, `choose_dtype`. `quantize` ("4bit") puts the
    linear weights of the decoder layers into 4 bits, see `quantize_layers`; `dtype` is then what they compute in.
    Raises CheckpointError, or ConfigError where 4 bits need what is not installed.
    """
    layout = read_layout(fetch(path, what="checkpoint", revision=revision, cache_dir=cache_dir))
    family = load_family(layout.family)
    return _load(layout, family, family.read_config(layout.folder), choose_device(device), dtype, quantize)[0]


def load_model_and_tokenizers(
    checkpoint: str | Path,
    *,
    codec: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    codec_device: str | torch.device = "cpu",
    revision: str | None = None,
    quantize: Quantize | None = None,
    cache_dir: str | Path | None = None,
) -> ModelAndTokenizers:
    """Model, tokenizer and codec of a checkpoint.

    The codec is the given one, else the checkpoint's sub-folder `codec`, else the released one. Everything small is
    checked, and the codec loaded, before the model's weights are read. `quantize` as in `load_model`. Raises
    CheckpointError, ConfigError.
    """
    folder = fetch(checkpoint, what="checkpoint", revision=revision, cache_dir=cache_dir)
    layout = read_layout(folder)
    family = load_family(layout.family)
    config = family.read_config(folder)
    target = choose_device(device)
    check_quantize(quantize, choose_dtype(dtype, target))
    tokenizer = load_tokenizer(folder, family, config)
    codec_name = checkpoint_codec(folder, codec)
    audio_tokenizer = load_codec(codec_name, device=str(codec_device), cache_dir=cache_dir)
    check_codec(audio_tokenizer, family.spec(config), codec_name)
    model, encoder = _load(layout, family, config, target, dtype, quantize)
    return ModelAndTokenizers(
        model=model,
        tokenizer=tokenizer,
        audio_tokenizer=audio_tokenizer,
        config=config,
        checkpoint=str(checkpoint),
        revision=revision,
        codec=codec_name,
        family=family,
        whisper=encoder,
        folder=folder,
    )


def load_tokenizer(folder: Path, family: Family, config: Any) -> Any:
    """The checkpoint's own tokenizer. Raises CheckpointError when it is missing or does not fit the config."""
    tokenizer = read_tokenizer(folder)
    family.check_tokenizer(tokenizer, config, folder)
    return tokenizer


def check_codec(codec: Codec, spec: Spec, name: str) -> None:
    """Raises CheckpointError unless the codec's codes are what the model predicts."""
    if codec.num_codebooks != spec.num_codebooks or codec.codebook_size != spec.codes:
        raise CheckpointError(
            f"the codec {name} has {codec.num_codebooks} codebooks of {codec.codebook_size}, the checkpoint expects "
            f"{spec.num_codebooks} of {spec.codes}: give the checkpoint's own codec"
        )


def _load(
    layout: Layout,
    family: Family,
    config: Any,
    device: torch.device,
    dtype: str | torch.dtype | None,
    quantize: Quantize | None,
) -> tuple[Any, WhisperTower | None]:
    chosen = choose_dtype(dtype, device)
    check_quantize(quantize, chosen)
    check_checksums(layout.folder)
    if (layout.folder / ADAPTER_CONFIG).exists():  # transformers would put it on the base, unasked
        raise CheckpointError(
            f"{layout.folder} is a checkpoint with an adapter in it: keep them in folders of their own"
        )
    model, tower = family.load(layout, config, chosen)
    if quantize is not None:
        setattr(model, UNQUANTIZED_FINGERPRINT, base_fingerprint(model))  # how adapters know the base, whole or not
        quantize_layers(model, family.four_bits, device)
    torch.nn.Module.to(model, device)  # transformers wraps its own `to` in a way that no type checker follows
    return model.eval(), tower
