"""What lies in a checkpoint's folder, found out from its small files before any weight is read."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from higgstune.errors import CheckpointError

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS = "model.safetensors"
Kind = Literal["native", "original", "extended"]
# The extended layout is the native one with modules that the native class does not have. It has a name of its own, so
# that no other software takes it for a native checkpoint and leaves them out.
MODEL_TYPES: dict[Any, Kind] = {
    "higgs_audio_v2": "native", "higgs_audio": "original", "higgs_audio_v2_extended": "extended",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A checkpoint's folder: which of the layouts, its config as written, and its weight files."""

    folder: Path
    kind: Kind
    config: dict[str, Any]
    weights: tuple[Path, ...]
    keys: frozenset[str]


def read_layout(folder: Path) -> Layout:
    """Check that config and weights are there and whole. Raises CheckpointError naming the file and what to do."""
    config = read_json(folder / "config.json", "it is no checkpoint folder without it")
    kind = MODEL_TYPES.get(config.get("model_type"))
    if kind is None:
        expected = ", ".join(f"{model_type} ({kind})" for model_type, kind in MODEL_TYPES.items())
        raise CheckpointError(
            f"{folder / 'config.json'} has the model_type {config.get('model_type')!r}: expected one of {expected}"
        )
    weights = weight_files(folder)
    keys: set[str] = set()
    for file in weights:
        keys |= safetensors_keys(file)
    return Layout(folder, kind, config, weights, frozenset(keys))


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing (with `why` it matters) or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {why}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def safetensors_keys(path: Path) -> set[str]:
    """The tensor names of a safetensors file, from its header alone.

    Raises CheckpointError when the file is missing, or shorter than its header says (a download that broke off).
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
            if not 0 < length <= size - 8:
                raise CheckpointError(f"{path} is truncated or no safetensors file: copy or download it again")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: copy or download the checkpoint again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} has a broken header: copy or download it again") from error
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < needed:
        raise CheckpointError(f"{path} is truncated ({size} of {needed} bytes): copy or download it again")
    return set(header)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint. Raises CheckpointError when there is none, or only pickled ones."""
    index = folder / SAFETENSORS_INDEX
    if index.exists():
        shards = read_json(index, "").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index} has no weight_map: copy or download it again")
        return tuple(folder / name for name in sorted(set(shards.values())))
    if (folder / SAFETENSORS).exists():
        return (folder / SAFETENSORS,)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder} has pickled weights (.bin, .pt) only: they can run code when loaded and are not read; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{folder} has neither {SAFETENSORS} nor {SAFETENSORS_INDEX}: the weights are missing")


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files. Raises CheckpointError naming a file that is missing or truncated."""
    state: dict[str, Tensor] = {}
    for file in files:
        safetensors_keys(file)  # tells a truncated file with a message of its own
        state |= load_file(file)
    return state
