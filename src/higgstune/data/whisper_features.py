"""Whisper features of the clips of a store: encoded once, stored beside the codes, found by the clip's audio hash.

    STORE/whisper/REVISION/index.json                the encoder, and the files with their checksums
    STORE/whisper/REVISION/features-*.safetensors    HASH: [positions, d_model] float16, HASH.chunks: [chunks] int32

A file is written whole under a temporary name; an interrupted preparation resumes after the last one. One second of
audio takes 64 kB for a d_model of 1280.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from higgstune.codec.base import WhisperFeatures
from higgstune.data.audio import resample
from higgstune.data.clips import Clip
from higgstune.data.shard_reader import CheckedFile
from higgstune.errors import DataError, WorkError
from higgstune.files import refusal, write_file, writing

FOLDER = "whisper"
_INDEX = "index.json"
_READING = Lock()  # loaders read in threads of their own, and a file has one position
_TEMPORARY = "features.tmp"
_CLIPS_PER_FILE = 256
_MAX_INDEX = 1 << 28  # bytes: the index of a million clips has 70 million
_FILE_NAME = re.compile(r"features-[0-9a-f]{12}\.safetensors")
_HASH = re.compile(r"[0-9a-f]{64}")


class WhisperEncoder(Protocol):
    """A Whisper encoder, such as `codec.whisper_encoder.WhisperTower`."""

    checkpoint: str
    revision: str
    sample_rate: int
    d_model: int
    chunk_frames: int

    def encode(self, waveform: np.ndarray) -> WhisperFeatures:
        """[samples] float32 mono at `sample_rate` -> features. Raises DataError for audio that is too short."""
        ...


@dataclass(frozen=True)
class FeatureFile:
    """One file of features."""

    name: str
    bytes: int
    sha256: str
    clips: tuple[str, ...]  # audio hashes


@dataclass(frozen=True)
class FeatureIndex:
    """`index.json`."""

    checkpoint: str
    revision: str
    d_model: int
    chunk_frames: int
    files: tuple[FeatureFile, ...] = ()


class FeatureStore:
    """The stored features of one encoder, read by clip."""

    def __init__(self, folder: Path, index: FeatureIndex) -> None:
        """Use `FeatureStore.open`."""
        self.folder = folder
        self.index = index
        self._places = {sha256: file for file in index.files for sha256 in file.clips}
        self._files: dict[str, _Tensors] = {}

    @classmethod
    def open(cls, store: Path, checkpoint: str, revision: str | None = None) -> "FeatureStore":
        """The features of a Whisper checkpoint, by its name, or by the revision of its encoder where that is given.

        Raises DataError, with the command to run, where the store has none.
        """
        indices = list(_indices(store))
        if revision is None:
            found = [index for index in indices if same_name(index.checkpoint, checkpoint)]
        else:
            found = [index for index in indices if index.revision == revision]
        if not found:
            others = f"; it has those of {', '.join(index.checkpoint for index in indices)}" if indices else ""
            raise DataError(
                f"{store} has no features of {checkpoint}{others}: run `higgstune prepare` again with "
                f"--whisper {checkpoint}, on the same recordings"
            )
        return cls(store / FOLDER / found[-1].revision, found[-1])

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._places

    def read(self, sha256: str) -> WhisperFeatures:
        """The features of a clip. Raises DataError where it was not encoded, or its file is damaged."""
        if sha256 not in self._places:
            raise DataError(f"{self.folder} has no features of the clip {sha256[:16]}: prepare it with --whisper")
        file = self._places[sha256]
        with _READING, self._named_in_errors(file):
            if file.name not in self._files:
                self._files[file.name] = _Tensors(CheckedFile(self.folder / file.name, file.bytes, file.sha256))
            opened = self._files[file.name]
            features, chunks = opened.tensor(sha256), opened.tensor(f"{sha256}.chunks")
        fits = features.shape == (chunks.sum(), self.index.d_model) and chunks.ndim == 1
        if not fits or (features.dtype, chunks.dtype) != (np.float16, np.int32):
            raise DataError(
                f"{self.folder / file.name} has features of the clip {sha256[:16]} that do not match its index: "
                "copy or prepare it again"
            )
        return WhisperFeatures(features, tuple(chunks.tolist()))

    @contextmanager
    def _named_in_errors(self, file: FeatureFile) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            path = self.folder / file.name
            raise DataError(
                f"{path} is missing, or not the file that was written ({error}): copy or prepare it again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, when it is pickled for another process."""
        return self.__dict__ | {"_files": {}}


class JoinedFeatureStore:
    """The stored features of one encoder in several stores."""

    def __init__(self, parts: Sequence[FeatureStore]) -> None:
        """Raises DataError where the features are of several encoders."""
        self.parts = parts
        self.index = parts[0].index
        for part in parts:
            if part.index.revision != self.index.revision:
                raise DataError(
                    f"{part.folder} has features of {part.index.checkpoint} (revision {part.index.revision}), "
                    f"{parts[0].folder} those of the revision {self.index.revision}: prepare both with one --whisper"
                )

    def __contains__(self, sha256: str) -> bool:
        return any(sha256 in part for part in self.parts)

    def read(self, sha256: str) -> WhisperFeatures:
        """As `FeatureStore.read`."""
        return next((part for part in self.parts if sha256 in part), self.parts[0]).read(sha256)


class _Tensors:
    """The tensors of a safetensors file, read without its library, which maps the file: see `shard_reader`."""

    def __init__(self, file: CheckedFile) -> None:
        """Raises OSError, ValueError, KeyError or TypeError for another file."""
        self._file = file
        length = int.from_bytes(file.read(8), "little")
        self._header = json.loads(file.read(length))
        self._start = 8 + length

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of float16 or int32. Raises as `__init__`."""
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        self._file.seek(self._start + begin)
        data = np.frombuffer(self._file.read(end - begin), {"F16": np.float16, "I32": np.int32}[entry["dtype"]])
        return data.reshape(entry["shape"]).copy()  # torch needs a writable one


def read_feature_index(path: Path) -> FeatureIndex:
    """Read `index.json`. Raises DataError where it is damaged, or names anything outside of its folder."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_INDEX)
        written = json.loads(content)
        files = tuple(FeatureFile(**file | {"clips": tuple(file["clips"])}) for file in written.pop("files"))
        index = FeatureIndex(**written, files=files)
        _check_index(index, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): delete its folder and prepare with --whisper again") from error
    return index


def _check_index(index: FeatureIndex, path: Path) -> None:
    """Raise ValueError unless the index is of this folder: its names become paths."""
    if index.revision != path.parent.name:
        raise ValueError(f"the revision {index.revision!r} is not that of its folder")
    if not isinstance(index.checkpoint, str) or not isinstance(index.d_model, int):
        raise ValueError("checkpoint must be a text, d_model a number")
    for file in index.files:
        if not _FILE_NAME.fullmatch(file.name):
            raise ValueError(f"{file.name!r} is not a file of features")
        if not all(map(_HASH.fullmatch, file.clips)):
            raise ValueError(f"{file.name} names a clip by something other than its hash")


def store_features(
    store: Path,
    needed: Iterable[str],
    clips: Mapping[str, Clip],
    encoder: WhisperEncoder,
    progress: Callable[[int], None],
) -> tuple[int, list[str]]:
    """Encode the needed clips that have no features yet -> (clips with features, hashes without a recording).

    `clips` are the available recordings by audio hash; `progress` is called with the number of encoded clips. Raises
    WorkError where the disk refuses; the files written before stay.
    """
    folder = store / FOLDER / encoder.revision
    path = folder / _INDEX
    index = read_feature_index(path) if path.exists() else _empty_index(encoder)
    index = replace(index, checkpoint=portable_name(encoder.checkpoint))
    known = {sha256 for file in index.files for sha256 in file.clips}
    wanted = sorted(set(needed))
    missing = [sha256 for sha256 in wanted if sha256 not in known and sha256 not in clips]
    todo = [clips[sha256] for sha256 in wanted if sha256 not in known and sha256 in clips]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for done, batch in _batches(todo):
            tensors: dict[str, np.ndarray] = {}
            for number, clip in enumerate(batch):
                progress(done + number)
                tensors |= _encode(clip, encoder)
            file = _write(folder, tensors, tuple(clip.sha256 for clip in batch))
            index = replace(index, files=(*index.files, file))
            write_file(path, _to_json(index))
        write_file(path, _to_json(index))
        _take_name(store, index)
        _remove_unnamed(folder, {file.name for file in index.files})
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            (folder / _TEMPORARY).unlink(missing_ok=True)  # on a full disk it would take up room
        raise WorkError(refusal(folder, error, "the features written so far are kept")) from error
    progress(len(todo))
    return len(wanted) - len(missing), missing


def forget_features(store: Path, clips: Collection[str]) -> None:
    """Delete the features of clips by their audio hashes; a file that holds others, too, is written anew.

    Raises DataError for damaged features, WorkError where the disk refuses; run it again then.
    """
    for index in list(_indices(store)):
        features = FeatureStore(store / FOLDER / index.revision, index)
        files = [_without(features, file, clips) for file in index.files]
        if files == list(index.files):
            continue
        left = tuple(file for file in files if file is not None)
        write_file(features.folder / _INDEX, _to_json(replace(index, files=left)))
        _remove_unnamed(features.folder, {file.name for file in left})


def _without(features: FeatureStore, file: FeatureFile, clips: Collection[str]) -> FeatureFile | None:
    """A file of features without those of some clips; None where no other is in it."""
    left = tuple(sha256 for sha256 in file.clips if sha256 not in clips)
    if left == file.clips:
        return file
    tensors: dict[str, np.ndarray] = {}
    for sha256 in left:
        tensors |= _tensors(sha256, features.read(sha256))
    with writing(features.folder, "the store has its new rows, and the old features"):
        return _write(features.folder, tensors, left) if left else None


def portable_name(name: str) -> str:
    """A hub id as it is, a folder as an absolute path."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def same_name(one: str, other: str) -> bool:
    """Whether two names stand for the same checkpoint."""
    return portable_name(one) == portable_name(other)


def _indices(store: Path) -> Iterator[FeatureIndex]:
    for path in sorted((store / FOLDER).glob(f"*/{_INDEX}")):
        yield read_feature_index(path)


def _take_name(store: Path, index: FeatureIndex) -> None:
    """Rename older features under the same name, which come from an earlier checkpoint of that name."""
    for other in _indices(store):
        if other.revision != index.revision and same_name(other.checkpoint, index.checkpoint):
            renamed = replace(other, checkpoint=f"{other.checkpoint} (earlier, {other.revision})")
            write_file(store / FOLDER / other.revision / _INDEX, _to_json(renamed))


def _to_json(index: FeatureIndex) -> str:
    return json.dumps(asdict(index), indent=1, ensure_ascii=False)


def _empty_index(encoder: WhisperEncoder) -> FeatureIndex:
    return FeatureIndex(encoder.checkpoint, encoder.revision, encoder.d_model, encoder.chunk_frames)


def _batches(clips: list[Clip]) -> Iterator[tuple[int, list[Clip]]]:
    for start in range(0, len(clips), _CLIPS_PER_FILE):
        yield start, clips[start : start + _CLIPS_PER_FILE]


def _encode(clip: Clip, encoder: WhisperEncoder) -> dict[str, np.ndarray]:
    waveform, rate = clip.read()
    try:
        features = encoder.encode(resample(waveform, rate, encoder.sample_rate))
    except DataError as error:
        raise DataError(f"{clip.path}: {error}") from error
    return _tensors(clip.sha256, features)


def _tensors(sha256: str, features: WhisperFeatures) -> dict[str, np.ndarray]:
    """The features of a clip as they are stored."""
    return {
        sha256: np.ascontiguousarray(features.features),
        f"{sha256}.chunks": np.array(features.chunks, dtype=np.int32),
    }


def _remove_unnamed(folder: Path, names: set[str]) -> None:
    """Delete files that are in no index, which a killed preparation may leave."""
    for path in folder.iterdir():
        if _FILE_NAME.fullmatch(path.name) and path.name not in names:
            path.unlink()
    (folder / _TEMPORARY).unlink(missing_ok=True)


def _write(folder: Path, tensors: dict[str, np.ndarray], clips: tuple[str, ...]) -> FeatureFile:
    temporary = folder / _TEMPORARY
    save_file(tensors, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # before an index names it
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"features-{checksum[:12]}.safetensors"
    size = temporary.stat().st_size
    os.replace(temporary, folder / name)
    return FeatureFile(name, size, checksum, clips)
