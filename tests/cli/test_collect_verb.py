"""The verb `collect`: what it prints, its exit codes, and the command to type next."""

import json
import shlex
from pathlib import Path

import pytest
from commands import Command
from raw_recordings import make_talk

TURNS = [("rms", n, 0.7) for n in range(8)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with a recording and its subtitles as labels."""
    folder = tmp_path / "my recordings"
    folder.mkdir()
    talk = make_talk(folder / "talk.wav", TURNS)
    labels = [f"{said.start:.2f}\t{said.end:.2f}\t{said.text}" for said in talk.said]
    (folder / "talk.txt").write_text("\n".join(labels))
    return folder


def next_command(output: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(("next: ", "once all")) or "next:" in line)
    return shlex.split(line.partition("higgstune ")[2])


def test_it_ends_with_minutes_reasons_and_the_next_command(raw: Path, tmp_path: Path, command: Command) -> None:
    code, out, err = command("collect", raw, "--out", tmp_path / "data set")
    assert code == 0
    assert "seconds kept of" in out
    assert "talk.txt is read as Audacity labels" in out
    assert "no model separated speakers" in out
    assert "collecting" in err
    miniature = Path(__file__).parents[2] / "src/higgstune/demo/assets/codec"
    again, prepared, _ = command(*next_command(out), "--codec", miniature)
    assert again == 0
    assert "train: " in prepared


def test_the_next_command_works_without_copies_too(raw: Path, tmp_path: Path, command: Command) -> None:
    _, out, _ = command("collect", raw, "--out", tmp_path / "data", "--no-copy")
    miniature = Path(__file__).parents[2] / "src/higgstune/demo/assets/codec"
    code, prepared, _ = command(*next_command(out), "--codec", miniature)
    assert code == 0
    assert "train: " in prepared


def test_prepare_does_both(raw: Path, tmp_path: Path, command: Command) -> None:
    miniature = Path(__file__).parents[2] / "src/higgstune/demo/assets/codec"
    code, _, _ = command("prepare", raw, "--out", tmp_path / "store", "--collect", "--codec", miniature)
    assert code == 0
    assert (tmp_path / "store-raw" / "manifest.jsonl").is_file()
    assert (tmp_path / "store" / "store.json").is_file()
    code, _, err = command("prepare", raw, "--out", tmp_path / "store", "--asr", "base", "--codec", miniature)
    assert code == 2
    assert "--asr belongs to --collect" in err


def test_a_shard_without_recordings_is_not_a_failure(raw: Path, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("collect", raw, "--out", tmp_path / "out", "--shard", "2/2")
    assert code == 0
    assert "0 recordings" in out


def test_json_is_the_summary_alone(raw: Path, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("collect", raw, "--out", tmp_path / "out", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["utterances"] == len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    saved = json.loads((tmp_path / "out" / "collect.json").read_text())
    assert saved | found == saved


def test_without_any_text_it_says_what_to_do_and_fails(raw: Path, tmp_path: Path, command: Command) -> None:
    (raw / "talk.txt").unlink()
    code, out, _ = command("collect", raw, "--out", tmp_path / "out")
    assert code == 2
    assert "no text" in out
    assert next_command(out)[-2] == "--asr"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing/", "--out", "out"), "nothing does not exist"),
        (("{raw}", "--out", "{raw}"), "its own folder"),
        (("{raw}", "--out", "out", "--shard", "3/2"), "I/N"),
        (("{raw}", "--out", "out", "--speakers", "0"), "at least 1"),
        (("{raw}", "--out", "out", "--asr", "no/such/model"), "no/such/model"),
        (("{raw}", "--out", "out", "--speaker-model", "python judge.py"), "no embeddings"),
    ],
)
def test_wrong_input_is_one_line(
    raw: Path, tmp_path: Path, command: Command, arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = command("collect", *(argument.format(raw=raw) for argument in arguments))
    assert code == 2
    assert said in err.splitlines()[-1]


def test_ctrl_c_says_how_to_resume(
    raw: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("higgstune.raw.collect.collect_recording", stop)
    code, _, err = command("collect", raw, "--out", tmp_path / "out")
    assert code == 130
    assert "the same command resumes" in err
