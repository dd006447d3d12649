"""Judges, measures and the report page."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from higgstune.demo.measure import Clips, measure
from higgstune.errors import ConfigError, WorkError
from higgstune.evaluate.judges import FasterWhisper, SpeakerJudge, word_error_rate
from higgstune.report.page import Report, Section, write_report

SCRIPT = """
import json, sys
split = sys.argv.index("--")
assert sys.argv[1] == "--reference"
for file in sys.argv[split + 1:]:
    print("loading")
    print(json.dumps({"file": file, "resemblyzer": 0.9 if "good" in file else 0.5, "other": 0.4}))
"""


@pytest.fixture
def judge(tmp_path: Path) -> SpeakerJudge:
    script = tmp_path / "judge.py"
    script.write_text(SCRIPT)
    return SpeakerJudge(f"{sys.executable} {script}")


def test_word_errors_are_summed_over_the_corpus_without_case_and_punctuation() -> None:
    assert word_error_rate(["Hello, there!", "It's a cat."], ["hello there", "its a dog"]) == pytest.approx(1 / 5)


def test_a_speaker_judge_is_a_command_that_prints_json_lines(judge: SpeakerJudge) -> None:
    found = judge.similarities([Path("r.wav")], [Path("good.wav"), Path("bad.wav")])
    assert found == pytest.approx({"resemblyzer": 0.7, "other": 0.4})
    with pytest.raises(WorkError, match="judge failed"):
        SpeakerJudge(f"{sys.executable} -c 'raise SystemExit(3)'").similarities([], [])
    with pytest.raises(ConfigError, match="cannot be run"):
        SpeakerJudge("/no/such/judge").similarities([], [])
    with pytest.raises(ConfigError, match="empty"):
        SpeakerJudge(" ")


def test_an_asr_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--asr"):
        FasterWhisper(str(tmp_path / "nothing"))


class Ears:
    """Hears what stands in a table of file names."""

    name = "ears"

    def __init__(self, heard: dict[str, str]) -> None:
        self.heard = heard

    def transcribe(self, files: Any) -> list[str]:
        return [self.heard[file.name] for file in files]


@pytest.mark.parametrize(
    ("adapted", "swapped", "adapted_file", "broken"),
    [
        ("hello there", "good day", "good-a.wav", set()),
        ("good day", "good day", "good-a.wav", {"error rate of training sentences"}),
        ("hello there", "hello there", "good-a.wav", {"error rate with swapped texts"}),
        ("hello there", "good day", "bad-a.wav", {"resemblyzer, adapted", "other, adapted"}),
    ],
)
def test_bars_hold_or_break(
    judge: SpeakerJudge, adapted: str, swapped: str, adapted_file: str, broken: set[str]
) -> None:
    files = {"round trip": "good-r.wav", "base": "bad-b.wav", "adapted": adapted_file,
             "swapped": "good-s.wav", "zeroed": "bad-z.wav"}  # fmt: skip
    ears = Ears({"good-r.wav": "hello there", "bad-b.wav": "hello there", adapted_file: adapted,
                 "good-s.wav": swapped, "bad-z.wav": "hello there"})  # fmt: skip
    sets = [Clips(name, [Path(file)], ["Hello there."]) for name, file in files.items()]
    result = measure(sets, [Path("r.wav")], ears, judge)
    found = {bar.name for bar in result.bars if not bar.holds}
    # "other" gives every file 0.4, so its bar is 0.35 and the base is above it.
    assert found - {"other, base", "other, zeroed"} == broken - {"other, adapted"}
    assert not result.passed
    assert len(result.bars) == 2 + 2 * 3


def test_the_page_is_self_contained_and_escapes_texts(tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, 0.1 * np.sin(np.arange(24_000) / 20), 24_000)
    history = [{"step": s, "audio_loss": 5 / s, "eval_audio_loss": 5.0, "audio_loss_0": 1.0} for s in range(1, 9)]
    text = 'He said "<b>stop</b>".'
    report = Report(
        title="A voice",
        introduction="What this is.",
        facts={"data": "1 clip"},
        histories={"stage1": history, "stage2": history},
        sections=[Section("Clips", ("original", "before"), [(text, (clip, None))])],
        measures=[{"clips": "adapted", "word error rate": "3.0 %"}],
        timings={"all": math.pi},
    )
    write_report(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<b>stop" not in page
    assert page.count("<audio") == 1
    assert page.count("data:image/png;base64") == 2
    assert "3.1 s" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
