"""A row of a store that is being put together: every column but the codes, and the split."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from higgstune.data.audio import Recording
from higgstune.data.clips import Candidate
from higgstune.data.manifest import Utterance
from higgstune.data.messages import Message
from higgstune.data.source import SourceRow
from higgstune.data.store import CodeStore


@dataclass
class Entry:
    """One row; the names are the columns' (schema.py)."""

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
    linked_recordings: list[str]
    recording_samples: int
    recording_rate: int
    recording_sketch: list[float]
    source_key: str
    frames: int = 0
    context_frames: int = 0
    split: str | None = None

    @property
    def recording(self) -> Recording:
        """The file it was cut from, as far as it matters for twins."""
        sketch = tuple(self.recording_sketch)
        return Recording(self.recording_sha256, self.recording_samples, self.recording_rate, 1.0, sketch)

    @property
    def content(self) -> tuple[Any, ...]:
        """Equal for rows that say the same thing with the same audio."""
        said = [
            (message["role"], [(part.get("text"), part.get("as")) for part in message["content"]])
            for message in self.messages or []
        ]
        return (self.audio_sha256, self.text, self.reference_sha256, *self.context_sha256, json.dumps(said))


def stored_entries(store: CodeStore) -> list[Entry]:
    """The rows of a store as they are, in order."""
    names = {field.name for field in fields(Entry)}
    splits = [shard.split for shard in store.shards for _ in range(shard.rows)]
    return [
        Entry(**{name: value for name, value in row.items() if name in names}, split=split)
        for row, split in zip(store.metadata.to_pylist(), splits, strict=True)
    ]


def new_entry(candidate: Candidate, source_key: str) -> Entry:
    """A checked row as it will be stored; its id is the given one or empty, split and frames are to come."""
    utterance, target, reference = candidate.utterance, candidate.target, candidate.reference
    context = list(zip(candidate.context, candidate.context_is_target, strict=True))
    linked = [clip.recording.sha256 for clip, learnt in context if not learnt]
    return Entry(
        id=utterance.id or "",
        text=candidate.text,
        speaker=utterance.speaker or None,
        language=utterance.language or None,
        scene=None if utterance.scene is None else utterance.scene.strip(),  # "" asks for none at all
        duration=target.seconds,
        reference_id=None,
        reference_text=candidate.reference_text,
        messages=candidate.messages,
        start_index=utterance.start_index,
        audio_sha256=target.sha256,
        recording_sha256=target.recording.sha256,
        reference_sha256=reference.sha256 if reference else None,
        context_sha256=[clip.sha256 for clip, _ in context],
        target_recordings=_unique([target.recording.sha256, *(c.recording.sha256 for c, learnt in context if learnt)]),
        linked_recordings=_unique([*linked, *([reference.recording.sha256] if reference else [])]),
        recording_samples=target.recording.samples,
        recording_rate=target.recording.rate,
        recording_sketch=list(target.recording.sketch),
        source_key=source_key,
    )


def source_key(row: SourceRow, utterance: Utterance, seen: Counter[str]) -> str:
    """A name for a row that stays when its source grows or its text is corrected; `seen` counts equal ones.

    It is hashed, so that a store that is given away tells nothing about the folders it was made in.
    """
    if utterance.id:
        name = f"id {utterance.id}"
    elif utterance.audio:
        name = f"audio {utterance.audio} {utterance.start} {utterance.end}"
    else:  # not its number: rows move when others are put in before them
        name = f"conversation {json.dumps(utterance.messages)}"
    name = f"{row.folder.resolve()}\n{name}"
    seen[name] += 1
    return hashlib.sha256(f"{name}\n{seen[name]}".encode(errors="replace")).hexdigest()[:32]


def fallback_ids(utterance: Utterance, location: str) -> list[str]:
    """Ids for a row without one, the nicest first: the file's name, with its segment, with its folder."""
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
