"""The registry of model families, by the `model_type` of a checkpoint's config.json or by the name in artefacts.

A lookup of a `FamilyInfo` imports neither torch nor transformers; `family_of` and `load_family` import a family's code.
"""

import shlex
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import read_json, safetensors_keys, weight_files
from higgstune.errors import CheckpointError, ConfigError
from higgstune.families import higgs_tts_3, higgs_v2
from higgstune.families.base import Family, FamilyInfo, Layout, Prompter, base_of
from higgstune.hub import local_folder
from higgstune.imports import collector_paused, deferred
from higgstune.inputs import ADAPTER_CONFIG, RUN_STATE

DEFAULT_FAMILY = higgs_v2.INFO.name  # of artefacts that name none
_KNOWN: dict[str, FamilyInfo] = {}


def register(info: FamilyInfo) -> None:
    """Register a family. Raises ValueError where its name or one of its model types is taken."""
    taken = {name for known in _KNOWN.values() for name in (known.name, *known.model_types)}
    if both := sorted(taken.intersection((info.name, *info.model_types))):
        raise ValueError(f"{info.title}: a family with {', '.join(both)} is registered already")
    _KNOWN[info.name] = info


register(higgs_v2.INFO)
register(higgs_tts_3.INFO)


def family_info(name: str | None) -> FamilyInfo:
    """The family with this name; None means the default one. Raises ConfigError."""
    found = _KNOWN.get(DEFAULT_FAMILY if name is None else name)
    if found is None:
        raise ConfigError(f"unknown model family {name!r}: use one of {', '.join(_KNOWN)}")
    return found


def load_family(info: FamilyInfo) -> Family:
    """Import the family's code."""
    # transformers imports scipy.optimize for its losses of object detection.
    with collector_paused(), deferred("scipy.optimize", "linear_sum_assignment"):
        family: Family = import_module(info.code).FAMILY
    return family


def read_prompter(info: FamilyInfo, tokenizer: Any, written: Mapping[str, Any], folder: Path) -> Prompter | None:
    """The family's prompter for a folder by its config.json as `written`; None where its code is needed for that.

    Raises CheckpointError when the tokenizer does not fit.
    """
    if info.prompts is None:
        return None
    prompter: Prompter | None = import_module(info.prompts).read_prompter(tokenizer, written, folder)
    return prompter


def family_of(model: Any) -> Family:
    """The family of a loaded model, or of the one inside a peft model. Raises CheckpointError for another model."""
    model_type = base_of(model).config.model_type
    for info in _KNOWN.values():
        if model_type in info.model_types:
            return load_family(info)
    raise CheckpointError(f"the model has the model_type {model_type!r}, which no family of Higgstune has")


def family_in(folder: Path) -> tuple[FamilyInfo, str, dict[str, Any]]:
    """The family of a checkpoint folder, its layout, and its config.json. Raises CheckpointError."""
    config = read_json(folder / "config.json", "a checkpoint folder needs it")
    model_type = config.get("model_type")
    for info in _KNOWN.values():
        if (kind := info.model_types.get(str(model_type))) is not None:
            return info, kind, config
    expected = ", ".join(f"{name} ({kind})" for info in _KNOWN.values() for name, kind in info.model_types.items())
    raise CheckpointError(f"{folder / 'config.json'} has the model_type {model_type!r}: expected one of {expected}")


def check_checkpoint(name_or_path: str | Path) -> None:
    """Raise CheckpointError for a checkpoint that, by its name or by its config.json on this disk, no family loads."""
    if (folder := local_folder(name_or_path, what="checkpoint")) is not None:
        is_adapter = any((folder / name).exists() for name in (ADAPTER_CONFIG, RUN_STATE))
        if is_adapter and not (folder / "config.json").exists():
            raise CheckpointError(f"{folder} is an adapter or a run, not a checkpoint: name it with --adapter")
        family_in(folder)


def read_layout(folder: Path) -> Layout:
    """Check that config and weights exist and are whole. Raises CheckpointError naming the file and what to do."""
    info, kind, config = family_in(folder)
    weights = weight_files(folder)
    keys = frozenset(key for file in weights for key in safetensors_keys(file))
    return Layout(folder, info, kind, config, weights, keys)


def check_store_family(folder: Path, name: str | None, base: FamilyInfo, checkpoint: str | Path) -> None:
    """`check_family` for a store in `folder`, with the command that makes one for the base `checkpoint`."""
    try:
        check_family(f"the store {folder}", name, base)
    except CheckpointError as error:
        command = shlex.join(("higgstune", "prepare", "RECORDINGS", "--model", str(checkpoint), "--out", "NEW_STORE"))
        raise CheckpointError(f"{error}, or make a store for this one: {command}") from error


def check_family(what: str, name: str | None, base: FamilyInfo) -> None:
    """Raises CheckpointError if an artefact (`what`, such as "the adapter runs/a") is not of its base's family.

    `name` is the family that the artefact records, or a model type of that family; None means the default one.
    """
    recorded = DEFAULT_FAMILY if name is None else name
    if recorded != base.name and recorded not in base.model_types:
        raise CheckpointError(
            f"{what} belongs to the model family {recorded}, the base to {base.title} ({base.name}): use the base that "
            "it was made for"
        )
