"""The commands of README, docs and recipes: those of README run, others are parsed; tests/test_docs.py runs more."""

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import typer.main
from commands import Command
from processes import forked_proofs  # noqa: F401
from typed import ELSEWHERE, ROOT, blocks, typist, unpack_clone, words
from with_parent import with_parent

import higgstune
from higgstune.cli.main import app
from higgstune.config.shipped import shipped_recipes
from higgstune.data.messages import speech_messages

README = "README.md"


@pytest.fixture
def type_in(clone: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a line of the README in this process; its output."""
    return typist(command, capsys)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: like a clone, with a base, and recordings with their texts beside them."""
    monkeypatch.chdir(tmp_path)
    unpack_clone(tmp_path)
    return tmp_path


def test_every_block_of_the_readme_is_run_somewhere() -> None:
    kinds = [sorted({line.split()[1] for line in block}) for block in blocks(README)]
    assert kinds == [
        ["demo", "test"],
        ["evaluate", "export", "install", "prepare", "speak", "train"],
        ["train"],
        ["speak", "unified_lora_training.py"],
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nmake test\n" in ci
    assert ".venv/bin/higgstune demo --out" in ci
    assert re.search(r"^demo: .*\n\t\S*higgstune demo --out runs/demo$", makefile, re.MULTILINE)


@pytest.mark.processes
def test_the_real_thing(clone: Path, type_in: Callable[[str], str]) -> None:
    said = {line.split()[1]: type_in(line) for line in blocks(README)[1] if line not in ELSEWHERE}
    assert str(Path("runs/voice/voice/adapter")) in said["train"]
    assert (clone / "models/voice/README.md").exists()
    waveform, rate = soundfile.read(clone / "morning.wav")
    assert rate == 24_000
    assert len(waveform) > 0


@pytest.mark.processes
def test_resuming_an_interrupted_run(clone: Path, type_in: Callable[[str], str]) -> None:
    prepare, train = (line for line in blocks(README)[1] if line.startswith(("higgstune prepare", "higgstune train")))
    [resume] = blocks(README)[2]
    type_in(prepare)
    process = subprocess.Popen(
        with_parent([sys.executable, "-m", *words(train)]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (clone / "runs/voice/voice/checkpoints/checkpoint-2").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    type_in(resume)
    assert (clone / "runs/voice/voice/adapter").is_dir()


@pytest.mark.processes
def test_two_stages_with_plain_flags(clone: Path, type_in: Callable[[str], str]) -> None:
    for line in blocks(README)[3]:
        type_in(line)
    assert (clone / "evening.wav").exists()


def other_commands() -> list[tuple[str, str]]:
    """File and line of each `higgstune` command in docs and recipes."""
    found = []
    for path in [*sorted((ROOT / "docs").rglob("*.md")), *shipped_recipes().values()]:
        text = path.read_text(encoding="utf-8").replace("\\\n#", " ")
        for line in re.findall(r"^(?:    |#   )(?:torchrun \S+ \d+ -m )?(higgstune .*)$", text, re.MULTILINE):
            found.append((path.name, line))
    return found


@pytest.mark.parametrize(("file", "line"), other_commands())
def test_a_command_in_docs_and_recipes_has_the_options_that_the_command_has(file: str, line: str) -> None:
    verb, *arguments = shlex.split(line)[1:]
    context = typer.main.get_group(app).commands[verb].make_context(verb, arguments)
    assert context.info_name == verb  # an unknown option or a missing one raises


def test_the_prompt_in_the_docs_is_the_one_that_is_rendered() -> None:
    spoken = {"role": "assistant", "content": [{"type": "audio"}]}
    messages = speech_messages("What is to be said.", context=[("What the reference says.", "")])
    documented = (ROOT / "docs" / "prompt.md").read_text(encoding="utf-8")
    rendered = higgstune.render([*messages, spoken])
    assert "\n".join(f"    {line}" if line else "" for line in rendered.splitlines()) in documented
