"""Which clip a row hears as its reference voice."""

import hashlib
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from higgstune.data.entry import Entry


@dataclass(frozen=True)
class Pairing:
    """What pairing did, over the whole store."""

    paired: int = 0  # rows with another clip of the same speaker
    explicit: int = 0  # rows with a reference of their own
    one_clip_speakers: int = 0  # speakers of one split with nothing to pair with
    without_speaker: int = 0  # rows that could not be paired for want of a name


def resolve_references(entries: list[Entry], mode: str, seed: int) -> Pairing:
    """Set `reference_id` of every row: explicit references that are rows, and with `same_speaker` pairs.

    A pair is another clip, with another text, of the same speaker in the same split; of another recording
    where there is one. The same rows, seed and mode give the same pairs.
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
        if entry.speaker is not None and entry.messages is None:
            voices[entry.speaker, str(entry.split)].append(entry)
    pools = {voice: _Pool(rows, seed) for voice, rows in voices.items()}
    alone = set()
    for entry in open_rows:
        if entry.speaker is not None:
            voice = entry.speaker, str(entry.split)
            other = pools[voice].pick(entry)
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
        """Another clip for a row, drawn by its id; None where there is none."""
        first = bisect_left(self._recordings, entry.recording_sha256)
        last = bisect_right(self._recordings, entry.recording_sha256)
        others = len(self._rows) - (last - first)
        return self._draw(entry, others, lambda n: n if n < first else n + last - first) or self._draw(
            entry, last - first, lambda n: n + first
        )

    def _draw(self, entry: Entry, count: int, place: Callable[[int], int]) -> Entry | None:
        """The first fitting one of `count` clips, beginning at a seeded place."""
        digest = hashlib.sha256(f"{self._seed}\n{entry.id}".encode()).hexdigest()
        for step in range(count):
            other = self._rows[place((int(digest[:15], 16) + step) % count)]
            if other.audio_sha256 != entry.audio_sha256 and other.text != entry.text:
                return other
        return None
