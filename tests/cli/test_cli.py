"""The command: every verb, its help, its JSON, its exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from tiny_checkpoint import save_tiny_checkpoint
from tiny_runs import DEMO_CODEC, make_recordings

import higgstune
from higgstune.errors import Interrupted

VERBS = ("prepare", "inspect", "train", "speak", "merge", "export", "doctor", "demo")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its codec, and recordings of which one is broken."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_checkpoint(folder / "base")
    shutil.copytree(DEMO_CODEC, folder / "base" / "codec")
    make_recordings(folder / "recordings")
    (folder / "recordings" / "broken.wav").write_bytes(b"RIFF")
    (folder / "recordings" / "broken.txt").write_text("Not to be heard.")
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

    code, out, _ = command("inspect", store, "--row", 0, "--json")
    row = json.loads(out)
    assert code == 0
    assert row["prompt"].endswith("<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>")
    assert row["audio_label_cells"] == 8 * (row["frames"] + 1)
    assert row["audio_rows"] == row["frames"] + 9
    code, out, _ = command("inspect", store, "--row", row["id"])
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
    lines = world / "lines.txt"
    lines.write_text("Hello.\n\nGood morning.\n")
    code, _, _ = command(
        "speak", "--file", lines, "--model", world / "base", "--out", world / "lines", "--max-seconds", 0.2,
        "--device", "cpu", "--temperature", 0,
    )  # fmt: skip
    assert code == 0
    assert len(list((world / "lines").glob("*.wav"))) == 2


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("prepare", "nowhere", "--out", "x"), "nowhere"),
        (("inspect", "nowhere"), "nowhere"),
        (("train", "nowhere.yaml", "--out", "x"), "nowhere.yaml"),
        (("speak", "Hello.", "--model", "/no/where"), "/no/where"),
        (("speak",), "a text or --file"),
        (("speak", "--file", "nowhere.txt", "--model", "x"), "nowhere.txt"),
        (("speak", "Hello.", "--model", "x", "--temperature", "-1"), "temperature"),
        (("speak", "Hello.", "--adapter", "/no/where"), "neither an adapter"),
        (("no-such-verb",), "No such command"),
    ],
)
def test_wrong_input_exits_with_2_and_says_what_is_wrong(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], names: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*arguments)
    assert code == 2
    assert names in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.wav"))


@pytest.mark.parametrize(("ends", "code"), [(signal.SIGTERM, 143), (Interrupted(signal.SIGINT, "kept"), 130)])
def test_signals_have_the_exit_codes_of_shells(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: int | Interrupted, code: int
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        if isinstance(ends, Interrupted):
            raise ends
        os.kill(os.getpid(), ends)
        time.sleep(10)

    monkeypatch.setattr("higgstune.training.run.train", stopped)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {store: x}\nstages: [{name: a, kind: full, epochs: 1}]\n")
    found, _, said = command("train", recipe, "--out", tmp_path / "run")
    assert found == code
    assert f"stopped by {signal.Signals(code - 128).name}" in said


def test_the_demo_does_not_write_over_anything(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = command("demo", "--out", tmp_path)
    assert code == 2
    assert "remove it" in err


# Where the public names live: each module is the first of ours that is imported; torch and others stay loaded.
EACH_FIRST = """
import importlib, sys
import higgstune
homes = sorted(set(higgstune._HOME.values()))
assert len(homes) > 5, homes
for home in homes:
    for ours in [loaded for loaded in sys.modules if loaded.split(".")[0] == "higgstune"]:
        del sys.modules[ours]
    importlib.import_module(home)
import higgstune, higgstune.training.run, higgstune.data.prepare, higgstune.generate.speak
for name in ("prepare", "train", "speak", "render"):
    assert callable(getattr(higgstune, name)), name
"""


@pytest.mark.processes
def test_verbs_stay_functions_whatever_was_imported() -> None:
    subprocess.run([sys.executable, "-c", EACH_FIRST], check=True)
