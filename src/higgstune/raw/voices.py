"""Who speaks: regions are separated by the embedding of a speaker model, before any of them are packed together.

regions -> embeddings of those of 1 s and more -> clusters -> every region has a speaker, or is of two
"""

from collections.abc import Callable, Sequence

import numpy as np

from higgstune.raw.speech import Region

MIN_SECONDS = 1.0  # of a region that forms clusters
_SURE_SECONDS = 2.0  # of a region whose own cluster counts; a shorter one goes to the nearest centre
_EMBEDDED_SECONDS = 0.4  # of a region that says who speaks, where it prefers one centre clearly
_UNKNOWN = 0.5  # cosine to every centre, below which a region is of none of them
_SINGLE = 0.95  # share of the speech in one cluster above which there is one voice
_END_SECONDS = 1.2  # of a region's beginning and end, that must be the same speaker's
_PREFERS = 0.07  # of cosine to its own centre above any other, for a short region
_MIN_MARGIN = 0.1  # the same, for each end of a region that is of two speakers


Embed = Callable[[float, float], np.ndarray]  # the embedding of a recording from a start to an end in seconds


def cluster(embeddings: np.ndarray, distance: float, speakers: int | None = None) -> np.ndarray:
    """[n, dim] of length 1 -> [n] numbers of clusters: average linkage up to a cosine distance, or so many clusters."""
    if len(embeddings) < 2:
        return np.zeros(len(embeddings), int)
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    tree = linkage(np.maximum(pdist(embeddings, "cosine"), 0), "average")
    if speakers is None:
        return np.asarray(fcluster(tree, distance, "distance")) - 1
    return np.asarray(fcluster(tree, speakers, "maxclust")) - 1


def assign(
    regions: Sequence[Region], embed: Embed, distance: float, speakers: int | None = None
) -> tuple[list[int | None], np.ndarray]:
    """The speaker of each region, from 0, None for a region of two speakers; and the centres [speakers, dim].

    Raises nothing: where no region is long enough, all are speaker 0.
    """
    long = [index for index, region in enumerate(regions) if region.seconds >= MIN_SECONDS]
    if not long:
        return [0] * len(regions), np.zeros((1, 0), np.float32)
    points = np.stack([embed(regions[index].start, regions[index].end) for index in long])
    found = cluster(points, distance, speakers)
    found = _merge_crumbs(found, [regions[index].seconds for index in long], points, distance, speakers)
    centres = _centres(points, found)
    if len(centres) == 1:
        return [0] * len(regions), centres
    owners: dict[int, int | None] = {
        index: label
        for index, label in zip(long, found.tolist(), strict=True)
        if regions[index].seconds >= _SURE_SECONDS
    }
    for index, region in enumerate(regions):
        if index not in owners and region.seconds >= _EMBEDDED_SECONDS:
            cosines = centres @ embed(region.start, region.end)
            best, next_best = np.sort(cosines)[-1], np.sort(cosines)[-2]
            if best - next_best > _PREFERS:
                owners[index] = int(cosines.argmax())
            elif region.seconds >= MIN_SECONDS or best < _UNKNOWN:
                owners[index] = None
    labels = _fill(regions, owners)
    return [
        None if label is None or _is_mixed(region, embed, centres) else label
        for region, label in zip(regions, labels, strict=True)
    ], centres


def link(recordings: Sequence[Sequence[Sequence[float]]], distance: float) -> list[list[int]]:
    """The voice of each speaker of each recording, given by its centre: nearest ones first, never two of a recording.

    Centres are nearer to each other than the regions that they are the mean of. A centre without numbers, of one who
    says too little to be known, is like no other.
    """
    owners = [number for number, centres in enumerate(recordings) for _ in centres]
    size = max((len(centre) for centres in recordings for centre in centres), default=0)
    known = [[*centre, *[0.0] * (size - len(centre))] for centres in recordings for centre in centres]
    points = np.array(known, np.float32)
    groups = {index: {index} for index in range(len(owners))}
    root = list(range(len(owners)))
    near = np.argwhere(points @ points.T > 1 - distance) if len(owners) else np.empty((0, 2), int)
    pairs = [(float(points[i] @ points[j]), int(i), int(j)) for i, j in near if owners[i] < owners[j]]
    for _, one, other in sorted(pairs, reverse=True):
        first, second = groups[root[one]], groups[root[other]]
        if first is second or {owners[i] for i in first} & {owners[i] for i in second}:
            continue
        first |= second
        for index in second:
            root[index] = root[one]
    numbers = iter(root)
    return [[next(numbers) for _ in centres] for centres in recordings]


def _merge_crumbs(
    found: np.ndarray, seconds: Sequence[float], points: np.ndarray, distance: float, speakers: int | None
) -> np.ndarray:
    """Labels from 0, in order of first appearance; a single voice is one, whatever splinters it has."""
    weights = np.bincount(found, weights=seconds)
    if speakers is None and weights.max() >= _SINGLE * weights.sum():
        return np.zeros_like(found)
    # A cluster whose regions are all short is a splinter of a speaker, unless it is far from every other one.
    sure = {label for label, long in zip(found.tolist(), seconds, strict=True) if long >= _SURE_SECONDS}
    if speakers is None and sure and len(sure) < len(weights):
        kept = sorted(sure)
        centres = _centres(points[np.isin(found, kept)], np.searchsorted(kept, found[np.isin(found, kept)]))
        near = points @ centres.T
        found = np.array([
            label if label in sure or near[row].max() < 1 - distance else kept[int(near[row].argmax())]
            for row, label in enumerate(found.tolist())
        ])  # fmt: skip
    order = {label: number for number, label in enumerate(dict.fromkeys(found.tolist()))}
    return np.array([order[label] for label in found.tolist()])


def _centres(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    centres = np.stack([points[labels == label].mean(axis=0) for label in range(int(labels.max()) + 1)])
    return np.asarray(centres / np.linalg.norm(centres, axis=1, keepdims=True))


def _fill(regions: Sequence[Region], owners: dict[int, int | None]) -> list[int | None]:
    """The speakers of all regions: one that is too short for an embedding is the nearer neighbour's."""
    labels = []
    for index, region in enumerate(regions):
        if index not in owners:
            nearest = min(
                owners, key=lambda other: max(regions[other].start - region.end, region.start - regions[other].end)
            )
            labels.append(owners[nearest])
        else:
            labels.append(owners[index])
    return labels


def _is_mixed(region: Region, embed: Embed, centres: np.ndarray) -> bool:
    """Whether the beginning and the end of a region are different speakers'."""
    if region.seconds < 2 * _END_SECONDS:
        return False
    ends = ((region.start, region.start + _END_SECONDS), (region.end - _END_SECONDS, region.end))
    first, last = (centres @ embed(*span) for span in ends)
    one, other = int(first.argmax()), int(last.argmax())
    return one != other and first[one] - first[other] > _MIN_MARGIN and last[other] - last[one] > _MIN_MARGIN
