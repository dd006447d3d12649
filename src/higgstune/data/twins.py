"""Files that hold the same recording although their samples are not equal to the last bit."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from scipy.spatial import cKDTree

from higgstune.data.audio import Recording

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
