"""LoRA adapters: adding, continuing, loading and unloading. A peft folder holds everything that was trained."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from higgstune.batch.collate import Batch
from higgstune.checkpoint_files import read_json
from higgstune.config.recipe import AttentionTraining, Lora
from higgstune.errors import CheckpointError, ConfigError
from higgstune.families import family_info, family_of, load_family
from higgstune.families.base import Conditioning, Family
from higgstune.inputs import ADAPTER_CONFIG
from higgstune.kernels.quantize import dequantized
from higgstune.model.adapter_folder import (
    ADAPTER_CARD,
    adapter_conditioning,
    doubts_of_card,
    read_adapter_config,
)
from higgstune.model.adapter_tensors import PREFIX, checked_weights, fitted_config, module_of, trained_in_full
from higgstune.peft_compat import (
    LoraConfig,
    LoraLayer,
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
    """peft's configuration for the layers of a stage on a model with these extensions."""
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
    """The model with a new adapter on the layers of a stage; all base weights are frozen.

    `conditioning` says which of the model's extensions are trained (None: all). The projector of Whisper features is
    trained in both kinds of stages, since its tokens take the text pathway; audio attention in full stages, in the way
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
    """The model with a stage's adapter that continues an earlier one in `folder`.

    Layers that the earlier adapter lacks start at zero. Raises ConfigError if its LoRA shape differs, CheckpointError
    if it has layers that this stage does not train.
    """
    weights = check_start(model, folder, lora)
    peft_model = add_lora(model, lora, kind, conditioning, attention)
    initial = adapter_state(peft_model)
    unknown = sorted(weights.keys() - initial.keys())
    if unknown:
        raise CheckpointError(
            f"the adapter {folder} has {len(unknown)} tensors that this stage does not train, such as {unknown[0]}: "
            "a text stage cannot follow a full one, audio attention keeps its way of training, and the extensions of "
            "the adapter (model.audio_attention, model.whisper) must stay on"
        )
    _set_weights(peft_model, initial | weights, folder)
    return peft_model


def check_start(model: Any, folder: Path, lora: Lora) -> dict[str, Tensor]:
    """The tensors of an adapter that a stage is to continue, after all checks that need no stage.

    Raises ConfigError if its LoRA shape is not the recipe's, CheckpointError if it cannot be continued on this base.
    """
    check_same_shape(folder, lora)
    weights, family = checked_weights(folder, model), family_of(model)
    fitted_config(read_adapter_config(folder / ADAPTER_CONFIG, family.lora_patterns), model, weights, folder)
    layers = [module_of(key) for key in weights if ".lora_" in key]
    untrained = [name for name in layers if not any(re.fullmatch(pattern, name) for pattern in family.lora_patterns)]
    in_full = [name for name in trained_in_full(weights, family) if name not in family.trainable]
    if others := [*in_full, *untrained]:
        raise CheckpointError(
            f"the adapter {folder} was trained on {others[0]}, which no stage trains: merge it (`higgstune export`), "
            "and train on the merged checkpoint"
        )
    return weights


def load_adapter(model: Any, folder: Path, *, checksum: bool = True) -> PeftModel:
    """The model with a trained adapter, frozen and in eval mode.

    Extensions that the adapter was trained with (audio attention, Whisper) are added to the model first, in place.
    Raises CheckpointError if the folder is not an adapter, is damaged, was trained on another base, or holds other
    tensors than the adapter needs on this base (peft alone would silently ignore them).
    """
    weights = checked_weights(folder, model, checksum=checksum)
    config = read_adapter_config(folder / ADAPTER_CONFIG, family_of(model).lora_patterns)
    family_of(model).extensions.add(model, adapter_conditioning(folder))
    config = fitted_config(config, model, weights, folder)
    try:
        peft_model = with_adapter(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"the adapter {folder} does not fit this base: {error}") from error
    expected = adapter_state(peft_model).keys()
    if expected != weights.keys():
        odd = sorted(expected ^ weights.keys())
        raise CheckpointError(
            f"the adapter {folder} does not fit this base: {len(odd)} tensors are missing or unknown, such as "
            f"{odd[0]}. Check that the base is the one that the adapter was trained on, and that the folder has its "
            f"{ADAPTER_CARD}"
        )
    _set_weights(peft_model, weights, folder)
    return peft_model.requires_grad_(False).eval()


def doubts_of(folder: Path, model: PeftModel, base: Path | None) -> list[str]:
    """What a user should know of a loaded adapter before trusting its speech: of its card, its effect, and its base,
    which lies in `base`.
    """
    found = doubts_of_card(folder, base)
    if is_idle(model):
        found.append(
            f"the adapter {folder} changes nothing, as all of its LoRA is zero and what it trained in full equals the "
            "base: this is the voice of the base"
        )
    return found


def is_idle(model: PeftModel) -> bool:
    """Whether an adapter cannot change any output: A or B of each LoRA is zero, and what was trained in full equals the
    base's.
    """
    layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
    if any(part.lora_magnitude_vector for part in layers):  # with DoRA, lengths may differ from the base's
        return False
    if any(_differs_from_original(part) for part in model.modules() if isinstance(part, ModulesToSaveWrapper)):
        return False
    pairs: list[tuple[Any, Any]] = [(part.lora_A[name], part.lora_B[name]) for part in layers for name in part.lora_A]
    return not any(bool(a.weight.any()) and bool(b.weight.any()) for a, b in pairs)


def unload_adapter(model: PeftModel) -> None:
    """Remove the adapter, in place: the base is as before, with untrained extensions."""
    # peft would leave trained copies of modules that are trained in full in the base.
    wrapped = [(name, part) for name, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)]
    for name, part in wrapped:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, part.original_module)
    model.unload()


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names with which peft saves them."""
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def adapted_layers(model: PeftModel) -> list[str]:
    """Full paths of the layers with LoRA, in order."""
    return sorted(cast(list[str], model.base_model.targeted_module_names))


def check_same_shape(folder: Path, lora: Lora) -> None:
    """Raises ConfigError naming both values if an adapter's LoRA shape is not the recipe's."""
    config = read_json(folder / ADAPTER_CONFIG, "an adapter folder needs it")
    wanted = {"r": lora.r, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "use_dora": lora.dora}
    for key, value in wanted.items():
        if config.get(key) != value:
            raise ConfigError(
                f"the adapter {folder} has {key} {config.get(key)}, the recipe {value}: "
                "a stage that continues an adapter needs the same LoRA shape"
            )


def claimed_and_idle(
    model: PeftModel, batch: Batch, card: Mapping[str, Any], gathered: AbstractContextManager[None] | None = None
) -> tuple[list[str], list[str]]:
    """Names of the modules with adapter weights, and of those that change nothing on a batch although they were taught.

    `card` is the adapter's; parts of a sharded model are called within `gathered`.
    """
    modules = dict(model.named_modules())
    lora = {name: modules[name] for name, part in modules.items() if isinstance(part, LoraLayer)}
    saved = {name: part for name, part in modules.items() if isinstance(part, ModulesToSaveWrapper)}
    changed = _changed_by_lora(model, lora, batch, gathered or nullcontext())
    idle = [name for name in lora if name not in changed]
    idle += [name for name, part in saved.items() if not _differs_from_original(part)]
    names = sorted(name.removeprefix(PREFIX) for name in [*lora, *saved])
    unchanged = sorted(name.removeprefix(PREFIX) for name in idle)
    return names, [name for name in unchanged if not was_untaught(name, card)]


def was_untaught(name: str, card: Mapping[str, Any]) -> bool:
    """Whether a module had no gradient in a card's stages: the last FFN of a pathway whose loss has the weight 0."""
    layers = card.get("base_shape", {}).get("num_hidden_layers", 0)
    done = {stage.get("name") for stage in card.get("stages", [])}
    stages = [stage for stage in card.get("recipe", {}).get("stages", []) if not done or stage.get("name") in done]
    weight = load_family(family_info(card.get("family"))).checks.untaught(name, layers)
    return weight is not None and bool(stages) and not any(stage.get(weight) for stage in stages)


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Hide a warning that no user can act on: peft 0.21 reads a deprecated attribute of transformers 5.23."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def check_directions(model: Any, lora: Lora, trained: Conditioning, attention: AttentionTraining) -> None:
    """Raises ConfigError for DoRA on audio attention whose rows start at zero: DoRA divides by their norm."""
    if not (lora.dora and trained.audio_attention and attention == "lora"):
        return
    owns, attended = family_of(model).extensions.owns, Conditioning(audio_attention=True)
    for name, weight in model.named_parameters():
        if owns(name, attended) and weight.ndim > 1 and bool((dequantized(weight) == 0).all(dim=1).any()):
            raise ConfigError(
                f"lora.dora cannot start from {name}, whose rows are zero: set lora.dora: false, or "
                "model.audio_attention: full"
            )


def with_adapter(model: Any, config: LoraConfig) -> PeftModel:
    """The model with peft's layers, untrained. Extensions and `Family.trainable` modules that are trained in full are
    in float32, other modules keep the base's dtype, in which their neighbours compute.
    """
    owns, trainable = family_of(model).extensions.owns, family_of(model).trainable
    with _without_deprecations(), plain_layers():
        peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    for name, part in peft_model.named_modules():
        named = name.removeprefix(PREFIX)
        if isinstance(part, ModulesToSaveWrapper) and (named in trainable or owns(f"{name}.")):
            part.modules_to_save.float()  # as peft does with LoRA: bfloat16 loses small steps
    return peft_model


def _set_weights(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise CheckpointError(f"the adapter {folder} does not fit this base: {error}") from error


def _changed_by_lora(
    model: PeftModel, layers: dict[str, nn.Module], batch: Batch, gathered: AbstractContextManager[None]
) -> set[str]:
    """Names of the LoRA layers whose output differs from their base layer's in one forward pass."""
    changed: set[str] = set()
    plain: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: plain.__setitem__(name, output.clone())

    def compare(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if name in plain and not torch.equal(plain.pop(name), output):
                changed.add(name)

        return hook

    handles = []
    for name, layer in layers.items():
        handles.append(layer.get_submodule("base_layer").register_forward_hook(remember(name)))
        handles.append(layer.register_forward_hook(compare(name)))
    try:
        with torch.no_grad():
            family_of(model).label_logits(model, batch, 1, gathered)
    finally:
        for handle in handles:
            handle.remove()
    return changed


def _differs_from_original(wrapper: ModulesToSaveWrapper) -> bool:
    active = next(iter(wrapper.active_adapters or []), None)
    if active is None or active not in wrapper.modules_to_save:
        return False
    return any(
        not torch.equal(a.float(), b.float())
        for a, b in zip(_parameters(wrapper.modules_to_save[active]), _parameters(wrapper.original_module), strict=True)
    )


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """By name; sharded ones whole."""
    for _, parameter in sorted(module.named_parameters()):
        yield (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
