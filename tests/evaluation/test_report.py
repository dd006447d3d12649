"""The report of a run: its page, its figures, and how numbers and words are shown."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pages import HOSTILE, Page, history

from higgstune.errors import DataError
from higgstune.evaluation.report import curves
from higgstune.evaluation.report.measures import change_rows, glances, metric_of, metric_rows
from higgstune.evaluation.report.page import (
    Candidate,
    Change,
    Choice,
    Item,
    RunReport,
    Section,
    System,
    Table,
    Take,
    write_report,
)
from higgstune.evaluation.report.players import audio_url, badness, complaints, marked, take_of
from higgstune.evaluation.verdict import Verdict
from higgstune.metrics import NOT_MEASURED, Difference, Estimate, verdict

TEMPLATES = Path(curves.__file__).parent / "templates"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(24_000) / 20), 24_000)
    return path


def full_report(clip: Path, words: str) -> RunReport:
    """A report with every part of the page; `words` stand wherever a user's words can."""
    estimate, difference = Estimate(0.05, 0.02, 0.09, 40), Difference(0.03, 0.01, 0.06, 0.004, 0.008, 40)
    summary = {"wer": estimate, "similarity": Estimate(math.nan, math.nan, math.nan, 0)}
    candidates = [
        Candidate(words, 100, {"wer": 0.3, "similarity": None}, [words]),
        Candidate("stage1", 200, {"wer": 0.05, "similarity": 0.8}, chosen=True),
    ]
    return RunReport(
        title=words,
        introduction=words,
        facts={words: words},
        histories={"stage1": history(), words: history()},
        verdicts={words: Verdict("not usable", [words], words, [words]), "stage1": Verdict("usable")},
        evaluations={
            "stage1": [{"step": 100, "wer": 0.3}, {"step": 200, "wer": 0.05}],
            words: [{"step": 1, "wer": 0.9}],
        },
        choice=Choice(words, words, words, candidates),
        systems=[System(words, {"wer": estimate}), System("adapter", summary)],
        measures_note=words,
        judges={words: words},
        not_measured={"naturalness": words},
        guard=[Change("wer", estimate, estimate, difference, words), Change("cap_rate", None, None, None)],
        guard_note=words,
        sections=[
            Section(words, (words, "base"), [Item(words, (Take(clip, words, [words]), None), "en", words, words)])
        ],
        tables=[Table(words, (words, "b"), [(words, None)], words)],
        environment={words: words},
        commands=[(words, words)],
        timings={words: math.pi},
    )


def written(report: RunReport, tmp_path: Path) -> str:
    write_report(report, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_self_contained_and_what_strangers_wrote_stays_text(clip: Path, tmp_path: Path) -> None:
    text = written(full_report(clip, HOSTILE), tmp_path)
    page = Page(text)
    page.check()
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert len(page.all("audio")) == 1
    assert HOSTILE in "".join(page.texts)
    assert "3.1 s" in text


def test_every_part_that_is_empty_is_left_out(tmp_path: Path) -> None:
    page = Page(written(RunReport("A voice", "", {"data": "1 clip"}), tmp_path))
    page.check()
    assert [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)] == ["h1", "h2"]


def test_unmeasured_values_are_named_and_no_nan_is_shown(clip: Path, tmp_path: Path) -> None:
    text = "".join(Page(written(full_report(clip, "words"), tmp_path)).texts)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    similarity = text[text.index("similarity to the speaker") :][:200]
    assert similarity.split().count("measured") == 2  # the base lacks it, and the adapter's is not a number


def test_the_verdict_stands_at_the_head_of_the_page(tmp_path: Path) -> None:
    verdicts = {
        "words": Verdict("no verdict", ["there are no validation rows"]),
        "voice": Verdict("not usable", ["it is at chance"], "Try a lower rate", ["the warm-up is long"]),
    }
    page = Page(written(RunReport("A voice", "", {}, verdicts=verdicts), tmp_path))
    text = " ".join(" ".join(page.texts).split())
    head = text[: text.index("What was trained")]
    assert "words: no verdict : there are no validation rows" in head
    assert "voice: not usable : it is at chance Try a lower rate Warning: the warm-up is long" in head


def test_a_page_grows_by_its_clips_alone(clip: Path, tmp_path: Path) -> None:
    def size(items: int) -> int:
        section = Section("Clips", ("a",), [Item("text", (Take(clip),))] * items)
        return len(written(RunReport("A voice", "", {}, {"a": history(5000)}, sections=[section]), tmp_path))

    one = len(audio_url(clip)[0])
    assert size(11) - size(1) < 10 * (one + 3000)
    assert size(1) < 150_000
    assert one < 20_000  # a second of audio


def test_clips_of_any_rate_and_channels_become_mp3_and_broken_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((96_000, 2)), 96_000)
    url, seconds = audio_url(path)
    assert url.startswith("data:audio/mpeg;base64,")
    assert seconds == 1.0
    path.write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"clip\.wav"):
        audio_url(path)


def _luminance(colour: tuple[float, ...]) -> float:
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def _contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_contrast_with_their_grounds(scheme: str) -> None:
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    light, dark = (re.findall(r"--([\w-]+): #(\w{6})", block) for block in style.split("@media screen and", 1))
    colours = {
        name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for name, value in (light if scheme == "light" else dark)
    }
    share = float(re.findall(r"var\(--share\) \* (\d+)%", style)[0]) / 100
    colours["cell"] = tuple(
        share * accent + (1 - share) * paper for accent, paper in zip(colours["accent"], colours["paper"], strict=True)
    )
    texts = [(text, ground) for text in ("ink", "muted", "bad", "accent") for ground in ("paper", "panel")]
    texts += [("good", "paper"), ("on-accent", "accent"), ("on-mark", "mark"), ("ink", "cell"), ("muted", "cell")]
    for text, ground in texts:
        assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for curve in [name for name in colours if re.fullmatch(r"[sq]\d", name)] + ["focus"]:
        assert _contrast(colours[curve], colours["paper"]) >= 3, curve


def _pieces(text: str, transcript: str, at_most: int = 50) -> list[tuple[str, str]]:
    return [(piece.kind, piece.words) for piece in marked(text, transcript, at_most=at_most)]


def test_wrong_and_missed_words_are_marked() -> None:
    assert _pieces("Hello, there old friend!", "hello dear old friend now") == [
        ("right", "hello"), ("missed", "there"), ("wrong", "dear"), ("right", "old friend"), ("wrong", "now"),
    ]  # fmt: skip
    assert _pieces("It's Caf\u00e9 time", "its cafe\u0301 time") == [("right", "its cafe\u0301 time")]
    assert _pieces("one two", "") == [("missed", "one two")]
    assert _pieces("今天天气好", "今天天汽好") == [
        ("right", "今天天"),
        ("missed", "气"),
        ("wrong", "汽"),
        ("right", "好"),
    ]


def test_chance_matches_are_not_marked_and_endless_transcripts_are_cut() -> None:
    assert _pieces("one two three", "la la two " * 20) == [("wrong", " ".join(["la la two"] * 16 + ["la la"])),
                                                           ("wrong", "… and 10 more")]  # fmt: skip
    assert _pieces("a b c d", "a b c d", at_most=2) == [("right", "a b"), ("wrong", "… and 2 more")]


def test_metrics_are_rows_with_intervals_and_a_plot_within_its_scale() -> None:
    first = System("base", {"wer": Estimate(0.12, 0.09, 0.15, 40), "f0_shift": Estimate(-4.1, -4.9, -3.2, 40)})
    second = System("adapter", {"wer": Estimate(0.05, 0.04, 0.06, 40), "duration_ratio": Estimate(1.2, 1.1, 1.3, 9)})
    wer, duration, pitch = metric_rows([first, second])
    assert (wer.label, wer.better) == ("word error rate", "lower is better")
    assert [(cell.value, cell.interval) for cell in wer.cells] == [("12.0 %", "9.0 to 15.0"), ("5.0 %", "4.0 to 6.0")]
    assert wer.ends == ("0.0 %", "15.0 %")
    assert wer.cells[0].place is not None
    assert wer.cells[0].place[2] == 96
    assert duration.ends == ("1.00", "1.30")
    assert duration.goal == 4
    assert [cell.value for cell in duration.cells] == [NOT_MEASURED, "1.20"]
    assert pitch.cells[0].value == "−4.10 semitones"


def test_what_has_no_spread_or_no_interval_is_shown_too() -> None:
    same, bare = Estimate(0.0, 0.0, 0.0, 40), Estimate(0.5, math.nan, math.nan, 1)
    (row,) = metric_rows([System("a", {"cap_rate": same}), System("b", {"cap_rate": bare})])
    assert [cell.place for cell in row.cells] == [(4.0, 4.0, 4.0), None]  # from 0 to 100 %
    assert row.cells[1].value == "50.0 %"


@pytest.mark.parametrize(
    ("name", "before", "after", "p", "expected"),
    [
        ("wer", 0.1, 0.2, 0.01, "worse"),
        ("wer", 0.2, 0.1, 0.01, "better"),
        ("wer", 0.1, 0.2, 0.05, "no clear difference"),
        ("similarity", 0.8, 0.7, 0.01, "worse"),
        ("duration_ratio", 0.7, 1.1, 0.01, "better"),
        ("duration_ratio", 1.1, 0.7, 0.01, "worse"),
        ("f0_shift", -4.0, 1.0, 0.01, "better"),
        ("wer", 0.1, 0.2, math.nan, NOT_MEASURED),
    ],
)
def test_better_and_worse_follow_the_metric(name: str, before: float, after: float, p: float, expected: str) -> None:
    a, b = (Estimate(value, value, value, 9) for value in (before, after))
    assert verdict(metric_of(name), a, b, Difference(after - before, 0, 0, p / 2, p, 9)) == expected


def test_what_got_worse_comes_first() -> None:
    a, b = Estimate(0.1, 0, 0.2, 9), Estimate(0.2, 0.1, 0.3, 9)
    better, worse = Difference(-0.1, -0.2, 0, 0.0004, 0.0008, 9), Difference(0.1, 0, 0.2, 0.03, 0.03, 9)
    rows = change_rows(
        [Change("wer", None, b, None), Change("wer", b, a, better), Change("wer", a, b, worse, "German")]
    )
    assert [row.verdict for row in rows] == ["worse", "better", NOT_MEASURED]
    assert (rows[0].label, rows[0].difference, rows[0].p) == ("word error rate, German", "+10.0 points", "p = 0.030")
    assert (rows[1].interval, rows[1].p) == ("−20.0 to +0.0", "p < 0.001")


def test_at_a_glance_there_are_the_last_systems_numbers() -> None:
    base, adapter = System("base", {"wer": Estimate(0.2, 0, 1, 9)}), System("adapter", {"wer": Estimate(0.1, 0, 1, 9)})
    (found,) = glances([base, adapter])
    assert (found.name, found.value, found.others) == ("adapter", "10.0 %", [("base", "20.0 %")])
    assert glances([base, System("adapter", {})]) == []


def test_a_clips_faults_are_named_in_words(clip: Path) -> None:
    good: dict[str, Any] = {"words": 4, "word_errors": 0, "similarity": 0.9, "transcript": "all is well"}
    bad = {**good, "word_errors": 4, "hit_cap": 1, "right_speaker": 0, "naturalness": 2.0}
    assert complaints(good) == []
    assert complaints(bad) == ["word error rate 100 %", "did not stop", "nearer to another speaker"]
    assert complaints({"words": None}) == []
    assert badness(bad) > badness({**good, "word_errors": 4}) > badness({**good, "similarity": 0.2}) > badness(good)
    assert take_of(bad, clip).notes == [*complaints(bad), "similarity 0.90", "naturalness 2.0"]


def test_any_number_of_stages_has_a_panel_each_and_long_curves_are_thinned() -> None:
    figure = curves.losses_figure({f"stage{i}": history(3000) for i in range(12)})
    assert [panel.title for panel in figure.panels] == [f"stage{i}" for i in range(12)]
    assert [key.label for key in figure.keys] == ["audio", "audio, validation"]
    assert "audio: " in figure.panels[0].summary
    assert len(curves.codebooks_figure({"full": history(3000)}).panels[0].svg) < 40_000
    assert [panel.title for panel in curves.codebooks_figure({"full": history()}).panels] == ["stage full"]


def test_figures_have_the_pages_colours_and_one_without_points_is_nothing() -> None:
    svg = curves.losses_figure({"a": history()}).panels[0].svg
    assert "var(--s0)" in svg
    assert not re.search(r"#0[abc]00", svg)
    assert svg == curves.losses_figure({"a": history()}).panels[0].svg
    assert not curves.losses_figure({"a": [], "b": [{"step": 1, "audio_loss": math.nan, "text_loss": None}]})


def test_the_chosen_checkpoint_is_marked() -> None:
    evaluations = {"full": [{"step": 100, "wer": 0.3}, {"step": 200, "wer": 0.05}]}
    plain, marked_one = (curves.evaluations_figure(evaluations, chosen) for chosen in (None, ("full", 200)))
    assert [key.label for key in marked_one.keys] == ["full", "chosen checkpoint"]
    assert "var(--ink)" in marked_one.panels[0].svg
    assert "var(--ink)" not in plain.panels[0].svg
    assert "5 at step 200" in plain.panels[0].summary


def test_stages_of_a_run_follow_each_other_where_runs_are_laid_over_each_other() -> None:
    runs = {"two": {"text": history(4), "full": history(4)}, "one": {"full": history(8)}}
    summary = curves.overlaid_losses(runs).panels[0].summary
    assert "two: 5 at step 1, 1.25 at step 8" in summary
    assert "one: 5 at step 1, 0.625 at step 8" in summary
