"""Reading the Parquet files of a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from higgstune.data.schema import CODE_COLUMNS, Shard
from higgstune.errors import DataError


def codes_of(cell: pa.Scalar) -> Any:
    """A cell of a codes column: [frames, num_codebooks] uint16, a list of such arrays, or None."""
    if not cell.is_valid:
        return None
    values = cell.values
    if pa.types.is_list(values.type):
        return [codes_of(inner) for inner in values]
    return np.array(values.flatten(), dtype=np.uint16).reshape(-1, values.type.list_size)


def read_light_columns(folder: Path, shards: list[Shard]) -> pa.Table:
    """Everything but the codes, of all shards in order. Raises DataError for a store without any."""
    tables = []
    for shard in shards:
        with open_shard(folder, shard) as file, named_in_errors(folder, shard):
            names = [name for name in file.schema_arrow.names if name not in CODE_COLUMNS]
            tables.append(file.read(columns=names, use_threads=False))
    if not tables:
        raise DataError(f"{folder} is a code store without a row: prepare it again")
    return pa.concat_tables(tables).combine_chunks()


def open_shard(folder: Path, shard: Shard) -> pq.ParquetFile:
    """Open one shard. Raises DataError where it is missing or is not what the index says."""
    path = folder / shard.name
    with named_in_errors(folder, shard):
        if path.stat().st_size != shard.bytes:
            raise DataError(f"{path} is not as long as the store's index says: copy or prepare it again")
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    if file.metadata.num_rows != shard.rows:
        raise DataError(f"{path} has {file.metadata.num_rows} rows, the store's index says {shard.rows}")
    return file


@contextmanager
def named_in_errors(folder: Path, shard: Shard) -> Iterator[None]:
    """Turn what goes wrong with a shard's file into a DataError that names it."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder / shard.name} is missing or damaged ({error}): copy or prepare it again") from error
