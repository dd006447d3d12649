"""Where there is speech: probabilities of silero-vad, regions above a threshold, edges by the local energy.

    16 kHz samples -> probabilities [frames of 32 ms] -> regions -> edges good to 10 ms

The probabilities need the model and are kept; all else is arithmetic on them and on the levels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from higgstune.errors import ConfigError
from higgstune.raw.recording import RATE, Samples

FRAME = 512  # samples of a probability
CONTEXT = 64  # samples before them that the model sees
LEVEL_HOP = 0.01  # seconds between levels
_HUM = 100.0  # Hz
_FRAMES_A_CALL = 512
_FALLING = 0.15  # speech ends this far below the threshold where it begins, as in silero's own loop
_MAX_MOVE = 0.25  # seconds that an edge may move
_GUARD = 0.05  # seconds of a pause beside an edge that may still be speech
_FLOOR_SHARE = 30  # percentile of a pause's levels that is its floor
_ABOVE_FLOOR = 8.0  # dB above it, speech begins
_MIN_PAUSE_LEVELS = 5
_GAP = 4  # levels below the floor that do not end a word: a plosive's closure
_QUIETEST = 1e-10


@dataclass(frozen=True)
class Region:
    """A stretch of speech between two pauses, in seconds of the recording."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end - self.start


class SpeechDetector:
    """The voice activity detector of silero, which comes with its weights."""

    def __init__(self) -> None:
        """Raises ConfigError where the extra `collect` is not installed."""
        try:
            from silero_vad import load_silero_vad

            self._session = load_silero_vad(sequence=True).session
        except ImportError as error:
            raise ConfigError(f"finding speech needs more: pip install 'higgstune[collect]' [{error}]") from error
        self.name = f"silero-vad {version('silero-vad')}"

    def probabilities(self, samples: Samples) -> np.ndarray:
        """[frames] float32: of each 32 ms, the probability that it is speech."""
        hidden = memory = np.zeros((1, 1, 128), np.float32)
        context, found = np.zeros(CONTEXT, np.float32), []
        for block in samples.blocks(FRAME * _FRAMES_A_CALL):
            frames = np.pad(block, (0, -len(block) % FRAME)).reshape(-1, FRAME)
            contexts = np.concatenate([context[None], frames[:-1, -CONTEXT:]])
            context = frames[-1, -CONTEXT:]
            values, hidden, memory = self._session.run(
                ["speech_probs", "hn", "cn"],
                {"input": np.concatenate([contexts, frames], axis=1), "h": hidden, "c": memory},
            )
            found.append(values.reshape(-1))
        return np.concatenate([np.empty(0, np.float32), *found])


def levels_of(samples: Samples) -> np.ndarray:
    """[seconds * 100] float32: the level of each 10 ms above 100 Hz, where mains hum is weak, in dB."""
    from scipy.signal import butter, sosfilt

    hop, found = round(LEVEL_HOP * RATE), [np.empty(0, np.float32)]
    high_pass = butter(4, _HUM, "highpass", fs=RATE, output="sos")
    state = np.zeros((len(high_pass), 2))
    for block in samples.blocks(hop * 6_000):
        sharp, state = sosfilt(high_pass, block, zi=state)
        frames = np.pad(sharp, (0, -len(block) % hop)).reshape(-1, hop)
        found.append((10 * np.log10(np.square(frames).mean(axis=1) + _QUIETEST)).astype(np.float32))
    return np.concatenate(found)


def find_regions(probabilities: np.ndarray, threshold: float, min_pause: float, min_speech: float) -> list[Region]:
    """Speech begins above `threshold` and ends with `min_pause` seconds below; shorter speech is none."""
    frame = FRAME / RATE
    regions, start, quiet = [], None, None
    for index, value in enumerate(probabilities.tolist()):
        if value >= threshold:
            quiet = None
            start = index if start is None else start
        elif start is not None and value < threshold - _FALLING:
            quiet = index if quiet is None else quiet
            if (index + 1 - quiet) * frame >= min_pause:
                regions.append(Region(start * frame, quiet * frame))
                start = quiet = None
    if start is not None:
        regions.append(Region(start * frame, (len(probabilities) if quiet is None else quiet) * frame))
    return [region for region in regions if region.seconds >= min_speech]


def refine(regions: Sequence[Region], levels: np.ndarray) -> list[Region]:
    """The regions with each edge moved, by 0.25 s at most, to where the level leaves the floor of the pause beside it.

    The detector is late by 60 to 90 ms at ends. Regions that meet after that become one.
    """
    borders = [0.0, *(border for region in regions for border in (region.start, region.end)), len(levels) * LEVEL_HOP]
    refined: list[Region] = []
    for number, region in enumerate(regions):
        before, behind = borders[2 * number], borders[2 * number + 3]
        start = _edge(levels, region.start, before, region.end, -1)
        end = _edge(levels, region.end, behind, region.start, +1)
        if refined and start - refined[-1].end < LEVEL_HOP:
            refined[-1] = Region(refined[-1].start, max(end, refined[-1].end))
        elif end > start:
            refined.append(Region(start, end))
    return refined


def _edge(levels: np.ndarray, edge: float, other: float, inner: float, direction: int) -> float:
    """Where speech ends that ends about at `edge`, seen from inside; `other` is where the next one begins.

    `direction` is +1 for an end, and -1 for a start.
    """
    pause = levels[slice(*sorted((_index(edge + direction * _GUARD), _index(other - direction * _GUARD))))]
    if direction * (other - edge) <= 2 * _GUARD or len(pause) < _MIN_PAUSE_LEVELS:
        pause = levels[slice(*sorted((_index(edge), _index(other))))]
    if not len(pause):
        return edge
    floor = float(np.percentile(pause, _FLOOR_SHARE)) + _ABOVE_FLOOR
    # From the detector's side, the outermost loud place counts, whatever is before it; beyond, speech must continue.
    inside = min(_MAX_MOVE, max(abs(edge - inner) / 2, LEVEL_HOP))
    outside = min(_MAX_MOVE, abs(other - edge) / 2)
    first, middle, last = (_index(edge + direction * by) for by in (-inside, 0.0, outside))
    window = levels[first : last + 1] if direction > 0 else levels[last : first + 1][::-1]
    loud = np.flatnonzero(window > floor)
    within = abs(middle - first)
    if not (loud <= within).any():
        return edge
    stop = int(loud[loud <= within][-1])
    for there in loud[loud > within].tolist():
        if there - stop > _GAP + 1:
            break
        stop = there
    return (first + direction * stop + (direction > 0)) * LEVEL_HOP


def quietest(levels: np.ndarray, start: float, end: float, width: float = 0.05) -> float:
    """The middle of the quietest `width` seconds between two times."""
    first, last = _index(start), max(_index(end), _index(start) + 1)
    window = levels[first:last]
    size = min(max(round(width / LEVEL_HOP), 1), len(window))
    sums = np.convolve(10 ** (window / 10), np.ones(size), mode="valid")
    return (first + int(np.argmin(sums)) + size / 2) * LEVEL_HOP


def level_of(levels: np.ndarray, start: float, end: float) -> float:
    """The mean power between two times, in dB."""
    part = levels[_index(start) : max(_index(end), _index(start) + 1)]
    return float(10 * np.log10(np.mean(10 ** (part / 10)))) if len(part) else 10 * float(np.log10(_QUIETEST))


def _index(seconds: float) -> int:
    return max(round(seconds / LEVEL_HOP), 0)


def speech_seconds(regions: Iterable[Region]) -> float:
    """How long regions are in all."""
    return sum(region.seconds for region in regions)
