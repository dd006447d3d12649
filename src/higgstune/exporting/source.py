"""The adapter, base and codec of an export, found and checked before any weight is read."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from higgstune.checkpoint_files import read_json, sha256_of
from higgstune.errors import CheckpointError, ConfigError
from higgstune.families import read_layout
from higgstune.families.base import Layout
from higgstune.hub import fetch
from higgstune.inputs import RUN_STATE, BaseSpec, find_adapter, is_unusable_run
from higgstune.model.adapter_folder import (
    ADAPTER_WEIGHTS,
    adapter_card,
    check_adapter_family,
    check_adapter_files,
    check_merged_once,
    other_adapter_in,
    recorded_base,
)
from higgstune.model.adapter_tensors import is_zero
from higgstune.model.load import naming_where_recorded

STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Source:
    """An adapter with its base and codec."""

    adapter: Path
    card: dict[str, Any]  # the adapter's; empty for an adapter that Higgstune did not write
    weights_sha256: str
    base: BaseSpec  # as the user or the adapter names it
    layout: Layout  # of the base's folder
    faults: tuple[str, ...] = ()  # why the run ended as not usable; empty where nothing says so

    @property
    def checkpoint(self) -> str:
        """The base's folder or hub id, as it was named."""
        return str(self.base.checkpoint)

    @property
    def run(self) -> Path:
        """The folder of the stage that made the adapter, unless the adapter was moved."""
        return self.adapter.parent


def faults_of(adapter: Path) -> tuple[str, ...]:
    """Why the run that made an adapter ended as not usable with it; empty where nothing says so."""
    run, stage = adapter.parent.parent, adapter.parent.name
    if not (run / RUN_STATE).exists() or not is_unusable_run(run):
        return ()
    state = read_json(run / RUN_STATE, "")
    if state.get("adapter") != adapter.relative_to(run).as_posix():
        return ()
    verdict = state.get("stages", {}).get(stage, {}).get("verdict") or {}
    return tuple(verdict.get("reasons") or ["its report says why"])


def open_source(run: str | Path, base: BaseSpec = BaseSpec()) -> Source:
    """The adapter of a run's or an adapter's folder with its base and codec (`base`, if they have moved).

    Raises CheckpointError when a part is missing or damaged, and when an adapter was merged into the base already;
    ConfigError for a `base` in 4 bits or another dtype.
    """
    if base.dtype is not None or base.quantize is not None:
        raise ConfigError("export reads the base as it is stored: its BaseSpec has no dtype and no quantize")
    adapter = find_adapter(run)
    check_adapter_files(adapter)
    if is_zero(adapter):
        raise CheckpointError(f"the adapter {adapter} changes nothing, as all of its LoRA is zero: export another one")
    card = adapter_card(adapter)
    recorded = adapter if base.checkpoint is None else None
    base = recorded_base(base, adapter, card)
    with naming_where_recorded(recorded):
        layout = read_layout(fetch(str(base.checkpoint), what="checkpoint", revision=base.revision))
    check_adapter_family(adapter, layout.family)
    sha256 = sha256_of(adapter / ADAPTER_WEIGHTS)
    check_merged_once(adapter, layout.folder)
    if (problem := other_adapter_in(layout.folder, card)) is not None:
        raise CheckpointError(problem)
    return Source(
        adapter=adapter,
        card=card,
        weights_sha256=sha256,
        base=base,
        layout=layout,
        faults=faults_of(adapter),
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
