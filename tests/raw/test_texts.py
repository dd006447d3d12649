"""The words of utterances: cues whose times are wrong, and a text without times."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgstune.data.importers.subtitles import Cue
from higgstune.raw.speech import Region
from higgstune.raw.texts import align_text, find_offset, join_words, keeps_border, place_cues

WORDS = ["aye", "bee", "sea", "dee.", "eee,", "eff"]


def spoken(count: int, random: np.random.Generator) -> tuple[list[Region], list[tuple[int, int]]]:
    """Regions, and which of them, from first to last, each of `count` sentences has."""
    regions, sentences, at = [], [], 0.5
    for _ in range(count):
        first = len(regions)
        for _ in range(random.integers(1, 4)):
            length = random.uniform(0.6, 3)
            regions.append(Region(at, at + length))
            at += length + random.uniform(0.12, 0.3)
        sentences.append((first, len(regions) - 1))
        at += random.uniform(0.35, 1.0)
    return regions, sentences


@settings(max_examples=200)
@given(st.integers(0, 10_000))
def test_cues_up_to_0_3_s_off_get_their_own_speech(seed: int):
    random = np.random.default_rng(seed)
    regions, sentences = spoken(8, random)
    cues = [
        Cue(regions[a].start + random.uniform(-0.3, 0.3), regions[b].end + random.uniform(-0.3, 0.3), f"text {n}", None)
        for n, (a, b) in enumerate(sentences)
    ]
    placed = place_cues(cues, regions)
    found = [(index, text) for index, text in enumerate(placed.texts) if text is not None]
    assert " ".join(text for _, text in found) == " ".join(cue.text for cue in cues)  # nothing lost, nothing twice
    right = {(a, f"text {n}") for n, (a, _) in enumerate(sentences)}
    assert len(right & set(found)) >= 7


def test_speech_in_no_cue_has_no_text_and_a_cue_without_speech_is_named():
    regions = [Region(1, 3), Region(10, 12), Region(20, 22)]
    cues = [Cue(1, 3, "One.", "Anna"), Cue(14, 16, "Nobody says this.", None), Cue(20, 22, "Three.", "Bo")]
    placed = place_cues(cues, regions)
    assert placed.texts == ["One.", None, "Three."]
    assert placed.speakers == ["Anna", None, "Bo"]
    assert placed.unspoken == ["Nobody says this."]


@settings(max_examples=100)
@given(st.integers(0, 10_000), st.floats(-20, 20))
def test_a_constant_offset_is_found_and_none_where_there_is_none(seed: int, late: float):
    random = np.random.default_rng(seed)
    regions, sentences = spoken(24, random)
    off = random.uniform(-0.2, 0.2, (len(sentences), 2))
    cues = [
        Cue(regions[a].start + late + first, regions[b].end + late + last, "", None)
        for (a, b), (first, last) in zip(sentences, off, strict=True)
    ]
    assert find_offset(cues, regions) == pytest.approx(
        late if abs(late) > 0.5 else 0.0, abs=0.2 if abs(late) > 0.5 else 0.6
    )
    others, sentences = spoken(24, random)  # of another film
    cues = [Cue(others[a].start, others[b].end, "", None) for a, b in sentences]
    assert find_offset(cues, regions) == 0.0


def test_a_drift_or_few_cues_have_no_offset():
    regions, sentences = spoken(40, np.random.default_rng(1))
    drift = [Cue(1.04 * regions[a].start, 1.04 * regions[b].end, "", None) for a, b in sentences]
    assert find_offset(drift, regions) == 0.0
    few = [Cue(regions[a].start + 1, regions[b].end + 1, "", None) for a, b in sentences[:5]]
    assert find_offset(few, regions) == find_offset([], regions) == find_offset(few, []) == 0.0


def test_cues_without_a_pause_between_them_are_one():
    placed = place_cues([Cue(1, 3, "One", None), Cue(3, 5, "and two.", None)], [Region(1, 5)])
    assert placed.texts == ["One and two."]
    assert placed.unspoken == []


def test_regions_of_one_cue_belong_together():
    placed = place_cues([Cue(1, 5, "One and two.", None)], [Region(1, 2.8), Region(3.1, 5), Region(8, 9)])
    assert placed.joined == [False, True, False]
    assert placed.texts == ["One and two.", None, None]


def test_a_text_is_kept_letter_by_letter():
    text = "«Well», said Mr. O'Brien — it's 1455, isn't it? Yes; it is."
    texts, unspoken = align_text(text, ["well said mister o'brien", "its fourteen fifty five isn't it", "yes it is"])
    assert texts == ["«Well», said Mr. O'Brien —", "it's 1455, isn't it?", "Yes; it is."]
    assert unspoken == []


def test_what_nobody_says_is_named_and_in_no_utterance():
    text = "CHAPTER ONE In which nothing happens. It was a dark night. The rain fell in torrents."
    texts, unspoken = align_text(text, ["it was a dark night", "the rain fell in torrents"])
    assert texts == ["It was a dark night.", "The rain fell in torrents."]
    assert unspoken == ["CHAPTER ONE In which nothing happens."]


@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=6), min_size=1, max_size=6),
    st.data(),
)
def test_no_word_of_a_text_is_lost_or_doubled(sentences: list[list[str]], data: st.DataObject):
    text = " ".join(word for sentence in sentences for word in sentence)
    recognised = [" ".join(word for word in sentence if data.draw(st.integers(0, 4))) for sentence in sentences]
    texts, unspoken = align_text(text, recognised)
    assert len(texts) == len(sentences)
    assert sorted(" ".join([*texts, *unspoken]).split()) == sorted(text.split())


@pytest.mark.parametrize("recognised", [[], [""], ["", ""]])
def test_a_text_of_which_nothing_is_recognised_is_unspoken(recognised: list[str]):
    texts, unspoken = align_text("One two three four five.", recognised)
    assert texts == [""] * len(recognised)
    assert unspoken == ["One two three four five."]


def test_scripts_without_spaces_are_parted_by_characters():
    texts, unspoken = align_text("今天天气很好。我们去公园。", ["今天天汽很好", "我们去公园"])
    assert texts == ["今天天气很好。", "我们去公园。"]
    assert unspoken == []


def test_a_border_is_kept_where_its_words_are_side_by_side():
    assert keeps_border("the rain fell", "in torrents.", "The rain fell in torrents.")
    assert keeps_border("a storm came", "in torrents", "the storm came in torrents")  # another slip is not a cut
    assert not keeps_border("the rain fe", "in torrents", "the rain fell in torrents")
    assert not keeps_border("the rain", "in torrents", "the rain fell in torrents")
    assert not keeps_border("the rain fell", "in torrents", "the rain fell and in torrents")
    assert keeps_border("", "in torrents", "in torrents")
    assert not keeps_border("", "in torrents", "fell in torrents")


def test_cues_of_single_words_are_joined_by_region():
    regions = [Region(1, 2), Region(3, 4)]
    cues = [Cue(1.0, 1.4, "One", "Anna"), Cue(1.4, 2.1, "two.", "Anna"), Cue(2.9, 4, "Three.", "Anna")]
    assert [cue.text for cue in join_words(cues, regions)] == ["One two.", "Three."]
    sentences = [Cue(1, 2, "One two.", None), Cue(3, 4, "Three four.", None)]
    assert join_words(sentences, regions) == sentences
