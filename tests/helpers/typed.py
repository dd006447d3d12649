"""Commands of README and docs, typed on the demo's miniature.

The released checkpoint, a hub and a GPU stand no test, so each command gets the options in `MAPPING` on top: the demo's
base in place of the released one, and a few steps in place of some epochs.
"""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command, run_script

import higgstune
from higgstune.data.manifest import Utterance, read_manifest

ROOT = Path(__file__).parent.parent.parent
ASSETS = Path(higgstune.__file__).parent / "demo" / "assets"
CLIPS = 10
MINIATURE = "runs/demo/"  # a line that names it is typed for the miniature already
BASE = "--set model.checkpoint=base"
STEPS = "--set stages.0.epochs=null --set stages.0.max_steps=4 --set stages.0.warmup_steps=0 --set save_steps=2"
SECOND = STEPS.replace("stages.0", "stages.1") + " --set stages.1.learning_rate=1e-3"
SILENT = "--set evaluation.clips=0"  # the other runs speak
RATE = "--set stages.0.learning_rate=1e-3"
MAPPING = {  # the first beginning that fits
    r"higgstune prepare .*runs/demo/": "",
    r"higgstune prepare ": "--model base",
    r"higgstune train .*--plan": BASE,
    r"higgstune train .*runs/demo/": STEPS,
    r"higgstune train new_language ": f"{BASE} {STEPS} {SECOND} {RATE} {SILENT}",
    r"higgstune train .*runs/(gentle|firm) ": f"{BASE} {STEPS} {RATE} {SILENT}",
    r"higgstune train ": f"{BASE} {STEPS} {RATE}",
    r"higgstune speak ": "--max-seconds 0.5",
    r"higgstune doctor --recipe": "--model base",
    r"higgstune evaluate ": "--limit 1",
    r"higgstune compare ": "--limit 1",
    r"python unified_lora_training.py ": "--base_ckpt base --epochs 1 --lr 5e-3 --warmup 0 --grad_accum 1",
    r"higgstune (inspect|recipe|doctor|export|collect)\b": "",
}
# What makes the environment that a test runs in, or is run by CI.
ELSEWHERE = {
    "make demo", "make test", "pip install .", "python3 -m venv .venv", "source .venv/bin/activate",
    "higgstune demo --out runs/demo", "pip install 'higgstune[collect,asr]'",
}  # fmt: skip


def blocks(page: str) -> list[list[str]]:
    """The commands of each shell block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]


def lines(page: str) -> list[str]:
    """The commands of a page, in order, but for those that run elsewhere."""
    return [line for block in blocks(page) for line in block if line not in ELSEWHERE]


def words(line: str) -> list[str]:
    """A command of the docs as it is run here."""
    added = next(options for start, options in MAPPING.items() if re.match(start, line))
    return shlex.split(f"{line} {added}")


def unpack_clone(folder: Path) -> None:
    """Make `folder` the working folder of a reader: the script, a base, recordings with their texts beside them."""
    (folder / "unified_lora_training.py").symlink_to(ROOT / "unified_lora_training.py")
    shutil.copytree(ASSETS / "base", folder / "base")
    shutil.copytree(ASSETS / "codec", folder / "base" / "codec")
    (folder / "recordings").mkdir()
    for _, row in list(read_manifest(ASSETS / "voices" / "metadata.jsonl"))[:CLIPS]:
        assert isinstance(row, Utterance)
        audio = Path(shutil.copy(ASSETS / "voices" / str(row.audio), folder / "recordings"))
        audio.with_suffix(".txt").write_text(row.text or "", encoding="utf-8")


def typist(command: Command, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """A function that runs a line of the docs in this process, and gives its output."""

    def run(line: str) -> str:
        program, *arguments = words(line)
        if program == "higgstune":
            code, output, errors = command(*arguments)
        else:
            code = run_script(Path(arguments[0]), arguments[1:])
            output, errors = capsys.readouterr()
        assert code == 0, f"{line}\n{output}\n{errors}"
        return output

    return run
