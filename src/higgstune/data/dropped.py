"""Rows that leave a store, by a person's list, and rows that stay although their source has changed."""

import hashlib
from collections.abc import Container, Iterable
from pathlib import Path

import numpy as np

from higgstune.data.entry import Entry
from higgstune.data.merge import Merger, Pairing
from higgstune.data.rejection import RowError, some_ids
from higgstune.data.shard_reader import DroppedRow, StoreInfo
from higgstune.data.whisper_features import FOLDER
from higgstune.errors import DataError


class DroppedRows:
    """Rows that were taken out of a store: a source does not bring them back before they are restored."""

    def __init__(self, rows: Iterable[DroppedRow]) -> None:
        self.rows = list(rows)
        self._by_audio: dict[str, list[DroppedRow]] = {}
        self._index()

    def _index(self) -> None:
        self._by_audio.clear()
        for row in self.rows:
            self._by_audio.setdefault(row.audio_sha256, []).append(row)

    def take_out(self, entries: list[Entry], ids: Iterable[str]) -> list[Entry]:
        """The rows that are left without those of these ids, which are recorded; ids recorded before are left alone.

        Raises DataError for an unknown id, and where a row that is left has the clip of one that is not in its prompt.
        """
        unwanted = set(ids)
        known = {entry.id for entry in entries} | {row.id for row in self.rows}
        if unknown := sorted(unwanted - known):
            raise DataError(f"ids to drop that no row has: {some_ids(unknown)}; nothing was dropped")
        left = [entry for entry in entries if entry.id not in unwanted]
        gone = {entry.audio_sha256 for entry in entries if entry.id in unwanted}
        gone -= {entry.audio_sha256 for entry in left}
        if users := [entry.id for entry in left if gone & {entry.reference_sha256, *entry.context_sha256}]:
            raise DataError(
                f"rows with a clip to drop as their reference or in their conversation: {some_ids(users)}; drop them, "
                "too (nothing was dropped)"
            )
        self.rows += [
            DroppedRow(entry.id, entry.audio_sha256, _text_hash(entry), entry.source_key)
            for entry in entries
            if entry.id in unwanted
        ]
        self._index()
        return left

    def restore(self, ids: Iterable[str]) -> None:
        """Let the rows of these ids come back with their source. Raises DataError for an id that was not dropped."""
        wanted = set(ids)
        if unknown := sorted(wanted - {row.id for row in self.rows}):
            raise DataError(f"ids to restore that no dropped row has: {some_ids(unknown)}; nothing was restored")
        self.rows = [row for row in self.rows if row.id not in wanted]
        self._index()

    def has(self, audio_sha256: str) -> bool:
        """Whether a dropped row has this clip."""
        return audio_sha256 in self._by_audio

    def clips_without_use(self, entries: Iterable[Entry]) -> set[str]:
        """The audio hashes of dropped clips that none of these rows has."""
        return set(self._by_audio) - {entry.audio_sha256 for entry in entries}

    def check(self, entry: Entry, stored_audio: Container[str]) -> None:
        """Raise RowError for a dropped row, by its audio with its id, place or text; and for one that has the clip of
        a dropped row in its prompt.
        """
        for row in self._by_audio.get(entry.audio_sha256, ()):
            if row.id == entry.id or row.source_key == entry.source_key or row.text_sha256 == _text_hash(entry):
                raise RowError(
                    "dropped", f"it was dropped as {row.id!r}: to add it again, prepare with this id in --restore"
                )
        for sha256 in (entry.reference_sha256, *entry.context_sha256):
            if sha256 in self._by_audio and sha256 not in stored_audio:
                row_id = self._by_audio[sha256][0].id
                raise RowError("dropped", f"the clip of the dropped row {row_id!r} is its reference or in its messages")


class StoredCodec:
    """The codec of a store to which no clip is added: its numbers, and nothing that encodes."""

    def __init__(self, info: StoreInfo) -> None:
        self.sample_rate = info.sample_rate
        self.frame_rate = info.frame_rate
        self.num_codebooks = info.num_codebooks
        self.codebook_size = info.codebook_size
        self.revision = info.codec_revision
        self.reference_seconds = 0.0

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Never called: every clip of a store is encoded."""
        raise AssertionError(f"{len(waveform)} samples to encode without a codec")

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Never called: a preparation decodes nothing."""
        raise AssertionError(f"{len(codes)} frames to decode without a codec")


def rows_not_in_source(merger: Merger, stale: list[str]) -> list[str]:
    """The ids of rows that this run neither wrote nor refused."""
    known = {entry.id for entry in merger.accepted} | set(stale)
    return [entry.id for entry in merger.entries if entry.id not in known]


def warn_of_pairs(pairing: Pairing, out: Path) -> list[str]:
    """What a change of pairs needs, where Whisper encodes the references."""
    if not pairing.paired or not (out / FOLDER).exists():
        return []
    return ["rows have new references, some without Whisper features: prepare their source again with --whisper"]


def warn_of_stale(stale: list[str], out: Path) -> list[str]:
    """What to do about rows that stay with their old text."""
    if not stale:
        return []
    return [
        f"rows of the store that are refused in this source now, and stay with their old text: {some_ids(stale)}; "
        "mend them in the source, or take them out: write their ids into a file, one a line, and run higgstune prepare "
        f"--drop FILE --out {out}"
    ]


def _text_hash(entry: Entry) -> str:
    return hashlib.sha256(entry.text.encode()).hexdigest()
