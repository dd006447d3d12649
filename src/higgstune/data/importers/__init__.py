"""Any kind of source -> rows; the kind follows from the files."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from higgstune.data.audio import AUDIO_SUFFIXES
from higgstune.data.importers.chatml import is_trainer_json, load_json, read_trainer_json
from higgstune.data.importers.columns import by_name
from higgstune.data.importers.folder import has_audio, has_transcripts, read_folder
from higgstune.data.importers.hub import read_hub, read_parquet
from higgstune.data.importers.kaldi import FILES as KALDI
from higgstune.data.importers.kaldi import read_kaldi
from higgstune.data.importers.records import is_record_list, read_records, records_source
from higgstune.data.importers.table import looks_like_table, read_table
from higgstune.data.importers.transcripts import plain_row
from higgstune.data.rejection import RowError
from higgstune.data.source import FOREIGN_SUFFIXES, Source, SourceRow, audio_files, nfc, path_within
from higgstune.errors import ConfigError, DataError
from higgstune.inputs import HUB_PREFIX, INDEX_NAME, check_source, unknown_kind

_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = ".parquet"
_TABLES = (".csv", ".tsv", ".list", ".txt")
_USUAL = ("manifest.jsonl", "metadata.jsonl", "metadata.csv")
_LISTS = re.compile(r".*(metadata|train|val|dev|test|all|list|transcript).*\.txt", re.IGNORECASE)
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")
_SHOWN = 6


def read_source(path: str | Path, *, allow_outside: bool = False, columns: str | None = None) -> Source:
    """The rows of a source, each with its place and either its content or the reason why it cannot be used.

    A row with a path that leaves the source's folder is refused unless `allow_outside`. `columns` says what the columns
    of a table, or the keys of a manifest, mean (see `columns.parse_columns`). Raises DataError for a source that is
    missing, of an unknown kind, ambiguous or without rows, ConfigError for columns that do not fit.
    """
    if str(path).startswith(HUB_PREFIX):
        return _plain(read_hub(str(path), read_source, columns=columns))
    path = Path(path)
    check_source(path)
    read = _read_folder if path.is_dir() else _read_file
    return _plain(read(path, allow_outside, columns))


def _plain(source: Source) -> Source:
    """The source with its texts as words: see `plain_row`."""
    return replace(source, rows=[_plain_row(row) for row in source])


def _plain_row(row: SourceRow) -> SourceRow:
    if isinstance(row.content, RowError):
        return row
    try:
        return replace(row, content=plain_row(row.content))
    except RowError as error:
        return replace(row, content=error)


def _read_folder(folder: Path, allow_outside: bool, columns: str | None) -> Source:
    if (folder / INDEX_NAME).is_file():
        raise DataError(f"{folder} is a code store, which is prepared already: name the recordings it was made from")
    if all((folder / name).is_file() for name in KALDI):
        return _without_columns(read_kaldi(folder, allow_outside=allow_outside), columns)
    found = [folder / name for name in _USUAL if (folder / name).is_file()]
    metadata = folder / "metadata.json"
    if metadata.is_file() and is_trainer_json(load_json(metadata)):
        found.append(metadata)
    if not found and not has_transcripts(folder):  # next to texts, another table holds something else
        names = {nfc(path.stem).casefold() for path in folder.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES}
        found = [path for path in sorted(folder.iterdir()) if _lists_clips(path, names, allow_outside)]
    for path in found:
        path_within(folder, path.name, allow_outside)  # it may be a link
    if len(found) > 1:
        shown = " and ".join(path.name for path in found[:_SHOWN])
        raise DataError(f"{folder} has {shown}: name the one to read instead of the folder")
    if found:
        return _read_file(found[0], allow_outside, columns)
    inside = [path for path in sorted(folder.glob("*/metadata.*")) if path.name in _USUAL]
    for path in inside:
        path_within(folder, path.relative_to(folder).as_posix(), allow_outside)
    if len({path.parent for path in inside}) < len(inside):
        raise DataError(f"{inside[0].parent} has two lists of its clips: name the one to read instead of the folder")
    if inside and all(path.parent.name.lower() in _SPLITS for path in inside):
        return _read_splits(folder, inside, allow_outside, columns)
    if inside:
        raise DataError(f"there is a {inside[0].name} in {inside[0].parent}: name that folder")
    if not has_audio(folder, allow_outside=allow_outside):
        if files := sorted(folder.rglob(f"*{_PARQUET}")):
            for path in files:
                path_within(folder, path.relative_to(folder).as_posix(), allow_outside)
            return read_parquet(folder, files, columns=columns)
        raise unknown_kind(folder, _seen(folder))
    return _without_columns(read_folder(folder, allow_outside=allow_outside), columns)


def _lists_clips(path: Path, recordings: set[str], allow_outside: bool) -> bool:
    """Whether a file is a table or a manifest of clips, and not the text of one of the recordings beside it."""
    suffix = path.suffix.lower()
    may_be = suffix in (*_JSON_LINES, *_TABLES, ".json") and (suffix != ".txt" or _LISTS.fullmatch(path.name))
    if not may_be or path.name.startswith(".") or not path.is_file():
        return False
    path_within(path.parent, path.name, allow_outside)  # it may be a link
    if suffix == ".json":
        return nfc(path.stem).casefold() not in recordings and is_record_list(path)
    return suffix in _JSON_LINES or looks_like_table(path)


def _read_file(path: Path, allow_outside: bool, columns: str | None) -> Source:
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES:
        return read_records(path, allow_outside=allow_outside, columns=columns)
    if suffix in _TABLES:
        return read_table(path, allow_outside=allow_outside, columns=columns)
    if suffix == ".json":
        return _read_json(path, allow_outside, columns)
    if suffix == _PARQUET:
        return read_parquet(path, [path], columns=columns)
    raise unknown_kind(path)


def _read_json(path: Path, allow_outside: bool, columns: str | None) -> Source:
    try:
        data = load_json(path)
    except DataError as error:
        if "Extra data" not in str(error):  # JSON lines under another name
            raise
        return read_records(path, allow_outside=allow_outside, columns=columns)
    if is_trainer_json(data):
        rows = list(read_trainer_json(path, data, allow_outside=allow_outside))
        return _without_columns(Source(rows, f"{path.name}, a list of samples or conversations"), columns)
    if isinstance(data, dict) and isinstance(data.get("segments"), list):
        raise DataError(f"{path} has the segments of one recording: put it beside {path.stem}.wav and name the folder")
    if isinstance(data, dict) and len(lists := [value for value in data.values() if _are_objects(value)]) == 1:
        [data] = lists
    if isinstance(data, dict) and by_name(list(data), columns, messages=True) is not None:
        data = [data]
    if _are_objects(data):
        records = [(f"{path.name}[{number}]", record) for number, record in enumerate(data)]
        return records_source(path, records, allow_outside=allow_outside, columns=columns)
    raise unknown_kind(path)


def _are_objects(data: Any) -> bool:
    """Whether decoded JSON is a list of objects, some of which may be the RowError of an object."""
    kinds = {type(item) for item in data} if isinstance(data, list) else set()
    return bool(kinds) and kinds <= {dict, RowError}


def _read_splits(folder: Path, files: list[Path], allow_outside: bool, columns: str | None) -> Source:
    """The rows of a folder per split, as `datasets` writes them. Ids and places name the split."""
    sources = {path.parent.name: _read_file(path, allow_outside, columns) for path in files}
    rows = [
        replace(_in_split(row, split), location=f"{split}/{row.location}")
        for split, source in sources.items()
        for row in source
    ]

    def notes() -> Iterator[str]:
        for split, source in sources.items():
            yield from (f"{split}: {note}" for note in source.notes())
        names = (path.relative_to(folder).parts[0] for path, _ in audio_files(folder, allow_outside))
        if others := sum(name not in sources for name in names):
            yield f"recordings outside of these splits: {others}"
        yield f"names of splits ({', '.join(sources)}): recordings are held out by their hash"

    return Source(rows, f"a folder per split ({', '.join(sources)}): {next(iter(sources.values())).read_as}", notes)


def _in_split(row: SourceRow, split: str) -> SourceRow:
    if row.id is None:
        return row
    named = f"{split}/{row.id}"
    content = row.content if isinstance(row.content, RowError) else row.content.model_copy(update={"id": named})
    return replace(row, id=named, content=content)


def _without_columns(source: Source, columns: str | None) -> Source:
    if columns is not None:
        raise ConfigError(f"--columns {columns} has no effect: the source is {source.read_as}")
    return source


def _seen(folder: Path) -> str:
    """What lies in a folder that is not a source, by the ends of its files' names."""
    ends = Counter(
        "".join(Path(name).suffixes[-2:]).lower() or name
        for _root, _folders, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    )
    found = ", ".join(f"{count} files *{end}" for end, count in ends.most_common(_SHOWN))
    foreign = any(end.endswith(FOREIGN_SUFFIXES) for end in ends)
    return (found or "no file") + (
        ", whose format is not read: convert them, as by ffmpeg -i IN.wma -vn OUT.flac" if foreign else ""
    )
