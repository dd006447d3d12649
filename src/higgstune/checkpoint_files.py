"""The files of a checkpoint's folder: what they say, and whether they are whole, before any weight is read."""

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from higgstune.errors import CheckpointError
from higgstune.files import write_file

if TYPE_CHECKING:
    from torch import Tensor  # torch is imported when tensors are read: a folder can be refused without it

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")  # weights that may run code when they are loaded
FOLDER_CARD = "higgstune.json"  # notes of Higgstune about a folder that it wrote
MERGED = "merged"  # key of the card: which adapter is in these weights
FILES = "files"  # key of the card: {path from the folder: sha256}
LFS_POINTER = b"version https://git-lfs"  # how a file begins whose content was not fetched
_PULL = "its content was not fetched; run `git lfs pull` where it was cloned, or download it again"
_MAX_JSON = 64 << 20  # bytes; the index of the largest checkpoint has a few MB
_MAX_HEADER = 100_000_000  # bytes, the limit of safetensors itself
_MAX_DEPTH = 64
# What configuration classes and models raise for wrong types, sizes and names in a file of unknown origin.
_MALFORMED = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError, OSError,
)  # fmt: skip


def malformed_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The errors to catch, and `others`, where transformers builds something from a file of unknown origin."""
    from huggingface_hub.errors import StrictDataclassError

    return (*_MALFORMED, StrictDataclassError, *others)


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing (`why` says why it matters) or broken."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {why}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    if len(content) > _MAX_JSON:
        raise CheckpointError(f"{path} is larger than {_MAX_JSON >> 20} MB, which no such file is: download it again")
    if content.startswith(LFS_POINTER):
        raise CheckpointError(f"{path} is a pointer of Git LFS: {_PULL}")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    if _is_deep(value):
        raise CheckpointError(f"{path} is nested more than {_MAX_DEPTH} levels deep: copy or download it again")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a recursive walk through a value could exhaust the stack."""
    level, depth = [value], 0
    while level and depth <= _MAX_DEPTH:
        level = [
            part
            for item in level
            if isinstance(item, dict | list)
            for part in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1
    return bool(level)


def safetensors_keys(path: Path) -> set[str]:
    """The tensor names of a safetensors file, from its header alone.

    Raises CheckpointError when the file is missing, or shorter than its header says (an interrupted download).
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
            written = file.read(length) if 0 < length <= min(size - 8, _MAX_HEADER) else b""
            file.seek(0)
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: copy or download the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if is_pointer:
        raise CheckpointError(f"{path} is a pointer of Git LFS: {_PULL}")
    if not written:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: copy or download it again")
    try:
        header = json.loads(written)
        header.pop("__metadata__", None)
        needed = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except _MALFORMED as error:
        raise CheckpointError(f"{path} has a broken header: copy or download it again") from error
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
        names = sorted({str(name) for name in shards.values()})
        if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise CheckpointError(
                f"{index} names the weight file {odd[0]!r}: it may name only safetensors files in its own folder"
            )
        return tuple(folder / name for name in names)
    if (folder / SAFETENSORS).exists():
        return (folder / SAFETENSORS,)
    if is_pickled(folder):
        raise CheckpointError(
            f"{folder} has only pickled weights (.bin, .pt, ...), which can run code when loaded and are never read: "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{folder} has neither {SAFETENSORS} nor {SAFETENSORS_INDEX}: the weights are missing")


def is_pickled(folder: Path) -> bool:
    """Whether a folder holds pickled weights, which are never read."""
    return any(next(folder.glob(pattern), None) for pattern in PICKLED)


def read_tensors(file: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file. Raises CheckpointError naming a file that is missing, truncated or broken."""
    from safetensors.torch import load_file

    safetensors_keys(file)  # a truncated file has a message of its own
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error


def read_weights(files: Sequence[Path]) -> "dict[str, Tensor]":
    """All tensors of a checkpoint's files. Raises CheckpointError naming a file that is missing or truncated."""
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_tensors(file)
    return state


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hex digits. Raises CheckpointError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def folder_card(folder: Path) -> dict[str, Any]:
    """Higgstune's notes on a folder; empty for a folder of another origin. Raises CheckpointError when broken."""
    path = folder / FOLDER_CARD
    card = read_json(path, "") if path.exists() else {}
    for keys in (("adapter",), ("adapter", "recipe"), ("adapter", "recipe", "data"), (MERGED,)):
        part: Any = card
        for key in keys:
            part = part.get(key, {})
        if not isinstance(part, dict):
            raise CheckpointError(f"{path} is damaged: {'.'.join(keys)} must be an object; copy the folder again")
    return card


def write_checksums(folder: Path, **notes: Any) -> None:
    """Record in the folder card the sha256 of every weight file below a folder, and `notes`."""
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*.safetensors"))}
    card = folder_card(folder) | notes | {FILES: files}
    write_file(folder / FOLDER_CARD, json.dumps(card, indent=2, ensure_ascii=False))


def check_checksums(folder: Path) -> None:
    """Compare each recorded weight file with its checksum. A folder without records passes.

    Raises CheckpointError naming the file that is missing or has changed.
    """
    files = folder_card(folder).get(FILES, {})
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / FOLDER_CARD}: {FILES} must map file names to checksums; copy it again")
    for name, recorded in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(
                f"{folder / FOLDER_CARD} names the file {name}, which is outside of its folder: copy it again"
            )
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {FOLDER_CARD} lists it; copy the folder again")
        found = sha256_of(path)
        if found != recorded:
            raise CheckpointError(
                f"{path} is not the file that was written: its sha256 is {found[:16]}..., {FOLDER_CARD} records "
                f"{str(recorded)[:16]}...; copy the folder again, or write it again"
            )
