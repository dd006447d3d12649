"""The commands of README, docs and recipes: those of README are run, the others parsed.

The released checkpoint, a hub and a GPU stand no test, so each command gets the options in `MAPPING` on top: the demo's
base in place of the released one, and a few steps in place of some epochs.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import typer.main
from commands import Command, run_script
from processes import forked_proofs  # noqa: F401
from with_parent import with_parent

import higgstune
from higgstune.cli.main import app
from higgstune.config.shipped import shipped_recipes
from higgstune.data.manifest import Utterance, read_manifest
from higgstune.data.messages import speech_messages

ROOT = Path(__file__).parent.parent
ASSETS = Path(higgstune.__file__).parent / "demo" / "assets"
CLIPS = 10
STEPS = "--set model.checkpoint=base --set stages.0.epochs=null --set stages.0.max_steps=4 --set save_steps=2"
MAPPING = {
    "higgstune prepare": "--model base",
    "higgstune inspect": "",  # the store knows the checkpoint that it was prepared for
    "higgstune train": f"{STEPS} --set stages.0.learning_rate=5e-3 --set stages.0.warmup_steps=0",
    "higgstune speak": "--max-seconds 0.5",
    "higgstune doctor": "",
    "higgstune evaluate": "--limit 1",
    "higgstune export": "",
    "python unified_lora_training.py": "--base_ckpt base --epochs 1 --lr 5e-3 --warmup 0 --grad_accum 1",
}
# What makes the environment that this test runs in: .ci/run types it.
ELSEWHERE = {"make demo", "make test", "make install", "source .venv/bin/activate"}


def blocks() -> list[list[str]]:
    """The commands of each shell block of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]


def words(line: str) -> list[str]:
    """A line of the README as it is run here."""
    [added] = [options for start, options in MAPPING.items() if line.startswith(start)]
    return shlex.split(f"{line} {added}")


@pytest.fixture
def type_in(clone: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a line of the README in this process; its output."""

    def run(line: str) -> str:
        program, *arguments = words(line)
        if program == "higgstune":
            code, output, errors = command(*arguments)
        else:
            code = run_script(Path(arguments[0]), arguments[1:])
            output, errors = capsys.readouterr()
        assert code == 0, f"{line}\n{errors}"
        return output

    return run


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: like a clone, with a base, and recordings with their texts beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unified_lora_training.py").symlink_to(ROOT / "unified_lora_training.py")
    shutil.copytree(ASSETS / "base", tmp_path / "base")
    shutil.copytree(ASSETS / "codec", tmp_path / "base" / "codec")
    (tmp_path / "recordings").mkdir()
    for _, row in list(read_manifest(ASSETS / "voices" / "metadata.jsonl"))[:CLIPS]:
        assert isinstance(row, Utterance)
        audio = Path(shutil.copy(ASSETS / "voices" / str(row.audio), tmp_path / "recordings"))
        audio.with_suffix(".txt").write_text(row.text or "", encoding="utf-8")
    return tmp_path


def test_every_block_of_the_readme_is_run_somewhere() -> None:
    kinds = [sorted({line.split()[1] for line in block}) for block in blocks()]
    assert kinds == [
        ["demo", "test"],
        [".venv/bin/activate", "doctor", "evaluate", "export", "inspect", "install", "prepare", "speak", "train"],
        ["train"],
        ["speak", "unified_lora_training.py"],
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nmake test\n" in ci
    assert ".venv/bin/higgstune demo --out" in ci
    assert re.search(r"^demo: .*\n\t\S*higgstune demo --out runs/demo$", makefile, re.MULTILINE)
    assert re.search(r"^install: \$\(INSTALLED\)$", makefile, re.MULTILINE)


@pytest.mark.processes
def test_the_real_thing(clone: Path, type_in: Callable[[str], str]) -> None:
    said = {line.split()[1]: type_in(line) for line in blocks()[1] if line not in ELSEWHERE}
    assert f"data/voice: {CLIPS} clips" in said["inspect"]
    assert str(Path("runs/voice/voice/adapter")) in said["train"]
    assert "0 failed" in said["doctor"]
    assert (clone / "models/voice/README.md").exists()
    waveform, rate = soundfile.read(clone / "morning.wav")
    assert rate == 24_000
    assert len(waveform) > 0


@pytest.mark.processes
def test_resuming_an_interrupted_run(clone: Path, type_in: Callable[[str], str]) -> None:
    prepare, train = (line for line in blocks()[1] if line.startswith(("higgstune prepare", "higgstune train")))
    [resume] = blocks()[2]
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
    for line in blocks()[3]:
        type_in(line)
    assert (clone / "evening.wav").exists()


def other_commands() -> list[tuple[str, str]]:
    """File and line of each `higgstune` command in docs and recipes."""
    found = []
    for path in [*sorted((ROOT / "docs").glob("*.md")), *shipped_recipes().values()]:
        text = path.read_text(encoding="utf-8").replace("\\\n#", " ")
        for line in re.findall(r"^(?:    |#   )(?:torchrun \S+ \d+ -m )?(higgstune .*)$", text, re.MULTILINE):
            found.append((path.name, line))
    return found


@pytest.mark.parametrize(("file", "line"), other_commands())
def test_a_command_in_docs_and_recipes_has_the_options_that_the_command_has(file: str, line: str) -> None:
    verb, *arguments = shlex.split(line)[1:]
    typer.main.get_group(app).commands[verb].make_context(verb, arguments)


def test_the_prompt_in_the_docs_is_the_one_that_is_rendered() -> None:
    spoken = {"role": "assistant", "content": [{"type": "audio"}]}
    messages = speech_messages("What is to be said.", context=[("What the reference says.", "")])
    documented = (ROOT / "docs" / "prompt.md").read_text(encoding="utf-8")
    rendered = higgstune.render([*messages, spoken])
    assert "\n".join(f"    {line}" if line else "" for line in rendered.splitlines()) in documented


def test_every_fault_has_its_test() -> None:
    """What docs/reliability.md names; `::name` is of the file named before it, or of the faults of training."""
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines():
        file = "tests/training/test_faults_of_training.py"
        for named, test in re.findall(r"`((?:tests/[\w/]+\.py)?)(?:::(\w+))?`", line):
            file = named or file
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not test or f"\ndef {test}(" in text, f"{file}::{test}"


def test_links_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
