"""Which rows are trained on and which are held out: decided by recording, never by row."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.spatial import cKDTree

from higgstune.data.audio import Recording
from higgstune.data.entry import Entry

# Distance of two sketches, relative to their length. One program that writes float samples as WAV and as FLAC
# rounds them differently (0.0002, measured), a good lossy copy is below 0.3, others are 1.4 apart.
_SAME = 0.3


def find_twins(recordings: Iterable[Recording]) -> dict[str, set[str]]:
    """For each recording that has any, the hashes of others of its length and rate that are the same."""
    alike: dict[tuple[int, int], dict[str, Recording]] = defaultdict(dict)
    for recording in recordings:
        alike[recording.samples, recording.rate][recording.sha256] = recording
    twins: dict[str, set[str]] = defaultdict(set)
    for group in alike.values():
        for one, other in _close_pairs(list(group.values())):
            twins[one].add(other)
            twins[other].add(one)
    return dict(twins)


def _close_pairs(recordings: list[Recording]) -> list[tuple[str, str]]:
    if len(recordings) < 2:
        return []
    sketches = np.array([recording.sketch for recording in recordings], dtype=np.float64)
    norms = np.maximum(np.linalg.norm(sketches, axis=1), 1e-12)
    near = cKDTree(sketches / norms[:, None]).query_pairs(_SAME)
    return [
        (recordings[i].sha256, recordings[j].sha256)
        for i, j in near
        if abs(norms[i] - norms[j]) < _SAME * max(norms[i], norms[j])
    ]


TRAIN, VALIDATION = "train", "validation"


class RecordingGroups:
    """Recordings that must be in one split, because a row learns from or listens to several of them.

    A recording that is only listened to, and learnt in no row, binds nothing together: a reference voice may
    serve both splits.
    """

    def __init__(self, stored: Sequence[Entry], new: Sequence[Entry], heard: Iterable[Recording] = ()) -> None:
        """`stored` rows keep their splits, `new` ones come by `join`; `heard` is the other audio of those."""
        self._parents: dict[str, str] = {}
        self._splits: dict[str, str] = {}  # by root
        self._twins = find_twins([*(entry.recording for entry in [*stored, *new]), *heard])
        self._learnt = {sha256 for entry in stored for sha256 in entry.target_recordings}
        self._listeners: dict[str, list[str]] = defaultdict(list)
        for entry in stored:
            self._join(entry.target_recordings, entry.split)
        for entry in stored:  # once every split is known: what a row hears must not move what another learns
            self._join(self._bound(entry))
            for sha256 in entry.linked_recordings:
                self._listeners[sha256].append(entry.recording_sha256)
        self._learnt |= {sha256 for entry in new for sha256 in entry.target_recordings}

    def join(self, entry: Entry) -> bool:
        """Bind a new row's recordings together; False, and nothing is done, where two splits would meet."""
        return self._join(self._bound(entry))

    def split_of(self, entry: Entry) -> str | None:
        """The split that a row's recordings already have."""
        return self._splits.get(self._root(entry.recording_sha256))

    def decide(self, entries: list[Entry], fraction: float) -> None:
        """Give every row its split: where its group has none, by the group's hash, so in any order the same.

        About `fraction` of the groups is held out; with a fraction above 0 at least one as soon as there
        are two, and never all of them.
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
        # A group's own hash: the smallest of its members would be small, and so held out, the larger it is.
        return {
            root: root
            if len(members[root]) < 2
            else hashlib.sha256("".join(sorted(members[root])).encode()).hexdigest()
            for root in rows
        }

    def _bound(self, entry: Entry) -> list[str]:
        """What must share the split of a row: what it learns, and what it hears and others learn."""
        heard = [sha for one in entry.linked_recordings for sha in (one, *self._twins.get(one, ()))]
        learnt = [sha for one in entry.target_recordings for sha in (one, *self._twins.get(one, ()))]
        listeners = [listener for sha256 in learnt for listener in self._listeners.get(sha256, ())]
        return [*learnt, *listeners, *(sha256 for sha256 in heard if sha256 in self._learnt)]

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


def _uniform(sha256: str) -> float:
    """A hash as a number from 0 to 1."""
    return int(sha256[:13], 16) / 16**13
