"""The adapter, base and codec of an export, found and checked before any weight is read."""

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
from higgstune.inputs import ADAPTER_CONFIG, find_adapter
from higgstune.model.adapter_folder import ADAPTER_WEIGHTS, adapter_card, check_adapter_family, check_adapter_files

MERGED = "merged"  # key of a folder's higgstune.json: which adapter is in these weights
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Source:
    """An adapter with its base and codec."""

    adapter: Path
    card: dict[str, Any]  # the adapter's; empty for an adapter that Higgstune did not write
    weights_sha256: str
    checkpoint: str  # the base as the user or the adapter names it, with `revision`
    revision: str | None
    layout: Layout  # of the base's folder
    codec: str

    @property
    def base(self) -> Path:
        """The base's folder on this disk."""
        return self.layout.folder

    @property
    def run(self) -> Path:
        """The folder of the stage that made the adapter, unless the adapter was moved."""
        return self.adapter.parent


def open_source(
    run: str | Path, *, model: str | Path | None = None, revision: str | None = None, codec: str | Path | None = None
) -> Source:
    """The adapter of a run's or an adapter's folder with its base (`model` where that has moved) and its codec.

    Raises CheckpointError when a part is missing or damaged, and when an adapter was merged into the base already.
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
            f"{error}\n(the adapter {adapter} names its base; name it with --model if it has moved)"
        ) from error
    check_adapter_family(adapter, layout.family)
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

    Another dtype counts as float32 when `wanted` names the dtype to write; else it raises CheckpointError.
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
            f"the weights in {layout.folder} are stored as {found}: choose the dtype of the merged weights with "
            "--dtype float32 or --dtype bfloat16"
        )
    return STORED_DTYPES.get(found, "float32")


def _recorded_base(adapter: Path) -> str:
    name = read_json(adapter / ADAPTER_CONFIG, "").get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"the adapter {adapter} does not record its base: name it with --model")
    return str(name)


def _recorded_codec(card: dict[str, Any], base: Path) -> str:
    """The codec that the adapter was trained with; when its folder has moved, the one in the base's folder."""
    recorded = card.get("codec")
    own = base / CODEC_FOLDER
    if recorded is None or (Path(recorded).is_absolute() and not Path(recorded).is_dir() and own.is_dir()):
        return checkpoint_codec(base)
    return str(recorded)


def _refuse_merged_base(base: Path, card: dict[str, Any], sha256: str) -> None:
    """Raise CheckpointError unless these are the weights that the adapter was trained on, without it."""
    merged = folder_card(base).get(MERGED)
    if merged is None:
        return
    if merged.get("adapter_sha256") == sha256:
        raise CheckpointError(
            f"this adapter was merged into {base} already: merging it again would apply it twice; name the base "
            "that it was trained on with --model"
        )
    # An adapter that was trained on a merged checkpoint names the fingerprint of its weights.
    if card.get("base_fingerprint") is None or card["base_fingerprint"] != merged.get("fingerprint"):
        raise CheckpointError(
            f"{base} is a merged checkpoint: its weights contain another adapter (sha256 "
            f"{str(merged.get('adapter_sha256'))[:16]}...), and this adapter was not trained on them. Name the base "
            f"that it was trained on ({card.get('checkpoint', 'see its run')}) with --model"
        )
