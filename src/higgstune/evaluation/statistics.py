"""Ratios of sums over clips: their bootstrap intervals, and the paired comparison of two systems.

All random draws come from a seed, so results are reproducible.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # of the bootstrap
PERMUTATIONS = 9999  # of the paired test, if there are too many to try all
_LEVEL = 0.95
_BLOCK = 1 << 22  # entries of one random matrix


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """sum(numerators) / sum(denominators), each [clips]; the latter must not sum to zero."""
    return float(numerators.sum() / denominators.sum())


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, *, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of `ratio` over clips (Efron 1979): both [clips].

    Resamples whose denominators sum to zero have no ratio and are left out. With a single clip there is nothing to
    resample: the interval is its value.
    """
    tops, bottoms = _resampled([numerators, denominators], seed)
    return _percentiles(_ratios(tops, bottoms))


def difference_interval(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], *, seed: int) -> tuple[
    float, float
]:  # fmt: skip
    """The interval of ratio(b) - ratio(a), with clips resampled in pairs; a, b: (numerators, denominators)."""
    top_a, bottom_a, top_b, bottom_b = _resampled([*a, *b], seed)
    return _percentiles(_ratios(top_b, bottom_b) - _ratios(top_a, bottom_a))


def permutation_p(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], *, seed: int) -> float:
    """The two-sided p-value of ratio(b) - ratio(a), under the hypothesis that the systems are exchangeable.

    Clips are swapped within pairs: in all 2**clips ways if these are at most 10,000, else in 9,999 random ones and the
    observed one (Phipson and Smyth 2010, so p is never zero).
    """
    observed = abs(ratio(*b) - ratio(*a))
    count, exact = len(a[0]), 2 ** len(a[0]) <= PERMUTATIONS + 1
    sums_a, sums_b = [part.sum() for part in a], [part.sum() for part in b]
    more = total = 0
    for swaps in _swaps(count, exact, seed):
        moved = [swaps @ (in_b - in_a) for in_a, in_b in zip(a, b, strict=True)]
        ratios_a = _ratios(sums_a[0] + moved[0], sums_a[1] + moved[1])
        ratios_b = _ratios(sums_b[0] - moved[0], sums_b[1] - moved[1])
        drawn = np.abs(ratios_b - ratios_a)
        # An undefined ratio counts as extreme; rounding must not hide a tie.
        more += int(np.sum(~(drawn < observed - 1e-9 * max(observed, 1))))
        total += len(drawn)
    return more / total if exact else (more + 1) / (total + 1)


def smallest_p(clips: int) -> float:
    """The smallest value that `permutation_p` can have for so many pairs: 2 / 2^clips while all swaps are tried."""
    return max(2 / 2**clips if clips < 1000 else 0.0, 1 / (PERMUTATIONS + 1))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests by Holm (1979), in the order of `p`.

    If nothing differs, the chance that any of them falls below 0.05 is at most 0.05.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def _resampled(columns: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Sums of columns, each [clips], over resampled clips: a list of [resamples]."""
    clips = len(columns[0])
    rng = np.random.default_rng(seed)
    stacked, sums = np.stack(columns, axis=1).astype(np.float64), []
    for size in _sizes(RESAMPLES, clips):
        sums.append(rng.multinomial(clips, np.full(clips, 1 / clips), size) @ stacked)
    return list(np.concatenate(sums).T)


def _swaps(count: int, exact: bool, seed: int) -> list[np.ndarray]:
    """Which pairs are swapped: matrices [ways, pairs] of 0 and 1."""
    if exact:
        return [(np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.float64)]
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2, (size, count)).astype(np.float64) for size in _sizes(PERMUTATIONS, count)]


def _sizes(rows: int, columns: int) -> list[int]:
    size = max(1, _BLOCK // columns)
    return [min(size, rows - start) for start in range(0, rows, size)]


def _ratios(tops: np.ndarray, bottoms: np.ndarray) -> np.ndarray:
    return np.divide(tops, bottoms, out=np.full(len(tops), np.nan), where=bottoms != 0)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    edges = (1 - _LEVEL) / 2
    low, high = np.nanquantile(values, [edges, 1 - edges])
    return float(low), float(high)
