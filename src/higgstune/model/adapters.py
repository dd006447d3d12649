"""LoRA adapters: which layers, how they start, how they are loaded. Everything trained is inside one peft folder."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from higgstune.errors import CheckpointError, ConfigError
from higgstune.model.layout import read_json, safetensors_keys

StageKind = Literal["text", "full"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CARD = "higgstune.json"  # base, codec and recipe of the adapter: what speaking with it needs
RUN_STATE = "run.json"

_SHARED = r"self_attn\.[qkvo]_proj"
_FFN = r"\.(?:gate|up|down)_proj"
# Full paths from the model's root: a suffix such as `self_attn.q_proj` would also match the codec's HuBERT.
_TARGETS: dict[StageKind, str] = {
    "text": rf"model\.layers\.\d+\.(?:{_SHARED}|mlp{_FFN})",
    "full": rf"model\.layers\.\d+\.(?:{_SHARED}|(?:audio_)?mlp{_FFN})",
}


class Lora(BaseModel):
    """The shape of the adapter; the same in all stages of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scaling: alpha / r (alpha / sqrt(r) with rslora)")
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = False
    dora: bool = False

    def config(self, kind: StageKind) -> LoraConfig:
        """As peft wants it, for the layers of a stage."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            target_modules=_TARGETS[kind],
            bias="none",
        )


def add_lora(model: HiggsAudioV2ForConditionalGeneration, lora: Lora, kind: StageKind) -> PeftModel:
    """The model with a fresh adapter on the layers of a stage; all base weights are frozen."""
    with _without_deprecations():
        peft_model = get_peft_model(model, lora.config(kind))
    assert isinstance(peft_model, PeftModel)
    return peft_model


def continue_lora(model: HiggsAudioV2ForConditionalGeneration, folder: Path, lora: Lora, kind: StageKind) -> PeftModel:
    """The model with a stage's adapter that goes on from an earlier one in `folder`.

    Layers that the earlier adapter does not have start at zero. Raises ConfigError when its LoRA shape is another,
    CheckpointError when it has layers that this stage does not.
    """
    check_same_shape(folder, lora)
    check_base(folder, model)
    peft_model = add_lora(model, lora, kind)
    weights = _adapter_weights(folder)
    known = adapter_keys(peft_model)
    unknown = sorted(weights.keys() - known)
    if unknown:
        raise CheckpointError(
            f"the adapter {folder} has {len(unknown)} tensors that this stage does not train, such as {unknown[0]}: "
            "a text stage cannot follow a full one"
        )
    try:
        set_peft_model_state_dict(peft_model, weights)
    except RuntimeError as error:
        raise CheckpointError(f"the adapter {folder} does not fit this base: {error}") from error
    return peft_model


def load_adapter(model: HiggsAudioV2ForConditionalGeneration, folder: Path) -> PeftModel:
    """The model with a trained adapter, frozen and in eval mode.

    Raises CheckpointError when the folder is no adapter, or holds other tensors than the adapter on this base has
    (peft alone would leave them out in silence).
    """
    weights = _adapter_weights(folder)
    check_base(folder, model)
    try:
        with _without_deprecations():
            peft_model = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"the adapter {folder} does not fit this base: {error}") from error
    expected = adapter_keys(peft_model)
    if expected != weights.keys():
        odd = sorted(expected ^ weights.keys())
        raise CheckpointError(
            f"the adapter {folder} does not fit this base: {len(odd)} tensors are in only one of them, such as "
            f"{odd[0]}; is it the base that the adapter was trained on?"
        )
    return peft_model.eval()


def adapter_keys(model: PeftModel) -> set[str]:
    """The names under which peft saves the adapter's tensors."""
    from peft import get_peft_model_state_dict

    return set(get_peft_model_state_dict(model))


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
    """Raises CheckpointError when the adapter's card says that it was trained on a model of another shape."""
    config = read_json(folder / ADAPTER_CONFIG, "it is no adapter folder without it")
    card = adapter_card(folder)
    for key, value in card.get("base_shape", {}).items():
        if getattr(model.config, key) != value:
            raise CheckpointError(
                f"the adapter {folder} was trained on {config.get('base_model_name_or_path')} with {key} {value}; "
                f"this base has {getattr(model.config, key)}"
            )


def base_shape(config: Any) -> dict[str, int]:
    """What an adapter's card keeps of its base, to tell a wrong one before peft fails on a tensor."""
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_codebooks", "codebook_size")
    return {key: getattr(config, key) for key in keys}


def adapter_card(folder: Path) -> dict[str, Any]:
    """What Higgstune wrote beside the adapter; empty for an adapter from elsewhere."""
    path = folder / ADAPTER_CARD
    return read_json(path, "") if path.exists() else {}


def find_adapter(path: str | Path) -> Path:
    """The adapter folder that a user means: it may be a run's folder, whose last finished stage is taken.

    Raises CheckpointError when there is none.
    """
    folder = Path(path).expanduser()
    if (folder / ADAPTER_CONFIG).exists():
        return folder
    if (folder / RUN_STATE).exists():
        last = json.loads((folder / RUN_STATE).read_text(encoding="utf-8")).get("adapter")
        if last is not None:
            return folder / last
        raise CheckpointError(f"the run {folder} has no finished stage yet: `higgstune train` it to its end")
    raise CheckpointError(f"{folder} is neither an adapter ({ADAPTER_CONFIG}) nor a run ({RUN_STATE})")


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for an attribute by a name that is going out of use; no user can mend that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _adapter_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    safetensors_keys(path)  # tells a truncated file with a message of its own
    return load_file(path)
