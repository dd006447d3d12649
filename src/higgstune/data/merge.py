"""Merges new rows into those of a store, and pairs rows with references."""

import hashlib
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from higgstune.data.entry import Entry
from higgstune.data.origin import ORIGIN
from higgstune.data.rejection import RowError
from higgstune.data.splits import RecordingGroups


class Merger:
    """Adds rows one by one, each as a new row or as an update of a stored one. Other stored rows stay."""

    def __init__(self, stored: Iterable[Entry], groups: RecordingGroups) -> None:
        self.entries = list(stored)
        self.added = 0
        self.updated = 0
        self._groups = groups
        self._is_new: set[int] = set()  # indices of the rows that this run has written
        self._by_key = {entry.source_key: n for n, entry in enumerate(self.entries)}
        self._by_id = {entry.id: n for n, entry in enumerate(self.entries)}
        self._by_content = {entry.content: n for n, entry in enumerate(self.entries)}

    @property
    def accepted(self) -> list[Entry]:
        """The rows added or updated in this run."""
        return [self.entries[index] for index in sorted(self._is_new)]

    def has_content(self, entry: Entry) -> bool:
        """Whether a row has the same texts and the same audio."""
        return entry.content in self._by_content

    def add(self, entry: Entry, fallback_ids: list[str]) -> None:
        """Add a row, or update the stored row that it replaces; a row without an id gets the first free fallback.

        Raises RowError for a duplicate, an id that another recording has, or recordings that would link the two
        splits.
        """
        index = self._find(entry, entry.id or fallback_ids[0])
        self._check_content(entry, index)
        if not entry.id:
            entry.id = self._free_id(fallback_ids) if index is None else self.entries[index].id
        if self._by_id.get(entry.id, index) != index:
            raise RowError("duplicate_id", f"the id {entry.id!r} is taken by another row: give each row its own")
        if not self._groups.join(entry):
            raise RowError(
                "split_conflict",
                "it links a recording in the training split with one held out for validation: prepare these "
                "recordings together into a new folder",
            )
        self._put(entry, index)

    def _find(self, entry: Entry, row_id: str) -> int | None:
        """The index of the stored row that this one replaces.

        It has the same content (where this one has no id), the same place in the source, or the same id and audio.
        """
        same_content = None if entry.id else self._by_content.get(entry.content)
        indices = [same_content, self._by_key.get(entry.source_key)]
        same_id = self._by_id.get(row_id)
        if same_id is not None and self.entries[same_id].audio_sha256 == entry.audio_sha256:
            indices.append(same_id)
        return next((index for index in indices if index is not None and index not in self._is_new), None)

    def _check_content(self, entry: Entry, index: int | None) -> None:
        same = self._by_content.get(entry.content, index)
        if same is not None and same != index:
            raise RowError("duplicate", f"its recording and text are those of the row {self.entries[same].id!r}")

    def _put(self, entry: Entry, index: int | None) -> None:
        if index is None:
            index = len(self.entries)
            self.entries.append(entry)
            self.added += 1
        else:
            old = self.entries[index]
            self.updated += _contents(old) != _contents(entry)
            for known, key in ((self._by_key, old.source_key), (self._by_id, old.id)):
                known.pop(key, None)
            self._by_content.pop(old.content, None)
            self.entries[index] = entry
        self._is_new.add(index)
        self._by_key[entry.source_key] = index
        self._by_id[entry.id] = index
        self._by_content[entry.content] = index

    def _free_id(self, names: list[str]) -> str:
        for name in names:
            if name not in self._by_id:
                return name
        return next(name for n in range(2, len(self._by_id) + 3) if (name := f"{names[-1]}#{n}") not in self._by_id)


@dataclass(frozen=True)
class Pairing:
    """The outcome of pairing, over the whole store."""

    paired: int = 0  # rows with another clip of the same speaker
    explicit: int = 0  # rows with a reference of their own
    one_clip_speakers: int = 0  # speakers with a single clip in a split: nothing to pair it with
    without_speaker: int = 0  # rows that name no speaker, and so have no pair


def resolve_references(entries: list[Entry], mode: str, seed: int, shortest: float = 0.0) -> Pairing:
    """Set `reference_id` of every row: to an explicit reference that is a row itself, or with `same_speaker` to a pair.

    A pair is another clip, with another text, of the same speaker in the same split; of another recording where there
    is one, and of at least `shortest` seconds. The same rows, seed and mode give the same pairs.
    """
    by_audio = {entry.audio_sha256: entry.id for entry in reversed(entries)}
    explicit = 0
    for entry in entries:
        entry.reference_id = None
        if entry.reference_sha256 is not None:
            entry.reference_id = by_audio.get(entry.reference_sha256)
            explicit += 1
    if mode == "none":
        return Pairing(explicit=explicit)
    open_rows = [entry for entry in entries if entry.reference_sha256 is None and entry.messages is None]
    voices: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.speaker is not None and entry.messages is None and entry.duration >= shortest:
            voices[entry.speaker, str(entry.split)].append(entry)
    pools = {voice: _Pool(rows, seed) for voice, rows in voices.items()}
    alone = set()
    for entry in open_rows:
        if entry.speaker is not None:
            voice = entry.speaker, str(entry.split)
            other = pools[voice].pick(entry) if voice in pools else None
            entry.reference_id = other.id if other else None
            if other is None:
                alone.add(voice)
    return Pairing(
        paired=sum(entry.reference_id is not None for entry in open_rows),
        explicit=explicit,
        one_clip_speakers=len(alone),
        without_speaker=sum(entry.speaker is None for entry in open_rows),
    )


class _Pool:
    """The clips of one speaker in one split, sorted by recording, so that one recording can be skipped."""

    def __init__(self, rows: list[Entry], seed: int) -> None:
        self._rows = sorted(rows, key=lambda row: (row.recording_sha256, row.id))
        self._recordings = [row.recording_sha256 for row in self._rows]
        self._seed = seed

    def pick(self, entry: Entry) -> Entry | None:
        """Another clip for a row, drawn by the row's id; None where there is none."""
        first = bisect_left(self._recordings, entry.recording_sha256)
        last = bisect_right(self._recordings, entry.recording_sha256)
        others = len(self._rows) - (last - first)
        return self._draw(entry, others, lambda n: n if n < first else n + last - first) or self._draw(
            entry, last - first, lambda n: n + first
        )

    def _draw(self, entry: Entry, count: int, index_of: Callable[[int], int]) -> Entry | None:
        """The first of `count` clips that fits, starting at a seeded one."""
        digest = hashlib.sha256(f"{self._seed}\n{entry.id}".encode()).hexdigest()
        for step in range(count):
            other = self._rows[index_of((int(digest[:15], 16) + step) % count)]
            if other.audio_sha256 != entry.audio_sha256 and other.text != entry.text:
                return other
        return None


def _contents(entry: Entry) -> tuple[object, ...]:
    labels = ("id", "speaker", "language", "scene", "reference_text", *ORIGIN)
    return (entry.content, *(getattr(entry, label) for label in labels))
