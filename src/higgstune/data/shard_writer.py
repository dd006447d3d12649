"""Writes a store: new shards beside the old ones, then the index in one step; then shards that are left over go.

Shards whose rows are all as they were are kept, and new rows follow in shards of their own. A short shard at the end is
written anew with new rows, where it has less than 1,024 or no more than these, so that a store has few shards.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from higgstune.data.entry import Entry
from higgstune.data.shard_reader import (
    LENGTHS_PREFIX,
    PARTIAL_NAME,
    PRINT,
    ROWS_PER_GROUP,
    ROWS_PER_SHARD,
    SHARD_NAME,
    SPLITS,
    Shard,
    StoreIndex,
    StoreInfo,
    read_index,
    store_schema,
)
from higgstune.errors import DataError, WorkError
from higgstune.files import refusal, sync_folder, write_file, writing
from higgstune.inputs import INDEX_NAME

CodesOf = Callable[[str], np.ndarray]  # audio hash -> [frames, num_codebooks] uint16
PrintOf = Callable[[str], bytes | None]  # audio hash -> see `duplicates.print_of`
_SHORT = 1_000  # rows of a shard that is written anew with any that follow
_UNCHANGED = "the store is unchanged, and the encoded clips are kept"


def write_store(
    folder: Path,
    entries: list[Entry],
    codes_of: CodesOf,
    print_of: PrintOf,
    info: StoreInfo,
    old_shards: Sequence[Shard] = (),
    old_entries: Iterable[Entry] = (),
) -> None:
    """Replace the store in a folder by one of these rows. Until the index is replaced, the old store stays intact.

    `old_shards` are those of the store, and `old_entries` their rows in order. Raises WorkError where the disk refuses;
    the old store is intact then.
    """
    rows_of_old = iter(old_entries)
    stored = [(shard, list(islice(rows_of_old, shard.rows))) for shard in old_shards]
    assembly = folder / PARTIAL_NAME / "shards"
    try:
        shutil.rmtree(assembly, ignore_errors=True)
        assembly.mkdir(parents=True)
        shards: list[Shard] = []
        new: list[Shard] = []
        for split in SPLITS:
            rows = [entry for entry in entries if entry.split == split]
            kept = _unchanged([one for one in stored if one[0].split == split], rows)
            left = rows[sum(shard.rows for shard in kept) :]
            first = _number_of(kept[-1]) + 1 if kept else 0
            written = [
                _write_shard(assembly, split, number, chunk, codes_of, print_of, info.num_codebooks)
                for number, chunk in enumerate(_chunks(left), first)
            ]
            new += written
            shards += [*kept, *written]
        for shard in new:
            os.replace(assembly / shard.name, folder / shard.name)
        sync_folder(folder)
        write_file(folder / INDEX_NAME, StoreIndex(info, shards).to_json(), kept=_UNCHANGED)
    except (OSError, WorkError) as error:
        shutil.rmtree(assembly, ignore_errors=True)  # on a full disk it would take up room
        with suppress(OSError, DataError):
            _remove_stale(folder, _named_by_index(folder), has_changed=False)
        if isinstance(error, WorkError):
            raise
        raise WorkError(refusal(folder, error, _UNCHANGED)) from error
    try:
        _remove_stale(folder, {shard.name for shard in shards}, has_changed=bool(new))
    except OSError as error:
        raise WorkError(f"{folder} has the new store, but its old shards cannot be deleted: {error}") from error


def _unchanged(stored: list[tuple[Shard, list[Entry]]], rows: list[Entry]) -> list[Shard]:
    """The shards that stay: the first ones whose rows are the first of these, one after the other."""
    kept: list[Shard] = []
    done = 0
    for shard, before in stored:
        if before != rows[done : done + shard.rows]:
            break
        kept.append(shard)
        done += shard.rows
    while kept and len(rows) - done > 0 and kept[-1].rows < max(_SHORT, min(len(rows) - done + 1, ROWS_PER_SHARD)):
        done -= kept.pop().rows
    return kept


def _number_of(shard: Shard) -> int:
    return int(shard.name.split("-")[1])


def _write_shard(
    folder: Path,
    split: str,
    number: int,
    rows: list[Entry],
    codes_of: CodesOf,
    print_of: PrintOf,
    num_codebooks: int,
) -> Shard:
    temporary = folder / f"{split}-{number:05d}"
    schema = store_schema(num_codebooks)
    with writing(temporary, _UNCHANGED):
        with open(temporary, "wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
                for first in range(0, len(rows), ROWS_PER_GROUP):
                    writer.write_table(_table(rows[first : first + ROWS_PER_GROUP], codes_of, print_of, schema))
            file.flush()
            os.fsync(file.fileno())
        with open(temporary, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        name = f"{split}-{number:05d}-{sha256[:12]}.parquet"
        os.replace(temporary, folder / name)
        return Shard(name, split, len(rows), (folder / name).stat().st_size, sha256)


def _table(rows: list[Entry], codes_of: CodesOf, print_of: PrintOf, schema: pa.Schema) -> pa.Table:
    num_codebooks = schema.field("codes").type.value_type.list_size
    context = [codes_of(sha256) for entry in rows for sha256 in entry.context_sha256]
    columns: dict[str, Any] = {
        "codes": _code_lists([codes_of(entry.audio_sha256) for entry in rows], num_codebooks),
        "reference_codes": _code_lists(
            [None if entry.reference_sha256 is None else codes_of(entry.reference_sha256) for entry in rows],
            num_codebooks,
        ),
        "context_codes": pa.ListArray.from_arrays(
            _offsets([len(entry.context_sha256) for entry in rows]), _code_lists(context, num_codebooks)
        ),
        PRINT: [print_of(entry.audio_sha256) for entry in rows],
    }
    for name in schema.names:
        if name not in columns:
            columns[name] = [entry.column(name) for entry in rows]
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema)


def _code_lists(values: Sequence[np.ndarray | None], num_codebooks: int) -> pa.ListArray:
    """A column of [frames, num_codebooks] arrays; None becomes null."""
    arrays = [np.empty((0, num_codebooks), np.uint16) if value is None else value for value in values]
    flat = np.concatenate([np.empty((0, num_codebooks), np.uint16), *arrays]).ravel()
    return pa.ListArray.from_arrays(
        _offsets([len(array) for array in arrays]),
        pa.FixedSizeListArray.from_arrays(pa.array(flat), num_codebooks),
        mask=pa.array([value is None for value in values], pa.bool_()),
    )


def _offsets(lengths: list[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), pa.int32())


def _chunks(rows: list[Entry]) -> Iterator[list[Entry]]:
    for first in range(0, len(rows), ROWS_PER_SHARD):
        yield rows[first : first + ROWS_PER_SHARD]


def _named_by_index(folder: Path) -> set[str]:
    """The names of the shards of the store in a folder; empty where there is no store."""
    has_index = (folder / INDEX_NAME).exists()
    return {shard.name for shard in read_index(folder).shards} if has_index else set()


def _remove_stale(folder: Path, names: set[str], *, has_changed: bool) -> None:
    """Delete shards that no index names, and the lengths of examples where the rows have changed."""
    stale = [path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name) and path.name not in names]
    for path in [*stale, *(folder.glob(f"{LENGTHS_PREFIX}*") if stale or has_changed else ())]:
        path.unlink()
