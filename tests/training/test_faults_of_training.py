"""What clusters do to a run: whatever it is, the run resumes and ends with the same bits."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, Together
from training_world import (
    STEP,
    assert_identical,
    assert_same,
    faulty_recipe,
    history,
    make_world,
    on_call,
    proven,
    shared_recipe,
    train_unproven,
    train_with_signal,
)

from higgstune.config.recipe import Recipe
from higgstune.data.store import CodeStore
from higgstune.errors import ConfigError, HiggstuneError, TrainingError, WorkError
from higgstune.training import stage
from higgstune.training.run import train
from higgstune.training.run_dir import FREE

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """An uninterrupted run."""
    Together(world / "logs-whole", 1, train_unproven, faulty_recipe(world), world / "whole").succeeded()
    return world / "whole"


MOMENTS = {
    "the first step": (STEP, 1),
    "a step between checkpoints": (STEP, 8),
    "a checkpoint, before its name": ("higgstune.training.checkpoint:os.replace", 4),
    "the removal of an old checkpoint": ("higgstune.training.checkpoint:shutil.rmtree", 7),
    "the final proof": ("higgstune.training.stage:probe_logits", 1),
    "the final save, before its name": ("higgstune.training.save:os.replace", 1),
    "the stage change": ("higgstune.training.run_dir:RunFolder.finished", 1),
    "the second stage": (STEP, 20),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_resumes_exactly(world: Path, whole: Path, tmp_path: Path, moment: str) -> None:
    run, made = tmp_path / "run", faulty_recipe(world)
    killed = Together(tmp_path / "killed", 1, train_with_signal, made, run, signal.SIGKILL, *MOMENTS[moment])
    assert killed.exit_codes() == [-signal.SIGKILL], killed.log()
    Together(tmp_path / "resumed", 1, train_unproven, made, run, True).succeeded()
    assert_identical(run, whole)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_it_with_a_checkpoint_of_that_step(
    world: Path, whole: Path, tmp_path: Path, name: str, code: int
) -> None:
    run, made = tmp_path / "run", faulty_recipe(world, save_steps=100)
    stopped = Together(tmp_path / "stopped", 1, train_with_signal, made, run, signal.Signals[name], STEP, 9)
    assert stopped.exit_codes() == [code], stopped.log()
    assert f"stopped by {name}: after step 5 of stage1" in stopped.log()
    assert [path.name for path in (run / "stage1" / "checkpoints").iterdir()] == ["checkpoint-5"]
    made = faulty_recipe(world, save_steps=6)  # how often is free to change
    Together(tmp_path / "resumed", 1, train_unproven, made, run, True).succeeded()
    assert_identical(run, whole)
    assert sorted(path.name for path in (run / "stage1" / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-7"]


def test_a_signal_outside_of_training_ends_it_at_once(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    at = "higgstune.training.run:check_store"
    stopped = Together(tmp_path / "logs", 1, train_with_signal, faulty_recipe(world), run, signal.SIGTERM, at, 1)
    assert stopped.exit_codes() == [143], stopped.log()
    assert not run.exists()


@pytest.mark.parametrize(("first", "then", "rank", "parallel"), [(2, 1, 1, "ddp"), (2, 2, 1, "ddp"), (2, 4, 0, "fsdp")])
def test_it_resumes_with_the_same_data_on_another_number_of_processes(
    world: Path, tmp_path: Path, first: int, then: int, rank: int, parallel: str
) -> None:
    # Between two logs: what was not logged yet is summed over the processes, and continues in the first one.
    run, made = tmp_path / "run", shared_recipe(world, first, parallel=parallel, log_steps=2)
    at = "higgstune.training.trainer:HiggsAudioTrainer.training_step"
    stopped = Together(tmp_path / "stopped", first, train_with_signal, made, run, signal.SIGTERM, at, 3, rank)
    assert stopped.exit_codes() == [143, 143], stopped.log()
    checkpoints = sorted(path.name for path in (run / "stage1" / "checkpoints").iterdir())
    assert len(checkpoints) == 1  # of the same step in all processes, which learn of the signal one step late
    Together(tmp_path / "resumed", then, train_unproven, made, run, True).succeeded()
    alone = tmp_path / "alone"
    Together(tmp_path / "logs-alone", 1, train_unproven, shared_recipe(world, 1, log_steps=2), alone).succeeded()
    assert_same(run, alone)


def fail_in_one(made: Recipe, out: Path, rank: int) -> None:
    def fail() -> None:
        raise WorkError("this process has had enough")

    if os.environ["RANK"] == str(rank):
        on_call(STEP, 3, fail)
    train_unproven(made, out)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_them_all_with_its_own_error(world: Path, tmp_path: Path, rank: int) -> None:
    failed = Together(tmp_path / "logs", 2, fail_in_one, shared_recipe(world, 2), tmp_path / "run", rank)
    assert failed.exit_codes() == [1, 1]
    assert "this process has had enough" in failed.log(rank)
    assert failed.log(1 - rank).splitlines()[-1].startswith("WorkError: another process of this run has ended")


def train_on_a_full_disk(made: Recipe, out: Path, at: str, nth: int) -> None:
    """Files may not be longer than a few kilobytes from a moment on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit))  # noqa: E731
    on_call(at, nth, fill)
    train_unproven(made, out)


@pytest.mark.parametrize(
    ("at", "nth", "said", "kept"),
    [
        (
            "higgstune.training.resume:new_checkpoint",
            2,
            "checkpoint-4 cannot be written",
            [2],
        ),
        ("higgstune.training.stage:write_probe", 1, "stage1/adapter cannot be written", [6, 7]),
        ("higgstune.training.stage:save_adapter", 1, "stage1/adapter cannot be written", [6, 7]),
    ],
)
def test_a_full_disk_ends_it_and_the_checkpoints_before_stay(
    world: Path, whole: Path, tmp_path: Path, at: str, nth: int, said: str, kept: list[int]
) -> None:
    run, made = tmp_path / "run", faulty_recipe(world, report_to=[])
    full = Together(tmp_path / "full", 1, train_on_a_full_disk, made, run, at, nth)
    assert full.exit_codes() == [1], full.log()
    assert said in full.log().splitlines()[-1]
    assert sorted(path.name for path in (run / "stage1" / "checkpoints").iterdir()) == [f"checkpoint-{n}" for n in kept]
    Together(tmp_path / "resumed", 1, train_unproven, made, run, True).succeeded()
    assert_identical(run, whole)


def train_with_jumping_clock(made: Recipe, out: Path) -> None:
    real, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return real() + (-1) ** calls * 86_400 * 400  # back and forth by more than a year

    time.time = jumping
    train_unproven(made, out)


def test_a_clock_that_jumps_changes_nothing(world: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Together(tmp_path / "logs", 1, train_with_jumping_clock, faulty_recipe(world), run).succeeded()
    assert_identical(run, whole)
    assert all(entry.get("tokens_per_second", 1) > 0 for entry in history(run))


def train_and_wait(made: Recipe, out: Path, until: Path) -> None:
    def wait() -> None:
        (out / "waiting").touch()
        while not until.exists():
            time.sleep(0.02)

    on_call(STEP, 3, wait)
    train_unproven(made, out)


def test_two_jobs_do_not_share_a_folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, made = tmp_path / "run", faulty_recipe(world)
    first = Together(tmp_path / "first", 1, train_and_wait, made, run, tmp_path / "go")
    deadline = time.monotonic() + PATIENCE
    while not (run / "waiting").exists():
        assert time.monotonic() < deadline, first.log()
        time.sleep(0.02)
    monkeypatch.setattr("higgstune.training.run_dir._UNTIL_FREE", 0.2)
    try:
        for resume in (False, True):
            with pytest.raises(ConfigError, match=rf"another job trains into .*process {first.all[0].pid} on "):
                train(made, run, resume=resume)
    finally:
        (tmp_path / "go").touch()
    first.succeeded()
    with pytest.raises(ConfigError, match="is finished"):
        train(made, run, resume=True)


def test_a_folder_that_cannot_be_written_is_refused(world: Path) -> None:
    with pytest.raises(WorkError, match=r"/proc/self/run cannot be written.*nothing was trained.*name a folder"):
        train(faulty_recipe(world), "/proc/self/run")


def test_a_run_may_resume_with_other_means_but_not_with_another_aim(world: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"status": "running"}))
    other = faulty_recipe(world, gradient_checkpointing=True, save_steps=9, report_to=[])
    assert train(other, run, resume=True).stages.keys() == {"stage1", "stage2"}
    (run / "run.json").write_text(json.dumps(state | {"status": "running"}))
    with pytest.raises(ConfigError, match=rf"eval_steps differ.*of which {FREE[0]}.* may change"):
        train(faulty_recipe(world, eval_steps=5), run, resume=True)


def skipped(run: Path) -> list[dict[str, Any]]:
    path = run / "stage1" / "checkpoints" / "skipped_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_clips_of_skipped_steps_are_recorded(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from higgstune.training.trainer import HiggsAudioTrainer

    compute, calls = HiggsAudioTrainer.compute_loss, 0

    def spoiled(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return compute(*arguments, **options) * (float("nan") if calls >= bad_from else 1.0)

    monkeypatch.setattr(HiggsAudioTrainer, "compute_loss", spoiled)
    monkeypatch.setattr(stage, "verify_in_fresh_process", proven)
    long = [{"name": "stage1", "kind": "text", "max_steps": 30, "batch_size": 2, "gradient_accumulation": 2}]
    bad_from = 7
    with pytest.raises(TrainingError, match=r"10 steps in a row.*skipped_steps.jsonl"):
        train(faulty_recipe(world, stages=long), tmp_path / "run")
    assert [entry["step"] for entry in skipped(tmp_path / "run")] == list(range(4, 14))
    ids = [clip for entry in skipped(tmp_path / "run") for clip in entry["clips"]]
    assert set(ids) <= {row.id for row in CodeStore.open(world / "data").rows("train")}
    assert all(len(entry["clips"]) == 4 or entry["step"] % 4 == 0 for entry in skipped(tmp_path / "run"))
    calls, bad_from = 0, 2**31
    with (tmp_path / "run" / "stage1" / "checkpoints" / "skipped_steps.jsonl").open("a") as file:
        file.write('{"step": 13, "cl')  # as a kill may leave it
    train(faulty_recipe(world, stages=long), tmp_path / "run", resume=True)
    assert [entry["step"] for entry in skipped(tmp_path / "run")] == list(range(4, 13))  # of checkpoint 12
    calls, bad_from = 0, 1
    short = [long[0] | {"max_steps": 3}]
    with pytest.raises(TrainingError, match="all 3 steps are not finite"):
        train(faulty_recipe(world, stages=short), tmp_path / "short")


def test_a_damaged_checkpoint_costs_no_more_than_its_steps(world: Path, whole: Path, tmp_path: Path) -> None:
    run, made = tmp_path / "run", faulty_recipe(world)
    Together(tmp_path / "killed", 1, train_with_signal, made, run, signal.SIGKILL, STEP, 26).exit_codes()
    newest = max((run / "stage2" / "checkpoints").glob("checkpoint-*"), key=lambda path: path.name)
    weights = newest / "training.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    resumed = Together(tmp_path / "resumed", 1, train_unproven, made, run, True)
    resumed.succeeded()
    assert f"{newest.name}/training.safetensors is missing, cut off or changed" in resumed.log()
    assert_identical(run, whole)


def test_a_checkpoint_of_another_model_is_refused(world: Path, whole: Path, tmp_path: Path) -> None:
    run, made = tmp_path / "run", faulty_recipe(world)
    Together(tmp_path / "killed", 1, train_with_signal, made, run, signal.SIGKILL, STEP, 20).exit_codes()
    newest = max((run / "stage2" / "checkpoints").glob("checkpoint-*"), key=lambda path: path.name)
    shutil.rmtree(newest)
    shutil.copytree(whole / "stage1" / "checkpoints" / "checkpoint-7", newest)
    with pytest.raises(HiggstuneError, match=f"cannot resume from .*{newest.name}: its weights are not"):
        train(made, run, resume=True)
