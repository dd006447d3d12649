"""How verbs end: the result in words, the verdict, and the command to type next, which the command line takes."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import Command
from tiny_runs import DEMO_CODEC, make_recordings

from higgstune.cli.endings import print_exported, print_trained
from higgstune.cli.main import app
from higgstune.evaluation.verdict import Verdict
from higgstune.exporting.export import ExportResult
from higgstune.exporting.verify import ExportCheck
from higgstune.progress import duration
from higgstune.training.run_dir import ChosenStep, RunResult, StageResult
from higgstune.training.verify import Verification


def next_command(out: str) -> str:
    """The command that the last line names; it must be one that the command line takes."""
    line = out.splitlines()[-1]
    program, verb, *arguments = shlex.split(line.removeprefix("next: "))
    assert program == "higgstune"
    typer.main.get_group(app).commands[verb].make_context(verb, arguments)
    return line.removeprefix("next: ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.61, "0.6 seconds"), (1, "1 second"), (60, "60 seconds"), (231, "3.9 minutes"), (5990, "100 minutes"),
     (7200, "2 hours"), (360_000, "100 hours")],
)  # fmt: skip
def test_durations_are_in_the_unit_that_people_use(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_prepare_ends_with_words_and_the_training_to_type(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_recordings(tmp_path / "in put")
    (tmp_path / "in put" / "mute.wav").write_bytes((tmp_path / "in put" / "clip0.wav").read_bytes())
    code, out, err = command("prepare", "in put", "--out", "data/my voice", "--codec", DEMO_CODEC)
    assert code == 0, err
    assert "data/my voice: 8 clips, 7.6 seconds (train: 7 clips, 6.8 seconds; validation: 1 clip" in out
    assert "refused: 1 no transcript; all of them are in data/my voice/rejected.jsonl" in out
    assert "None" not in out
    assert "{" not in out
    assert next_command(out) == (
        f"higgstune train voice --set 'data.store=data/my voice' --set model.codec={DEMO_CODEC} --out 'runs/my voice'"
    )


def test_nothing_usable_is_said_without_a_dictionary(tmp_path: Path, command: Command) -> None:
    make_recordings(tmp_path / "in", clips=1)
    (tmp_path / "in" / "clip0.txt").unlink()
    _, _, err = command("prepare", tmp_path / "in", "--out", tmp_path / "data", "--codec", DEMO_CODEC)
    assert "no row can be used: 1 no transcript; all are in" in err


def run_of(folder: Path, verdict: Verdict | None, **changes: Any) -> RunResult:
    stage = StageResult(
        kind="full", steps=450, layers=1, compiled=False, checkpointed_layers=0, parameters=1, sharded_parameters=0,
        history=[], verification=Verification("float32", 1e-5, 0.0, 1.0), verdict=verdict, **changes,
    )  # fmt: skip
    return RunResult(folder, folder / "voice" / "adapter", {"voice": stage})


def test_train_ends_with_a_sentence_to_speak(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ChosenStep(450, "the last step", True, [])
    found = run_of(Path("runs/voice"), Verdict("usable", loss=4.5, base_loss=6.25), chosen=chosen)
    print_trained(found, 231.0, Path("voice"), [])
    out = capsys.readouterr().out
    for line in (
        "stage voice: full, 450 steps; ends with the last one; validation audio loss 6.25 before, 4.50 after",
        "time: 3.9 minutes",
        "verdict: usable",
    ):
        assert line in out.splitlines()
    assert next_command(out) == ("higgstune speak 'Good morning, how are you?' --adapter runs/voice --out voice.wav")


def test_a_run_that_is_not_usable_ends_with_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = Verdict("not usable", ["x"], "Try it.", change=("stages.0.learning_rate=1e-05",))
    print_trained(
        run_of(Path("runs/voice"), verdict), 1.0, Path("voice"), ["stages.0.learning_rate=1", "data.store=data/a b"]
    )
    assert next_command(capsys.readouterr().out) == (
        "higgstune train voice --set 'data.store=data/a b' --set stages.0.learning_rate=1e-05 --out runs/voice-2"
    )
    print_trained(run_of(Path("runs/voice"), Verdict("not usable", ["x"])), 1.0, Path("voice"), [])
    assert next_command(capsys.readouterr().out) == "higgstune doctor --recipe runs/voice/recipe.yaml"


@pytest.mark.parametrize(("format", "option"), [("native", "--model"), ("boson", "--model"), ("peft", "--adapter")])
def test_export_ends_with_a_sentence_to_speak(format: Any, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    check = ExportCheck("bfloat16", 0.2, 0.06729, 2.5, 4, "validation clips of the store voice")
    print_exported(ExportResult(Path("models/voice"), format, "bfloat16", check))
    out = capsys.readouterr().out
    assert (
        "logits differ on average by 0.067 (0.2 is allowed), and by 2.5 from the base's, on 4 validation clips" in out
    )
    assert next_command(out) == (f"higgstune speak 'Good morning, how are you?' {option} models/voice --out voice.wav")
