"""What lies in a checkpoint's folder, found out from its small files before any weight is read."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from higgstune.errors import CheckpointError

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS = "model.safetensors"


@dataclass(frozen=True)
class Layout:
    """A checkpoint's folder: which of the two layouts, its config as written, and its weight files."""

    folder: Path
    kind: Literal["native", "original"]
    config: dict[str, Any]
    weights: tuple[Path, ...]
    keys: frozenset[str]


def read_layout(folder: Path) -> Layout:
    """Check that config and weights are there and whole. Raises CheckpointError naming the file and what to do."""
    config = read_json(folder / "config.json", "it is no checkpoint folder without it")
    kinds: dict[Any, Literal["native", "original"]] = {"higgs_audio_v2": "native", "higgs_audio": "original"}
    kind = kinds.get(config.get("model_type"))
    if kind is None:
        raise CheckpointError(
            f"{folder / 'config.json'} has the model_type {config.get('model_type')!r}: expected higgs_audio_v2 "
            "(native) or higgs_audio (original)"
        )
    weights = _weight_files(folder)
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


def _weight_files(folder: Path) -> tuple[Path, ...]:
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
