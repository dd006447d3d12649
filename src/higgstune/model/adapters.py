"""LoRA adapters: which layers, how they start, how they are loaded. Everything trained is inside one peft folder."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from higgstune.checkpoint_files import read_json
from higgstune.config.recipe import AttentionTraining, Lora
from higgstune.errors import CheckpointError, ConfigError
from higgstune.families import family_of
from higgstune.families.base import Conditioning, Family
from higgstune.inputs import ADAPTER_CONFIG
from higgstune.kernels.quantize import dequantized
from higgstune.model.adapter_folder import (
    ADAPTER_CARD,
    adapter_conditioning,
    check_shapes,
    checked_weights,
    read_adapter_config,
)
from higgstune.peft_compat import (
    LoraConfig,
    ModulesToSaveWrapper,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    plain_layers,
    set_peft_model_state_dict,
)


def lora_config(
    lora: Lora, family: Family, kind: str, conditioning: Conditioning, attention: AttentionTraining
) -> LoraConfig:
    """As peft wants it, for the layers of a stage on a model with these extensions."""
    targets = family.lora_targets(kind, conditioning, attention)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=targets.pattern,
        modules_to_save=list(targets.in_full) or None,
        bias="none",
    )


def add_lora(
    model: Any,
    lora: Lora,
    kind: str,
    conditioning: Conditioning | None = None,
    attention: AttentionTraining = "lora",
) -> PeftModel:
    """The model with a fresh adapter on the layers of a stage; all base weights are frozen.

    `conditioning` says which of the model's extensions are trained; all, where not given. The projector of Whisper
    features is trained in both kinds of stages, its positions being text's; audio attention in full stages, in the way
    that `attention` says.
    """
    family = family_of(model)
    trained = family.extensions.of(model) if conditioning is None else conditioning
    if kind == "full":
        check_directions(model, lora, trained, attention)
    return with_adapter(model, lora_config(lora, family, kind, trained, attention))


def continue_lora(
    model: Any,
    folder: Path,
    lora: Lora,
    kind: str,
    conditioning: Conditioning | None = None,
    attention: AttentionTraining = "lora",
) -> PeftModel:
    """The model with a stage's adapter that goes on from an earlier one in `folder`.

    Layers that the earlier adapter does not have start at zero. Raises ConfigError when its LoRA shape is another,
    CheckpointError when it has layers that this stage does not.
    """
    check_same_shape(folder, lora)
    weights = checked_weights(folder, model)
    peft_model = add_lora(model, lora, kind, conditioning, attention)
    begins_with = adapter_state(peft_model)
    unknown = sorted(weights.keys() - begins_with.keys())
    if unknown:
        raise CheckpointError(
            f"the adapter {folder} has {len(unknown)} tensors that this stage does not train, such as {unknown[0]}: "
            "a text stage cannot follow a full one, audio attention is trained in one way, and what the adapter was "
            "conditioned on (model.audio_attention, model.whisper) stays on"
        )
    _set_weights(peft_model, begins_with | weights, folder)
    return peft_model


def load_adapter(model: Any, folder: Path, *, checksum: bool = True) -> PeftModel:
    """The model with a trained adapter, frozen and in eval mode.

    Extensions that the adapter was trained with (audio attention, Whisper) are added to the model first, in place.
    Raises CheckpointError when the folder is no adapter or damaged, was trained on another base, or holds other
    tensors than the adapter on this base has (peft alone would leave them out in silence).
    """
    weights = checked_weights(folder, model, checksum=checksum)
    config = read_adapter_config(folder / ADAPTER_CONFIG, family_of(model).lora_patterns)
    family_of(model).extensions.add(model, adapter_conditioning(folder))
    check_shapes(config, model, weights, folder)
    try:
        peft_model = with_adapter(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"the adapter {folder} does not fit this base: {error}") from error
    expected = adapter_state(peft_model).keys()
    if expected != weights.keys():
        odd = sorted(expected ^ weights.keys())
        raise CheckpointError(
            f"the adapter {folder} does not fit this base: {len(odd)} tensors are in only one of them, such as "
            f"{odd[0]}; is it the base that the adapter was trained on, and does the folder have its {ADAPTER_CARD}?"
        )
    _set_weights(peft_model, weights, folder)
    return peft_model.requires_grad_(False).eval()


def unload_adapter(model: PeftModel) -> None:
    """Take the adapter off again, in place: the base is as it was before, its extensions untrained, too."""
    # peft would leave the trained copies of modules that are trained in full in the base.
    wrapped = [(name, part) for name, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)]
    for name, part in wrapped:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, part.original_module)
    model.unload()


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names that peft saves them with."""
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def adapted_layers(model: PeftModel) -> list[str]:
    """Full paths of the layers that carry LoRA, in order."""
    return sorted(cast(list[str], model.base_model.targeted_module_names))


def check_same_shape(folder: Path, lora: Lora) -> None:
    """Raises ConfigError naming both values when an adapter's LoRA shape is not the recipe's."""
    config = read_json(folder / ADAPTER_CONFIG, "it is no adapter folder without it")
    wanted = {"r": lora.r, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "use_dora": lora.dora}
    for key, value in wanted.items():
        if config.get(key) != value:
            raise ConfigError(
                f"the adapter {folder} has {key} {config.get(key)}, the recipe {value}: "
                "a stage that goes on from an adapter needs the same LoRA shape"
            )


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for an attribute by a name that is going out of use; no user can mend that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def check_directions(model: Any, lora: Lora, trained: Conditioning, attention: AttentionTraining) -> None:
    """DoRA divides by the norm of a weight's rows. Raises ConfigError for audio attention that begins with none."""
    if not (lora.dora and trained.audio_attention and attention == "lora"):
        return
    owns, attended = family_of(model).extensions.owns, Conditioning(audio_attention=True)
    for name, weight in model.named_parameters():
        if owns(name, attended) and weight.ndim > 1 and bool((dequantized(weight) == 0).all(dim=1).any()):
            raise ConfigError(
                f"lora.dora has no direction to start from in {name}, which is zero: set lora.dora: false, or "
                "model.audio_attention: full"
            )


def with_adapter(model: Any, config: LoraConfig) -> PeftModel:
    """The model with peft's layers on it, untrained; modules that are trained in full are in float32."""
    with _without_deprecations(), plain_layers():
        peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    for part in peft_model.modules():
        if isinstance(part, ModulesToSaveWrapper):
            part.modules_to_save.float()  # as peft does with LoRA: small steps are lost in bfloat16
    return peft_model


def _set_weights(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise CheckpointError(f"the adapter {folder} does not fit this base: {error}") from error
