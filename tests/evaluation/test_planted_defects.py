"""Defects planted into real speech: each moves its own numbers clearly, and no other by much."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from speech_defects import ColourJudge, Take, World, real_takes, real_world, silence

from higgstune.errors import DataError
from higgstune.evaluation.clips import Clip
from higgstune.evaluation.judges.base import Judges
from higgstune.evaluation.score import compare, score
from higgstune.generate.chunks import frame_cap
from higgstune.metrics import Evaluation

# How far a number may move that a defect does not concern.
STILL = {
    "wer": 0.05, "cer": 0.05, "similarity": 0.05, "similarity_reference": 0.05, "speaker_accuracy": 0.0,
    "cap_rate": 0.0, "short_rate": 0.0, "silence": 0.2, "trailing_silence": 0.15, "duration_ratio": 0.2,
    "loop_rate": 0.0, "leak_rate": 0.0, "leak_wer": 0.15, "f0_shift": 1.0, "f0_spread": 0.25,
    "energy_spread": 0.25, "recording_wer": 0.0, "recording_cer": 0.0, "babble_rate": 0.0,
}  # fmt: skip
# Of each defect: by how much its own numbers move at least, and which others follow because it is the same fact.
OWN: dict[str, dict[str, float]] = {
    "runs_on": {"cap_rate": 1.0, "duration_ratio": 1.0, "babble_rate": 1.0},
    "swapped": {"similarity": -0.15, "speaker_accuracy": -0.8},
    "shuffled": {"wer": 0.7, "cer": 0.5},
    "silent": {"silence": 1.0},
    "tailed": {"trailing_silence": 1.0, "duration_ratio": 0.3},
    "looped": {"loop_rate": 1.0},
    "leaked": {"leak_rate": 1.0, "leak_wer": -0.3},
    "cut": {"short_rate": 1.0, "wer": 0.9, "duration_ratio": -0.9},
}
FOLLOWS = {
    "runs_on": {"wer", "cer"},  # words that are not in the text
    "swapped": {"f0_shift", "f0_spread", "energy_spread"},  # another person's
    "shuffled": {"babble_rate"},  # where a long text takes the place of a short one
    "silent": {"duration_ratio"},
    "tailed": set(),
    "looped": {"duration_ratio"},
    "leaked": {"wer", "cer", "duration_ratio"},  # the leaked words are said
    "cut": {"cer", "silence", "similarity", "similarity_reference", "speaker_accuracy", "leak_wer", "f0_shift",
            "f0_spread", "energy_spread"},  # next to nothing is left to measure
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    speakers = {"lj": real_takes("ljspeech")[:8]}
    for name in ("1998", "2033"):
        speakers[name] = real_takes("librispeech", name)[:7]
    return real_world(tmp_path_factory.mktemp("clips"), speakers, clips_each=3)


@pytest.fixture(scope="module")
def scores(world: World) -> dict[str, Evaluation]:
    judges = Judges(asr=world.asr, speaker=ColourJudge())
    folders = {"clean": world.clips} | {name: plant(world) for name, plant in DEFECTS.items()}
    return {name: score(clips, judges, world.voices) for name, clips in folders.items()}


def _each(change: Callable[[World, Clip, Take], Take], name: str) -> Callable[[World], list[Clip]]:
    def plant(world: World) -> list[Clip]:
        return world.with_takes(name, {clip.id: change(world, clip, world.takes[clip.id]) for clip in world.clips})

    return plant


def _runs_on(world: World, clip: Clip, take: Take) -> Take:
    """No stop token: the speaker talks on, up to the frame cap."""
    same = [world.takes[other.id] for other in world.clips if other.speaker == clip.speaker and other.id != clip.id]
    cap = frame_cap(clip.text, 25) / 25
    whole = take
    for more in same * 9:
        whole = whole + more
    return whole.part(0, cap)


def _swapped(world: World) -> list[Clip]:
    """Each speaker's clips under the next one's name."""
    names = list(world.voices)
    return [replace(clip, speaker=names[(names.index(str(clip.speaker)) + 1) % len(names)]) for clip in world.clips]


def _shuffled(world: World) -> list[Clip]:
    """Each clip with the text, and its recording, of the same speaker's next."""
    per = len(world.clips) // len(world.voices)
    following = [world.clips[i // per * per + (i + 1) % per] for i in range(len(world.clips))]
    return [
        replace(clip, text=other.text, recording=other.recording)
        for clip, other in zip(world.clips, following, strict=True)
    ]


def _silent(world: World, clip: Clip, take: Take) -> Take:
    return take.part(0, take.seconds / 2) + silence(2.5) + take.part(take.seconds / 2, 9)


def _tailed(world: World, clip: Clip, take: Take) -> Take:
    return take + silence(2.5)


def _looped(world: World, clip: Clip, take: Take, period: float = 0.137) -> Take:
    """A loud piece between two words, eight times."""
    middles = [at for at, _ in take.words]
    places = [a + 0.01 for a, b in pairwise(middles[1:]) if b - a > period + 0.02]
    start = max(places, key=lambda at: float(np.square(take.part(at, at + period).waveform).sum()))
    piece = take.part(start, start + period)
    looped = take.part(0, start)
    for _ in range(8):
        looped = looped + piece
    return looped + take.part(start + period, 9)


def _leaked(world: World, clip: Clip, take: Take) -> Take:
    """The last 2.2 s of the reference, then the clip."""
    reference = world.leading[str(clip.speaker)]
    return reference.part(reference.seconds - 2.2, reference.seconds) + take


def _cut(world: World, clip: Clip, take: Take) -> Take:
    return take.part(0.5, 0.7)


DEFECTS: Mapping[str, Callable[[World], list[Clip]]] = {
    "runs_on": _each(_runs_on, "runs_on"), "swapped": _swapped, "shuffled": _shuffled,
    "silent": _each(_silent, "silent"), "tailed": _each(_tailed, "tailed"),
    "looped": _each(_looped, "looped"), "leaked": _each(_leaked, "leaked"),
    "cut": _each(_cut, "cut"),
}  # fmt: skip


def test_clean_speech_has_no_defect(scores: dict[str, Evaluation]) -> None:
    values = {name: estimate.value for name, estimate in scores["clean"].summary.items()}
    for name in ("wer", "cer", "recording_wer", "cap_rate", "short_rate", "loop_rate", "leak_rate"):
        assert values[name] == 0, name
    assert values["speaker_accuracy"] == 1
    assert values["duration_ratio"] == pytest.approx(1)
    assert values["leak_wer"] > 0.7
    assert values["silence"] < 1
    assert abs(values["f0_shift"]) < 1


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_moves_its_own_numbers_and_no_other(scores: dict[str, Evaluation], defect: str) -> None:
    clean, found = scores["clean"].summary, scores[defect].summary
    moved = {name: found[name].value - clean[name].value for name in clean if name in found}
    for name, least in OWN[defect].items():
        assert moved[name] * np.sign(least) >= abs(least), f"{defect}: {name} moved by {moved[name]:.3f}"
    others = moved.keys() - OWN[defect].keys() - FOLLOWS[defect]
    too_far = {name: round(moved[name], 3) for name in others if abs(moved[name]) > STILL[name]}
    assert not too_far, defect


@pytest.mark.parametrize("defect", [name for name in DEFECTS if name != "shuffled"])
def test_a_comparison_is_sure_of_it(scores: dict[str, Evaluation], defect: str) -> None:
    differences = compare(scores["clean"], scores[defect])
    for name, least in OWN[defect].items():
        difference = differences[name]
        assert difference.p < 0.01
        assert min(difference.low * np.sign(least), difference.high * np.sign(least)) > 0


def test_other_texts_are_not_compared(scores: dict[str, Evaluation]) -> None:
    with pytest.raises(DataError, match="has two texts"):
        compare(scores["clean"], scores["shuffled"])


def test_a_half_planted_defect_counts_half(world: World) -> None:
    chosen = [clip for number, clip in enumerate(world.clips) if number % 2]
    clips = world.with_takes("half", {clip.id: _looped(world, clip, world.takes[clip.id]) for clip in chosen})
    found = score(clips, Judges()).summary["loop_rate"]
    assert found.value == len(chosen) / len(clips)
    assert 0 < found.low < found.value < found.high < 1


def test_the_confusion_matrix_shows_who_was_swapped(scores: dict[str, Evaluation]) -> None:
    clean, swapped = scores["clean"].confusion, scores["swapped"].confusion
    assert clean is not None
    assert swapped is not None
    assert clean.nearest == (3 * np.eye(3, dtype=int)).tolist()
    assert np.array(swapped.nearest).trace() == 0
