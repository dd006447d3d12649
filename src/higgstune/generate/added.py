"""What an adapter says of how to speak with it, and adapters that stand beside others on one base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from higgstune.checkpoint_files import folder_card
from higgstune.data.messages import ReferencePlace
from higgstune.errors import CheckpointError
from higgstune.families import family_in, family_info
from higgstune.families.base import FamilyInfo, base_of
from higgstune.families.sampling import Sampling, base_sampling, read_sampling
from higgstune.hub import fetch
from higgstune.model.adapter_folder import (
    ADAPTER_CARD,
    adapter_card,
    adapter_conditioning,
    check_merged_once,
    check_tokenizer,
)
from higgstune.model.load import ModelAndTokenizers

Lora = Mapping[nn.Module, tuple[Tensor, Tensor]]  # A [r, in] and B [out, r], scaled, of each linear layer


@dataclass(frozen=True)
class AddedAdapter:
    """An adapter beside others."""

    lora: Lora
    sampling: Sampling
    reference_place: ReferencePlace


def read_added(folder: Path, loaded: ModelAndTokenizers) -> AddedAdapter:
    """Read an adapter for rows of a batch; the base stays as it is. Raises CheckpointError."""
    from higgstune.model.adapters import load_adapter, unload_adapter  # imports peft

    if adapter_conditioning(folder):
        raise CheckpointError(f"the adapter {folder} uses audio attention or Whisper, {_ALONE}")
    if loaded.folder is not None:
        check_merged_once(folder, loaded.folder)
        check_tokenizer(folder, loaded.folder)
    check_codec(folder, loaded)
    model = load_adapter(loaded.model, folder)
    try:
        lora = lora_of(model)
    except CheckpointError as error:
        raise CheckpointError(f"the adapter {folder} {error}") from error
    finally:
        unload_adapter(model)
    return AddedAdapter(lora, trained_sampling(folder, loaded.folder), trained_place(folder, loaded.folder))


def lora_of(model: Any) -> Lora:
    """The plain or rank-stabilised LoRA of a peft model, in the dtype of its base.

    Raises CheckpointError for what rows of one batch cannot choose.
    """
    from higgstune.peft_compat import ModulesToSaveWrapper  # imports peft

    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    dtype = next(base_of(model).parameters()).dtype
    for path, layer in model.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            raise CheckpointError(f"has trained {path} in full, {_ALONE}")
        for name in getattr(layer, "lora_A", {}):
            if layer.lora_magnitude_vector or layer.lora_bias.get(name):
                raise CheckpointError(f"was trained with DoRA or biases, {_ALONE}")
            scaled = layer.lora_B[name].weight.detach() * layer.scaling[name]
            found[layer.base_layer] = layer.lora_A[name].weight.detach().to(dtype), scaled.to(dtype)
    return found


_ALONE = "which rows of one batch cannot choose: load it by itself, or export it merged"


def check_codec(adapter: Path, loaded: ModelAndTokenizers) -> None:
    """Raise CheckpointError for an adapter that was trained on codes of another codec."""
    trained_with, revision = adapter_card(adapter).get("codec_revision"), loaded.audio_tokenizer.revision
    if trained_with not in (None, revision):
        raise CheckpointError(
            f"the adapter {adapter} was trained on codes of another codec (revision {trained_with}) than "
            f"{loaded.codec} (revision {revision}): name its codec with --codec"
        )


def trained_sampling(adapter: Path | None, base: Path | None) -> Sampling:
    """The sampling that an adapter records, else what its base recommends. Raises CheckpointError."""
    recorded = None if adapter is None else adapter_card(adapter).get("sampling")
    if adapter is None or recorded is None:
        return base_sampling(base)
    return read_sampling(recorded, adapter / ADAPTER_CARD)


def trained_place(adapter: Path | None, checkpoint: Path | None) -> ReferencePlace:
    """Where the reference stands in the prompts that an adapter, or the one in a merged checkpoint, was trained on."""
    if adapter is not None:
        card = adapter_card(adapter)
    else:
        card = {} if checkpoint is None else folder_card(checkpoint).get("adapter", {})
    place: ReferencePlace = card.get("recipe", {}).get("data", {}).get("reference", "turn")
    if place not in get_args(ReferencePlace):
        raise CheckpointError(f"{adapter or checkpoint} records the place {place!r} of a reference, which is unknown")
    return place


def family_to_speak(adapter: Path | None, checkpoint: str | Path | None) -> FamilyInfo:
    """The family of an adapter by its card, or of a checkpoint by its config.json, before any weight is read.

    Raises CheckpointError.
    """
    if adapter is not None:
        return family_info(adapter_card(adapter).get("family"))
    assert checkpoint is not None
    return family_in(fetch(checkpoint, what="checkpoint", weights=False))[0]
