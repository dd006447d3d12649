"""Loads checkpoints: the model of a family, its tokenizer and its codec."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from higgstune.checkpoint_files import check_checksums
from higgstune.codec import Codec, checkpoint_codec, load_codec
from higgstune.codec.whisper_encoder import WhisperTower
from higgstune.environment import choose_device, choose_dtype
from higgstune.errors import CheckpointError, InputError
from higgstune.families import family_in, load_family, read_layout
from higgstune.families.base import Family, Layout, Prompter, Spec
from higgstune.hub import fetch
from higgstune.inputs import ADAPTER_CONFIG, BaseSpec, Quantize
from higgstune.kernels.quantize import check_quantize, quantize_layers
from higgstune.model.adapter_folder import (
    UNQUANTIZED_FINGERPRINT,
    adapter_card,
    base_fingerprint,
    check_adapter_family,
    recorded_base,
)
from higgstune.model.base_identity import base_identity, check_sealed
from higgstune.model.tokenizer import read_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelAndTokenizers:
    """A checkpoint with everything that training and speaking need. The codec is outside the model's module tree."""

    model: Any  # of its family's class
    tokenizer: Any
    audio_tokenizer: Codec
    config: Any
    checkpoint: str  # as named by the user, with `revision`
    revision: str | None
    codec: str  # as named by the user or found
    family: Family
    whisper: WhisperTower | None = None  # the encoder of an original-format checkpoint
    folder: Path | None = None  # of the checkpoint on this disk

    @property
    def spec(self) -> Spec:
        """The numbers of the checkpoint."""
        return self.family.spec(self.config)

    @property
    def identity(self) -> dict[str, Any]:
        """What configuration and tokenizer are: see `base_identity`."""
        assert self.folder is not None
        return base_identity(self.family, self.config, self.folder)

    @property
    def prompter(self) -> Prompter:
        """The prompter of the checkpoint, which turns conversations into examples."""
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

    `dtype` and `device` default to those of `choose_device` and `choose_dtype`. `quantize` ("4bit") quantizes the
    linear weights of the decoder layers, see `quantize_layers`; they then compute in `dtype`. Raises CheckpointError,
    or ConfigError if bitsandbytes is missing for 4 bits.
    """
    base = BaseSpec(path, dtype=dtype, device=device, quantize=quantize)
    layout = read_layout(fetch(path, what="checkpoint", revision=revision, cache_dir=cache_dir))
    family = load_family(layout.family)
    return _load(layout, family, family.read_config(layout.folder), base)[0]


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
    base = BaseSpec(checkpoint, revision, codec, dtype, device, quantize)
    return _load_all(base, codec_device=codec_device, cache_dir=cache_dir)


def load_base(base: BaseSpec, adapter: Path | None = None) -> ModelAndTokenizers:
    """A base as in `load_model_and_tokenizers`; what it does not name, an adapter's folder may. The adapter is not
    loaded.

    Raises CheckpointError, ConfigError, InputError when neither names a checkpoint.
    """
    if adapter is not None:
        base = recorded_base(base, adapter, adapter_card(adapter))
    with naming_where_recorded(adapter):
        if adapter is not None:
            folder = fetch(str(base.checkpoint), what="checkpoint", revision=base.revision, weights=False)
            check_adapter_family(adapter, family_in(folder)[0])
        return _load_all(base)


@contextmanager
def naming_where_recorded(adapter: Path | None) -> Iterator[None]:
    """Errors about a base and a codec that an adapter records say so."""
    try:
        yield
    except CheckpointError as error:
        if adapter is None:
            raise
        raise CheckpointError(
            f"{error}\n(the adapter {adapter} records its base and codec; if they have moved, name them with --model "
            "and --codec)"
        ) from error


def _load_all(
    base: BaseSpec, *, codec_device: str | torch.device = "cpu", cache_dir: str | Path | None = None
) -> ModelAndTokenizers:
    if base.checkpoint is None:
        raise InputError("name a base (--model) or an adapter (--adapter)")
    folder = fetch(base.checkpoint, what="checkpoint", revision=base.revision, cache_dir=cache_dir)
    layout = read_layout(folder)
    family = load_family(layout.family)
    config = family.read_config(folder)
    check_quantize(base.quantize, choose_dtype(base.dtype, choose_device(base.device)))
    tokenizer = load_tokenizer(folder, family, config)
    codec_name = checkpoint_codec(folder, base.codec)
    audio_tokenizer = load_codec(codec_name, device=str(codec_device), cache_dir=cache_dir)
    check_codec(audio_tokenizer, family.spec(config), codec_name)
    model, encoder = _load(layout, family, config, base)
    return ModelAndTokenizers(
        model=model,
        tokenizer=tokenizer,
        audio_tokenizer=audio_tokenizer,
        config=config,
        checkpoint=str(base.checkpoint),
        revision=base.revision,
        codec=codec_name,
        family=family,
        whisper=encoder,
        folder=folder,
    )


def load_tokenizer(folder: Path, family: Family, config: Any) -> Any:
    """The checkpoint's own tokenizer. Raises CheckpointError if it is missing or does not fit the config."""
    tokenizer = read_tokenizer(folder)
    family.check_tokenizer(tokenizer, config, folder)
    return tokenizer


def check_codec(codec: Codec, spec: Spec, name: str) -> None:
    """Raises CheckpointError unless the codec's codes are those that the model predicts."""
    if codec.num_codebooks != spec.num_codebooks or codec.codebook_size != spec.codes:
        raise CheckpointError(
            f"the codec {name} has {codec.num_codebooks} codebooks of {codec.codebook_size}, the checkpoint expects "
            f"{spec.num_codebooks} of {spec.codes}: give the checkpoint's own codec"
        )


def _load(layout: Layout, family: Family, config: Any, base: BaseSpec) -> tuple[Any, WhisperTower | None]:
    device = choose_device(base.device)
    dtype = choose_dtype(base.dtype, device)
    check_quantize(base.quantize, dtype)
    check_checksums(layout.folder)
    if (warning := check_sealed(family, config, layout.folder)) is not None:
        logger.warning("%s", warning)
    if (layout.folder / ADAPTER_CONFIG).exists():  # transformers would silently load it onto the base
        raise CheckpointError(
            f"{layout.folder} is a checkpoint with an adapter in it: keep them in folders of their own"
        )
    model, tower = family.load(layout, config, dtype)
    if base.quantize is not None:
        setattr(model, UNQUANTIZED_FINGERPRINT, base_fingerprint(model))  # adapters know the base by it
        quantize_layers(model, family.four_bits, device)
    torch.nn.Module.to(model, device)  # type checkers do not understand the `to` of transformers
    return model.eval(), tower
