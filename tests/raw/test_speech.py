"""Where speech is found: regions of probabilities, edges by energy, and utterances that are cut in pauses."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgstune.raw.pack import pack
from higgstune.raw.recording import RATE
from higgstune.raw.speech import FRAME, LEVEL_HOP, Region, find_regions, quietest, refine

SECOND = RATE / FRAME  # frames


def probabilities(*spans: tuple[float, float], seconds: float = 10.0) -> np.ndarray:
    """[frames], 1 inside of the spans."""
    values = np.zeros(round(seconds * SECOND), np.float32)
    for start, end in spans:
        values[round(start * SECOND) : round(end * SECOND)] = 1
    return values


def levels(*spans: tuple[float, float], seconds: float = 10.0, loud: float = -20, floor: float = -60) -> np.ndarray:
    """[seconds * 100] in dB."""
    values = np.full(round(seconds / LEVEL_HOP), floor, np.float32)
    for start, end in spans:
        values[round(start / LEVEL_HOP) : round(end / LEVEL_HOP)] = loud
    return values


def test_regions_begin_and_end_with_the_probability():
    found = find_regions(probabilities((1, 2), (4, 6)), 0.5, 0.1, 0.25)
    assert [(round(r.start, 1), round(r.end, 1)) for r in found] == [(1, 2), (4, 6)]


def test_a_short_pause_does_not_part_a_region_and_a_short_sound_is_none():
    values = probabilities((1, 2), (2.05, 3), (5, 5.1))
    assert len(find_regions(values, 0.5, 0.1, 0.25)) == 1
    assert len(find_regions(values, 0.5, 0.1, 0.0)) == 2


def test_between_the_two_thresholds_speech_continues():
    values = probabilities((1, 3))
    values[round(2 * SECOND) : round(2.5 * SECOND)] = 0.4
    assert len(find_regions(values, 0.5, 0.1, 0.25)) == 1
    values[round(2 * SECOND) : round(2.5 * SECOND)] = 0.3
    assert len(find_regions(values, 0.5, 0.1, 0.25)) == 2


def test_speech_up_to_the_end_of_the_recording_is_found():
    assert find_regions(probabilities((8, 10)), 0.5, 0.1, 0.25)[-1].end == pytest.approx(10, abs=0.05)


@pytest.mark.parametrize("late", [-0.2, -0.1, 0.0, 0.08, 0.2])
def test_edges_move_to_where_the_energy_leaves_the_floor(late: float):
    [region] = refine([Region(2 + late, 4 + late)], levels((2, 4)))
    assert region.start == pytest.approx(2, abs=0.011)
    assert region.end == pytest.approx(4, abs=0.011)


def test_edges_do_not_move_far_from_what_the_detector_says():
    [region] = refine([Region(2, 4)], levels((0, 10)))
    assert abs(region.start - 2) <= 0.25
    assert abs(region.end - 4) <= 0.25


def test_a_weak_sound_inside_of_what_the_detector_calls_speech_is_not_cut_off():
    """A fricative, quiet, then the closure of a plosive."""
    values = levels((2.0, 2.06), (2.16, 4))
    [region] = refine([Region(1.98, 4)], values)
    assert region.start == pytest.approx(2.0, abs=0.011)


def test_a_click_in_the_pause_is_not_speech():
    [region] = refine([Region(2, 4)], levels((2, 4), (4.15, 4.17)))
    assert region.end == pytest.approx(4, abs=0.011)


def test_the_quietest_place_is_in_the_quiet():
    assert 4 < quietest(levels((0, 4), (4.2, 10)), 3.9, 4.3) < 4.2


times = st.lists(st.floats(0.06, 3.0), min_size=1, max_size=40)


@given(lengths=times, pauses=times, data=st.data())
def test_every_region_is_in_exactly_one_utterance_and_no_cut_is_in_speech(
    lengths: list[float], pauses: list[float], data: st.DataObject
):
    regions, at = [], 0.5
    for length, pause in zip(lengths, pauses, strict=False):
        regions.append(Region(at, at + length))
        at += length + pause
    speakers = [data.draw(st.sampled_from([0, 0, 0, 1, None])) for _ in regions]
    joined = [bool(i) and speakers[i] == speakers[i - 1] and data.draw(st.booleans()) for i in range(len(regions))]
    loud = levels(*((r.start, r.end) for r in regions), seconds=at + 1)
    cuts = pack(regions, speakers, joined, loud, at + 1, 3, 15)
    assert [region for cut in cuts for region in cut.speech] == regions
    number = {region: index for index, region in enumerate(regions)}
    for cut in cuts:
        inside = [number[region] for region in cut.speech]
        assert len({speakers[index] for index in inside}) == 1
        assert cut.start <= cut.speech[0].start + 0.011
        assert cut.end >= cut.speech[-1].end - 0.011
        assert not joined[inside[0]]
        if speakers[inside[0]] is None:  # what is refused takes no neighbour with it
            assert all(joined[index] for index in inside[1:])
        for one, other in pairwise(inside):
            assert joined[other] or regions[other].start - regions[one].end <= 1.5
        assert len(inside) == 1 or cut.seconds <= 15.01 or any(joined[index] for index in inside)
    for one, other in pairwise(cuts):
        assert one.end <= other.start + 1e-6


def test_utterances_are_cut_in_the_long_pauses():
    regions = [Region(i * 2.2 + (2 if i > 2 else 0), i * 2.2 + 2 + (2 if i > 2 else 0)) for i in range(6)]
    cuts = pack(regions, [0] * 6, [False] * 6, levels(seconds=20), 20, 3, 15)
    assert [len(cut.speech) for cut in cuts] == [3, 3]
