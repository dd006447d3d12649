"""Rows from a data set at the hub: `hf:owner/name`, or `hf:owner/name:split`. Needs the extra `datasets`."""

import hashlib
import os
import re
from collections.abc import Callable
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
    if find_spec("datasets") is None:
        raise ConfigError(f"{source} needs datasets: pip install 'higgstune[datasets]'")
    import datasets
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
    from huggingface_hub import snapshot_download

    name, split = found["name"], found["split"] or "train"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "higgstune" / "datasets"
    try:
        builder = datasets.load_dataset_builder(name)
        if isinstance(builder, FolderBasedBuilder):
            whole = cache / name.replace("/", "--")
            snapshot_download(name, repo_type="dataset", local_dir=whole)
            if found["split"] and not (whole / split).is_dir():
                raise DataError(f"the data set {name} has no folder {split}: name one that it has, or none")
            return read_folder(whole / split if (whole / split).is_dir() else whole, columns=columns)
        folder = cache / f"{name.replace('/', '--')}--{split}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = builder.as_streaming_dataset(split=split)
        rows = rows if rows.features is not None else rows._resolve_features()
        features = rows.features
        for key in (key for key, kind in features.items() if _is_audio(kind)):  # the bytes: decoding is ours
            rows = rows.cast_column(key, datasets.Audio(decode=False))
        records = [(f"{source}:{number}", _record(row, features, folder, name)) for number, row in enumerate(rows)]
    except DataError:
        raise
    except (ImportError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"the data set {name} cannot be read (split {split}): {error}") from error
    return records_source(folder / source.removeprefix(HUB_PREFIX).replace("/", "--"), records, columns=columns)


def _is_audio(kind: Any) -> bool:
    """Whether a feature is a recording, declared or as a struct of bytes and path."""
    import datasets

    return isinstance(kind, datasets.Audio) or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys())


def _record(row: dict[str, Any], features: Any, folder: Path, name: str) -> dict[str, Any]:
    """A row as an object: a recording is the name of its file below `folder`, and a class its name.

    Raises DataError for a recording that the data set `name` does not hold.
    """
    record: dict[str, Any] = {}
    for key, value in row.items():
        if _is_audio(features[key]) and value is not None:
            if value["bytes"] is None:  # its path is of another machine, or at the hub, and never read here
                raise DataError(
                    f"the data set {name} has the paths of its recordings in its rows, not their bytes: download it "
                    f"(`hf download --repo-type dataset {name} --local-dir FOLDER`) and name the folder"
                )
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
