"""Loads checkpoints: the model of a family, its tokenizer and its codec."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from higgstune.checkpoint_files import check_checksums, read_json
from higgstune.codec import Codec, checkpoint_codec, load_codec
from higgstune.codec.whisper_encoder import WhisperTower
from higgstune.config.recipe import Quantize
from higgstune.environment import choose_device, choose_dtype
from higgstune.errors import CheckpointError
from higgstune.families import family_in, load_family, read_layout
from higgstune.families.base import Family, Layout, Prompter, Spec
from higgstune.hub import fetch
from higgstune.inputs import ADAPTER_CONFIG
from higgstune.kernels.quantize import check_quantize, quantize_layers
from higgstune.model.adapter_folder import UNQUANTIZED_FINGERPRINT, base_fingerprint


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
    """The checkpoint's own tokenizer. Raises CheckpointError if it is missing or does not fit the config."""
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder / 'tokenizer.json'} is missing: the tokenizer belongs to the checkpoint")
    settings = read_json(folder / "tokenizer_config.json", "") if (folder / "tokenizer_config.json").exists() else {}
    # transformers would read a file named here instead of the folder's own. It never reads special_tokens_map_file.
    files = [key for key in settings if key.endswith("_file") and key != "special_tokens_map_file"]
    if named := [key for key in files if settings[key] is not None]:
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} names a file by {named[0]}: remove the key")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers has nothing narrower
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
    family.check_tokenizer(tokenizer, config, folder)
    return tokenizer


def load_prompter(checkpoint: str | Path) -> Prompter:
    """The prompter of a checkpoint, without its weights. Raises CheckpointError."""
    folder = fetch(checkpoint, what="checkpoint", weights=False)
    family = load_family(family_in(folder)[0])
    config = family.read_config(folder)
    return family.prompter(load_tokenizer(folder, family, config), config)


def check_codec(codec: Codec, spec: Spec, name: str) -> None:
    """Raises CheckpointError unless the codec's codes are those that the model predicts."""
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
    if (layout.folder / ADAPTER_CONFIG).exists():  # transformers would silently load it onto the base
        raise CheckpointError(
            f"{layout.folder} is a checkpoint with an adapter in it: keep them in folders of their own"
        )
    model, tower = family.load(layout, config, chosen)
    if quantize is not None:
        setattr(model, UNQUANTIZED_FINGERPRINT, base_fingerprint(model))  # adapters know the base by it
        quantize_layers(model, family.four_bits, device)
    torch.nn.Module.to(model, device)  # type checkers do not understand the `to` of transformers
    return model.eval(), tower
