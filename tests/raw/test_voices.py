"""Who speaks: regions are separated by their embeddings, and speakers are found again in other recordings."""

import numpy as np
import pytest

from higgstune.raw.speech import Region
from higgstune.raw.voices import assign, link

DIM = 32


class Ears:
    """Embeds each span as a mean of the voices in it, weighted by their seconds, with some noise."""

    def __init__(self, turns: list[tuple[float, float, int]], noise: float = 0.12) -> None:
        self.turns, self.random = turns, np.random.default_rng(0)
        self.voices = np.linalg.qr(self.random.standard_normal((DIM, DIM)))[0]
        self.noise = noise

    def __call__(self, start: float, end: float) -> np.ndarray:
        shares = [(max(0.0, min(end, b) - max(start, a)), self.voices[who]) for a, b, who in self.turns]
        point = sum(share * voice for share, voice in shares) / (end - start)
        point = point + self.noise * self.random.standard_normal(DIM) / min(end - start, 3)
        return (point / np.linalg.norm(point)).astype(np.float32)


def dialogue(count: int, seconds: float, pause: float = 0.3) -> list[tuple[float, float, int]]:
    return [(i * (seconds + pause), i * (seconds + pause) + seconds, i % 2) for i in range(count)]


def test_two_voices_are_separated_and_numbered_as_they_appear():
    turns = dialogue(12, 4)
    labels, centres = assign([Region(a, b) for a, b, _ in turns], Ears(turns), 0.4)
    assert labels == [who for _, _, who in turns]
    assert len(centres) == 2


def test_a_short_region_goes_to_the_voice_that_it_prefers():
    turns = [*dialogue(12, 4), (60, 60.6, 1), (61, 61.2, 0)]
    labels, _ = assign([Region(a, b) for a, b, _ in turns], Ears(turns, 0.03), 0.4)
    assert labels[-2] == 1
    assert labels[-1] == 1  # too short to be embedded: as its neighbour


def test_a_region_of_two_voices_is_nobodys():
    turns = [*dialogue(12, 4), (60, 62.5, 0), (62.5, 65, 1)]
    regions = [*(Region(a, b) for a, b, _ in turns[:-2]), Region(60, 65)]
    labels, _ = assign(regions, Ears(turns, 0.03), 0.4)
    assert labels[-1] is None
    assert None not in labels[:-1]


def test_one_voice_is_one_whatever_splinters_it_has():
    turns = [(5.0 * i, 5.0 * i + 4, 0) for i in range(20)] + [(200, 201.2, 5)]
    labels, _ = assign([Region(a, b) for a, b, _ in turns], Ears(turns, 0.03), 0.4)
    assert set(labels) == {0}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_speakers_can_be_given(count: int):
    turns = [(5.0 * i, 5.0 * i + 4, i % 3) for i in range(18)]
    labels, centres = assign([Region(a, b) for a, b, _ in turns], Ears(turns, 0.03), 0.4, count)
    assert len(centres) == count
    if count == 3:
        assert labels == [who for _, _, who in turns]


def test_without_a_long_region_there_is_one_speaker():
    turns = [(float(i), i + 0.5, i % 2) for i in range(6)]
    assert assign([Region(a, b) for a, b, _ in turns], Ears(turns), 0.4)[0] == [0] * 6
    assert assign([], Ears([]), 0.4)[0] == []


def test_the_same_voice_is_found_in_other_recordings():
    basis = np.eye(4)
    near = [0.9, 0.43589, 0, 0]  # cosine 0.9 with the first
    first, second, third = link([[basis[0], basis[1]], [near, basis[2]], [basis[1]]], 0.3)
    assert first[0] == second[0]
    assert first[1] == third[0]
    assert len({*first, *second, *third}) == 3


def test_two_speakers_of_one_recording_are_never_one():
    basis = np.eye(3)
    close = np.array([0.95, 0.3122, 0])
    one, other = link([[basis[0], close], [np.array([0.99, 0.141, 0])]], 0.3)
    assert one[0] != one[1]
    assert other[0] in one


def test_who_says_too_little_is_linked_with_nobody():
    assert link([[[1.0, 0.0]], [[]], [[1.0, 0.0]], [[]]], 0.3) == [[0], [1], [0], [3]]
