"""What a base is, beside the sample of its weights in its fingerprint: configuration, tokenizer, weight files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgstune.checkpoint_files import FILES, folder_card, read_json, sha256_of, weight_files
from higgstune.errors import CheckpointError
from higgstune.families.base import Family

IDENTITY = "base_identity"  # key of an adapter's card, whose own `config_sha256` is that of adapter_config.json
ARCHITECTURE, CONFIG_SHA256, TOKENIZER_SHA256 = "architecture", "config_sha256", "tokenizer_sha256"
# The parts of a tokenizer.json that decide ids; truncation and padding are set by each call.
_DECIDE_IDS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")


@dataclass(frozen=True)
class WeightFile:
    """A weight file as a run found it. It is read again only where size or times differ."""

    sha256: str
    bytes: int
    modified: int  # ns
    changed: int  # ns; of the file's entry, which no program can set back


def config_identity(family: Family, config: Any) -> dict[str, Any]:
    """What decides ids and logits in a configuration, and its SHA-256: the same in every layout and dtype."""
    architecture = family.architecture(config)
    return {ARCHITECTURE: architecture, CONFIG_SHA256: _sha256(architecture)}


def base_identity(family: Family, config: Any, folder: Path) -> dict[str, Any]:
    """`config_identity` with the SHA-256 of the tokenizer in a base's folder. Raises CheckpointError."""
    return config_identity(family, config) | {TOKENIZER_SHA256: tokenizer_sha256(folder)}


def tokenizer_sha256(folder: Path) -> str:
    """The SHA-256 of what decides ids in tokenizer.json, whatever its spacing and order. Raises CheckpointError."""
    written = read_json(folder / "tokenizer.json", "the tokenizer belongs to the checkpoint")
    parts = {key: written.get(key) for key in _DECIDE_IDS}
    model = parts["model"]
    if isinstance(model, dict) and isinstance(model.get("merges"), list):  # pairs, or "a b" in older files
        merges = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in model["merges"]]
        parts["model"] = model | {"merges": merges}
    return _sha256(parts)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What of a recorded identity is another one now, in words; None where nothing is, or nothing was recorded."""
    found = []
    if CONFIG_SHA256 in now and before.get(CONFIG_SHA256, now[CONFIG_SHA256]) != now[CONFIG_SHA256]:
        old, new = before.get(ARCHITECTURE), now[ARCHITECTURE]
        if isinstance(old, Mapping):  # a key that was not recorded comes from a later transformers, with its default
            keys = [
                f"{key} is {new.get(key)}, not {value}" for key, value in sorted(old.items()) if new.get(key) != value
            ]
        else:
            keys = ["its architecture"]
        if keys:
            found.append(f"config.json has changed ({', '.join(keys)})")
    if TOKENIZER_SHA256 in now and before.get(TOKENIZER_SHA256, now[TOKENIZER_SHA256]) != now[TOKENIZER_SHA256]:
        found.append("tokenizer.json has changed (it gives other ids)")
    return " and ".join(found) or None


def unrecorded(what: str) -> str:
    """The warning of something that was written before identities were recorded."""
    return f"{what} does not record config.json and tokenizer.json of its base: whether they have changed is unknown"


def check_sealed(family: Family, config: Any, folder: Path) -> str | None:
    """Compare configuration and tokenizer of a folder that Higgstune wrote with what its card records.

    Returns a warning for a card that does not record them. Raises CheckpointError where one has changed.
    """
    card = folder_card(folder)
    if FILES not in card:
        return None
    if CONFIG_SHA256 not in card:
        return unrecorded(str(folder))
    if (problem := changes(card, base_identity(family, config, folder))) is not None:
        raise CheckpointError(f"{folder} is not as it was written: {problem}; copy the folder again, or write it again")
    return None


def read_weight_files(folder: Path, known: Mapping[str, WeightFile]) -> dict[str, WeightFile]:
    """The weight files of a base by name; those in `known` whose size and times are the same are not read again.

    Raises CheckpointError.
    """
    found = {}
    for path in weight_files(folder):
        state = path.stat()
        place = (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        before = known.get(path.name)
        same = before is not None and place == (before.bytes, before.modified, before.changed)
        found[path.name] = before if before is not None and same else WeightFile(sha256_of(path), *place)
    return found


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
