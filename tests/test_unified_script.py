"""`unified_lora_training.py` as people start it: one process, torchrun, killed and started again, with wrong flags."""

import json
import runpy
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
import torch
import yaml
from commands import run_script
from processes import forked_proofs  # noqa: F401
from safetensors.torch import load_file
from tiny_checkpoint import SENTENCES, save_tiny_checkpoint
from with_parent import with_parent

import higgstune
from higgstune.data.store import CodeStore

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "unified_lora_training.py"
CODEC = Path(higgstune.__file__).parent / "demo" / "assets" / "codec"
CLIPS = 9
SECONDS = 240  # the longest that a start may take on a busy machine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint (codec inside), recordings and their manifest."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_checkpoint(folder / "base")
    shutil.copytree(CODEC, folder / "base" / "codec")
    rows = []
    for i in range(CLIPS):
        seconds = np.arange(round(24_000 * (0.5 + 0.05 * i))) / 24_000
        soundfile.write(folder / f"{i}.wav", 0.3 * np.sin(1300 * (1 + i) * seconds * (1 + seconds)), 24_000)
        rows.append(json.dumps({"audio": f"{i}.wav", "text": f"{SENTENCES[i % 3]} {i}", "speaker": "anna"}))
    (folder / "clips.jsonl").write_text("\n".join(rows))
    return folder


def flags(world: Path, out: Path, **changes: Any) -> list[str]:
    """A run of 3 steps or so: the flags with their values; True stands for a flag alone."""
    given: dict[str, Any] = {
        "training_stage": "stage1", "train_manifest": world / "clips.jsonl", "output_dir": out,
        "base_ckpt": world / "base", "batch_size": 2, "lr": 5e-3, "epochs": 2, "grad_accum": 2, "warmup": 1,
        "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "save_steps": 1, "log_steps": 1, "val_steps": 2,
        "eval_clips": 0,
    }  # fmt: skip
    given |= changes
    return [
        part for key, value in given.items() for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]


def start(arguments: list[str], *, processes: int = 0) -> subprocess.Popen[str]:
    """The script in a process of its own, or in several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes else []), str(SCRIPT), *arguments]
    return subprocess.Popen(with_parent(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(arguments: list[str], *, processes: int = 0) -> tuple[int, str]:
    """Exit code and stderr."""
    process = start(arguments, processes=processes)
    _, errors = process.communicate(timeout=SECONDS)
    return process.returncode, errors


def adapter(run_folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the adapter that a finished run left."""
    state = json.loads((run_folder / "run.json").read_text())
    assert state["status"] == "finished"
    return load_file(run_folder / state["adapter"] / "adapter_model.safetensors")


def stage(run_folder: Path) -> dict[str, Any]:
    """What a finished run says of its one stage."""
    [found] = json.loads((run_folder / "run.json").read_text())["stages"].values()
    return found


@pytest.fixture(scope="module")
def out(world: Path) -> Path:
    """An output folder after stage1, trained from the manifest."""
    assert run_script(SCRIPT, flags(world, world / "out")) == 0
    return world / "out"


def test_stage1_prepares_the_manifest_and_trains_the_text_pathway(world: Path, out: Path) -> None:
    assert len(CodeStore.open(out / "data")) == CLIPS
    names = adapter(out / "stage1").keys()
    assert any(".mlp." in name for name in names)
    assert not any("audio" in name for name in names)
    recipe = yaml.safe_load((out / "stage1" / "recipe.yaml").read_text())
    [given] = recipe["stages"]
    assert (given["kind"], given["learning_rate"], given["warmup_steps"]) == ("text", 5e-3, 1.0)
    assert (given["batch_size"], given["gradient_accumulation"], given["epochs"]) == (2, 2, 2.0)
    assert recipe["lora"]["r"] == 4
    assert (recipe["save_steps"], recipe["log_steps"], recipe["eval_steps"]) == (1, 1, 2)
    assert recipe["evaluation"]["clips"] == 0


@pytest.fixture(scope="module")
def stage2(world: Path, out: Path) -> Path:
    """The run folder of a stage2 that was trained from the prepared store."""
    assert run_script(SCRIPT, flags(world, out, training_stage="stage2", train_manifest=out / "data")) == 0
    return out / "stage2"


def test_stage2_continues_stage1(out: Path, stage2: Path) -> None:
    recipe = yaml.safe_load((stage2 / "recipe.yaml").read_text())
    assert recipe["init_adapter"] == str(out / "stage1")
    assert adapter(out / "stage1").keys() < adapter(stage2).keys()
    first, second = (
        [entry["eval_audio_loss"] for entry in stage(out / name)["history"] if "eval_audio_loss" in entry]
        for name in ("stage1", "stage2")
    )
    assert second[0] == pytest.approx(first[-1], abs=1e-6)


def test_a_finished_stage_is_not_overwritten(world: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = adapter(out / "stage1")
    assert run_script(SCRIPT, flags(world, out)) == 2
    assert "is finished and is not overwritten" in capsys.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in adapter(out / "stage1").items())


def test_stage2_without_stage1_says_so_before_any_work(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(SCRIPT, flags(world, tmp_path, training_stage="stage2")) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: stage2 needs stage1 (or --from_base)")
    assert str(tmp_path / "stage1") in errors
    assert not list(tmp_path.iterdir())


def test_stage2_from_the_base(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(SCRIPT))
    arguments = flags(world, tmp_path, training_stage="stage2", from_base=True)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    recipe = script["as_recipe"](script["arguments"](), tmp_path / "data")
    assert recipe.init_adapter is None
    assert recipe.stages[0].kind == "full"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_stage": "stage3"}, "invalid choice: 'stage3'"),
        ({"batch_size": "many"}, "invalid int value"),
        ({"batch_size": 0}, "stages.0.batch_size: Input should be greater than or equal to 1"),
        ({"base_ckpt": "nowhere"}, "the checkpoint nowhere does not exist"),
        ({"train_manifest": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_wrong_flags_end_with_2_and_a_message(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert run_script(SCRIPT, flags(world, tmp_path, **changes)) == 2
    assert message in capsys.readouterr().err


def test_a_killed_stage_resumes(world: Path, out: Path) -> None:
    again = world / "again"
    arguments = flags(world, again, train_manifest=out / "data")
    process = start(arguments)
    checkpoints = again / "stage1" / "text" / "checkpoints"
    deadline = time.monotonic() + SECONDS
    while not (checkpoints / "checkpoint-2").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (again / "stage1" / "text" / "adapter").exists()
    assert run_script(SCRIPT, arguments) == 0
    expected, found = adapter(out / "stage1"), adapter(again / "stage1")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_torchrun_with_two_processes_trains_what_one_does(world: Path, stage2: Path) -> None:
    """Half the batch in each of two processes; the first one prepares while the other waits."""
    two = world / "two"
    shutil.copytree(stage2.parent / "stage1", two / "stage1")
    code, errors = run(flags(world, two, training_stage="stage2", batch_size=1), processes=2)
    assert code == 0, errors
    assert len(CodeStore.open(two / "data")) == CLIPS
    assert stage(two / "stage2")["steps"] == stage(stage2)["steps"]
    expected, found = adapter(stage2), adapter(two / "stage2")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3)


def test_torchrun_ends_when_the_manifest_cannot_be_read(world: Path, tmp_path: Path) -> None:
    code, errors = run(flags(world, tmp_path, train_manifest=tmp_path / "nowhere.jsonl"), processes=2)
    assert code != 0
    assert "error: " in errors
    assert "nowhere.jsonl" in errors
