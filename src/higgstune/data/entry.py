"""A row of a store that is being built: every column but the codes, and the split."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from higgstune.data.audio import Recording
from higgstune.data.clips import Candidate
from higgstune.data.manifest import Utterance
from higgstune.data.measures import Measures
from higgstune.data.messages import Message
from higgstune.data.rejection import RowError
from higgstune.data.source import SourceRow
from higgstune.data.store import CodeStore
from higgstune.data.text import spoken_length

# Stores keep the names of their columns, so that old ones can be read: this field has another one.
_FIELD_OF_COLUMN = {"linked_recordings": "context_recordings"}
_MEASURES = tuple(field.name for field in fields(Measures))  # columns, and null in rows of a store without them


@dataclass
class Entry:
    """One row. Its fields are columns of `shard_reader.store_schema`, but for the split, which is in a shard's name."""

    id: str
    text: str
    speaker: str | None
    language: str | None
    scene: str | None
    duration: float  # seconds
    reference_id: str | None
    reference_text: str | None
    messages: list[Message] | None
    start_index: int | None
    audio_sha256: str
    recording_sha256: str
    reference_sha256: str | None
    context_sha256: list[str]
    target_recordings: list[str]
    context_recordings: list[str]
    recording_samples: int
    recording_rate: int
    recording_sketch: list[float]
    source_key: str
    measures: Measures | None = None  # of the target; None where an earlier version stored the row
    frames: int = 0
    context_frames: int = 0
    split: str | None = None
    source: str | None = None
    licence: str | None = None
    consent: str | None = None

    @property
    def recording(self) -> Recording:
        """The file that the target was cut from, with what a search for near-duplicates needs."""
        sketch = tuple(self.recording_sketch)
        return Recording(self.recording_sha256, self.recording_samples, self.recording_rate, 1.0, sketch)

    @property
    def content(self) -> tuple[Any, ...]:
        """Equal for rows that have the same texts and the same audio."""
        parts = [
            (message["role"], [(part.get("text"), part.get("as")) for part in message["content"]])
            for message in self.messages or []
        ]
        written = json.dumps(parts) if parts else ""
        return (self.audio_sha256, self.text, self.reference_sha256, *self.context_sha256, written)

    @property
    def characters_per_second(self) -> float | None:
        """Spoken characters of the text a second of the clip; None where only sound tags are spoken."""
        return round(length / self.duration, 2) if (length := spoken_length(self.text)) else None

    def column(self, name: str) -> Any:
        """The value for a column of a store, by the column's name."""
        if name in _MEASURES:
            return None if self.measures is None else getattr(self.measures, name)
        return getattr(self, _FIELD_OF_COLUMN.get(name, name))


def stored_entries(store: CodeStore) -> list[Entry]:
    """The rows of a store as they are, in order."""
    names = {field.name for field in fields(Entry)}
    splits = [shard.split for shard in store.shards for _ in range(shard.rows)]
    return [
        Entry(
            **{name: value for name, value in _fields_of(row) if name in names},
            measures=stored_measures(row),
            split=split,
        )
        for row, split in zip(store.metadata.to_pylist(), splits, strict=True)
    ]


def _fields_of(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((_FIELD_OF_COLUMN.get(column, column), value) for column, value in row.items())


def stored_measures(row: dict[str, Any]) -> Measures | None:
    """The measures of a stored row; None for one without some of them."""
    missing = any(row.get(name) is None for name in _MEASURES)
    return None if missing else Measures(**{name: row[name] for name in _MEASURES})


def new_entry(candidate: Candidate, source_key: str) -> Entry:
    """A checked row as it will be stored; its id and split are the given ones or none, frames are set later."""
    utterance, target, reference = candidate.utterance, candidate.target, candidate.reference
    context = list(zip(candidate.context, candidate.context_is_target, strict=True))
    context_only = [clip.recording.sha256 for clip, is_target in context if not is_target]
    targets = [clip.recording.sha256 for clip, is_target in context if is_target]
    return Entry(
        id=utterance.id or "",
        text=candidate.text,
        speaker=utterance.speaker or None,
        language=utterance.language or None,
        scene=None if utterance.scene is None else utterance.scene.strip(),  # "": a prompt without a scene
        duration=target.seconds,
        reference_id=None,
        reference_text=candidate.reference_text,
        messages=candidate.messages,
        start_index=utterance.start_index,
        audio_sha256=target.sha256,
        recording_sha256=target.recording.sha256,
        reference_sha256=reference.sha256 if reference else None,
        context_sha256=[clip.sha256 for clip, _ in context],
        target_recordings=_unique([target.recording.sha256, *targets]),
        split=None if utterance.held_out is None else "validation" if utterance.held_out else "train",
        context_recordings=_unique([*context_only, *([reference.recording.sha256] if reference else [])]),
        recording_samples=target.recording.samples,
        recording_rate=target.recording.rate,
        recording_sketch=list(target.recording.sketch),
        source_key=source_key,
        measures=target.measures,
        source=utterance.source or None,
        licence=utterance.licence or None,
        consent=utterance.consent or None,
    )


class SourceKeys:
    """Names for the rows of a run; equal ones are counted."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._folders: dict[Path, Path] = {}  # resolved

    def of(self, row: SourceRow, utterance: Utterance) -> str:
        """A name for a row that stays the same when its source grows or its text is corrected.

        It is hashed, so that a store that is passed on reveals nothing about the folders it was made in.
        """
        if utterance.id:
            name = f"id {utterance.id}"
        elif utterance.audio:
            name = f"audio {utterance.audio} {utterance.start} {utterance.end}"
        else:  # not its number: rows move when others are inserted before them
            name = f"conversation {json.dumps(utterance.messages)}"
        if row.folder not in self._folders:
            self._folders[row.folder] = row.folder.resolve()
        name = f"{self._folders[row.folder]}\n{name}"
        self._seen[name] += 1
        return hashlib.sha256(f"{name}\n{self._seen[name]}".encode(errors="replace")).hexdigest()[:32]


def refused_key(row: SourceRow) -> str | None:
    """The key that a refused row had while it could be used; None where its place is not known."""
    if not isinstance(row.content, RowError):
        return SourceKeys().of(row, row.content)
    if not (row.audio or row.id):
        return None
    return SourceKeys().of(row, Utterance(id=row.id or None, audio=row.audio or row.id, text=""))


def fallback_ids(utterance: Utterance, location: str) -> list[str]:
    """Ids for a row without one, the shortest first: the file's name, with its segment, with its folder."""
    if utterance.audio is None:
        return [location]
    path = Path(utterance.audio)
    segment = "" if utterance.start is None and utterance.end is None else _segment(utterance)
    return [path.stem + segment, path.with_suffix("").as_posix() + segment, path.as_posix() + segment]


def _segment(utterance: Utterance) -> str:
    end = "" if utterance.end is None else f"{utterance.end:.3f}"
    return f"@{utterance.start or 0.0:.3f}-{end}"


def _unique(items: list[str]) -> list[str]:
    return list(dict.fromkeys(items))
