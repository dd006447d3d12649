"""The demo's bars: which hold and which break, given the judges' answers."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from higgstune.demo.measure import Clips, measure


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


@pytest.mark.parametrize(
    ("adapted", "swapped", "adapted_file", "broken"),
    [
        ("hello there", "good day", "good-a.wav", set()),
        ("good day", "good day", "good-a.wav", {"error rate of training sentences"}),
        ("hello there", "hello there", "good-a.wav", {"error rate with swapped texts"}),
        ("hello there", "good day", "bad-a.wav", {"resemblyzer, adapted"}),
    ],
)
def test_bars_hold_or_break(adapted: str, swapped: str, adapted_file: str, broken: set[str]) -> None:
    files = {"round trip": "good-r.wav", "base": "bad-b.wav", "adapted": adapted_file,
             "swapped": "good-s.wav", "zeroed": "bad-z.wav"}  # fmt: skip
    asr = TableTranscriber({"good-r.wav": "hello there", "bad-b.wav": "hello there", adapted_file: adapted,
                 "good-s.wav": swapped, "bad-z.wav": "hello there"})  # fmt: skip
    sets = [Clips(name, [Path(file)], ["Hello there."]) for name, file in files.items()]
    result = measure(sets, [Path("r.wav")], asr, Voices())
    found = {bar.name for bar in result.bars if not bar.holds}
    # "other" gives every file 0.4, so its bar is 0.35 and the base and the zeroed adapter are above it.
    assert found == broken | {"other, base", "other, zeroed"}
    assert not result.passed
    assert len(result.bars) == 2 + 2 * 3
    assert result.judges == "table 1, voices 1"


def test_similarities_are_means_over_the_clips_and_may_be_the_only_measure() -> None:
    names = ("round trip", "base", "adapted", "swapped", "zeroed")
    sets = [Clips(name, [Path("good.wav"), Path("bad.wav")], ["One.", "Two."]) for name in names]
    result = measure(sets, [Path("r.wav")], None, Voices())
    assert [row.similarity for row in result.rows] == [{"resemblyzer": pytest.approx(0.7), "other": 0.4}] * 5
    assert {row.error_rate for row in result.rows} == {None}
    assert {bar.name.split(",")[0] for bar in result.bars} == {"resemblyzer", "other"}
