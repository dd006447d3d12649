"""The demo's bars: which hold and which break, given the judges' answers."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from higgstune.demo.measure import Clips, measure
from higgstune.demo.page import next_commands


class TableTranscriber:
    """Looks the transcripts up in a table, by file name."""

    name = "table 1"

    def __init__(self, transcripts: dict[str, str]) -> None:
        self.transcripts = transcripts

    def transcribe(
        self, files: Sequence[Path], *, language: str | None = None, seconds: float | None = None
    ) -> list[str]:
        assert (language, seconds) == ("en", None)
        return [self.transcripts[file.name] for file in files]


class Voices:
    """Knows a voice by the file's name; the other model calls every voice the same."""

    name = "voices 1"

    def similarities(self, references: Sequence[Path], files: Sequence[Path]) -> dict[str, list[float]]:
        assert references == [Path("r.wav")]
        return {"resemblyzer": [0.9 if "good" in file.name else 0.5 for file in files], "other": [0.4] * len(files)}


# For each set its file, by which the speaker judge knows the voice, and what the ASR reads in it.
TAKES = {
    "round trip": ("good-r.wav", "hello there"),
    "before": ("bad-b.wav", "hello there"),
    "after": ("good-a.wav", "hello there"),
    "swapped": ("good-s.wav", "good day"),
    "zeroed": ("bad-z.wav", "hello there"),
}


@pytest.mark.parametrize(
    ("changed", "stopped", "broken"),
    [
        ({}, {}, set()),
        ({"after": ("good-a.wav", "good day")}, {}, {"word error rate, after"}),
        ({"before": ("bad-b.wav", "good day")}, {}, {"word error rate, before"}),
        ({"swapped": ("good-s.wav", "hello there")}, {}, {"word error rate, swapped texts"}),
        ({"after": ("bad-a.wav", "hello there")}, {}, {"resemblyzer, after"}),
        ({"before": ("good-b.wav", "hello there")}, {}, {"resemblyzer, before"}),
        ({"zeroed": ("good-z.wav", "hello there")}, {}, {"resemblyzer, zeroed"}),
        ({}, {"after": False}, {"clips that stop in time"}),
        ({}, {"before": False}, {"clips that stop in time"}),
    ],
)
def test_bars_hold_or_break(changed: dict[str, tuple[str, str]], stopped: dict[str, bool], broken: set[str]) -> None:
    takes = TAKES | changed
    asr = TableTranscriber(dict(takes.values()))
    sets = [
        Clips(name, [Path(file)], ["Hello there."], [] if "round trip" in name else [stopped.get(name, True)])
        for name, (file, _) in takes.items()
    ]
    result = measure(sets, [Path("r.wav")], asr, Voices())
    found = {bar.name for bar in result.bars if not bar.holds}
    # "other" gives every file 0.4, so its bar is 0.35 and the base and the zeroed adapter are above it.
    assert found == broken | {"other, before", "other, zeroed"}
    assert not result.passed
    assert len(result.bars) == 1 + 3 + 2 * 3
    assert result.judges == "table 1, voices 1"
    assert {row.stopped for row in result.rows if "round trip" in row.name} == {None}


def test_similarities_are_means_over_the_clips_and_may_be_the_only_measure() -> None:
    clips = [Path("good.wav"), Path("bad.wav")]
    sets = [Clips(name, clips, ["One.", "Two."], [True, True]) for name in TAKES]
    result = measure(sets, [Path("r.wav")], None, Voices())
    assert [row.similarity for row in result.rows] == [{"resemblyzer": pytest.approx(0.7), "other": 0.4}] * 5
    assert {row.error_rate for row in result.rows} == {None}
    assert {bar.name.split(",")[0] for bar in result.bars} == {"resemblyzer", "other", "clips that stop in time"}


def test_the_next_commands_are_typed_as_they_are_printed() -> None:
    commands = [shlex.split(command) for _, command in next_commands(Path("my runs/demo"), 'Say "yes", it\'s me.')]
    assert commands[0][:3] == ["higgstune", "speak", 'Say "yes", it\'s me.']
    assert [command[1] for command in commands] == ["speak", "evaluate", "export", "demo"]
    assert all("my runs/demo" in command for command in commands[:3])
