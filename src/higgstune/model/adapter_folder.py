"""The folder of an adapter: its config, weights and card, and what is checked before any of it is used."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from torch import Tensor, nn

from higgstune.checkpoint_files import is_pickled, read_json, read_tensors, safetensors_keys, sha256_of
from higgstune.errors import CheckpointError
from higgstune.families import check_family, family_info, family_of, load_family
from higgstune.families.base import Conditioning, FamilyInfo, base_of
from higgstune.inputs import ADAPTER_CONFIG

if TYPE_CHECKING:
    from higgstune.peft_compat import LoraConfig  # imported where there is an adapter

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CARD = "higgstune.json"  # base, codec and recipe of the adapter: what speaking with it needs
UNQUANTIZED_FINGERPRINT = "unquantized_fingerprint"  # attribute of a base in 4 bits
_SEAL = "card_sha256"
_PLACES = (_SEAL, "base_model_name_or_path", "checkpoint", "codec", "store", "whisper", "init_adapter")
_NAMES = (
    "checkpoint",
    "revision",
    "codec",
    "codec_revision",
    "base_fingerprint",
    "family",
)  # keys of the card that are texts
_SAMPLED = 4096  # values of a weight that its fingerprint looks at


def adapter_conditioning(folder: Path) -> Conditioning:
    """The extensions that an adapter was trained with. Raises CheckpointError when its card is damaged."""
    try:
        return Conditioning.model_validate(adapter_card(folder).get("conditioning", {}))
    except ValidationError as error:
        raise CheckpointError(f"{folder / ADAPTER_CARD} is damaged (conditioning): {error}") from error


def base_fingerprint(model: Any) -> str:
    """16 hexadecimal digits that tell one base from another, whatever its layout, dtype and device.

    Of each weight up to 4096 values, spread over it, are taken as bfloat16. Adapters do not count, nor do extensions
    whose weights follow from the base. A base in 4 bits has that of the weights it was made from.
    """
    digest = hashlib.sha256()
    base, extensions = base_of(model), family_of(model).extensions
    builtin = extensions.builtin(model)
    if (recorded := getattr(base, UNQUANTIZED_FINGERPRINT, None)) is not None:
        return recorded
    for name, value in sorted(base.named_parameters()):
        added = extensions.owns(name) and not extensions.owns(name, builtin)
        if ".lora_" in name or ".modules_to_save." in name or added:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
        digest.update(f"{plain} {tuple(value.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_base(folder: Path, model: Any) -> None:
    """Raises CheckpointError when the adapter's card says that it was trained on another base."""
    config = read_json(folder / ADAPTER_CONFIG, "it is no adapter folder without it")
    card, trained_on = adapter_card(folder), config.get("base_model_name_or_path")
    family = family_of(model)
    check_adapter_family(folder, family.info)
    shape = family.spec(base_of(model).config).card()
    for key, value in card.get("base_shape", {}).items():
        if (actual := shape.get(key)) != value:
            raise CheckpointError(
                f"the adapter {folder} was trained on {trained_on} with {key} {value}; this base has {actual}"
            )
    expected = card.get("base_fingerprint")
    if expected is not None and (found := base_fingerprint(model)) != expected:
        raise CheckpointError(
            f"the adapter {folder} was trained on {trained_on}, whose weights have the fingerprint {expected}; this "
            f"base has {found}: another checkpoint, a fine-tuned one, or one that an adapter was merged into. Name the "
            "base that it was trained on"
        )


def check_adapter_family(folder: Path, base: FamilyInfo) -> None:
    """Raises CheckpointError when an adapter's card names another model family than that of the base."""
    check_family(f"the adapter {folder}", adapter_card(folder).get("family"), base)


def adapter_card(folder: Path) -> dict[str, Any]:
    """What Higgstune wrote beside the adapter; empty for an adapter from elsewhere.

    Raises CheckpointError when it is broken, or not what was written.
    """
    path = folder / ADAPTER_CARD
    card = read_json(path, "") if path.exists() else {}
    if card.get(_SEAL) not in (None, _seal(card)):
        raise CheckpointError(f"{path} is not what was saved (its checksum differs): copy the adapter again")
    recipe = card.get("recipe", {})
    parts = {key: card.get(key, {}) for key in ("recipe", "base_shape", "conditioning", "data")}
    if isinstance(recipe, dict):
        parts |= {f"recipe.{key}": recipe.get(key, {}) for key in ("model", "data", "lora")}
    if wrong := [key for key, value in parts.items() if not isinstance(value, dict)]:
        raise CheckpointError(f"{path} is damaged: {wrong[0]} must be an object; copy the adapter again")
    if wrong := [key for key in _NAMES if not isinstance(card.get(key), str | None)]:
        raise CheckpointError(f"{path} is damaged: {wrong[0]} must be a text; copy the adapter again")
    return card


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write an adapter's card, with checksums of itself and of the folder's other files, which are there already.

    Those of JSON leave out where base, codec and store lie: that may be edited when they have moved.
    """
    config = read_json(folder / ADAPTER_CONFIG, "it is no adapter folder without it")
    whole = {**card, "weights_sha256": sha256_of(folder / ADAPTER_WEIGHTS), "config_sha256": _seal(config)}
    text = json.dumps(whole | {_SEAL: _seal(whole)}, indent=2)
    (folder / ADAPTER_CARD).write_text(text, encoding="utf-8")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_without_places(content), sort_keys=True).encode()).hexdigest()


def _without_places(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = {key: item for key, item in value.items() if key not in _PLACES or isinstance(item, Mapping)}
    return {key: _without_places(item) for key, item in kept.items()}


def checked_weights(folder: Path, model: Any, *, checksum: bool = True) -> dict[str, Tensor]:
    """The adapter's tensors, once nothing speaks against them. Raises CheckpointError."""
    check_adapter_files(folder, checksum=checksum)
    check_base(folder, model)
    weights = read_tensors(folder / ADAPTER_WEIGHTS)
    check_values(weights, folder)
    return weights


def check_adapter_files(folder: Path, *, checksum: bool = True) -> None:
    """Raises CheckpointError when a file of an adapter is missing, truncated or not the one that was written."""
    config = read_json(folder / ADAPTER_CONFIG, "it is no adapter folder without it")
    path = folder / ADAPTER_WEIGHTS
    if not path.exists() and is_pickled(folder):
        raise CheckpointError(
            f"{folder} has pickled weights only: they can run code when loaded and are not read; have the adapter "
            "saved as safetensors"
        )
    keys = safetensors_keys(path)  # tells a truncated file with a message of its own
    card = adapter_card(folder)
    recorded = (card.get("weights_sha256"), card.get("config_sha256")) if checksum else (None, None)
    for name, expected in zip((ADAPTER_WEIGHTS, ADAPTER_CONFIG), recorded, strict=True):
        if expected is not None and expected != (_seal(config) if name == ADAPTER_CONFIG else sha256_of(path)):
            raise CheckpointError(
                f"{folder / name} is not the file that was saved (its checksum differs): copy the adapter again"
            )
    owns = load_family(family_info(card.get("family"))).extensions.owns
    if not card and (extra := sorted(filter(owns, keys))):
        raise CheckpointError(
            f"{folder / ADAPTER_CARD} is missing: it says how to add the modules of {len(extra)} tensors, such as "
            f"{extra[0]}; copy the whole adapter folder"
        )
    trained = card.get("recipe", {}).get("lora", {})
    for key, name in {"r": "r", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}.items():
        if name in trained and config.get(key) != trained[name]:
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG} has {key} {config.get(key)}, but the adapter was trained with "
                f"{trained[name]} ({ADAPTER_CARD}): copy the adapter again"
            )


_PREFIX = "base_model.model."  # of a layer's name among the adapter's tensors
# These say something, and change nothing of how a LoRA is loaded.
_TOLD = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
)  # fmt: skip
# Plain names: peft matches those of modules_to_save as regular expressions.
Names = Annotated[list[Annotated[StrictStr, Field(pattern=r"^[\w.]+$", max_length=500)]], Field(max_length=10_000)]


class _Written(BaseModel):
    """The keys that are acted on; all others must be off."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: StrictInt = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    bias: Literal["none"] = "none"
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True  # the others change the base
    target_modules: StrictStr | Names
    modules_to_save: Names | None = None


def read_adapter_config(path: Path, patterns: tuple[str, ...]) -> "LoraConfig":
    """The LoRA that `adapter_config.json` describes; `patterns` are the regular expressions that it may name layers by.

    Raises CheckpointError for what is no plain LoRA.
    """
    content = read_json(path, "it is no adapter folder without it")
    try:
        written = _Written.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise CheckpointError(f"{path} is not a LoRA configuration: {place}: {problem['msg']}") from error
    extra = written.model_extra or {}
    if on := sorted(key for key, value in extra.items() if value and key not in _TOLD):
        raise CheckpointError(f"{path} asks for {on[0]}: only plain LoRA is read, with rslora or dora")
    if isinstance(written.target_modules, str) and written.target_modules not in patterns:
        raise CheckpointError(
            f"{path} does not fit: target_modules is a pattern that Higgstune did not write, "
            f"{written.target_modules[:100]!r}; name the layers in a list"
        )
    known = written.model_dump(exclude={*extra, "peft_type", "init_lora_weights"})
    from higgstune.peft_compat import LoraConfig

    return LoraConfig(**known, inference_mode=True)


def check_shapes(config: "LoraConfig", model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError unless every layer that the configuration names has its LoRA among the tensors.

    Before peft makes the layers: a rank from a stranger must not ask for more memory than the file itself has.
    """
    for name, layer in model.named_modules():
        if not _is_target(config, name):
            continue
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"the adapter {folder} does not fit this base: {name} is no linear layer")
        expected = {"lora_A": (config.r, layer.in_features), "lora_B": (layer.out_features, config.r)}
        for part, shape in expected.items():
            key = f"{_PREFIX}{name}.{part}.weight"
            if key not in weights:
                raise CheckpointError(
                    f"the adapter {folder} does not fit this base: tensors are in only one of them, such as {key}; is "
                    "it the base that the adapter was trained on, and is the whole folder there?"
                )
            if (found := tuple(weights[key].shape)) != shape:
                raise CheckpointError(
                    f"the adapter {folder} does not fit this base: {key} is {found}, expected {shape}"
                )


def check_values(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError for tensors that are no finite floats."""
    for key, value in weights.items():
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            raise CheckpointError(
                f"the adapter {folder} is damaged: {key} holds NaN or infinity, or no floats ({value.dtype}); copy the "
                "adapter again, or take an earlier checkpoint of its run"
            )


def _is_target(config: "LoraConfig", name: str) -> bool:
    """Whether a layer gets LoRA, as peft decides it."""
    targets: Any = config.target_modules
    if any(f".{kept}." in f".{name}." for kept in config.modules_to_save or ()):  # trained in full
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)
