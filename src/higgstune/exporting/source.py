"""What is merged or exported: an adapter, its base and its codec, found and checked before any weight is read."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from higgstune.checkpoint_files import folder_card, read_json, sha256_of
from higgstune.codec import CODEC_FOLDER, checkpoint_codec
from higgstune.errors import CheckpointError
from higgstune.families import read_layout
from higgstune.families.base import Layout
from higgstune.hub import fetch
from higgstune.model.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_card,
    check_adapter_files,
    find_adapter,
)

MERGED = "merged"  # key of a folder's higgstune.json: an adapter is in these weights, and which
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Source:
    """An adapter and what it belongs to."""

    adapter: Path
    card: dict[str, Any]  # the adapter's; empty where it is not one of ours
    weights_sha256: str
    checkpoint: str  # the base as it was named, with `revision`
    revision: str | None
    layout: Layout  # of the base's folder
    codec: str

    @property
    def base(self) -> Path:
        """The base's folder on this disk."""
        return self.layout.folder

    @property
    def run(self) -> Path:
        """The folder of the stage that made the adapter, where it still lies in one."""
        return self.adapter.parent


def open_source(
    run: str | Path, *, model: str | Path | None = None, revision: str | None = None, codec: str | Path | None = None
) -> Source:
    """The adapter of a run's or an adapter's folder with its base (`model` where that has moved) and its codec.

    Raises CheckpointError when a part is missing or damaged, and when the adapter, or another one, is in the base.
    """
    adapter = find_adapter(run)
    check_adapter_files(adapter)
    card = adapter_card(adapter)
    checkpoint = str(model) if model is not None else _recorded_base(adapter)
    revision = revision if model is not None else revision or card.get("revision")
    try:
        layout = read_layout(fetch(checkpoint, what="checkpoint", revision=revision))
    except CheckpointError as error:
        if model is not None:
            raise
        raise CheckpointError(
            f"{error}\n(the adapter {adapter} names its base; where it has moved, say so with --model)"
        ) from error
    sha256 = sha256_of(adapter / ADAPTER_WEIGHTS)
    _refuse_merged_base(layout.folder, card, sha256)
    return Source(
        adapter=adapter,
        card=card,
        weights_sha256=sha256,
        checkpoint=checkpoint,
        revision=revision,
        layout=layout,
        codec=str(codec) if codec is not None else _recorded_codec(card, layout.folder),
    )


def stored_dtype(layout: Layout, *, wanted: str | None = None) -> str:
    """The dtype in which most of a checkpoint's values are stored: float32 or bfloat16.

    Another one counts as float32 where `wanted` says what is to be written; else it raises CheckpointError.
    """
    values: Counter[str] = Counter()
    for path in layout.weights:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                values[part.get_dtype()] += prod(part.get_shape())
    [(found, _)] = values.most_common(1)
    if found not in STORED_DTYPES and wanted is None:
        raise CheckpointError(
            f"the weights in {layout.folder} are stored as {found}: say with --dtype float32 or --dtype bfloat16 how "
            "the merged ones are to be stored"
        )
    return STORED_DTYPES.get(found, "float32")


def _recorded_base(adapter: Path) -> str:
    name = read_json(adapter / ADAPTER_CONFIG, "").get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"the adapter {adapter} does not say which base it was trained on: name it with --model")
    return str(name)


def _recorded_codec(card: dict[str, Any], base: Path) -> str:
    """The codec that the adapter was trained with; where its folder has moved, the one that the base brings."""
    recorded = card.get("codec")
    own = base / CODEC_FOLDER
    if recorded is None or (Path(recorded).is_absolute() and not Path(recorded).is_dir() and own.is_dir()):
        return checkpoint_codec(base)
    return str(recorded)


def _refuse_merged_base(base: Path, card: dict[str, Any], sha256: str) -> None:
    """An adapter is merged once, and only into what it was trained on. Raises CheckpointError."""
    merged = folder_card(base).get(MERGED)
    if merged is None:
        return
    if merged.get("adapter_sha256") == sha256:
        raise CheckpointError(
            f"this adapter is in {base} already: merging it twice would apply it twice; name the base that it was "
            "trained on with --model"
        )
    # A run that was begun on a merged checkpoint is another matter: its adapter names these very weights.
    if card.get("base_fingerprint") is None or card["base_fingerprint"] != merged.get("fingerprint"):
        raise CheckpointError(
            f"{base} is a merged checkpoint: an adapter (sha256 {str(merged.get('adapter_sha256'))[:16]}...) is in its "
            f"weights already, and this adapter was not trained on them. Name the base that it was trained on "
            f"({card.get('checkpoint', 'see its run')}) with --model"
        )
