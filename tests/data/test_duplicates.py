"""The same speech in two utterances is found, whatever was done to it, and other speech is not."""

import json
from pathlib import Path
from time import process_time

import numpy as np
import pytest
from recordings import babble
from scipy.signal import lfilter

from higgstune.data.audio import resample
from higgstune.data.duplicates import FRAME, RATE, Duplicate, find_duplicates, print_of

RAW = Path(__file__).parents[3] / "shared" / "raw"


def found_in(*sounds: np.ndarray) -> list[Duplicate]:
    return find_duplicates([print_of(sound) for sound in sounds])


def test_the_same_speech_is_found_where_it_was_cut_differently() -> None:
    one, two, three = babble(3, 1), babble(2.5, 2), babble(4, 3)
    found = found_in(babble(5, 4), np.concatenate([one, two]), np.concatenate([two[533:], three]))
    assert [(each.first, each.second) for each in found] == [(1, 2)]
    assert found[0].offset == pytest.approx(-3 - 533 / RATE, abs=FRAME)
    assert found[0].overlap == pytest.approx(2.5, abs=0.3)
    assert found[0].cosine > 0.9


def test_the_same_speech_is_found_between_other_speech() -> None:
    same = babble(2.5, 1)
    found = found_in(
        np.concatenate([babble(3, 2), same, babble(2, 3)]), np.concatenate([babble(1.03, 4), same, babble(4, 5)])
    )
    assert [(each.first, each.second) for each in found] == [(0, 1)]
    assert found[0].offset == pytest.approx(1.03 - 3, abs=FRAME)
    assert found[0].overlap == pytest.approx(2.5, abs=0.4)


@pytest.mark.parametrize("change", ["level", "noise", "tone", "telephone", "rate", "hum"])
def test_the_same_speech_is_found_whatever_was_done_to_it(change: str) -> None:
    sound = babble(4, 1)
    time = np.arange(len(sound)) / RATE
    changed = {
        "level": 0.01 * sound,
        "noise": sound + 0.05 * 10 ** (-15 / 20) * np.random.default_rng(9).standard_normal(len(sound)),
        "tone": sound + 0.03 * np.sin(2 * np.pi * 1000 * time),
        "telephone": lfilter([1, -0.95], [1.0, -0.5], sound),
        "rate": resample(resample(sound, RATE, 11_025), 11_025, RATE),
        "hum": sound + 0.1 * np.sin(2 * np.pi * 60 * time),
    }[change]
    found = found_in(babble(4, 2), sound, babble(4, 3), changed[700:].astype(np.float32))
    assert [(each.first, each.second) for each in found] == [(1, 3)]
    assert found[0].overlap > 3


def test_other_speech_silence_tones_and_scraps_are_not_duplicates() -> None:
    time = np.arange(4 * RATE) / RATE
    tone = (0.1 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    noise = [0.01 * np.random.default_rng(seed).standard_normal(4 * RATE).astype(np.float32) for seed in range(4)]
    silence = np.zeros(4 * RATE, np.float32)
    assert found_in(*(babble(4, seed) for seed in range(20))) == []
    assert found_in(tone, tone, silence, silence, *noise) == []
    assert found_in(babble(1, 1), babble(1, 1), silence[:300], silence[:300], silence[:0]) == []
    assert find_duplicates([]) == []


def test_speech_that_occurs_often_makes_one_group() -> None:
    same = babble(3, 0)
    prints = [print_of(np.concatenate([babble(0.6, seed), same])) for seed in range(1, 41)]
    found = find_duplicates(prints)
    group = {0}
    for _ in range(5):
        group |= {other for each in found for other in (each.first, each.second) if {each.first, each.second} & group}
    assert group == set(range(40))


def test_prints_are_small() -> None:
    assert len(print_of(babble(8, 1))) == pytest.approx(2000, rel=0.02)


@pytest.mark.processes
def test_the_work_grows_with_the_number_of_utterances() -> None:
    """Prints of noise that changes as slowly as speech does: four times as many in less than six times the time."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4000, 110, 20))
    noise = 20 * lfilter([1.0], [1.0, -0.57], noise, axis=1)
    prints = [each.tobytes() for each in np.clip(np.round(noise), -127, 127).astype(np.int8)]
    spent = []
    for number in (1000, 4000):
        start = process_time()
        assert find_duplicates(prints[:number]) == []
        spent.append(process_time() - start)
    assert spent[1] < 6 * spent[0]


@pytest.mark.processes
def test_clips_that_occur_in_two_real_recordings_are_found() -> None:
    if not RAW.is_dir():
        pytest.skip("needs recordings with known truth at ../shared/raw")
    import soundfile

    prints, names = [], []
    for path in sorted(RAW.glob("*.json")):
        truth = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(truth, dict):
            samples, rate = soundfile.read(RAW / truth["audio"], dtype="float32", always_2d=True)
            sound = resample(samples.mean(axis=1), rate, RATE)
            for row in truth["utterances"]:
                prints.append(print_of(sound[round((row["start"] - 0.1) * RATE) : round((row["end"] + 0.2) * RATE)]))
                names.append(row["id"] if row["end"] - row["start"] >= 2 else None)
    pairs = {(i, j) for j, name in enumerate(names) for i in range(j) if name and names[i] == name}
    found = {(each.first, each.second) for each in find_duplicates(prints)}
    assert len(pairs) > 40
    assert len(pairs & found) >= 0.99 * len(pairs)
    assert all(names[i] == names[j] or None in (names[i], names[j]) for i, j in found)
