"""LoRA adapters: which layers, how they start, how they are loaded. Everything trained is inside one peft folder."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from higgstune.errors import CheckpointError, ConfigError
from higgstune.model.adapter_config import check_shapes, check_values, read_adapter_config
from higgstune.model.audio_attention import ATTENTION, NORM
from higgstune.model.checksums import sha256_of
from higgstune.model.conditioning import (
    PROJECTOR,
    Conditioning,
    add_conditioning,
    base_of,
    conditioning_of,
    is_conditioning_key,
    own_conditioning,
)
from higgstune.model.layout import is_pickled, read_json, read_tensors, safetensors_keys
from higgstune.model.quantize import dequantized

StageKind = Literal["text", "full"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CARD = "higgstune.json"  # base, codec and recipe of the adapter: what speaking with it needs
RUN_STATE = "run.json"
UNQUANTIZED_FINGERPRINT = "unquantized_fingerprint"  # attribute of a base in 4 bits
_SEAL = "card_sha256"
_PLACES = (_SEAL, "base_model_name_or_path", "checkpoint", "codec", "store", "whisper", "init_adapter")
_NAMES = ("checkpoint", "revision", "codec", "codec_revision", "base_fingerprint")  # keys of the card that are texts
_SAMPLED = 4096  # values of a weight that its fingerprint looks at

_SHARED = r"self_attn\.[qkvo]_proj"
_FFN = r"\.(?:gate|up|down)_proj"
# Full paths from the model's root: a suffix such as `self_attn.q_proj` would also match the codec's HuBERT or Whisper.
_LAYER = r"model\.layers\.\d+\."
_TEXT_TARGETS = rf"{_LAYER}(?:{_SHARED}|mlp{_FFN})"
_FULL_TARGETS = rf"{_LAYER}(?:{_SHARED}|(?:audio_)?mlp{_FFN})"
_FULL_AND_AUDIO_ATTENTION = rf"{_LAYER}(?:(?:self|audio)_attn\.[qkvo]_proj|(?:audio_)?mlp{_FFN})"
_PATTERNS = (_TEXT_TARGETS, _FULL_TARGETS, _FULL_AND_AUDIO_ATTENTION)

AttentionTraining = Literal["lora", "full"]


class Lora(BaseModel):
    """The shape of the adapter; the same in all stages of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scaling: alpha / r (alpha / sqrt(r) with rslora)")
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = False
    dora: bool = False

    def config(self, kind: StageKind, conditioning: Conditioning, attention: AttentionTraining) -> LoraConfig:
        """As peft wants it, for the layers of a stage on a model with these extensions.

        Audio attention is trained by LoRA or in full, never both: of a module that is trained in full, peft would
        silently leave out the LoRA.
        """
        saved = [PROJECTOR] if conditioning.whisper is not None else []
        targets = {"text": _TEXT_TARGETS, "full": _FULL_TARGETS}[kind]
        if conditioning.audio_attention and kind == "full":
            if attention == "full":
                saved += [ATTENTION, NORM]
            else:
                targets = _FULL_AND_AUDIO_ATTENTION
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            target_modules=targets,
            modules_to_save=saved or None,
            bias="none",
        )


def add_lora(
    model: HiggsAudioV2ForConditionalGeneration,
    lora: Lora,
    kind: StageKind,
    conditioning: Conditioning | None = None,
    attention: AttentionTraining = "lora",
) -> PeftModel:
    """The model with a fresh adapter on the layers of a stage; all base weights are frozen.

    `conditioning` says which of the model's extensions are trained; all, where not given. The projector of Whisper
    features is trained in both kinds of stages, its positions being text's; audio attention in full stages, in the way
    that `attention` says.
    """
    trained = conditioning_of(model) if conditioning is None else conditioning
    if kind == "full":
        check_directions(model, lora, trained, attention)
    return _with_adapter(model, lora.config(kind, trained, attention))


def continue_lora(
    model: HiggsAudioV2ForConditionalGeneration,
    folder: Path,
    lora: Lora,
    kind: StageKind,
    conditioning: Conditioning | None = None,
    attention: AttentionTraining = "lora",
) -> PeftModel:
    """The model with a stage's adapter that goes on from an earlier one in `folder`.

    Layers that the earlier adapter does not have start at zero. Raises ConfigError when its LoRA shape is another,
    CheckpointError when it has layers that this stage does not.
    """
    check_same_shape(folder, lora)
    weights = _checked_weights(folder, model)
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


def load_adapter(model: HiggsAudioV2ForConditionalGeneration, folder: Path, *, checksum: bool = True) -> PeftModel:
    """The model with a trained adapter, frozen and in eval mode.

    Extensions that the adapter was trained with (audio attention, Whisper) are added to the model first, in place.
    Raises CheckpointError when the folder is no adapter or damaged, was trained on another base, or holds other
    tensors than the adapter on this base has (peft alone would leave them out in silence).
    """
    weights = _checked_weights(folder, model, checksum=checksum)
    config = read_adapter_config(folder / ADAPTER_CONFIG, _PATTERNS)
    add_conditioning(model, adapter_conditioning(folder))
    check_shapes(config, model, weights, folder)
    try:
        peft_model = _with_adapter(model, config)
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
    base, own = base_of(model), own_conditioning(model)
    if (recorded := getattr(base, UNQUANTIZED_FINGERPRINT, None)) is not None:
        return recorded
    for name, value in sorted(base.named_parameters()):
        added = is_conditioning_key(name) and not is_conditioning_key(name, own)
        if ".lora_" in name or ".modules_to_save." in name or added:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
        digest.update(f"{plain} {tuple(value.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors under the names that peft saves them with."""
    from peft import get_peft_model_state_dict

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


def check_base(folder: Path, model: HiggsAudioV2ForConditionalGeneration) -> None:
    """Raises CheckpointError when the adapter's card says that it was trained on another base."""
    config = read_json(folder / ADAPTER_CONFIG, "it is no adapter folder without it")
    card, trained_on = adapter_card(folder), config.get("base_model_name_or_path")
    for key, value in card.get("base_shape", {}).items():
        found = getattr(model.config, key, None)
        if found != value:
            raise CheckpointError(
                f"the adapter {folder} was trained on {trained_on} with {key} {value}; this base has {found}"
            )
    expected = card.get("base_fingerprint")
    if expected is not None and (found := base_fingerprint(model)) != expected:
        raise CheckpointError(
            f"the adapter {folder} was trained on {trained_on}, whose weights have the fingerprint {expected}; this "
            f"base has {found}: another checkpoint, a fine-tuned one, or one that an adapter was merged into. Name the "
            "base that it was trained on"
        )


def base_shape(config: Any) -> dict[str, int]:
    """What an adapter's card keeps of its base, to tell a wrong one before peft fails on a tensor."""
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_codebooks", "codebook_size")
    return {key: getattr(config, key) for key in keys}


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


def find_adapter(path: str | Path) -> Path:
    """The adapter folder that a user means: it may be a run's folder, whose last finished stage is taken.

    Raises CheckpointError when there is none.
    """
    folder = Path(path).expanduser()
    if (folder / ADAPTER_CONFIG).exists():
        return folder
    if (folder / RUN_STATE).exists():
        last = read_json(folder / RUN_STATE, "").get("adapter")
        if last is not None:
            place = Path(str(last))
            if place.is_absolute() or ".." in place.parts:
                raise CheckpointError(f"{folder / RUN_STATE} names an adapter outside of its run: {last}")
            return folder / place
        raise CheckpointError(f"the run {folder} has no finished stage yet: `higgstune train` it to its end")
    hint = "; it is a checkpoint, which goes by --model" if (folder / "config.json").exists() else ""
    raise CheckpointError(f"{folder} is neither an adapter ({ADAPTER_CONFIG}) nor a run ({RUN_STATE}){hint}")


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for an attribute by a name that is going out of use; no user can mend that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def check_directions(
    model: HiggsAudioV2ForConditionalGeneration, lora: Lora, trained: Conditioning, attention: AttentionTraining
) -> None:
    """DoRA divides by the norm of a weight's rows. Raises ConfigError for audio attention that begins with none."""
    if not (lora.dora and trained.audio_attention and attention == "lora"):
        return
    for name, weight in model.named_parameters():
        if f".{ATTENTION}." in name and weight.ndim > 1 and bool((dequantized(weight) == 0).all(dim=1).any()):
            raise ConfigError(
                f"lora.dora has no direction to start from in {name}, which is zero: set lora.dora: false, or "
                "model.audio_attention: full"
            )


def _with_adapter(model: HiggsAudioV2ForConditionalGeneration, config: LoraConfig) -> PeftModel:
    with _without_deprecations():
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


def _checked_weights(
    folder: Path, model: HiggsAudioV2ForConditionalGeneration, *, checksum: bool = True
) -> dict[str, Tensor]:
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
    if not card and (extra := sorted(filter(is_conditioning_key, keys))):
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
