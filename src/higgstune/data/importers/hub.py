"""Rows from a data set at the hub, `hf:owner/name` or `hf:owner/name:split`, or from Parquet files of one on this
machine. Needs the extra `datasets`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from higgstune.data.importers.records import records_source
from higgstune.data.source import Source
from higgstune.errors import ConfigError, DataError
from higgstune.inputs import HUB_PREFIX

_NAME = re.compile(rf"{HUB_PREFIX}(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:-]+))?")
_SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg"}


def read_hub(source: str, read_folder: Callable[..., Source], *, columns: str | None = None) -> Source:
    """The rows of a data set at the hub; without a split, those of "train".

    It is streamed, and the bytes of its recordings are written as they are into a folder of the user's cache, from
    which a repeated preparation reads them. A data set that is a folder of files is downloaded there as it is, and read
    with `read_folder`: the folder named like the split, or all of it where no split is named and none has that name.

    Raises ConfigError for a wrong name or without the extra, DataError for a data set that cannot be read.
    """
    if (found := _NAME.fullmatch(source)) is None:
        raise ConfigError(f"{source} is not the name of a data set: write {HUB_PREFIX}owner/name or :split behind it")
    _check_extra(source)
    import datasets
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
    from huggingface_hub import snapshot_download

    name, split = found["name"], found["split"] or "train"
    cache = _cache()
    try:
        builder = datasets.load_dataset_builder(name)
        if isinstance(builder, FolderBasedBuilder):
            whole = cache / name.replace("/", "--")
            snapshot_download(name, repo_type="dataset", local_dir=whole)
            if found["split"] and not (whole / split).is_dir():
                raise DataError(f"the data set {name} has no folder {split}: name one that it has, or none")
            return read_folder(whole / split if (whole / split).is_dir() else whole, columns=columns)
        folder = cache / f"{name.replace('/', '--')}--{split}"
        advice = f"download it (`hf download --repo-type dataset {name} --local-dir FOLDER`) and name the folder"
        records = _records(builder, split, source, folder, advice)
    except DataError:
        raise
    except (ImportError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"the data set {name} cannot be read (split {split}): {error}") from error
    return records_source(folder / source.removeprefix(HUB_PREFIX).replace("/", "--"), records, columns=columns)


def read_parquet(path: Path, files: Sequence[Path], *, columns: str | None = None) -> Source:
    """The rows of Parquet files as `datasets` writes them, which hold their recordings: `path`, or those in it.

    Recordings are written into the user's cache, as those of `read_hub`. Raises ConfigError without the extra,
    DataError for files that cannot be read, or do not hold their recordings.
    """
    _check_extra(str(path))
    import datasets

    folder = _cache() / f"{path.name}--{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    advice = "write it again with its recordings in it, or name a folder with the recordings and a table of them"
    try:
        builder = datasets.load_dataset_builder("parquet", data_files=[str(file) for file in files])
        records = _records(builder, "train", path.name, folder, advice)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return records_source(folder / path.name, records, columns=columns)


def _check_extra(source: str) -> None:
    if find_spec("datasets") is None:
        raise ConfigError(f"{source} needs datasets: pip install 'higgstune[datasets]'")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "higgstune" / "datasets"


def _records(builder: Any, split: str, source: str, folder: Path, advice: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a split with their places; their recordings are written below `folder`."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    rows = builder.as_streaming_dataset(split=split)
    rows = rows if rows.features is not None else rows._resolve_features()
    features = rows.features
    for key in (key for key, kind in features.items() if _is_audio(kind)):  # the bytes: decoding is ours
        rows = rows.cast_column(key, datasets.Audio(decode=False))
    return [(f"{source}:{number}", _record(row, features, folder, source, advice)) for number, row in enumerate(rows)]


def _is_audio(kind: Any) -> bool:
    """Whether a feature is a recording, declared or as a struct of bytes and path."""
    import datasets

    return isinstance(kind, datasets.Audio) or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys())


def _record(row: dict[str, Any], features: Any, folder: Path, source: str, advice: str) -> dict[str, Any]:
    """A row as an object: a recording is the name of its file below `folder`, and a class its name.

    Raises DataError, with advice, for a recording that the data set does not hold.
    """
    record: dict[str, Any] = {}
    for key, value in row.items():
        if _is_audio(features[key]) and value is not None:
            if value["bytes"] is None:  # its path is of another machine, or at the hub, and never read here
                raise DataError(f"{source} has the paths of its recordings in its rows, not their bytes: {advice}")
            record[key] = _written(value["bytes"], folder)
        else:
            named = hasattr(features[key], "int2str") and isinstance(value, int) and value >= 0
            record[key] = features[key].int2str(value) if named else value
    return record


def _written(content: bytes, folder: Path) -> str:
    """The name of the file of a recording, which is that of its content."""
    name = hashlib.sha256(content).hexdigest()[:32] + _SUFFIXES.get(content[:4], ".mp3")
    if not (folder / name).is_file():
        temporary = folder / f".{name}.{os.getpid()}.new"
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    return name
