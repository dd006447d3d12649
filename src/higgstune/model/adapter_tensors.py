"""An adapter's tensors under the names of its base, and the checks of them before peft allocates anything.

Other software leaves the names of its wrappers in them (DDP, torch.compile, FSDP), the name of the adapter, or the
layer names of another layout of the base.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from higgstune.checkpoint_files import read_json, read_tensors, safetensors_keys
from higgstune.errors import CheckpointError
from higgstune.families import family_info, family_of, load_family
from higgstune.families.base import Family
from higgstune.inputs import ADAPTER_CONFIG
from higgstune.model.adapter_folder import (
    ADAPTER_WEIGHTS,
    adapter_card,
    check_adapter_files,
    check_base,
    read_adapter_config,
)

if TYPE_CHECKING:  # imported where an adapter is loaded: a wrong folder is refused without them
    from torch import Tensor, nn

    from higgstune.peft_compat import LoraConfig

PREFIX = "base_model.model."  # peft's, before the names of the base
# Modules around a model: DDP, DataParallel and DeepSpeed; torch.compile; FSDP; activation checkpointing; Lightning.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))
_LORA = ("lora_A", "lora_B")
_MAGNITUDE = "lora_magnitude_vector"  # of DoRA, which peft saves without a parameter's name
_IN_FULL = "modules_to_save"


def plain_key(key: str, family: Family) -> str:
    """The name with which peft would have saved a tensor on the family's plain class."""
    parts = _without_adapter_name([part for part in key.split(".") if part not in _WRAPPERS])
    while len(parts) > 1 and parts[0] in ("base_model", "model"):
        parts = parts[1:]
    return PREFIX + family.plain_name(".".join(parts))


def module_of(key: str) -> str:
    """A tensor's name in an adapter -> the module of the base that it belongs to."""
    name = key.removeprefix(PREFIX)
    return name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]


def read_adapter(folder: Path) -> "dict[str, Tensor]":
    """The tensors of an adapter's folder under the names of its base. Raises CheckpointError.

    peft's `original_module` beside a trained copy is the base's own, and left out.
    """
    family = load_family(family_info(adapter_card(folder).get("family")))
    found: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    copied = {key.partition(f".{_IN_FULL}.")[0] for key in tensors if f".{_IN_FULL}." in key}
    for key, value in tensors.items():
        module, of_base, _ = key.partition(".original_module.")
        if of_base and module in copied:
            continue
        name = plain_key(key, family)
        if name in found:
            raise CheckpointError(
                f"the adapter {folder} has two tensors for {name}, {sources[name]} and {key}: save one adapter in a "
                "folder, without its copies"
            )
        found[name], sources[name] = value, key
    return found


def is_zero(folder: Path) -> bool:
    """Whether all LoRA of an adapter's folder is zero, and nothing was trained in full. Raises CheckpointError."""
    weights = read_adapter(folder)
    changing = {module_of(key) for key, value in weights.items() if ".lora_A" in key and value.any()}
    changing &= {module_of(key) for key, value in weights.items() if ".lora_B" in key and value.any()}
    return not changing and all(".lora_" in key for key in weights)


def checked_weights(folder: Path, model: Any, *, checksum: bool = True) -> "dict[str, Tensor]":
    """The adapter's tensors, after all checks of its files, its base and its values. Raises CheckpointError."""
    check_adapter_files(folder, checksum=checksum)
    check_base(folder, model)
    weights = read_adapter(folder)
    _check_values(weights, folder)
    return weights


def fitted_config(
    config: "LoraConfig", model: "nn.Module", weights: "Mapping[str, Tensor]", folder: Path
) -> "LoraConfig":
    """`config` with the names of this base, after a check that it and the tensors describe the same modules.

    Modules that are trained in full are named one by one, down to those that hold weights: peft fails on a module
    inside of another one that it takes, too. Extensions of the family keep their names. Raises CheckpointError.
    """
    family = family_of(model)
    targets: Any = config.target_modules
    named = config.modules_to_save or ()
    if not isinstance(targets, str):
        targets = {_plain_entry(target, family) for target in targets}
    extensions = [name for name in named if family.extensions.owns(f"{name}.")]
    entries = {name: (name, _plain_entry(name, family)) for name in named if name not in extensions}
    in_full = trained_in_full(weights, family)
    _check_modules(weights, model, folder)
    for name, spellings in entries.items():
        if not any(_names(spellings, module, family) for module in in_full):
            raise CheckpointError(
                f"the adapter {folder} does not fit this base: {ADAPTER_CONFIG} names {name} in {_IN_FULL}, of which "
                f"{ADAPTER_WEIGHTS} has no tensor; remove it there if it was not trained"
            )
    for module in in_full:
        if not any(_names(spellings, module, family) for spellings in entries.values()):
            raise CheckpointError(
                f"the adapter {folder} does not fit this base: it has weights of {module}, which {_IN_FULL} in "
                f"{ADAPTER_CONFIG} does not name; name it there if it was trained in full"
            )
        _check_in_full(module, model.get_submodule(module), weights, folder)
    found = replace(config, target_modules=targets, modules_to_save=[*extensions, *in_full] or None)
    _check_lora(found, model, weights, folder)
    return found


def copy_for_peft(adapter: Path, folder: Path, model: "nn.Module") -> None:
    """Copy an adapter's weights and configuration into `folder`: what plain peft would not read is written anew, with
    the names of the base. Raises CheckpointError.
    """
    from safetensors.torch import save_file

    weights = read_adapter(adapter)
    config = read_adapter_config(adapter / ADAPTER_CONFIG, family_of(model).lora_patterns)
    fitted = fitted_config(config, model, weights, adapter)
    if weights.keys() == safetensors_keys(adapter / ADAPTER_WEIGHTS):
        shutil.copyfile(adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    else:
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    if fitted == config:
        shutil.copyfile(adapter / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
        return
    targets = fitted.target_modules if isinstance(fitted.target_modules, str) else sorted(fitted.target_modules or ())
    written = read_json(adapter / ADAPTER_CONFIG, "an adapter folder needs it")
    named = {"target_modules": targets, _IN_FULL: fitted.modules_to_save}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(written | named, indent=2), encoding="utf-8")


def trained_in_full(weights: "Iterable[str]", family: Family) -> list[str]:
    """The modules with weights of their own among an adapter's tensors, without extensions of the family."""
    owns = family.extensions.owns
    return sorted({module_of(key) for key in weights if ".lora_" not in key and not owns(key)})


def _without_adapter_name(parts: list[str]) -> list[str]:
    """peft leaves the adapter's name out when it saves: `lora_A.default.weight`, `modules_to_save.default.weight`."""
    if _IN_FULL in parts:
        at = parts.index(_IN_FULL)
        return parts[:at] + parts[at + (2 if len(parts) > at + 2 else 1) :]
    for at, part in enumerate(parts):
        if part == _MAGNITUDE:
            return parts[: at + 1]
        if part in _LORA and len(parts) == at + 3:
            return [*parts[: at + 1], parts[-1]]
    return parts


def _plain_entry(name: str, family: Family) -> str:
    """The name of a module, or its end, in adapter_config.json -> that of this base."""
    kept = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return family.plain_name(f"{kept}.").removesuffix(".") or kept


def _names(spellings: Iterable[str], module: str, family: Family) -> bool:
    """Whether an entry of `modules_to_save` means a module or one around it, which the base here may not have: peft
    compares ends, not whole names.
    """
    inside = any(f"{spelling}." in f"{module}." for spelling in spellings)
    return inside or any(family.plain_name(f"{spelling}.{module}") == module for spelling in spellings)


def _check_modules(weights: "Mapping[str, Tensor]", model: "nn.Module", folder: Path) -> None:
    family = family_of(model)
    modules = {name for name, _ in model.named_modules()}
    lacking = dict.fromkeys(module_of(key) for key in weights if not family.extensions.owns(key))
    if unknown := [name for name in lacking if name not in modules]:
        more = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"the adapter {folder} does not fit this base: it was trained on {unknown[0]}{more}, which "
            f"{family.info.title} does not have; only an adapter of its own layers can be used"
        )


def _check_in_full(name: str, module: "nn.Module", weights: "Mapping[str, Tensor]", folder: Path) -> None:
    """Raises CheckpointError unless the tensors are exactly the weights of a module."""
    expected = dict(module.named_parameters(recurse=False))
    if any(not value.is_floating_point() for value in expected.values()):
        raise CheckpointError(
            f"the adapter {folder} does not fit this base: it was trained in full on {name}, which is in 4 bits; load "
            "the base without quantization"
        )
    shapes = {f"{PREFIX}{name}.{key}": tuple(value.shape) for key, value in expected.items()}
    found = {key: tuple(weights[key].shape) for key in weights if module_of(key) == name and ".lora_" not in key}
    for key in sorted(shapes.keys() | found.keys()):
        if shapes.get(key) != found.get(key):
            raise CheckpointError(
                f"the adapter {folder} does not fit this base: {key} is {found.get(key, 'missing')}, expected "
                f"{shapes.get(key, 'no such tensor')}"
            )


def _check_lora(config: "LoraConfig", model: "nn.Module", weights: "Mapping[str, Tensor]", folder: Path) -> None:
    """Raise CheckpointError unless every layer that the configuration names has its LoRA among the tensors.

    Runs before peft allocates the layers: a rank from a stranger must not take more memory than the file has.
    """
    from torch import nn

    for name, layer in _targets(config, model):
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"the adapter {folder} does not fit this base: {name} is not a linear layer")
        expected = {"lora_A": (config.r, layer.in_features), "lora_B": (layer.out_features, config.r)}
        for part, shape in expected.items():
            key = f"{PREFIX}{name}.{part}.weight"
            if key not in weights:
                raise CheckpointError(
                    f"the adapter {folder} does not fit this base: it has no tensor {key}. Check that the base is the "
                    "one that the adapter was trained on, and that the folder is complete"
                )
            if (found := tuple(weights[key].shape)) != shape:
                raise CheckpointError(
                    f"the adapter {folder} does not fit this base: {key} is {found}, expected {shape}"
                )


def _targets(config: "LoraConfig", model: "nn.Module") -> "Iterator[tuple[str, nn.Module]]":
    """The layers that get LoRA, by peft's rules."""
    targets: Any = config.target_modules
    for name, layer in model.named_modules():
        if any(f".{kept}." in f".{name}." for kept in config.modules_to_save or ()):  # trained in full
            continue
        if isinstance(targets, str):
            if re.fullmatch(targets, name):
                yield name, layer
        elif name in targets or any(name.endswith(f".{target}") for target in targets):
            yield name, layer


def _check_values(weights: "Mapping[str, Tensor]", folder: Path) -> None:
    for key, value in weights.items():
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            raise CheckpointError(
                f"the adapter {folder} is damaged: {key} holds NaN or infinity, or is not of floats ({value.dtype}); "
                "copy the adapter again, or use an earlier checkpoint of its run"
            )
