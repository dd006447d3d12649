"""The split of each row, training or validation: decided by recording, never by row.

Recordings that are nearly the same (a WAV and its FLAC), or that one row uses as targets, form a group, and a group is
in one split.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from higgstune.data.audio import Recording
from higgstune.data.entry import Entry

TRAIN, VALIDATION = "train", "validation"
# Distance of two sketches, relative to their length. A program that writes float samples as WAV and as FLAC rounds them
# differently (0.0002, measured), a good lossy copy is below 0.3, different recordings are 1.4 apart.
_MAX_DISTANCE = 0.3


def find_near_duplicates(recordings: Iterable[Recording]) -> dict[str, set[str]]:
    """For each recording that has near-duplicates of the same length and rate, the hashes of these."""
    alike: dict[tuple[int, int], dict[str, Recording]] = defaultdict(dict)
    for recording in recordings:
        alike[recording.samples, recording.rate][recording.sha256] = recording
    found: dict[str, set[str]] = defaultdict(set)
    for group in alike.values():
        for one, other in _close_pairs(list(group.values())):
            found[one].add(other)
            found[other].add(one)
    return dict(found)


class RecordingGroups:
    """Groups of recordings that must be in one split, because rows use several of them.

    A recording that is only context, and a target in no row, links nothing: a reference voice may serve both splits.
    """

    def __init__(self, stored: Sequence[Entry], new: Sequence[Entry], context: Iterable[Recording] = ()) -> None:
        """`stored` rows keep their splits, `new` ones are added by `join`; `context` is the context audio of those."""
        self._parents: dict[str, str] = {}
        self._splits: dict[str, str] = {}  # by root
        self._near_duplicates = find_near_duplicates([*(entry.recording for entry in [*stored, *new]), *context])
        self._targets = {sha256 for entry in stored for sha256 in entry.target_recordings}
        self._used_by: dict[str, list[str]] = defaultdict(list)  # by context recording: recordings of stored rows
        for entry in stored:
            self._join(entry.target_recordings, entry.split)
        for entry in stored:  # once every split is known: the context of one row must not move the target of another
            self._join(self._linked(entry))
            for sha256 in entry.context_recordings:
                self._used_by[sha256].append(entry.recording_sha256)
        self._targets |= {sha256 for entry in new for sha256 in entry.target_recordings}

    def join(self, entry: Entry) -> bool:
        """Link the recordings of a new row; False, without any change, where that would link the two splits."""
        linked = self._linked(entry)
        return self._join(linked, entry.split) or self._join(linked)  # what is stored stays in its split

    def decide(self, entries: list[Entry], fraction: float) -> None:
        """Set the split of every row; a group without one gets it by the group's hash, so the order does not matter.

        About `fraction` of the groups is held out; with a fraction above 0 at least one as soon as there are two, and
        never all of them.
        """
        rows: dict[str, int] = defaultdict(int)
        for entry in entries:
            rows[self._root(entry.recording_sha256)] += 1
        names = self._group_names(rows)
        open_roots = sorted((root for root in rows if root not in self._splits), key=lambda root: names[root])
        for root in open_roots:
            is_large = rows[root] * 2 > len(entries)  # most of the data must never be held out
            self._splits[root] = VALIDATION if _uniform(names[root]) < fraction and not is_large else TRAIN
        self._fill_empty_splits(open_roots, rows, fraction)
        for entry in entries:
            entry.split = self._splits[self._root(entry.recording_sha256)]

    def _fill_empty_splits(self, open_roots: list[str], rows: dict[str, int], fraction: float) -> None:
        present = {self._splits[root] for root in rows}
        if VALIDATION not in present and fraction > 0 and len(rows) > 1 and open_roots:
            moved = min(open_roots, key=lambda root: rows[root] * 2 > sum(rows.values()))
            self._splits[moved] = VALIDATION
        if TRAIN not in present and open_roots:
            self._splits[open_roots[-1]] = TRAIN

    def _group_names(self, rows: Iterable[str]) -> dict[str, str]:
        members: dict[str, list[str]] = defaultdict(list)
        for sha256 in self._parents:
            members[self._root(sha256)].append(sha256)
        # A hash over all members: the smallest of their hashes would be smaller, and held out more often, the larger
        # the group is.
        return {
            root: root
            if len(members[root]) < 2
            else hashlib.sha256("".join(sorted(members[root])).encode()).hexdigest()
            for root in rows
        }

    def _linked(self, entry: Entry) -> list[str]:
        """Recordings that must share the split of a row: its targets, and context that is a target of another row."""
        context = [sha for one in entry.context_recordings for sha in (one, *self._near_duplicates.get(one, ()))]
        targets = [sha for one in entry.target_recordings for sha in (one, *self._near_duplicates.get(one, ()))]
        users = [user for sha256 in targets for user in self._used_by.get(sha256, ())]
        return [*targets, *users, *(sha256 for sha256 in context if sha256 in self._targets)]

    def _join(self, recordings: list[str], split: str | None = None) -> bool:
        roots = {self._root(sha256) for sha256 in recordings}
        splits = {self._splits[root] for root in roots if root in self._splits} | ({split} if split else set())
        if len(splits) > 1:
            return False
        first = min(roots)
        for root in roots:
            self._parents[root] = first
            self._splits.pop(root, None)
        if splits:
            self._splits[first] = splits.pop()
        return True

    def _root(self, sha256: str) -> str:
        while (parent := self._parents.setdefault(sha256, sha256)) != sha256:
            self._parents[sha256] = self._parents[parent]
            sha256 = parent
        return sha256


def _close_pairs(recordings: list[Recording]) -> list[tuple[str, str]]:
    if len(recordings) < 2:
        return []
    from scipy.spatial import cKDTree  # takes long to import

    sketches = np.array([recording.sketch for recording in recordings], dtype=np.float64)
    norms = np.maximum(np.linalg.norm(sketches, axis=1), 1e-12)
    near = cKDTree(sketches / norms[:, None]).query_pairs(_MAX_DISTANCE)
    return [
        (recordings[i].sha256, recordings[j].sha256)
        for i, j in near
        if abs(norms[i] - norms[j]) < _MAX_DISTANCE * max(norms[i], norms[j])
    ]


def _uniform(sha256: str) -> float:
    """A hash as a number from 0 to 1."""
    return int(sha256[:13], 16) / 16**13
