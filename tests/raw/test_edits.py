"""Decisions: their lines, undo, and what cuts and joins make of utterances."""

import json
from pathlib import Path
from typing import Any

import pytest

from higgstune.errors import DataError
from higgstune.raw.edits import Decision, DecisionLog, Item, Replay, read_edits, recut
from higgstune.raw.measure import UtteranceMeasures
from higgstune.raw.utterances import Part, Utterance

ITEMS = [
    Item("talk.wav-00001000", "talk.wav", 1.0, 6.0, ((1.15, 2.5), (3.0, 5.8)), "We went home. She stayed."),
    Item("talk.wav-00006000", "talk.wav", 6.0, 9.0, ((6.15, 8.8),), "And then?"),
    Item("other.wav-00000000", "other.wav", 0.0, 3.0, ((0.15, 2.8),), None),
]
FIRST, SECOND = "talk.wav-00001000", "talk.wav-00006000"


def log(folder: Path, *lines: dict[str, Any]) -> DecisionLog:
    made = DecisionLog(folder)
    made.append(*lines)
    return made


def replayed(*lines: dict[str, Any]) -> Replay:
    return Replay(ITEMS, [Decision.parse(number, line) for number, line in enumerate(lines, 1)])


def test_the_last_decision_of_each_key_counts(tmp_path: Path) -> None:
    log(
        tmp_path,
        {"id": "a", "text": "One.", "keep": True},
        {"id": "a", "keep": False},
        {"ids": ["a", "b"], "speaker": "anna"},
        {"id": "a", "text": "Two."},
    )
    assert read_edits(tmp_path) == {"a": {"text": "Two.", "keep": False, "speaker": "anna"}, "b": {"speaker": "anna"}}
    assert read_edits(tmp_path / "nowhere") == {}


def test_an_undo_is_a_line_and_can_be_undone(tmp_path: Path) -> None:
    lines = log(tmp_path, {"id": "a", "keep": True}, {"id": "a", "keep": False}, {"undo": 2})
    assert read_edits(tmp_path) == {"a": {"keep": True}}
    lines.append({"undo": 3})
    assert read_edits(tmp_path) == {"a": {"keep": False}}
    assert [one.number for one in DecisionLog(tmp_path).active] == [1, 2]


def test_an_unfinished_last_line_does_not_count_and_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    path.write_text('{"id": "a", "keep": true}\n{"id": "b", "ke', encoding="utf-8")
    lines = DecisionLog(tmp_path)
    assert [one.ids for one in lines.decisions] == [("a",)]
    lines.append({"id": "c", "text": "Größe"})
    assert path.read_text(encoding="utf-8") == '{"id": "a", "keep": true}\n{"id": "c", "text": "Größe"}\n'


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    (tmp_path / "review.jsonl").write_text('{"id": "a", "keep": true}')
    lines = DecisionLog(tmp_path)
    lines.append({"undo": 1})
    assert [one.undo for one in DecisionLog(tmp_path).decisions] == [None, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "not an object"),
        ("{", "Expecting"),
        ('{"keep": true}', "no id"),
        ('{"ids": [], "keep": true}', "no id"),
        ('{"id": "a"}', "decides nothing"),
        ('{"id": "a", "kepe": true}', "unknown key 'kepe'"),
        ('{"id": "a", "keep": "yes"}', "keep is not a yes or no"),
        ('{"id": "a", "text": 3}', "text is not a text"),
        ('{"id": "a", "speaker": ""}', "speaker is empty"),
        ('{"id": "a", "cut": []}', "no time"),
        ('{"id": "a", "cut": [2, 1]}', "in order"),
        ('{"id": "a", "cut": [NaN]}', "in order"),
        ('{"id": "a", "cut": [1], "texts": ["x"]}', "as many as"),
        ('{"id": "a", "cut": [1], "join": "b"}', "one utterance alone"),
        ('{"id": "a", "cut": [1], "text": "x"}', "texts belong to a cut"),
        ('{"ids": ["a", "b"], "join": "c"}', "one utterance alone"),
        ('{"undo": 1}', "earlier line"),
        ('{"undo": 0}', "earlier line"),
    ],
)
def test_a_line_that_is_not_a_decision_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "review.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=rf"review\.jsonl:1: .*{message}"):
        DecisionLog(tmp_path)


def test_a_wrong_line_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no id"):
        DecisionLog(tmp_path).append({"id": "a", "keep": True}, {"keep": True})
    assert not (tmp_path / "review.jsonl").exists()


def test_a_cut_in_a_pause_keeps_the_margins_of_both_pieces() -> None:
    done = replayed({"id": FIRST, "cut": [2.8], "texts": ["We went home.", "She stayed."]})
    first, second, _ = done.of("talk.wav")
    assert (first.id, first.start, first.end, first.speech) == (FIRST, 1.0, 2.7, ((1.15, 2.5),))
    assert (second.id, second.start, second.end) == ("talk.wav-00002850", 2.85, 6.0)
    assert second.speech == ((3.0, 5.8),)
    assert [first.text, second.text] == ["We went home.", "She stayed."]
    assert first.made_of == second.made_of == (FIRST,)


def test_a_cut_within_speech_parts_it() -> None:
    first, second, _ = replayed({"id": FIRST, "cut": [4.0]}).of("talk.wav")
    assert (first.end, second.start) == (4.0, 4.0)
    assert first.speech == ((1.15, 2.5), (3.0, 4.0))
    assert second.speech == ((4.0, 5.8),)
    assert first.text is second.text is None


def test_a_cut_beside_speech_trims() -> None:
    one, _ = replayed({"id": FIRST, "cut": [5.9], "texts": ["All of it.", ""]}).of("talk.wav")
    assert (one.id, one.end, one.text) == (FIRST, 5.9, "All of it.")
    one, _ = replayed({"id": FIRST, "cut": [1.1], "texts": ["", "All of it."]}).of("talk.wav")
    assert (one.id, one.start, one.end) == ("talk.wav-00001100", 1.1, 6.0)  # an id follows from the start


def test_a_join_appends_the_next_one() -> None:
    done = replayed({"id": FIRST, "text": "We left."}, {"id": FIRST, "join": SECOND})
    (one,) = done.of("talk.wav")
    assert (one.id, one.start, one.end, one.text) == (FIRST, 1.0, 9.0, "We left. And then?")
    assert one.speech == ((1.15, 2.5), (3.0, 5.8), (6.15, 8.8))
    assert one.made_of == (FIRST, SECOND)
    assert FIRST not in done.edits


def test_what_was_cut_can_be_joined_and_cut_again() -> None:
    done = replayed(
        {"id": FIRST, "cut": [2.8], "texts": ["a", "b"]},
        {"id": FIRST, "join": "talk.wav-00002850", "text": "a b"},
        {"id": FIRST, "cut": [4.0], "texts": ["c", "d"]},
        {"id": "talk.wav-00004000", "join": SECOND},
    )
    first, second = done.of("talk.wav")
    assert (first.end, second.start, second.end, second.text) == (4.0, 4.0, 9.0, "d And then?")
    assert second.made_of == (FIRST, FIRST, SECOND)
    assert not done.unused


def test_a_cut_ends_decisions_about_the_text_but_not_about_the_speaker() -> None:
    done = replayed(
        {"id": FIRST, "text": "Old.", "keep": True, "speaker": "anna"},
        {"id": FIRST, "cut": [2.8], "texts": ["a", "b"]},
        {"id": "talk.wav-00002850", "keep": True},
    )
    assert done.edits == {FIRST: {"speaker": "anna"}, "talk.wav-00002850": {"speaker": "anna", "keep": True}}


@pytest.mark.parametrize(
    "line",
    [
        {"id": "gone", "keep": True},
        {"id": FIRST, "cut": [0.5]},
        {"id": FIRST, "cut": [6.0]},
        {"id": SECOND, "join": FIRST},
        {"id": FIRST, "join": "other.wav-00000000"},
        {"id": SECOND, "join": "gone"},
    ],
)
def test_what_fits_no_utterance_is_left_out_and_named(line: dict[str, Any]) -> None:
    done = replayed(line)
    assert [one.ids for one in done.unused] == [(line["id"],)]
    assert list(done.items.values()) == sorted(ITEMS, key=lambda item: item.start)


def test_a_cut_that_was_collected_already_leaves_later_decisions() -> None:
    """Behind a collection, the list has the pieces, and the log still has the cut."""
    pieces = replayed({"id": FIRST, "cut": [2.8], "texts": ["a", "b"]}).of("talk.wav")
    lines = [
        {"id": FIRST, "text": "Old.", "speaker": "anna"},
        {"id": FIRST, "cut": [2.8], "texts": ["a", "b"]},
        {"id": "talk.wav-00002850", "text": "New."},
    ]
    done = Replay(pieces, [Decision.parse(number, line) for number, line in enumerate(lines, 1)])
    assert done.edits == {FIRST: {"speaker": "anna"}, "talk.wav-00002850": {"text": "New."}}


def test_lines_are_whole_on_the_disk(tmp_path: Path) -> None:
    for number in range(3):
        log(tmp_path, {"id": f"utterance {number}", "keep": True})
        lines = (tmp_path / "review.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == [f"utterance {index}" for index in range(number + 1)]


MEASURES = UtteranceMeasures(loudness=-23.0, true_peak=-3.0, snr=30.0, clipped=0.0, clipped_runs=0, dc=-60.0)


def part_of(path: str, utterances: list[Utterance]) -> Part:
    return Part(
        path=path, sha256=path, seconds=20.0, rate=16_000, channels=1, damage=None, lossless=True, text=None,
        language="en", voices=[], hum=None, utterances=utterances,
    )  # fmt: skip


def spoken(
    start: float, end: float, *speech: list[float], speaker: int | None = 0, given: str | None = None
) -> Utterance:
    return Utterance(start, end, list(speech), speaker, None, given, "words", -0.2, MEASURES, "print")


def test_a_part_is_cut_and_joined_and_what_is_new_is_not_measured() -> None:
    utterances = [
        spoken(1.0, 6.0, [1.15, 2.5], [3.0, 5.8], speaker=None, given="a b"),
        spoken(6.0, 9.0, [6.15, 8.8], given="c"),
        spoken(9.0, 12.0, [9.15, 11.8], given="d"),
        spoken(12.0, 15.0, [12.15, 14.8]),
    ]
    part = part_of("talk.wav", utterances)
    other = part_of("more/talk.wav", [utterances[1]])
    lines = [
        {"id": FIRST, "cut": [2.8], "texts": ["a", "b"]},
        {"id": SECOND, "join": "talk.wav-00009000"},
        {"id": SECOND, "keep": True},
        {"id": "gone", "keep": True},
    ]
    decisions = [Decision.parse(number, line) for number, line in enumerate(lines, 1)]
    (new, same), edits, unused = recut([part, other], decisions)
    assert [(one.start, one.end, one.given) for one in new.utterances] == [
        (1.0, 2.7, "a"), (2.85, 6.0, "b"), (6.0, 12.0, "c d"), (12.0, 15.0, None),
    ]  # fmt: skip
    assert [one.print for one in new.utterances] == ["", "", "", "print"]
    assert all((one.recognised, one.logprob) == (None, None) for one in new.utterances[:3])
    assert [one.speaker for one in new.utterances] == [None, None, 0, 0]
    assert new.utterances[3] is utterances[3]
    assert same == other
    assert edits == {SECOND: {"keep": True}}
    assert [one.ids for one in unused] == [("gone",)]


def test_what_two_speakers_say_is_the_known_ones_once_it_is_joined() -> None:
    utterances = [spoken(1.0, 6.0, [1.15, 5.8], speaker=None), spoken(6.0, 9.0, [6.15, 8.8], speaker=2)]
    part = part_of("talk.wav", utterances)
    (new,), _, _ = recut([part], [Decision.parse(1, {"id": FIRST, "join": SECOND})])
    assert [(one.speaker, one.speech) for one in new.utterances] == [(2, [[1.15, 5.8], [6.15, 8.8]])]
