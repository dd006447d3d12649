"""`adapter_config.json`, which may come from a stranger: what a LoRA needs of it, checked, and nothing else.

peft acts on whatever stands there: it imports a module that is named, matches any regular expression, changes the base.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from torch import Tensor, nn

from higgstune.errors import CheckpointError
from higgstune.model.layout import read_json

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


def read_adapter_config(path: Path, patterns: tuple[str, ...]) -> LoraConfig:
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
    return LoraConfig(**known, inference_mode=True)


def check_shapes(config: LoraConfig, model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
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


def _is_target(config: LoraConfig, name: str) -> bool:
    """Whether a layer gets LoRA, as peft decides it."""
    targets: Any = config.target_modules
    if any(f".{kept}." in f".{name}." for kept in config.modules_to_save or ()):  # trained in full
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)
