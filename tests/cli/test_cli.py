"""The command: every verb, its help, its JSON, its exit codes."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from commands import Command
from fake_codec import FakeCodec
from recordings import speech, write
from rich.table import Table
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import DEMO_CODEC, make_recordings

import higgstune
from higgstune.cli.output import mute_libraries, print_table
from higgstune.environment import check_versions
from higgstune.errors import CheckpointError, Interrupted, WorkError

VERBS = ("prepare", "inspect", "recipe", "train", "speak", "evaluate", "compare", "export", "doctor", "demo")

RECIPE = "data: {store: store}\nmodel: {checkpoint: x/y}\nstages: [{name: a, kind: full, epochs: 1}]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its codec, and recordings of which one is broken."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_checkpoint(folder / "base")
    shutil.copytree(DEMO_CODEC, folder / "base" / "codec")
    make_recordings(folder / "recordings", step=4, glide=30)
    (folder / "recordings" / "broken.wav").write_bytes(b"RIFF")
    (folder / "recordings" / "broken.txt").write_text("Not to be used.")
    return folder


def test_every_verb_has_help_with_an_example(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)
    for verb in VERBS:
        code, out, _ = command(verb, "--help")
        assert code == 0
        assert f"Example: higgstune {verb}" in out
        assert "--json" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_80_columns_and_shows_no_ranges(command: Command, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = command(verb, "--help")
    assert max(map(len, out.splitlines())) <= 80
    assert "<=" not in out.replace('"wer <= 0.1"', "")  # but for an example of a rule
    assert "<bool>" not in out
    options = re.findall(r"^│[ *]*(--[\w-]+)(.*)│$", out, re.MULTILINE)
    assert all(re.search(r"[a-z]{2}", rest) for _, rest in options), "an option is not explained"
    assert len(out.splitlines()) < 70


@pytest.mark.processes
def test_help_and_import_do_not_bring_torch() -> None:
    check = "import sys, higgstune, higgstune.cli.main; assert 'torch' not in sys.modules; print(higgstune.__version__)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == higgstune.__version__


def test_the_public_names_are_there() -> None:
    for name in higgstune.__all__:
        assert getattr(higgstune, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        _ = higgstune.no_such


@pytest.mark.processes
def test_from_recordings_to_speech(world: Path, command: Command) -> None:
    store, run = world / "data", world / "run"
    code, out, _ = command(
        "prepare", world / "recordings", "--out", store, "--model", world / "base", "--device", "cpu", "--json"
    )
    assert code == 0
    summary = json.loads(out)
    assert sum(summary["accepted"].values()) == 8
    assert sum(summary["refused"].values()) == 1
    assert "broken.wav" in (store / "rejected.jsonl").read_text()

    code, out, _ = command("inspect", store, "--row", 0, "--tokens", "--json")
    row = json.loads(out)
    assert code == 0
    assert row["prompt"].endswith("<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>")
    assert row["audio_label_entries"] == 8 * (row["frames"] + 1)
    assert row["audio_rows"] == row["frames"] + 9
    code, out, _ = command("inspect", store, "--row", row["id"], "--tokens")
    assert code == 0
    assert row["prompt"] in out
    assert "1025" in out

    recipe = world / "recipe.yaml"
    recipe.write_text(
        "data: {store: x}\nstages: [{name: s, kind: full, max_steps: 3, learning_rate: 5.0e-3, batch_size: 4}]\n"
    )
    settings = ("--set", f"data.store={store}", "--set", f"model.checkpoint={world / 'base'}", "--set", "lora.r=4")
    code, out, err = command("train", recipe, "--out", run, *settings, "--set", "model.device=cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["stages"]["s"]["verification"]["from_trained"] <= 1e-5
    assert "audio" in err  # progress lines
    code, _, err = command("train", recipe, "--out", run, *settings, "--set", "model.device=cpu")
    assert code == 2
    assert "is finished and is not overwritten" in err

    speech = world / "x.wav"
    code, out, _ = command(
        "speak", "Hello there.", "--adapter", run, "--out", speech, "--max-seconds", 0.3, "--device", "cpu",
        "--reference", world / "recordings" / "clip0.wav", "--reference-text", "The sun rises.", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out) == {"files": [str(speech)]}
    said = ("speak", "Hello there.", "--adapter", run, "--max-seconds", 0.3, "--device", "cpu", "--temperature", 0)
    assert command(*said, "--out", speech)[0] == command(*said, "--out", world / "grown.wav", "--stream")[0] == 0
    whole, grown = (soundfile.read(file)[0] for file in (speech, world / "grown.wav"))
    np.testing.assert_allclose(whole, grown, atol=2 / 32768)
    piped = subprocess.run(
        [sys.executable, "-m", "higgstune", *map(str, said), "--stream", "--out", "-"], capture_output=True, check=True
    )
    assert piped.stdout[44:] == (world / "grown.wav").read_bytes()[44:]
    code, _, err = command("speak", "--file", recipe, "--model", world / "base", "--stream")
    assert code == 2
    assert "leave out --file" in err
    asr = f"{sys.executable} {world / 'asr.py'}"
    (world / "asr.py").write_text(ASR)
    code, out, _ = command(*said, "--out", speech, "--check", asr, "--json")
    assert code == 0
    assert json.loads(out) == {"files": [str(speech)], "spoken_again": 1}
    lines = world / "lines.txt"
    lines.write_text("Hello.\n\n... !\nGood morning.\n", encoding="utf-16")
    code, out, err = command(
        "speak", "--file", lines, "--model", world / "base", "--out", world / "lines", "--max-seconds", 0.2,
        "--device", "cpu", "--temperature", 0,
    )  # fmt: skip
    assert code == 1
    assert sorted(path.name for path in (world / "lines").iterdir()) == ["0001.wav", "0003.wav"]
    assert f"not spoken: line 3 of {lines} has no letter and no digit" in err
    assert "1 of 3 lines" in err
    assert "not_spoken: line 3" in out


# An ASR that finds other words in every clip.
ASR = """
import json, sys
for file in sys.argv[1:]:
    print(json.dumps({"file": file, "text": "something else"}))
"""
LONG = "x" * 300  # no file name can have it

# Wrong in a way that needs no model to be seen: arguments, and what the error names. `run` is a run, `store` a store.
WRONG = (
    (("prepare", "nowhere", "--out", "x"), "nowhere"),
    (("prepare", "notes.md", "--out", "x"), "notes.md is of an unknown kind"),
    (("prepare", "store", "--out", "x", "--max-seconds", "0"), "must be above 0"),
    (("prepare", "empty", "--out", "x"), "holds no recording"),
    (("prepare", "", "--out", "x"), "it is empty"),
    (("prepare", "clips", "--out", ""), "it is empty"),
    (("prepare", "clips", "--out", "notes.txt"), "notes.txt is not a folder"),
    (("prepare", "clips", "--out", "x", "--validation-fraction", "1"), "below 1"),
    (("prepare", "clips", "--out", "x", "--model", "empty"), "config.json is missing"),
    (("prepare", LONG, "--out", "x"), "too long"),
    (("prepare", "--out", "x"), "name a source, or rows"),
    (("prepare", "--out", "x", "--drop", "notes.txt"), "x is not a code store"),
    (("prepare", "--out", "x", "--drop", "nowhere.txt"), "nowhere.txt cannot be read"),
    (("prepare", "clips", "--out", "x", "--limit", "snr"), "is not a measure, < or >, and a number"),
    (("inspect", "store", "--outliers", "--limit", "snrr < 3"), "did you mean 'snr'"),
    (("inspect", "store", "--limit", "snr < 3"), "it is for --outliers"),
    (("inspect", "nowhere"), "nowhere is not a code store"),
    (("inspect", r"x\[/foo]"), r"x\[/foo] is not a code store"),
    (("inspect", "store", "--row", "0", "--tokens", "--model", LONG), "too long"),
    (("inspect", "store", "--row", "0", "--model", "x/y"), "it is for --tokens"),
    (("inspect", "store", "--tokens"), "name a row with --row"),
    (("inspect", "store", "--outliers", "--row", "0"), "--outliers lists all rows"),
    (("inspect", "store", "--row", "0", "--listen", "x.mp3"), "speech is written as .wav"),
    (("speak",), "a text or --file"),
    (("speak", "--nosuch"), "No such option: --nosuch"),
    (("speak", "Hello.", "--seed", "x"), "--seed"),
    (("speak", "Hello.", "--top-p"), "--top-p"),
    (("speak", "Hello.", "--quantize", "8bit"), "'8bit' is not one of '4bit'"),
    (("inspect",), "Missing argument"),
    (("speak", "Hello."), "--adapter"),
    (("speak", "Hello.", "--model", "/no/where"), "/no/where"),
    (("speak", "Hello.", "--adapter", "/no/where"), "neither an adapter"),
    (("speak", "Hello.", "--adapter", "run", "--out", "x.mp3"), "speech is written as .wav"),
    (("speak", "Hello.", "--adapter", "run", "--device", "gpu"), "unknown device"),
    (("speak", "Hello.", "--adapter", "run", "--reference", "nowhere.wav"), "nowhere.wav"),
    (("speak", "Hello.", "--adapter", "run", "--reference-text", "Hello."), "--reference"),
    (("speak", "Hello.", "--adapter", "foreign"), "does not record its base"),
    (("speak", "--file", "nowhere.txt", "--model", "x/y"), "nowhere.txt"),
    (("speak", "--file", "notes.txt", "--model", "x/y", "--out", "o.wav"), "name it without .wav"),
    (("speak", "--file", "notes.txt", "--model", "x/y", "--out", "notes.txt"), "notes.txt is not a folder"),
    (("speak", "--file", "dots.txt", "--model", "x/y"), "no line that can be spoken: line 2 of dots.txt has no letter"),
    (("speak", "--file", "latin.txt", "--model", "x/y"), "neither UTF-8 nor UTF-16 (byte 3)"),
    (("speak", "... !!!", "--model", "x/y"), "the text to speak has no letter and no digit: there is nothing to speak"),
    (("speak", "<b>Hello</b>", "--model", "x/y"), "the text to speak: the text has the tag '<b>'"),
    (("speak", "\U0001f389", "--model", "x/y"), "the text to speak has no letter and no digit"),
    (("speak", "a <|eot_id|>", "--model", "x/y"), "the text to speak holds the control token <|eot_id|>"),
    (("speak", "Hello.", "--model", "x/y", "--scene", "<|eot_id|>"), "--scene holds the control token"),
    (
        ("speak", "Hello.", "--model", "x/y", "--reference", "silence.wav"),
        "silence.wav cannot be used: the peak",
    ),
    (
        ("speak", "Hello.", "--model", "x/y", "--reference", "voice.wav", "--reference-text", "!"),
        "--reference-text has no letter",
    ),
    (("speak", "Hello.", "--model", "x/y", "--temperature", "-1"), "temperature"),
    (("speak", "Hello.", "--model", "x/y", "--top-p", "0"), "must be above 0 and at most 1"),
    (("speak", "Hello.", "--model", "x/y", "--temperature", "inf"), "at least 0 and at most 100, not inf"),
    (("speak", "Hello.", "--model", "x/y", "--max-seconds", "1e308"), "above 0 and at most 3600, not 1e+308"),
    (("speak", "Hello.", "--model", "x/y", "--device", "meta"), "unknown device"),
    (("speak", "Hello.", "--adapter", "odd-run"), "cannot be read"),
    (("evaluate", "/no/where"), "/no/where"),
    (("evaluate", ""), "it is empty"),
    (("evaluate", LONG), "too long"),
    (("evaluate", "empty"), "empty has no clips"),
    (("evaluate", "foreign"), "does not record its base"),
    (("evaluate", "clips", "--quality-judge", "nothing"), "there is no quality judge"),
    (("evaluate", "clips", "--out", "notes.txt"), "notes.txt is not a folder"),
    (("compare", "clips", "clips", "--out", "x"), "one folder is given twice"),
    (("compare", "clips", "empty", "--out", "x"), "empty has no clips"),
    (("compare", "clips", "others", "--out", "x", "--gate", "foo(("), "not an expression"),
    (("compare", "clips", "others", "--out", "x", "--rank", "wer"), "no judge of it was named"),
    (("evaluate", "run", "--set", "nowhere.txt"), "nowhere.txt"),
    (("evaluate", "run", "--data", "nowhere"), "nowhere is not a code store"),
    (("evaluate", "run", "--guard", "en", "--no-base"), "--no-base"),
    (("compare", "run", "--out", "x"), "give 2 to 8"),
    (("export", "nowhere", "--out", "x"), "nowhere"),
    (("export", "run", "--out", "run"), "is not overwritten"),
    (("export", "run", "--out", "x", "--format", "gguf"), "'native', 'extended', 'boson', 'peft'"),
    (("export", "run", "--out", "x", "--format", "peft", "--dtype", "float32"), "--dtype has no effect"),
    (("export", "run"), "Missing option '--out'"),
    (("doctor", "--device", "gpu"), "unknown device"),
    (("demo", "--out", "run"), "remove it"),
    (("demo", "--out", "notes.txt"), "notes.txt is not a folder"),
    (("no-such-verb",), "No such command"),
    (("train", "nowhere.yaml", "--out", "x"), "nowhere.yaml"),
    (("train", "recipe.yaml", "--out", "x", "--set", "seeed=1"), "seeed"),
    (("train", "recipe.yaml", "--out", "x", "--set", r"x\[/foo]=1"), r"x\[/foo]: unknown key"),
    (("train", "recipe.yaml", "--out", "x", "--set", "lora.r=1000000000000"), "lora.r: "),
    (("train", "recipe.yaml", "--out", "x", "--set", "data.store=nowhere"), "nowhere is not a code store"),
    (("train", "recipe.yaml"), "--out"),
    (("train", "recipe.yaml", "--out", "x", "--set", "learning_rate=1"), "write stages.0.learning_rate"),
    (("train", "recipe.yaml", "--out", "x", "--set", "report_to=wandb"), "wandb is not installed"),
    (("train", "recipe.yaml", "--out", "notes.txt"), "notes.txt is not a folder"),
    (("train", "recipe.yaml", "--out", "notes.txt/run"), "notes.txt is not a folder"),
)
HEAVY = {"torch", "transformers", "peft", "pyarrow", "scipy", "bitsandbytes"}
REFUSE_ALL = """
import json, sys
from higgstune.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["higgstune", *arguments]
    try:
        main()
    except SystemExit as ended:
        print(json.dumps([ended.code, sorted(set(HEAVY) & sys.modules.keys())]))
    sys.stderr.write("\\0")
"""


@pytest.fixture
def wrong_inputs(tmp_path: Path) -> Path:
    """A working folder with something of the right kind where an error is to be about something else."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    (tmp_path / "odd-run").mkdir()
    (tmp_path / "odd-run" / "run.json").write_text('{"adapter": "a\\ud800"}')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name in ("clips", "others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.wav").write_bytes(b"")
        (tmp_path / name / "one.txt").write_text("One.")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text("{}")
    for name in ("notes.txt", "notes.md"):
        (tmp_path / name).write_text("A note.")
    (tmp_path / "dots.txt").write_text("\n... !\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    write(tmp_path / "silence.wav", np.zeros(16_000))
    write(tmp_path / "voice.wav", speech(1.0))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_wrong_input_is_refused_in_one_layout_before_heavy_imports(wrong_inputs: Path) -> None:
    script = REFUSE_ALL.replace("HEAVY", repr(sorted(HEAVY)))
    words = json.dumps([arguments for arguments, _ in WRONG])
    done = subprocess.run(
        [sys.executable, "-c", script, words], capture_output=True, text=True, cwd=wrong_inputs, check=True
    )
    before = sorted(path.name for path in wrong_inputs.iterdir())
    for (arguments, names), line, said in zip(WRONG, done.stdout.splitlines(), done.stderr.split("\0"), strict=False):
        code, heavy = json.loads(line)
        assert code == 2, arguments
        assert heavy == [], arguments
        assert said.startswith("error: "), arguments
        assert names in said, arguments
        assert not set(said) & set("╭│╰"), arguments
    assert sorted(path.name for path in wrong_inputs.iterdir()) == before


def test_outliers_are_listed_and_dropped(tmp_path: Path, command: Command) -> None:
    store, ids = tmp_path / "data", tmp_path / "ids.txt"
    make_recordings(tmp_path / "recordings")
    higgstune.prepare(tmp_path / "recordings", store, codec=FakeCodec())
    _, out, _ = command("inspect", store, "--outliers", "--limit", "peak > -90", "--json")
    report = json.loads(out)
    first = next(outlier["id"] for outlier in report["outliers"] if outlier["kind"] == "peak > -90 dBFS")
    _, out, _ = command("inspect", store, "--outliers", "--limit", "peak > -90")
    assert f"outliers: {report['rows']} rows of {report['rows']}" in out
    assert f"  {first}  " in out
    ids.write_text(f"\ufeff{first}\n\n", encoding="utf-8")
    code, out, err = command("prepare", "--drop", ids, "--out", store)
    assert (code, "dropped: 1" in out, "loading the codec" in err) == (0, True, False)
    code, out, _ = command("prepare", "--restore", ids, "--out", store, "--limit", "peak > -90", "--json")
    summary = json.loads(out)
    assert (code, summary["restored"], sum(summary["rows"].values())) == (0, 1, report["rows"] - 1)
    assert {outlier["kind"] for outlier in summary["outliers"]} >= {"peak > -90 dBFS"}
    assert command("prepare", "--drop", ids, "--out", store)[0] == 2


def test_versions_that_do_not_fit_are_refused_before_they_are_imported(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers-4.57.1.dist-info").mkdir()
    (tmp_path / "transformers-4.57.1.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 4.57.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = command("speak", "Hello.", "--model", "x/y", "--out", tmp_path / "x.wav")
    assert code == 1
    assert "transformers 4.57.1, needs >=5.23,<6" in err
    code, _, err = command("speak", "Hello.", "--model", "/no/where")
    assert code == 2
    assert "/no/where" in err
    with pytest.raises(WorkError, match=r"transformers 4\.57\.1"):
        check_versions()


@pytest.mark.parametrize(("option", "announced"), [((), True), (("--json",), False)])
def test_what_takes_time_is_announced_on_stderr(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...], announced: bool
) -> None:
    def stopped(*_: Any) -> None:
        raise CheckpointError("no further")

    monkeypatch.setattr("higgstune.model.load.load_base", stopped)
    code, _, err = command("speak", "Hello.", "--model", "x/y", "--out", tmp_path / "x.wav", *option)
    assert code == 2
    assert "no further" in err
    assert ("loading the model ..." in err) == announced


def test_a_warning_that_nobody_can_act_on_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    mute_libraries()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("model.embed"), "KeyError: 'model.embed'; this is a fault of Higgstune: HIGGSTUNE_TRACEBACK=1"),
        (RuntimeError("one\nline"), "RuntimeError: one line; this is a fault of Higgstune"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory"),
        (ImportError("no name 'x'"), "ImportError: no name 'x'; a library is missing or broken: higgstune doctor"),
    ],
)
def test_what_nobody_expected_ends_in_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr("higgstune.model.load.load_base", broken)
    arguments = ("speak", "Hello.", "--model", "x/y", "--out", tmp_path / "x.wav")
    code, _, err = command(*arguments)
    assert code == 1
    assert f"error: {message}" in err
    assert len(err.splitlines()) == 2  # "loading the model ..." is the other
    monkeypatch.setenv("HIGGSTUNE_TRACEBACK", "1")
    _, _, err = command(*arguments)
    assert "Traceback" in err


def test_ctrl_c_is_not_a_fault(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("higgstune.model.load.load_base", stopped)
    code, _, err = command("speak", "Hello.", "--model", "x/y", "--out", tmp_path / "x.wav")
    assert code == 130
    assert "fault" not in err


def test_tables_are_whole_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    words = ["model.layers." + "x" * 300, "[/b] y " * 40]
    print_table(Table("name", "finding", *map(str, range(20))))
    table = Table("name", r"finding \[/b]")
    table.add_row(*words)
    print_table(table)
    out = capsys.readouterr().out
    for word in (*words, r"finding \[/b]", "19"):
        assert word.strip() in out


def test_on_a_narrow_terminal_long_words_are_broken_and_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    table = Table("name", "finding")
    table.add_row("a" * 150, "b" * 150)
    print_table(table)
    out = capsys.readouterr().out
    assert (out.count("a"), out.count("b")) == (151, 150)  # with that of "name"
    assert "\u2026" not in out


@pytest.mark.parametrize(("ends", "code"), [(signal.SIGTERM, 143), (Interrupted(signal.SIGINT, "kept"), 130)])
def test_signals_have_the_exit_codes_of_shells(
    command: Command,
    wrong_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends: int | Interrupted,
    code: int,
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        if isinstance(ends, Interrupted):
            raise ends
        os.kill(os.getpid(), ends)
        time.sleep(10)

    monkeypatch.setattr("higgstune.training.run.train", stopped)
    monkeypatch.chdir(wrong_inputs)
    found, _, said = command("train", "recipe.yaml", "--out", tmp_path / "new")
    assert found == code
    assert f"stopped by {signal.Signals(code - 128).name}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speak", " ", "--model", "x/y"), "the text to speak is empty"),
        (("speak", "Hello.", "--temperature", "nan"), "not nan"),
        (("doctor", "--model", ""), "empty name"),
    ],
)
def test_odd_values_are_refused_with_a_message(command: Command, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = command(*arguments)
    assert code
    assert message in out + err
