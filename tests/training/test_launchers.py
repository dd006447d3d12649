"""Runs under the launchers of clusters: torchrun on two machines, accelerate; faults and signals as they pass them."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer.main
import yaml
from accelerate.commands.launch import launch_command_parser
from processes import PATIENCE
from tiny_runs import recipe
from torch.distributed.run import get_args_parser
from training_world import Unplanned, assert_same, make_world, proven, shared_recipe
from with_parent import with_parent

from higgstune.cli.main import app
from higgstune.config.recipe import Recipe, save_recipe
from higgstune.errors import ConfigError
from higgstune.training import run, stage
from higgstune.training.distributed import Processes
from higgstune.training.run_dir import FREE

pytestmark = pytest.mark.processes

DOCS = Path(__file__).parents[2] / "docs"
CLUSTER = DOCS / "cluster"
FAULTY = Path(__file__).parents[1] / "helpers" / "faulty_rank.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


class Launched:
    """A launcher; what it and its processes print is in `log()`."""

    def __init__(self, log: Path, *command: str | Path) -> None:
        self._log = log
        with log.open("w") as file:
            self.launcher = psutil.Popen(
                with_parent(command), stdout=file, stderr=file,
                env=os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(PATIENCE))},
            )  # fmt: skip
        self.started: set[psutil.Process] = set()  # by it, as far as seen while it was waited for

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        """Until it is in the log."""
        while text not in self.log():
            assert self._runs(), self.log()

    def exit_code(self) -> int:
        """Once it has ended."""
        while self._runs():
            pass
        code: int = self.launcher.wait()
        return code

    def left(self) -> list[psutil.Process]:
        """What it has started and is still there."""
        return [process for process in self.started if process.is_running()]

    def end(self) -> None:
        """All that is left of it."""
        for process in [self.launcher, *self.left()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _runs(self) -> bool:
        """After a moment."""
        time.sleep(0.05)
        assert time.time() - self.launcher.create_time() < PATIENCE, self.log()
        with suppress(psutil.NoSuchProcess):
            self.started.update(self.launcher.children(recursive=True))
        return self.launcher.poll() is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Any]:
    """Starts launchers, and ends what a test has left."""
    all_of_them: list[Launched] = []

    def launch(*command: str | Path) -> Launched:
        all_of_them.append(Launched(tmp_path / f"{len(all_of_them)}.log", *command))
        return all_of_them[-1]

    yield launch
    for each in all_of_them:
        each.end()


def write(made: Recipe, path: Path) -> Path:
    save_recipe(made, path)
    return path


def one_stage(world: Path, steps: int) -> Recipe:
    stages = [{"name": "stage2", "kind": "full", "max_steps": steps, "learning_rate": 5e-3, "batch_size": 2}]
    return recipe(world, stages=stages, log_steps=1, eval_steps=1000, save_steps=1000)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])


def test_two_machines_train_both_stages_as_one_process_does(
    world: Path, tmp_path: Path, launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(shared_recipe(world, 2), tmp_path / "two.yaml")
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test",
               "--rdzv_endpoint", f"localhost:{free_port()}", "--local_addr", "localhost"]  # fmt: skip
    train = [
        FAULTY,
        "none",
        "0",
        "train",
        path,
        "--out",
        tmp_path / "two",
        "--resume",
    ]  # starts a new run
    machines = [launched(*TORCHRUN, *meeting, *train) for _ in range(2)]
    assert [machine.exit_code() for machine in machines] == [0, 0], "\n".join(machine.log() for machine in machines)
    state = json.loads((tmp_path / "two" / "run.json").read_text())
    assert state["status"] == "finished"
    assert state["processes"] == 2
    monkeypatch.setattr(stage, "verify_in_fresh_process", proven)
    monkeypatch.setattr(run, "RunMemory", Unplanned)
    run.train(shared_recipe(world, 1), tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one")


def test_a_process_that_fails_ends_them_all_with_its_own_error(world: Path, tmp_path: Path, launched: Any) -> None:
    path = write(one_stage(world, 10_000), tmp_path / "long.yaml")
    command = [FAULTY, "fail", "1", "train", path, "--out", tmp_path / "run"]
    failed = launched(*TORCHRUN, "--standalone", "--nproc_per_node", "2", *command)
    failed.wait_for("stage2 1/10000")  # it fails two steps later
    assert failed.exit_code() == 1, failed.log()
    assert len(failed.started) >= 2
    assert failed.left() == []
    assert "error in process 1: this process has had enough" in failed.log()
    assert "error in process 0: another process of this run has ended: its own error says why" in failed.log()
    first = failed.log().partition("Root Cause (first observed failure)")[2]  # what torchrun sums up
    assert "rank      : 1" in first
    assert "traceback : this process has had enough" in first


def test_the_last_that_torchrun_prints_of_a_mistake_is_our_message(tmp_path: Path, launched: Any) -> None:
    train = ["train", "voice", "--out", tmp_path / "run", "--set", f"data.store={tmp_path / 'nowhere'}"]
    failed = launched(*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "higgstune", *train)
    assert failed.exit_code() == 1, failed.log()
    *_, last, _border = failed.log().splitlines()
    assert re.fullmatch(r"  traceback : .*nowhere is not a code store: .*; make one with `higgstune prepare`", last)
    assert "cli/main.py" not in failed.log()


def test_sigterm_to_the_launcher_ends_it_with_a_checkpoint_and_another_resumes(
    world: Path, tmp_path: Path, launched: Any
) -> None:
    path, folder = write(one_stage(world, 60), tmp_path / "recipe.yaml"), tmp_path / "run"
    train = ["train", path, "--out", folder]
    stopped = launched(*TORCHRUN, "--standalone", "--nproc_per_node", "2", FAULTY, "dawdle", "1", *train)
    stopped.wait_for("stage2 4/60")
    stopped.launcher.send_signal(signal.SIGTERM)
    assert stopped.exit_code() == 1, stopped.log()
    assert len(stopped.started) >= 2
    assert stopped.left() == []
    assert "SIGKILL" not in stopped.log()
    [checkpoint] = (folder / "stage2" / "checkpoints").iterdir()
    steps = int(checkpoint.name.removeprefix("checkpoint-"))
    for rank in range(2):
        assert f"error in process {rank}: stopped by SIGTERM: after step {steps} of stage2" in stopped.log()
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    resumed = launched(*accelerate, FAULTY, "none", "0", *train, "--resume")
    assert resumed.exit_code() == 0, resumed.log()
    assert f"stage2 {steps}/60" not in resumed.log()
    assert f"stage2 {steps + 1}/60" in resumed.log()
    state = json.loads((folder / "run.json").read_text())
    assert (state["status"], state["processes"], state["stages"]["stage2"]["steps"]) == ("finished", 2, 60)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_shardings_of_accelerate_are_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=rf"{variable} is set: .*parallel: fsdp in the recipe"):
        Processes(cpu=True)
    monkeypatch.setenv(variable, "false")
    assert Processes(cpu=True).count == 1


def assert_a_verb_takes(words: list[str]) -> None:
    verb, *arguments = words
    typer.main.get_group(app).commands[verb].make_context(verb, arguments)


def commands_in_the_docs() -> list[str]:
    text = (DOCS / "cluster.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^    ((?:torchrun|accelerate launch) .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("line", commands_in_the_docs())
def test_launchers_take_the_commands_in_the_docs(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
    else:
        parsed = launch_command_parser().parse_args(words[2:])
    assert parsed.module
    assert parsed.training_script == "higgstune"
    assert_a_verb_takes(parsed.training_script_args)


def test_the_docs_name_the_keys_that_may_change_when_a_run_resumes() -> None:
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in text for key in FREE)


def test_the_job_for_kubernetes_is_one() -> None:
    job = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker, elastic = job["spec"]["pytorchReplicaSpecs"]["Worker"], job["spec"]["elasticPolicy"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"]
    pod = worker["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == "pytorch"
    parsed = get_args_parser().parse_args(container["command"][1:])
    assert (container["command"][0], parsed.module, parsed.training_script) == ("torchrun", True, "higgstune")
    assert_a_verb_takes(parsed.training_script_args)
    assert "--resume" in parsed.training_script_args
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    patience = {entry["name"]: entry["value"] for entry in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert int(patience) < pod["terminationGracePeriodSeconds"]


SRUN = """#!/bin/bash
# In place of Slurm's: it keeps what it should run, and ends a while after SIGTERM, or at once with $ENDS.
printf '%s\\n' "$@" > arguments
trap 'echo stopping >> calls; sleep 0.5; echo stopped >> calls; exit 1' TERM
touch started
[ -n "$ENDS" ] && exit "$ENDS"
while kill -0 $PPID 2> /dev/null; do sleep 0.05; done
"""

SCONTROL = """#!/bin/bash
case $1 in
show) printf 'node7\\nnode8\\n' ;;
requeue) echo "requeued $2" >> calls ;;
esac
"""


def has_trap(shell: int) -> bool:
    """Whether a shell handles SIGTERM, for which the script sets its last trap."""
    status = Path(f"/proc/{shell}/status").read_text()
    caught = int(re.findall(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)[0], 16)
    return bool(caught & 1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize(
    ("sent", "ends", "code", "calls"),
    [
        (signal.SIGUSR1, "", 1, ["stopping", "stopped", "requeued 42"]),
        (signal.SIGTERM, "", 1, ["stopping", "stopped"]),  # scancel; after a preemption Slurm itself requeues it
        (None, "0", 0, []),
        (None, "2", 2, []),
    ],
)
def test_the_script_for_slurm_stops_training_and_queues_it_again(
    tmp_path: Path, sent: signal.Signals | None, ends: str, code: int, calls: list[str]
) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "32",
    }  # fmt: skip
    job = subprocess.Popen(
        with_parent(["bash", CLUSTER / "slurm.sh", "voice", "runs/my voice"]), cwd=tmp_path,
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ENDS": ends},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "started").exists() or (sent is not None and not has_trap(job.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if sent is not None:
            job.send_signal(sent)  # to the shell alone, as Slurm does it with B:
        assert job.wait(PATIENCE) == code
    finally:
        job.kill()
    found = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert found == calls
    words = (tmp_path / "arguments").read_text().splitlines()
    parsed = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "8", "node7:29500")
    assert parsed.module
    assert parsed.training_script_args == ["train", "voice", "--out", "runs/my voice", "--resume"]
    assert_a_verb_takes(parsed.training_script_args)
