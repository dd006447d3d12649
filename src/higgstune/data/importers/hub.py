"""Rows from a data set at the hub: `hf:owner/name`, or `hf:owner/name:split`. Needs the extra `datasets`."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from higgstune.data.importers.records import records_source
from higgstune.data.source import Source
from higgstune.errors import ConfigError, DataError
from higgstune.inputs import HUB_PREFIX

_NAME = re.compile(rf"{HUB_PREFIX}(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:-]+))?")
_SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg"}


def read_hub(source: str, *, columns: str | None = None) -> Source:
    """The rows of a data set at the hub; without a split, those of "train".

    It is streamed, and the bytes of its recordings are written as they are into a folder of the user's cache, from
    which a repeated preparation reads them.

    Raises ConfigError for a wrong name or without the extra, DataError for a data set that cannot be read.
    """
    if (found := _NAME.fullmatch(source)) is None:
        raise ConfigError(f"{source} is not the name of a data set: write {HUB_PREFIX}owner/name or :split behind it")
    if find_spec("datasets") is None:
        raise ConfigError(f"{source} needs datasets: pip install 'higgstune[datasets]'")
    import datasets

    name, split = found["name"], found["split"] or "train"
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        rows = rows if rows.features is not None else rows._resolve_features()
        audio = [key for key, kind in rows.features.items() if _is_audio(kind)]
        for key in audio:  # the bytes: decoding is ours
            rows = rows.cast_column(key, datasets.Audio(decode=False))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"the data set {name} cannot be read (split {split}): {error}") from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "higgstune" / "datasets" / f"{name.replace('/', '--')}--{split}"
    folder.mkdir(parents=True, exist_ok=True)
    records = list(_records(rows, audio, folder, source))
    return records_source(folder / source.removeprefix(HUB_PREFIX).replace("/", "--"), records, columns=columns)


def _is_audio(kind: Any) -> bool:
    """Whether a feature is a recording, declared or as a struct of bytes and path."""
    import datasets

    return isinstance(kind, datasets.Audio) or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys())


def _records(rows: Any, audio: list[str], folder: Path, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place; a recording is the name of its file below `folder`."""
    for number, row in enumerate(rows):
        record: dict[str, Any] = {key: value for key, value in row.items() if key not in audio}
        for key in audio:
            content = row[key]
            if content is not None:
                data = content["bytes"] or Path(content["path"]).read_bytes()
                suffix = _SUFFIXES.get(data[:4], ".mp3")
                record[key] = f"{number:07d}-{key}{suffix}"
                if not (file := folder / record[key]).is_file() or file.stat().st_size != len(data):
                    file.write_bytes(data)
        yield f"{source}:{number}", record
