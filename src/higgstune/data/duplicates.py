"""Which utterances hold the same speech: the same clip in two recordings, also where it was cut in other places.

An utterance has a print: how the spectrum's slope changes from frame to frame. Level, equaliser, codec, noise and music
leave most of it as it was. Pairs are found as in Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System"
(ISMIR 2002): by signs of coefficients, of which the least certain are tried both ways, so that the work grows with the
number of utterances and not with its square. What is found that way is verified by the prints themselves.

`collect` compares utterances of recordings, `prepare` the clips of a store, which holds their prints.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

RATE = 16_000  # Hz, of the samples that `collect` makes prints of
FRAME = 0.08  # seconds of a print's frame

# Prints.
_SPECTRUM = 0.025  # seconds of a spectrum
_FINE = 0.01, 0.032, 1  # seconds from spectrum to spectrum, and of one that is filled with zeros; units of int8
_COARSE = 0.02, 0.025, 8  # the same: a fifth of the time, and half of the room once it is compressed
_AT_ONCE = 1_000  # spectra, for the memory
_SLOPES = 20  # of one band to the next
_LOWEST, _HIGHEST = 150.0, 5000.0  # Hz
_NEARBY = 12  # frames on either side, of which a band's loudest says how loud speech is there
_RANGE = 10 ** (-25 / 10)  # of that; what lies deeper is noise
_STEP = 0.5  # dB a unit of int8

# Search.
_WINDOW = 12  # frames: 1 s
_BITS_IN_TIME, _BITS_IN_FREQUENCY = 4, 7  # cosines of a window, whose signs are its key
_DOUBTFUL = 6  # bits of a key that are tried both ways
_EVERY = 3  # windows: of clips that are the same from end to end, one in three is looked up
_MOST = 32  # windows of one key that a window is compared with
_LEAST_CHANGE = 2.0  # dB: the standard deviation of a window's slopes; less is a pause or a tone
_WINDOW_COSINE = 0.5
_CHUNK = 1 << 15  # windows at a time; the first say how large coefficients are
_FEW = 1 << 11  # windows at a time that fit into a processor's cache

# Verification.
_LEAST_OVERLAP = 19  # frames: 1.5 s
_PAIR_OFFSETS = 3  # with the most votes, that are verified of a pair
_COSINE = 0.6  # of 3 s and more
_SHORT_COSINE = 0.7  # of 1.5 s: a step from telephone to studio has 0.64 with another such step
_ENDS = 0.5  # cosine below which frames at an end belong to other speech


@dataclass(frozen=True)
class Duplicate:
    """Two utterances with the same speech."""

    first: int  # the lower of two positions among the prints
    second: int
    offset: float  # seconds that, added to a time in the first, give the time of the same speech in the second
    overlap: float  # seconds of the same speech
    cosine: float  # between the prints of it: 1 for the same samples, 0.6 and more


def print_of(samples: np.ndarray, rate: int = RATE, *, coarse: bool = False) -> bytes:
    """The print of an utterance, about 250 bytes a second: [samples] float32 at a rate in Hz, all of them finite.

    Prints are compared with prints of the same rate, `coarse` or not. A frame weighs its spectra by a Hann window twice
    as long as it is, so that cuts between two frames change little.
    """
    from scipy.fft import next_fast_len, rfft  # takes long to import

    hop, filled, units = _COARSE if coarse else _FINE
    if coarse and rate > 4 * _HIGHEST:  # what lies above is not used
        samples, rate = _halved(samples), rate // 2
    size, bins, hops = round(_SPECTRUM * rate), next_fast_len(round(filled * rate), real=True), round(FRAME / hop)
    if len(samples) < size:
        return b""
    frames = sliding_window_view(np.asarray(samples, np.float32), size)[:: round(hop * rate)]
    mel = _mel_bands(bins, rate)
    bands = np.empty((len(frames), _SLOPES + 1), np.float32)
    for start in range(0, len(frames), _AT_ONCE):
        spectra = rfft(frames[start : start + _AT_ONCE] * _hann(size), bins, axis=1)[:, : len(mel)]
        bands[start : start + _AT_ONCE] = (spectra.real**2 + spectra.imag**2) @ mel
    pooled = sliding_window_view(_padded(bands, hops), 2 * hops, axis=0)[::hops] @ _hann(2 * hops)
    loud = sliding_window_view(_padded(pooled, _NEARBY), 2 * _NEARBY + 1, axis=0).max(axis=-1)
    levels = 10 * np.log10(pooled + _RANGE * loud + 1e-12)
    slopes = units * np.round(np.diff(levels, axis=1) / (units * _STEP))
    return np.clip(slopes, -127, 127).astype(np.int8).tobytes()


def find_duplicates(prints: Sequence[bytes], *, whole: bool = False) -> list[Duplicate]:
    """All pairs of utterances that share at least 1.5 s of speech, in the order of their positions.

    Where the same speech occurs in more than 30 utterances, each is paired with some of the others, so that groups
    hold together; otherwise with all of them. `whole`: those that are the same from end to end are enough, which takes
    a third of the time.
    """
    slopes = [np.frombuffer(each, np.int8).reshape(-1, _SLOPES) for each in prints]
    found = []
    for first, second, offsets in _candidates(slopes, _EVERY if whole else 1):
        matches = [match for offset in offsets if (match := _verified(slopes[first], slopes[second], offset))]
        if matches:
            shift, frames, cosine = max(matches, key=lambda match: match[1] * match[2])
            duplicate = Duplicate(first, second, round(shift * FRAME, 2), round(frames * FRAME, 2), round(cosine, 3))
            found.append(duplicate)
    return found


def _halved(samples: np.ndarray) -> np.ndarray:
    """Every second sample, smoothed by 1, 3, 3, 1."""
    even, odd = samples[: len(samples) // 2 * 2 : 2], samples[1::2]
    return even[:-1] + 3 * (odd[:-1] + even[1:]) + odd[1:]


def _padded(frames: np.ndarray, count: int) -> np.ndarray:
    """[frames, bands] with so many more at each end, which repeat the last; sooner than `np.pad`."""
    return np.concatenate([frames[:1].repeat(count, axis=0), frames, frames[-1:].repeat(count, axis=0)])


@cache
def _hann(size: int) -> np.ndarray:
    window = np.hanning(size + 2)[1:-1].astype(np.float32)
    return np.asarray(window / window.sum())


@cache
def _mel_bands(size: int, rate: int) -> np.ndarray:
    """[bins, bands] float32 triangles, evenly spaced in mel; for the bins of a spectrum of this size up to the last."""
    lowest, highest = 2595 * np.log10(1 + np.array([_LOWEST, _HIGHEST]) / 700)
    edges = 700 * (10 ** (np.linspace(lowest, highest, _SLOPES + 3) / 2595) - 1)
    bins = np.arange(min(size // 2, int(_HIGHEST * size / rate)) + 1)[:, None] * rate / size
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


@cache
def _cosines() -> np.ndarray:
    """[frames of a window * slopes, bits] float32: products of cosines in time and in frequency. None is constant in
    time, so that what stays the same, as hum and an equaliser's curve do, has no part in a key."""
    time = np.cos(np.pi * np.outer(np.arange(_WINDOW) + 0.5, np.arange(1, _BITS_IN_TIME + 1)) / _WINDOW)
    frequency = np.cos(np.pi * np.outer(np.arange(_SLOPES) + 0.5, np.arange(_BITS_IN_FREQUENCY)) / _SLOPES)
    both = np.einsum("ti,fj->tfij", time, frequency).reshape(_WINDOW * _SLOPES, -1)
    return np.asarray(both / np.sqrt(np.square(both).sum(axis=0)), np.float32)


class _Windows:
    """Every window of all utterances that are long enough, but pauses; as positions in one array of frames."""

    def __init__(self, slopes: Sequence[np.ndarray]) -> None:
        ends = np.cumsum([len(each) for each in slopes])
        self.frames = np.concatenate(slopes) if slopes else np.empty((0, _SLOPES), np.int8)
        self.starts = ends - [len(each) for each in slopes]
        self.at = np.concatenate(
            [
                np.arange(start, start + len(each) - _WINDOW + 1)
                for start, each in zip(self.starts, slopes, strict=True)
                if len(each) >= _LEAST_OVERLAP
            ]
            or [np.empty(0, np.int64)]
        )

    def values(self, at: np.ndarray) -> np.ndarray:
        """Windows at frames: [windows, frames * slopes] float32 in dB, without their mean over time."""
        found = self.frames[at[:, None] + np.arange(_WINDOW)].astype(np.float32) * _STEP
        return np.asarray((found - found.mean(axis=1, keepdims=True)).reshape(len(at), -1))

    def owner(self, at: np.ndarray) -> np.ndarray:
        """The utterance that a frame is of."""
        return np.searchsorted(self.starts, at, side="right") - 1

    def with_keys(
        self, flips: int = 0, every: int = 1, between: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some windows at a time, one in `every`: [windows], where, and [windows, 2^flips] uint32, their keys; the
        first is the window's own, the others have doubtful bits the other way. `between` two frames: half a frame
        later."""
        ways = np.arange(1 << flips)[:, None] >> np.arange(flips) & 1
        powers = np.uint32(1) << np.arange(_BITS_IN_TIME * _BITS_IN_FREQUENCY, dtype=np.uint32)
        usual: np.ndarray | None = None
        step = every * (_CHUNK if flips else _FEW)
        for start in range(0, len(self.at), step):
            at = self.at[start : start + step : every]
            values = self.values(at)
            changing = values.std(axis=1) >= _LEAST_CHANGE
            at, values = at[changing], values[changing]
            if not len(at):
                continue
            if between:  # the last window of an utterance gets a frame of the next one, and is one of many
                values = (values + self.values(np.minimum(at + 1, len(self.frames) - _WINDOW))) / 2
            coefficients = values @ _cosines()
            own = ((coefficients > 0) * powers).sum(axis=1, dtype=np.uint32)
            if not flips:
                yield at, own[:, None]
                continue
            if usual is None:  # the sizes of coefficients, so that doubt is relative to them
                usual = np.sqrt(np.square(coefficients).mean(axis=0)) + 1e-6
            doubtful = np.argpartition(np.abs(coefficients) / usual, flips, axis=1)[:, :flips]
            masks = (powers[doubtful][:, None, :] * ways.astype(np.uint32)).sum(axis=2, dtype=np.uint32)
            yield at, own[:, None] ^ masks


def _candidates(slopes: Sequence[np.ndarray], every: int) -> Iterator[tuple[int, int, list[int]]]:
    """Pairs of utterances with the offsets, in frames, at which windows of them are alike, most votes first."""
    windows = _Windows(slopes)
    known = [(at, keys[:, 0]) for at, keys in windows.with_keys()]
    if not known:
        return
    at, keys = np.concatenate([where for where, _ in known]), np.concatenate([key for _, key in known])
    order = np.argsort(keys, kind="stable")
    at, keys = at[order], keys[order]
    present = np.zeros(1 << 24, bool)  # by a hash of the key: most probes end here
    present[_hash(keys)] = True
    votes = []
    for here, probes in chain(windows.with_keys(_DOUBTFUL, every), windows.with_keys(_DOUBTFUL, every, between=True)):
        rows, columns = np.nonzero(present[_hash(probes)])
        votes.append(_alike(windows, here[rows], probes[rows, columns], at, keys))
    pairs, numbers = np.unique(np.concatenate(votes), axis=0, return_counts=True)
    order = np.lexsort((-numbers, pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    bounds = np.flatnonzero(np.any(np.diff(pairs[:, :2], axis=0, prepend=-1, append=-1), axis=1))
    for start, end in pairwise(bounds):
        first, second, _ = pairs[start].tolist()
        yield first, second, pairs[start : min(end, start + _PAIR_OFFSETS), 2].tolist()


def _hash(keys: np.ndarray) -> np.ndarray:
    return (keys * np.uint32(2_654_435_769)) >> np.uint32(8)  # Knuth's, which wraps


def _alike(windows: _Windows, here: np.ndarray, probes: np.ndarray, at: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Votes of windows for those with a probe's key that are alike, in another utterance: [votes, 3] first utterance,
    second, and by how many frames the same speech is later in the second."""
    lowest = np.searchsorted(keys, probes, side="left")
    highest = np.minimum(np.searchsorted(keys, probes, side="right"), lowest + _MOST)
    numbers = highest - lowest
    left = np.repeat(here, numbers)
    right = at[np.arange(numbers.sum()) + np.repeat(lowest - np.cumsum(numbers) + numbers, numbers)]
    first, second = windows.owner(left), windows.owner(right)
    swapped = first > second
    left, right = np.where(swapped, right, left), np.where(swapped, left, right)
    first, second = np.minimum(first, second), np.maximum(first, second)
    votes = []
    for start in range(0, len(left), _FEW):
        part = slice(start, start + _FEW)
        a, b = windows.values(left[part]), windows.values(right[part])
        cosine = (a * b).sum(axis=1) / np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
        alike = (cosine >= _WINDOW_COSINE) & (first[part] < second[part])
        i, j = first[part][alike], second[part][alike]
        later = (right[part][alike] - windows.starts[j]) - (left[part][alike] - windows.starts[i])
        votes.append(np.stack([i, j, later], axis=1))
    return np.concatenate(votes) if votes else np.empty((0, 3), np.int64)


def _verified(first: np.ndarray, second: np.ndarray, offset: int) -> tuple[float, int, float] | None:
    """Where and how well two prints match near an offset in frames: (offset, frames, cosine); None where not.

    The offset is tried half a frame and one to either side, too: cuts fall anywhere within a frame.
    """
    best: tuple[float, int, float] | None = None
    for halves in range(-2, 3):
        shift = offset + halves / 2
        match = _match(*_overlap(first, second, shift))
        if match and (best is None or match[0] * match[1] > best[1] * best[2]):
            best = (shift, *match)
    return best


def _overlap(first: np.ndarray, second: np.ndarray, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """The frames of both that fall together if the second is shifted: [frames, slopes] float32 each."""
    whole = int(np.floor(shift))
    a: np.ndarray = first[max(0, -whole) :].astype(np.float32)
    b: np.ndarray = second[max(0, whole) :].astype(np.float32)
    if shift != whole:  # between two frames; the other one is smoothed as much
        b = (b[:-1] + b[1:]) / 2
        a = np.concatenate([a[:1], (a[:-2] + 2 * a[1:-1] + a[2:]) / 4, a[-1:]]) if len(a) > 2 else a
    frames = min(len(a), len(b))
    return a[:frames], b[:frames]


def _match(a: np.ndarray, b: np.ndarray) -> tuple[int, float] | None:
    """The longest part in which two prints match: (frames, cosine); None where there is none."""
    if len(a) < _LEAST_OVERLAP:
        return None
    a, b = _changes(a), _changes(b)
    scores = (a * b).sum(axis=1) - _ENDS / 2 * (np.square(a).sum(axis=1) + np.square(b).sum(axis=1))
    sums = np.concatenate([[0.0], np.cumsum(scores)])
    lowest = np.minimum.accumulate(sums)
    end = int(np.argmax(sums - lowest))
    start = int(np.argmin(sums[: end + 1]))
    frames = end - start
    if frames < _LEAST_OVERLAP:
        return None
    a, b = a[start:end], b[start:end]
    cosine = float((a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum() + 1e-9))
    least = np.interp(frames, [_LEAST_OVERLAP, 2 * _LEAST_OVERLAP], [_SHORT_COSINE, _COSINE])
    return (frames, cosine) if cosine >= least else None


def _changes(slopes: np.ndarray) -> np.ndarray:
    """Slopes without their mean over two seconds, so that a step from one sound to another is not a likeness."""
    sums = np.concatenate([np.zeros((1, _SLOPES)), np.cumsum(slopes, axis=0, dtype=np.float64)])
    ends = np.minimum(np.arange(len(slopes)) + _NEARBY + 1, len(slopes))
    starts = np.maximum(np.arange(len(slopes)) - _NEARBY, 0)
    return np.asarray(slopes - (sums[ends] - sums[starts]) / (ends - starts)[:, None], np.float32)
