"""The data card and the advice: what they say is what the data set holds, in a page that requests nothing else."""

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
from pages import HOSTILE, Page

from higgstune.data.importers import read_source
from higgstune.evaluation.test_sets import read_sentences
from higgstune.raw.advice import VOICE_MINUTES, advise, common_pairs, next_sentences, units_of
from higgstune.raw.card import COST, HTML, MARKDOWN, write_card
from higgstune.raw.choose import choose, find_baseline
from higgstune.raw.collect import _summary
from higgstune.raw.dataset import CACHE, MANIFEST, clip_path, write_lists
from higgstune.raw.measure import UtteranceMeasures
from higgstune.raw.recipe import CollectRecipe
from higgstune.raw.utterances import Part, Utterance

ROOT = Path(__file__).parents[2]
RATE = 8_000
MODELS = {"vad": "ears 1", "speakers": None, "asr": "knowing 2"}


def an_utterance(number: int, text: str, **changes: Any) -> Utterance:
    """Four seconds of a recording, with a pause of a second behind them."""
    start = 5.0 * number
    values: dict[str, Any] = {
        "start": start,
        "end": start + 4.0,
        "speech": [[start + 0.2, start + 3.8]],
        "speaker": 0,
        "name": None,
        "given": text,
        "recognised": text,
        "logprob": -0.2,
        "measures": UtteranceMeasures(-25.0 - number % 9, -6.0, 30.0, 0.0, 0, -60.0),
        "print": "",
    }
    measures = {key: changes.pop(key) for key in ("snr", "loudness") if key in changes}
    values |= changes
    return Utterance(**(values | {"measures": replace(values["measures"], **measures)}))


def a_part(utterances: list[Utterance], path: str = "talk.wav", language: str | None = "en") -> Part:
    return Part(
        path, path * 8, 5.0 * len(utterances), RATE, 1, None, True, "talk.txt", language, [], None, utterances,
        models=MODELS,
    )  # fmt: skip


def a_recipe(**settings: Any) -> CollectRecipe:
    """Settings that refuse no pace: these utterances all have the same length."""
    return CollectRecipe(**({"rate_deviations": 1000} | settings))


def texts(count: int) -> list[str]:
    return [sentence.text for sentence in read_sentences("en")[:count]]


def a_card(out: Path, parts: list[Part], recipe: CollectRecipe | None = None, *, copied: bool = True) -> Any:
    """A data set in a folder as `collect` leaves it, with clips of noise: its `collect.json`."""
    recipe = recipe or a_recipe()
    (out / CACHE).mkdir(parents=True, exist_ok=True)
    chosen = choose(parts, recipe, {}, find_baseline(parts, recipe, copied=copied))
    for one in chosen if copied else []:
        if one.refused is None:
            clip_path(out, one.id).parent.mkdir(exist_ok=True)
            soundfile.write(clip_path(out, one.id), 0.1 * np.random.default_rng(1).standard_normal(RATE), RATE)
    write_lists(chosen, out, out / "raw", copied=copied, origin=recipe.origin)
    advice = advise(chosen, parts, recipe)
    summary = replace(_summary(out, parts, chosen, {"x.wav": "/home/anna/my raw/x.wav is broken"}), advice=advice)
    content = asdict(summary) | {"recipe": recipe.model_dump(), "higgstune": "9.9"}
    write_card(out, chosen, parts, content)
    return content


def the_advice(parts: list[Part], **settings: Any) -> str:
    recipe = a_recipe(**settings)
    return "\n".join(advise(choose(parts, recipe, {}, find_baseline(parts, recipe, copied=True)), parts, recipe))


def page_of(out: Path) -> Page:
    """The card, checked like every page, with links into the folder as the only ones."""
    text = (out / HTML).read_text()
    page = Page(text.replace('src="clips/', 'src="data:clips/'))
    page.check()
    return page


def test_the_card_says_what_the_data_set_holds(tmp_path: Path):
    said = [an_utterance(n, text) for n, text in enumerate(texts(30))]
    said[3] = replace(said[3], measures=replace(said[3].measures, snr=2.0))
    said[4] = replace(said[4], recognised="something else entirely is said")
    content = a_card(tmp_path / "out", [a_part(said)], a_recipe(consent="Anna, for all uses, 2026"))
    page, markdown = page_of(tmp_path / "out"), (tmp_path / "out" / MARKDOWN).read_text()
    shown = " ".join(" ".join(page.texts).split())
    assert content["refused"] == {"noise": 1, "text": 1}
    for words in ("noise 1", "text 1", "kept 28", "knowing 2", "Anna, for all uses, 2026", "not stated"):
        assert words in shown
    assert "| noise | 1 | 4 seconds |" in markdown
    assert "| kept | 28 | 1.9 minutes |" in markdown.replace("112 seconds", "1.9 minutes")
    assert "- consent: Anna, for all uses, 2026" in markdown
    assert "- licence: not stated" in markdown
    figures = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert [figure.split(",")[0].split(":")[0] for figure in figures] == [
        "Length", "Level before the gain", "SNR", "Speech rate", "Difference of given and recognised text"
    ]  # fmt: skip
    assert "28 utterances from 4 to 4, median 4" in figures[0]


def test_players_are_links_into_the_folder_and_every_text_is_escaped(tmp_path: Path):
    said = [an_utterance(n, text) for n, text in enumerate([*texts(12), HOSTILE, "a | b `c` [d](http://e)"])]
    a_card(tmp_path / "out", [a_part(said, "odd #1%20 name?.wav")], a_recipe(source=HOSTILE))
    page, text = page_of(tmp_path / "out"), (tmp_path / "out" / HTML).read_text()
    links = [audio["src"] or "" for audio in page.all("audio")]
    assert len(links) == 20
    for link in links:
        assert (tmp_path / "out" / unquote(link.removeprefix("data:"))).is_file()
        assert not re.search(r"[#? ]", link)
    assert "alert(1)</script>" not in text
    markdown = (tmp_path / "out" / MARKDOWN).read_text()
    assert "<script>" not in markdown
    assert re.search(
        r"a \\\| b \\`c\\` \\\[d\\\]\(http://e\)\]\(clips/odd%20%231%2520%20name%3F\.wav-\d+\.flac\)", markdown
    )


def test_no_path_of_the_machine_is_in_it(tmp_path: Path):
    a_card(tmp_path / "out", [a_part([an_utterance(0, "Good morning.")])])
    for name in (HTML, MARKDOWN):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path) not in text
        assert "/home" not in text
        assert "x.wav is broken" in text


def test_the_same_data_set_has_the_same_card_and_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = [a_part([an_utterance(n, text) for n, text in enumerate(texts(40))])]
    written = []
    for place in ("one", "two"):
        a_card(tmp_path / place / "voice", parts)
        written.append([(tmp_path / place / "voice" / name).read_bytes() for name in (HTML, MARKDOWN)])
    assert written[0] == written[1]
    monkeypatch.setattr("higgstune.raw.card.new_axis", None)
    a_card(tmp_path / "one" / "voice", parts)
    with pytest.raises(TypeError):
        a_card(tmp_path / "one" / "voice", [a_part([replace(one, logprob=-0.9) for one in parts[0].utterances])])


def test_the_worst_come_with_their_reasons(tmp_path: Path):
    said = [an_utterance(n, text) for n, text in enumerate(texts(30))]
    said[17] = replace(said[17], measures=replace(said[17].measures, snr=12.0), recognised=said[17].given[:-12])  # type: ignore[index]
    a_card(tmp_path / "out", [a_part(said)])
    worst = (tmp_path / "out" / MARKDOWN).read_text().partition("## The ten worst")[2]
    first = next(line for line in worst.splitlines() if line.startswith("- "))
    assert "clips/talk.wav-00085000.flac" in first
    assert "speech is 12.0 dB above noise or music" in first
    assert "of its characters differ" in first


def test_without_copies_the_card_lacks_players(tmp_path: Path):
    a_card(tmp_path / "out", [a_part([an_utterance(0, "Good morning.")])], copied=False)
    assert page_of(tmp_path / "out").all("audio") == []


def test_nothing_kept_is_a_card_too(tmp_path: Path):
    content = a_card(tmp_path / "out", [a_part([an_utterance(0, "Good morning.", snr=-3.0)])])
    page_of(tmp_path / "out")
    assert content["advice"] == [
        "0 seconds kept of 5 seconds, 0 % (0 of 1 utterances; the rest is refused, or pauses)",
        "Most often refused for: noise (1 of 1 refused utterances; the threshold is 10)",
    ]


def test_origin_travels_into_manifest_rows(tmp_path: Path):
    recipe = a_recipe(source="own phone", licence="CC-BY-4.0", consent="Anna, 2026")
    a_card(tmp_path / "out", [a_part([an_utterance(0, "Good morning.")])], recipe)
    row = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (row["source"], row["licence"], row["consent"]) == ("own phone", "CC-BY-4.0", "Anna, 2026")
    [found] = [one.content for one in read_source(tmp_path / "out")]
    assert (found.text, found.licence, found.consent) == ("Good morning.", "CC-BY-4.0", "Anna, 2026")


def test_cost_is_of_all_calls(tmp_path: Path):
    (tmp_path / "out" / CACHE).mkdir(parents=True)
    for number, seconds in enumerate((30.0, 12.0)):
        (tmp_path / "out" / CACHE / f"{number}{COST}").write_text(json.dumps(seconds))
    a_card(tmp_path / "out", [a_part([an_utterance(0, "Good morning.")])])
    text = (tmp_path / "out" / MARKDOWN).read_text()
    assert "CPU time of the recordings: 42 seconds" in text
    assert "for an hour of them: 8.4 hours" in text


def test_speech_in_both_splits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = [an_utterance(n, text) for n, text in enumerate(texts(20))]
    said[19] = replace(said[19], given=said[0].given, recognised=said[0].given)
    pair = SimpleNamespace(first=2, second=19, overlap=1.5, cosine=0.9)
    monkeypatch.setattr("higgstune.raw.choose.find_duplicates", lambda prints: [pair])
    content = a_card(tmp_path / "out", [a_part(said)])
    table = (tmp_path / "out" / MARKDOWN).read_text().partition("## Duplicates")[2]
    assert "| talk.wav-00010000 | talk.wav-00095000 | 1.5 s of it |" in table
    assert "| talk.wav-00000000 | talk.wav-00095000 | the text" in table
    assert any(
        line.startswith("The same speech is in training") and "pairs of utterances: 1;" in line
        for line in content["advice"]
    )


def test_words_are_counted_against_frequent_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    frequent = {"en": ["the", "good", "0000", "morning", "zebra"], "zh": ["早上", "晚上"]}
    fake = SimpleNamespace(available_languages=lambda: frequent, top_n_list=lambda language, n: frequent[language][:n])
    monkeypatch.setitem(sys.modules, "wordfreq", fake)  # type: ignore[arg-type]
    a_card(
        tmp_path / "out",
        [a_part([an_utterance(0, "The good morning!")]), a_part([an_utterance(0, "早上好。")], "zh.wav", "zh")],
    )
    text = (tmp_path / "out" / MARKDOWN).read_text()
    assert "| en: words | 3 of 4 | zebra |" in text
    assert "| zh: words | 1 of 2 | 晚上 |" in text
    assert "zh: characters" in text


def test_the_real_list_of_frequent_words():
    pytest.importorskip("wordfreq")
    from higgstune.raw.card import _frequent_words

    words = _frequent_words("en")
    assert words is not None
    assert len(words) == 1000
    assert {"the", "you", "water"} <= set(words)
    assert _frequent_words("xx") == []


def test_enough_is_what_the_documentation_says():
    assert f"designed for {VOICE_MINUTES} minutes of speech" in (ROOT / "docs/howto/record.md").read_text()
    assert "3 to 15 s" in (ROOT / "docs/howto/record.md").read_text()
    few = [a_part([an_utterance(n, "Good morning.") for n in range(449)])]
    assert "Less than the recipe voice is designed for: the only speaker assumed has 30 minutes" in the_advice(few)
    assert "record 4 seconds more" in the_advice(few)
    many = [a_part([an_utterance(n, "Good morning.") for n in range(450)])]
    assert "Enough for a voice, recipe voice: the only speaker assumed has 30 minutes (designed" in the_advice(many)


def test_each_sentence_has_its_number_and_threshold():
    said = [an_utterance(n, text, loudness=-30.0 + n) for n, text in enumerate(texts(21))]
    said[5] = replace(said[5], recognised=said[5].given[:150])  # type: ignore[index]
    said[6] = an_utterance(6, "Good morning.", snr=15.0, loudness=-24.0)
    said[7] = replace(said[7], given=None)
    advice = the_advice([a_part(said)], min_snr=5)
    assert "105 seconds" not in advice
    assert "84 seconds kept of 1.8 minutes, 80 % (21 of 21 utterances" in advice
    assert "5 % of the given texts differ from what is recognised" in advice
    assert "(1 of 20; by more than 10 % of their characters)" in advice
    assert "(1 of 21 have no given text)" in advice
    assert "The level varies by 18 dB, and by 18 dB after the gain (5th to 95th percentile of 21" in advice
    assert "(1 of 21 are below 20 dB, the median is 30 dB)" in advice
    assert "State before you publish it: source, licence, consent" in advice
    assert all(line.endswith(")") for line in advice.splitlines())


def test_a_good_data_set_gets_no_complaint():
    said = [an_utterance(n, text) for n, text in enumerate(5 * texts(100))]
    advice = the_advice([a_part(said)], source="a", licence="b", consent="c")
    assert "Enough for a voice" in advice
    for words in ("Noise", "mumbling", "State before", "Record next", "validation", "shorter"):
        assert words not in advice


def test_sentences_to_record_next_cover_what_is_missing():
    common = common_pairs("en")
    assert {"th", "in", "ed"} <= common
    advice = the_advice([a_part([an_utterance(0, "Good morning.")])])
    missing = common - units_of(["Good morning."])
    chosen = next_sentences("en", missing)
    assert len(chosen) == 5
    assert all(text in advice for text in chosen)
    assert f"{len(missing)} of {len(common)} common letter pairs" in advice
    best = max(len(units_of([sentence.text]) & missing) for sentence in read_sentences("en"))
    assert len(units_of(chosen[:1]) & missing) == best
    assert len(units_of(chosen) & missing) > len(units_of(texts(5)) & missing)
    assert next_sentences("en", {"qz"}) == []
    assert "Record next" not in the_advice([a_part([an_utterance(0, "Bonjour.")], language="fr")])
