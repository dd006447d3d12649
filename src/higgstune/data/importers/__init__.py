"""Any kind of source -> rows; the kind follows from the files."""

from collections.abc import Iterator
from pathlib import Path

from higgstune.data.importers.chatml import is_trainer_json, load_json, read_trainer_json
from higgstune.data.importers.folder import has_audio, read_folder
from higgstune.data.importers.table import read_table
from higgstune.data.manifest import Utterance, read_manifest
from higgstune.data.source import SourceRow
from higgstune.errors import DataError
from higgstune.inputs import INDEX_NAME, check_source, unknown_kind

_MANIFESTS = ("manifest.jsonl", "metadata.jsonl")


def read_source(path: str | Path, *, allow_outside: bool = False) -> Iterator[SourceRow]:
    """The rows of a source, each with its place and either its content or the reason why it cannot be used.

    A row with a path that leaves the source's folder is refused unless `allow_outside`. Raises DataError at once for a
    source that is missing, of an unknown kind or ambiguous, and during iteration for one that cannot be read or has no
    rows.
    """
    path = Path(path)
    check_source(path)
    if path.is_dir():
        return _read_folder(path, allow_outside)
    return _read_file(path, allow_outside)


def _read_folder(folder: Path, allow_outside: bool) -> Iterator[SourceRow]:
    if (folder / INDEX_NAME).is_file():
        raise DataError(f"{folder} is a code store, which is prepared already: name the recordings it was made from")
    found = [folder / name for name in (*_MANIFESTS, "metadata.csv") if (folder / name).is_file()]
    metadata = folder / "metadata.json"
    if metadata.is_file() and is_trainer_json(load_json(metadata)):
        found.append(metadata)
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{folder} has {names}: name the one to read instead of the folder")
    if found:
        return _read_file(found[0], allow_outside)
    if not has_audio(folder, allow_outside=allow_outside):
        raise unknown_kind(folder)
    return read_folder(folder, allow_outside=allow_outside)


def _read_file(path: Path, allow_outside: bool) -> Iterator[SourceRow]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _manifest_rows(path, allow_outside)
    if suffix == ".csv":
        return read_table(path, allow_outside=allow_outside)
    if suffix == ".json":
        data = load_json(path)
        if is_trainer_json(data):
            return read_trainer_json(path, data, allow_outside=allow_outside)
    raise unknown_kind(path)


def _manifest_rows(path: Path, allow_outside: bool) -> Iterator[SourceRow]:
    for number, row in read_manifest(path):
        row_id, audio = (row.id, row.audio) if isinstance(row, Utterance) else (None, None)
        yield SourceRow(f"{path.name}:{number}", path.parent, row, row_id, audio, allow_outside)
