"""What a code store looks like on disk: the columns of its shards and its index, `store.json`."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from higgstune.errors import DataError

SCHEMA_VERSION = 1
INDEX_NAME = "store.json"
_MAX_INDEX = 1 << 28  # bytes: that of a million rows has thirty thousand
REJECTED_NAME = "rejected.jsonl"
PARTIAL_NAME = ".partial"
SPLITS = ("train", "validation")
SHARD_NAME = re.compile(r"(train|validation)-\d{5}-[0-9a-f]{12}\.parquet")
CODE_COLUMNS = ("codes", "reference_codes", "context_codes")
ROWS_PER_GROUP = 64  # what one random access has to decode
ROWS_PER_SHARD = 8192


@dataclass(frozen=True)
class StoreInfo:
    """What made a code store, and what is in it."""

    codec: str  # its name or folder, as it was asked for
    codec_revision: str
    sample_rate: int  # Hz
    frame_rate: float  # frames per second
    num_codebooks: int
    codebook_size: int
    text_normalization: str
    higgstune_version: str
    rows: dict[str, int]  # by split
    hours: dict[str, float]  # by split
    settings: dict[str, Any] = field(default_factory=dict)  # of the last preparation


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a store."""

    name: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreIndex:
    """`store.json`: the shards that belong to the store, and how they were made. No other file does."""

    info: StoreInfo
    shards: list[Shard]

    def to_json(self) -> str:
        """As it stands in `store.json`."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


_STORE_INDEX = TypeAdapter(StoreIndex)


def read_index(folder: Path) -> StoreIndex:
    """The index of the store in a folder. Raises DataError where there is none or it is not one of ours."""
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_MAX_INDEX))
    except FileNotFoundError:
        lacks = f"has no {INDEX_NAME}" if folder.exists() else "does not exist"
        raise DataError(f"{folder} is no code store: it {lacks}; make one with `higgstune prepare`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): prepare the store again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path} has schema version {version}, this Higgstune reads {SCHEMA_VERSION}: prepare it again")
    try:
        shards = [Shard(**shard) for shard in data["shards"]]
        index = StoreIndex(StoreInfo(**data["info"]), shards)
        _STORE_INDEX.validate_json(json.dumps(asdict(index)), strict=True)  # types, also of what is in lists
    except (KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{path} is damaged ({error}): prepare the store again") from error
    if foreign := [shard.name for shard in shards if not SHARD_NAME.fullmatch(shard.name)]:
        raise DataError(f"{path} names {foreign[0]}, which is no shard of a store: prepare the store again")
    if odd := [shard.name for shard in shards if not shard.name.startswith(f"{shard.split}-")]:
        raise DataError(f"{path} has {odd[0]} in another split than its name says: prepare the store again")
    return index


def store_schema(num_codebooks: int) -> pa.Schema:
    """The columns of a shard. Codes are [frames, num_codebooks] uint16."""
    codes = pa.list_(pa.list_(pa.uint16(), num_codebooks))
    part = pa.struct({"type": pa.string(), "text": pa.string(), "url": pa.string(), "as": pa.string()})
    message = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    columns: dict[str, pa.DataType] = {
        "id": pa.string(),
        "text": pa.string(),
        "speaker": pa.string(),
        "language": pa.string(),
        "scene": pa.string(),
        "duration": pa.float64(),  # seconds of the recording, before the codec rounds it to frames
        "frames": pa.int32(),
        "codes": codes,
        "reference_id": pa.string(),  # the row of the same store that is the reference
        "reference_text": pa.string(),
        "reference_codes": codes,  # null where `reference_id` leads to them
        "messages": pa.list_(message),
        "start_index": pa.int32(),
        "context_codes": pa.list_(codes),
        "context_frames": pa.int32(),  # of the reference or of all context audio
        "audio_sha256": pa.string(),  # of the decoded segment
        "recording_sha256": pa.string(),  # of the whole decoded file
        "reference_sha256": pa.string(),  # of an explicit reference; null for a paired one
        "context_sha256": pa.list_(pa.string()),
        "target_recordings": pa.list_(pa.string()),  # recordings of everything that is learnt in this row
        "linked_recordings": pa.list_(pa.string()),  # recordings of its explicit reference and other context audio
        "recording_samples": pa.int64(),
        "recording_rate": pa.int32(),  # Hz
        "recording_sketch": pa.list_(pa.float32()),  # see data/twins.py
        "source_key": pa.string(),  # names the row in its source
    }
    return pa.schema(list(columns.items()))
