"""Adapter folders: the card that Higgstune writes, and the checks before any file of a folder is used.

A folder has adapter_config.json and adapter_model.safetensors, as peft writes them, and the card higgstune.json, which
adapters of other software lack.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from higgstune.checkpoint_files import MERGED, folder_card, is_pickled, read_json, safetensors_keys, sha256_of
from higgstune.codec import brings_codec
from higgstune.errors import CheckpointError
from higgstune.families import check_family, family_info, family_of, load_family
from higgstune.families.base import Conditioning, FamilyInfo, base_of
from higgstune.hub import fetch
from higgstune.inputs import ADAPTER_CONFIG, BaseSpec
from higgstune.model.base_identity import (
    ARCHITECTURE,
    IDENTITY,
    TOKENIZER_SHA256,
    changes,
    config_identity,
    tokenizer_sha256,
    unrecorded,
)

if TYPE_CHECKING:  # imported where an adapter is loaded: a wrong folder is refused without them
    from higgstune.peft_compat import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CARD = "higgstune.json"  # base, codec and recipe of the adapter, which speaking needs
UNQUANTIZED_FINGERPRINT = "unquantized_fingerprint"  # attribute of a 4-bit base
_SEAL = "card_sha256"
# Keys that checksums leave out: they may be edited when something has moved.
_PLACES = (_SEAL, "base_model_name_or_path", "checkpoint", "codec", "store", "whisper", "init_adapter")
# Keys of the card whose values are strings.
_STRINGS = ("checkpoint", "revision", "codec", "codec_revision", "base_fingerprint", "family")
_SAMPLED_VALUES = 4096  # of each weight, for the fingerprint
# Keys of adapter_config.json that have no effect on how a LoRA is loaded.
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
)  # fmt: skip
# Plain names only: peft matches those of modules_to_save as regular expressions.
_Names = Annotated[list[Annotated[StrictStr, Field(pattern=r"^[\w.]+$", max_length=500)]], Field(max_length=10_000)]


def adapter_card(folder: Path) -> dict[str, Any]:
    """The card that Higgstune wrote beside the adapter; empty for an adapter of other software.

    Raises CheckpointError if it is damaged or was changed.
    """
    path = folder / ADAPTER_CARD
    card = read_json(path, "") if path.exists() else {}
    if card.get(_SEAL) not in (None, _seal(card)):
        raise CheckpointError(f"{path} is not what was saved (its checksum differs): copy the adapter again")
    recipe = card.get("recipe", {})
    parts = {key: card.get(key, {}) for key in ("recipe", "base_shape", "conditioning", "data", IDENTITY)}
    if isinstance(recipe, dict):
        parts |= {f"recipe.{key}": recipe.get(key, {}) for key in ("model", "data", "lora")}
    if isinstance(parts[IDENTITY], dict):
        parts[f"{IDENTITY}.{ARCHITECTURE}"] = parts[IDENTITY].get(ARCHITECTURE, {})
    if wrong := [key for key, value in parts.items() if not isinstance(value, dict)]:
        raise CheckpointError(f"{path} is damaged: {wrong[0]} must be an object; copy the adapter again")
    if wrong := [key for key in _STRINGS if not isinstance(card.get(key), str | None)]:
        raise CheckpointError(f"{path} is damaged: {wrong[0]} must be a string; copy the adapter again")
    return card


def no_card(folder: Path) -> str:
    """What is unknown of an adapter without a card."""
    return (
        f"{folder} has no {ADAPTER_CARD}: it is external, and whether base and codec are those that it was trained "
        "with is unknown"
    )


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write an adapter's card, with checksums of itself and of the folder's other files, which must exist.

    Checksums of JSON leave out the paths of base, codec and store, which may be edited when these have moved.
    """
    config = read_json(folder / ADAPTER_CONFIG, "an adapter folder needs it")
    whole = {**card, "weights_sha256": sha256_of(folder / ADAPTER_WEIGHTS), "config_sha256": _seal(config)}
    text = json.dumps(whole | {_SEAL: _seal(whole)}, indent=2)
    (folder / ADAPTER_CARD).write_text(text, encoding="utf-8")


def adapter_conditioning(folder: Path) -> Conditioning:
    """The extensions that an adapter was trained with. Raises CheckpointError if its card is damaged."""
    try:
        return Conditioning.model_validate(adapter_card(folder).get("conditioning", {}))
    except ValidationError as error:
        raise CheckpointError(f"{folder / ADAPTER_CARD} is damaged (conditioning): {error}") from error


def recorded_base(base: BaseSpec, adapter: Path, card: Mapping[str, Any]) -> BaseSpec:
    """`base` with the checkpoint, revision and codec that an adapter's files record, where it names none.

    A recorded codec whose folder has moved is the one in the checkpoint's folder, if there is one. `card` is the
    adapter's, which may be empty. Raises CheckpointError when no checkpoint is recorded.
    """
    checkpoint, codec = base.checkpoint, card.get("codec")
    if checkpoint is None:
        checkpoint = read_json(adapter / ADAPTER_CONFIG, "").get("base_model_name_or_path")
        if not checkpoint:
            raise CheckpointError(f"the adapter {adapter} does not record its base: name it with --model")
    moved = codec is not None and Path(codec).is_absolute() and not Path(codec).is_dir()
    found = base.filled(str(checkpoint), card.get("revision"))
    if moved and base.codec is None and _has_codec(found):
        codec = None
    return found.filled(codec=codec)


def stores_of_card(card: Mapping[str, Any]) -> list[Path]:
    """Where the store that an adapter was trained on may be: where it was, and where its recipe names it from here."""
    named = (card.get("data", {}).get("store"), card.get("recipe", {}).get("data", {}).get("store"))
    return list(dict.fromkeys(Path(name).expanduser() for name in named if name))


def _has_codec(base: BaseSpec) -> bool:
    """Whether a base brings its codec; false for a missing base, which is refused where it is loaded."""
    try:
        folder = fetch(str(base.checkpoint), what="checkpoint", revision=base.revision, weights=False)
    except CheckpointError:
        return False
    return brings_codec(folder)


def check_adapter_files(folder: Path, *, checksum: bool = True) -> None:
    """Raises CheckpointError if a file of an adapter is missing, truncated or changed since it was written."""
    config = read_json(folder / ADAPTER_CONFIG, "an adapter folder needs it")
    path = folder / ADAPTER_WEIGHTS
    if not path.exists() and is_pickled(folder):
        raise CheckpointError(
            f"{folder} has pickled weights only, which can run code when loaded and are not read: have the adapter "
            "saved as safetensors"
        )
    keys = safetensors_keys(path)  # has its own message for a truncated file
    card = adapter_card(folder)
    recorded = (card.get("weights_sha256"), card.get("config_sha256")) if checksum else (None, None)
    for name, expected in zip((ADAPTER_WEIGHTS, ADAPTER_CONFIG), recorded, strict=True):
        if expected is not None and expected != (_seal(config) if name == ADAPTER_CONFIG else sha256_of(path)):
            raise CheckpointError(
                f"{folder / name} is not the file that was saved (its checksum differs): copy the adapter again"
            )
    if not card and (extra := sorted(filter(load_family(family_info(None)).extensions.owns, keys))):
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


def check_base(folder: Path, model: Any) -> None:
    """Raises CheckpointError if the adapter was trained on another base, by its card."""
    config = read_json(folder / ADAPTER_CONFIG, "an adapter folder needs it")
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
            f"base has {found}: it is another checkpoint, a fine-tuned one, or one with a merged adapter. Name the "
            "base that the adapter was trained on"
        )
    _refuse_changes(folder, changes(card.get(IDENTITY, {}), config_identity(family, base_of(model).config)))


def check_tokenizer(folder: Path, base: Path) -> None:
    """Raises CheckpointError if the tokenizer in a base's folder gives other ids than in training, by the card."""
    recorded = adapter_card(folder).get(IDENTITY, {})
    if recorded.get(TOKENIZER_SHA256) is not None:
        _refuse_changes(folder, changes(recorded, {TOKENIZER_SHA256: tokenizer_sha256(base)}))


def _refuse_changes(folder: Path, problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(
            f"the adapter {folder} was trained on this base as it was: {problem}; restore the base, or name the one "
            "that the adapter was trained on"
        )


def check_adapter_family(folder: Path, base: FamilyInfo) -> None:
    """Raises CheckpointError if an adapter's card names another model family than that of the base."""
    check_family(f"the adapter {folder}", adapter_card(folder).get("family"), base)


def check_merged_once(adapter: Path, base: Path) -> None:
    """Raises CheckpointError if this adapter is in the weights of a base already."""
    merged = folder_card(base).get(MERGED)
    if merged is not None and merged.get("adapter_sha256") == sha256_of(adapter / ADAPTER_WEIGHTS):
        raise CheckpointError(
            f"this adapter was merged into {base} already: merging it again would apply it twice; name the base "
            "that it was trained on with --model"
        )


def other_adapter_in(base: Path, card: Mapping[str, Any]) -> str | None:
    """What speaks against a base whose weights contain another adapter, unless the card of this one names them."""
    merged, trained_on = folder_card(base).get(MERGED), card.get("base_fingerprint")
    # An adapter that was trained on a merged checkpoint names the fingerprint of its weights.
    if merged is None or (trained_on is not None and trained_on == merged.get("fingerprint")):
        return None
    return (
        f"{base} is a merged checkpoint: its weights contain another adapter (sha256 "
        f"{str(merged.get('adapter_sha256'))[:16]}...), and nothing says that this adapter was trained on them; name "
        f"the base that it was trained on ({card.get('checkpoint', 'see its run')}) with --model"
    )


def doubts_of_card(folder: Path, base: Path | None) -> list[str]:
    """What the card of an adapter cannot vouch for, on a base in the folder `base`."""
    card = adapter_card(folder)
    found = [] if card else [no_card(folder)]
    if card and IDENTITY not in card:
        found.append(unrecorded(f"the adapter {folder}"))
    other = None if base is None else other_adapter_in(base, card)
    return found if other is None else [*found, other]


def base_fingerprint(model: Any) -> str:
    """16 hexadecimal digits that identify a base, whatever its layout, dtype and device.

    They are a hash of up to 4096 values of each weight, evenly spaced, as bfloat16. It leaves out adapters, and
    extensions whose weights follow from the base. A 4-bit base has the fingerprint of its unquantized weights.
    """
    import torch

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
        sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
        digest.update(f"{plain} {tuple(value.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_adapter_config(path: Path, patterns: tuple[str, ...]) -> "LoraConfig":
    """The LoRA that `adapter_config.json` describes; `patterns` are the regular expressions allowed in it.

    Raises CheckpointError for anything but plain LoRA.
    """
    content = read_json(path, "an adapter folder needs it")
    try:
        written = _Written.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise CheckpointError(f"{path} is not a LoRA configuration: {place}: {problem['msg']}") from error
    extra = written.model_extra or {}
    if on := sorted(key for key, value in extra.items() if value and key not in _WITHOUT_EFFECT):
        raise CheckpointError(f"{path} sets {on[0]}: only plain LoRA is supported, with rslora or dora")
    if isinstance(written.target_modules, str) and written.target_modules not in patterns:
        raise CheckpointError(
            f"{path} does not fit: target_modules is a pattern that Higgstune did not write, "
            f"{written.target_modules[:100]!r}; name the layers in a list"
        )
    known = written.model_dump(exclude={*extra, "peft_type", "init_lora_weights"})
    from higgstune.peft_compat import LoraConfig

    return LoraConfig(**known, inference_mode=True)


class _Written(BaseModel):
    """The keys of adapter_config.json that have an effect; all others must be off."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: StrictInt = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    bias: Literal["none"] = "none"
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal"] = True  # the others change the base
    target_modules: StrictStr | _Names
    modules_to_save: _Names | None = None


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_without_places(content), sort_keys=True).encode()).hexdigest()


def _without_places(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = {key: item for key, item in value.items() if key not in _PLACES or isinstance(item, Mapping)}
    return {key: _without_places(item) for key, item in kept.items()}
