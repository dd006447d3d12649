"""Clips to codes, once each: from the store, from an interrupted preparation, or by the codec."""

import hashlib
from pathlib import Path

import numpy as np

from higgstune.codec.base import Codec
from higgstune.data.audio import resample
from higgstune.data.check import Candidate
from higgstune.data.clips import MIN_FRAMES, Clip
from higgstune.data.journal import CodeJournal
from higgstune.data.rejection import RowError
from higgstune.data.schema import PARTIAL_NAME
from higgstune.data.store import CodeStore
from higgstune.errors import CheckpointError


class Encoder:
    """Codes by audio hash. `encoded` and `reused` count clips."""

    def __init__(self, codec: Codec, journal: CodeJournal, store: CodeStore | None) -> None:
        self.encoded = 0
        self.reused = 0
        self._codec = codec
        self._journal = journal
        self._store = store
        self._stored = {} if store is None else _stored_clips(store)
        self._seen: set[str] = set()

    def encode(self, candidate: Candidate) -> Candidate:
        """Make sure that every clip of a row has codes. Raises RowError where a clip turns out unusable."""
        for clip in candidate.clips:
            if clip.sha256 not in self._journal and clip.sha256 not in self._stored:
                self._journal.append(clip.sha256, encode_clip(self._codec, clip))
                self.encoded += 1
            elif clip.sha256 not in self._seen:
                self.reused += 1
            self._seen.add(clip.sha256)
            frames = self.frames(clip.sha256)
            if frames < MIN_FRAMES:
                raise RowError("too_short", f"{clip.path}: {frames} frames; at least {MIN_FRAMES} are needed")
        return candidate

    def codes(self, sha256: str) -> np.ndarray:
        """The codes of a clip, [frames, num_codebooks] uint16."""
        if sha256 in self._journal:
            return self._journal.read(sha256)
        assert self._store is not None
        index, column, number = self._stored[sha256]
        cell = self._store.cells(index, column)
        return cell if number is None else cell[number]

    def frames(self, sha256: str) -> int:
        """Frames of a clip."""
        return self._journal.frames(sha256) if sha256 in self._journal else len(self.codes(sha256))


def encode_clip(codec: Codec, clip: Clip) -> np.ndarray:
    """A clip's codes, [frames, num_codebooks] uint16. Raises CheckpointError for an answer that is none."""
    waveform, rate = clip.read()
    waveform = np.clip(resample(waveform, rate, codec.sample_rate), -1.0, 1.0)
    codes = np.asarray(codec.encode(waveform))
    is_table = codes.ndim == 2 and codes.shape[1] == codec.num_codebooks
    if not is_table or not np.issubdtype(codes.dtype, np.integer):
        raise CheckpointError(f"the codec gave codes of shape {codes.shape} and type {codes.dtype} for {clip.path}")
    if codes.size and not 0 <= codes.min() <= codes.max() < codec.codebook_size:
        raise CheckpointError(f"the codec gave codes outside of 0 to {codec.codebook_size - 1} for {clip.path}")
    return codes.astype(np.uint16)


def journal_path(folder: Path, codec: Codec) -> Path:
    """Where the codes of an unfinished preparation with this codec are."""
    name = hashlib.sha256(f"{codec.revision}\n{codec.num_codebooks}".encode()).hexdigest()[:16]
    return folder / PARTIAL_NAME / f"codes-{name}.bin"


def _stored_clips(store: CodeStore) -> dict[str, tuple[int, str, int | None]]:
    """Where the codes of every clip of a store are: row, column, place in a list."""
    places: dict[str, tuple[int, str, int | None]] = {}
    columns = [store.light[name].to_pylist() for name in ("context_sha256", "reference_sha256", "audio_sha256")]
    for index, (context, reference, audio) in enumerate(zip(*columns, strict=True)):
        places.update({sha256: (index, "context_codes", number) for number, sha256 in enumerate(context)})
        if reference is not None:
            places[reference] = (index, "reference_codes", None)
        places[audio] = (index, "codes", None)
    return places
