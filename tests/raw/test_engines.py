"""Who works on which recording: all engines give the same, and nobody's death loses or doubles anything."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from engine_work import DyingAsr, Notes
from raw_recordings import KnowingAsr, Talk, make_talk
from with_parent import with_parent

from higgstune.errors import ConfigError, DataError, WorkError
from higgstune.files import lock_file
from higgstune.raw import engines
from higgstune.raw.collect import collect
from higgstune.raw.dataset import CACHE, WRITTEN
from higgstune.raw.engines import Job, finish, remove_work, work_folder

PATIENCE = 300.0  # seconds, on a machine that has other work to do


def jobs_of(folder: Path, *contents: str) -> list[Job]:
    """Recordings whose first word says what is to happen, the longest first."""
    folder.mkdir(exist_ok=True)
    found = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.txt"
        path.write_text(content)
        found.append(Job(path, float(len(contents) - number)))
    return found


def tries(folder: Path, number: int) -> list[str]:
    return (folder / f"{number}.txt.log").read_text().split()


def everything(out: Path) -> dict[str, bytes]:
    """All files of a data set by name, but its card, which has the name of the folder and the cost."""
    return {
        path.relative_to(out).as_posix(): re.sub(
            rb'"raw": "[^"]*"', b'"raw": "RAW"', path.read_bytes().replace(str(out).encode(), b"OUT")
        )
        for path in sorted(out.rglob("*"))
        if path.is_file() and CACHE not in path.parts and path.suffix != ".lock" and path.stem != "data_card"
    }


def temporary(out: Path) -> list[Path]:
    """What a finished collection must not leave."""
    return [path for path in out.rglob("*") if path.suffix in (".tmp", ".new", ".work", ".f32")]


def journals(out: Path) -> dict[str, list[str]]:
    """The lines of each recording's journal."""
    found = sorted((out / CACHE).glob("*.jsonl"))
    return {path.name: path.read_text().splitlines() for path in found if path.name != WRITTEN}


def make_raw(folder: Path, lengths: Sequence[int], *, labels: bool = True) -> list[Talk]:
    """Recordings of so many sentences, each with its text beside it."""
    folder.mkdir()
    talks = []
    for number, length in enumerate(lengths):
        turns = [("rms", (7 * number + turn) % 24, 0.7) for turn in range(length)]
        talks.append(make_talk(folder / f"talk{number}.wav", turns, seed=number))
        if labels:
            lines = [f"{said.start:.2f}\t{said.end:.2f}\t{said.text}" for said in talks[-1].said]
            (folder / f"talk{number}.txt").write_text("\n".join(lines))
    return talks


@pytest.mark.processes
def test_two_processes_share_the_work_and_report_all_of_it(tmp_path: Path):
    jobs, reported = jobs_of(tmp_path / "raw", *["wait 0.3"] * 6, "refuse"), []
    work = Notes(tmp_path)
    assert finish(work, jobs, "local", 2, reported.append) == {jobs[-1].path: "it is bad"}
    who = [tries(tmp_path, number) for number in range(7)]
    assert {len(one) for one in who} == {1}
    assert len({one[0] for one in who}) == 2
    assert str(os.getpid()) not in {one[0] for one in who}
    assert reported == sorted(reported)
    assert (reported[0], reported[-1]) == (0.0, sum(job.seconds for job in jobs))
    assert work.models == []  # not here, too
    assert not temporary(tmp_path)


def test_one_process_is_this_one_and_begins_with_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "_worthwhile", lambda device, jobs: 1)
    jobs, order = jobs_of(tmp_path / "raw", "", "", ""), []
    work = Notes(tmp_path)
    do, work.do = work.do, lambda path, report: order.append(path) or do(path, report)
    finish(work, jobs[::-1], "local", None, lambda seconds: None)
    assert order == [job.path for job in jobs]
    assert {one for number in range(3) for one in tries(tmp_path, number)} == {str(os.getpid())}
    assert work.models == ["loaded"]


def test_models_that_cannot_travel_stay_here(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    jobs, work = jobs_of(tmp_path / "raw", "", ""), Notes(tmp_path)
    work.models = [lambda: None]  # type: ignore[list-item]
    finish(work, jobs, "local", 2, lambda seconds: None)
    assert {one for number in range(2) for one in tries(tmp_path, number)} == {str(os.getpid())}
    assert "others cannot have these models" in caplog.text


@pytest.mark.processes
def test_what_a_killed_worker_had_is_done_by_another(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    jobs = jobs_of(tmp_path / "raw", "die 1", "die 9", "", "wait 0.2")
    found = finish(Notes(tmp_path), jobs, "local", 2, lambda seconds: None)
    assert found == {jobs[1].path: "3 processes that worked on it ended (by SIGKILL): is there memory enough?"}
    assert [len(tries(tmp_path, number)) for number in range(4)] == [2, 3, 1, 1]
    assert f"another continues with {jobs[0].path}" in caplog.text


@pytest.mark.processes
@pytest.mark.parametrize(
    ("content", "error", "message"),
    [("raise", DataError, "the disk is on fire"), ("break", WorkError, "ZeroDivisionError: by nothing")],
)
def test_an_error_ends_all(tmp_path: Path, content: str, error: type[Exception], message: str):
    jobs = jobs_of(tmp_path / "raw", "wait 600", content)
    with pytest.raises(error, match=message):
        finish(Notes(tmp_path), jobs, "local", 2, lambda seconds: None)
    assert not psutil.pid_exists(int(tries(tmp_path, 0)[0]))


_COMMAND = """
import sys
from pathlib import Path
from engine_work import Notes
from higgstune.raw.engines import Job, finish
if __name__ == "__main__":
    finish(Notes(Path(sys.argv[1])), [Job(Path(name), 1.0) for name in sys.argv[2:]], "local", 2, lambda seconds: None)
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_command(tmp_path: Path, how: signal.Signals):
    jobs = jobs_of(tmp_path / "raw", "wait 600", "wait 600")
    script = tmp_path / "command.py"
    script.write_text(_COMMAND)
    process = subprocess.Popen(
        with_parent([sys.executable, script, tmp_path, *(job.path for job in jobs)]),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: all((tmp_path / f"{number}.txt.log").exists() for number in (0, 1)))
    workers = [int(tries(tmp_path, number)[0]) for number in (0, 1)]
    assert all(map(psutil.pid_exists, workers))
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()  # a terminal signals all of a group
    assert process.wait(PATIENCE) != 0
    wait_for(lambda: not any(map(psutil.pid_exists, workers)))
    assert len(temporary(tmp_path)) == 2
    remove_work(tmp_path)
    assert not temporary(tmp_path)


def wait_for(happened: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.processes
def test_a_script_without_its_guard_is_named(tmp_path: Path):
    jobs = jobs_of(tmp_path / "raw", "", "")
    script = tmp_path / "command.py"
    script.write_text(_COMMAND.replace('__name__ == "__main__"', "True"))
    ended = subprocess.run(
        with_parent([sys.executable, script, tmp_path, *(job.path for job in jobs)]),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode != 0
    assert 'below `if __name__ == "__main__":`' in ended.stderr


def test_as_many_processes_as_cores_memory_and_recordings_allow(monkeypatch: pytest.MonkeyPatch):
    jobs = [Job(Path("a.wav"), 3600.0), Job(Path("b.wav"), 3600.0)]
    monkeypatch.setattr(engines, "_logical", lambda: 16)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    assert engines._worthwhile("cpu", jobs) == 4
    assert engines._worthwhile("cuda", jobs) == 1
    assert engines._worthwhile("cpu", [Job(Path("a.wav"), 60.0)]) == 1
    monkeypatch.setattr(engines, "_logical", lambda: 2)  # of a container
    assert engines._worthwhile("cpu", jobs) == 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert engines._worthwhile("cpu", jobs) == 1


def test_temporary_files_are_removed_unless_somebody_works_there(tmp_path: Path):
    (tmp_path / "left.work").mkdir()
    with work_folder(tmp_path / "busy.part") as folder:
        remove_work(tmp_path)
        assert folder.is_dir()
        assert not (tmp_path / "left.work").exists()
        with pytest.raises(TimeoutError):
            lock_file(tmp_path / "busy.lock").acquire(timeout=0)
    assert not folder.exists()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recordings with texts, and one that cannot be used."""
    folder = tmp_path_factory.mktemp("engines") / "raw"
    make_raw(folder, (5, 8, 6))
    (folder / "bad.wav").write_text("this is not audio")
    return folder


@pytest.fixture(scope="module")
def alone(raw: Path) -> Path:
    """Their data set as one process makes it."""
    out = raw.parent / "alone"
    collect(raw, out)
    return out


@pytest.mark.processes
def test_two_processes_make_the_same_data_set(raw: Path, alone: Path, tmp_path: Path):
    collect(raw, tmp_path / "out", workers=2)
    assert everything(tmp_path / "out") == everything(alone)
    assert not temporary(tmp_path / "out")


def test_parts_are_made_at_the_same_time_and_merged(raw: Path, alone: Path, tmp_path: Path):
    out, inner = tmp_path / "out", []

    def meanwhile(stage: str, done: int, total: int) -> None:
        if not inner:
            inner.append(collect(raw, out, shard=(2, 2)))

    collect(raw, out, shard=(1, 2), progress=meanwhile)
    assert not (out / "manifest.jsonl").exists()
    assert inner[0].recordings == 2
    with pytest.raises(DataError, match="another part 1 of 2 is writing"):
        collect(raw, out, shard=(1, 2), progress=lambda *_: collect(raw, out, shard=(1, 2)))
    collect(raw, out)
    assert everything(out) == everything(alone)


@pytest.mark.processes
def test_a_killed_process_loses_the_stretch_in_work_at_most(tmp_path: Path):
    talks = make_raw(tmp_path / "raw", (12, 12), labels=False)
    reference = KnowingAsr(*talks)
    collect(tmp_path / "raw", tmp_path / "alone", asr=reference)
    asr = DyingAsr(tmp_path, *talks)
    collect(tmp_path / "raw", tmp_path / "out", asr=asr, workers=2)
    clips_done = [int(line) for line in (tmp_path / "transcribed").read_text().splitlines()]
    assert 0 < sum(clips_done) - reference.clips <= max(clips_done)
    assert everything(tmp_path / "out") == everything(tmp_path / "alone")
    assert {name: sorted(lines) for name, lines in journals(tmp_path / "out").items()} == {
        name: sorted(lines) for name, lines in journals(tmp_path / "alone").items()
    }


def test_the_same_recording_under_two_names_has_one_journal(tmp_path: Path):
    [talk] = make_raw(tmp_path / "raw", (4,), labels=False)
    (tmp_path / "raw" / "other.wav").write_bytes((tmp_path / "raw" / "talk0.wav").read_bytes())
    asr = KnowingAsr(talk)
    collect(tmp_path / "raw", tmp_path / "out", asr=asr)
    [lines] = journals(tmp_path / "out").values()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)
    assert asr.clips <= len(lines)


def test_ray_needs_its_extra(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"higgstune\[ray\]"):
        collect(raw, tmp_path / "out", engine="ray")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray, whose workers find what tests import."""
    module = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield module
        module.shutdown()


@pytest.mark.processes
@pytest.mark.filterwarnings("default")  # of Ray
def test_ray_makes_the_same_data_set(ray: Any, raw: Path, alone: Path, tmp_path: Path):
    collect(raw, tmp_path / "out", engine="ray")
    assert not ray.is_initialized()
    assert everything(tmp_path / "out") == everything(alone)
    assert not temporary(tmp_path / "out")


@pytest.fixture(scope="module")
def cluster(ray: Any) -> Iterator[Any]:
    """Two nodes of two CPUs each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.proof
@pytest.mark.filterwarnings("default")
def test_a_cluster_makes_the_same_data_set(cluster: Any, raw: Path, alone: Path, tmp_path: Path):
    killed: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if 0 < done < total and not killed:
            workers = [one for one in psutil.process_iter(["name"]) if "_RayWorker" in (one.info["name"] or "")]
            killed.extend(one.pid for one in workers[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    collect(raw, tmp_path / "out", engine="ray", progress=progress)
    assert everything(tmp_path / "out") == everything(alone)
    assert not temporary(tmp_path / "out")


@pytest.mark.proof
@pytest.mark.filterwarnings("default")
def test_a_cluster_without_progress_is_given_up(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "_PATIENCE", 30.0)
    with pytest.raises(WorkError, match="no recording has progressed"):
        finish(Notes(tmp_path), jobs_of(tmp_path / "raw", "wait 6000"), "ray", None, lambda seconds: None)
    wait_for(lambda: not psutil.pid_exists(int(tries(tmp_path, 0)[0])))


@pytest.mark.proof
@pytest.mark.filterwarnings("default")
def test_an_error_in_a_cluster_is_raised(cluster: Any, tmp_path: Path):
    with pytest.raises(DataError, match="the disk is on fire"):
        finish(Notes(tmp_path), jobs_of(tmp_path / "raw", "", "raise"), "ray", None, lambda seconds: None)


@pytest.mark.proof
@pytest.mark.filterwarnings("default")
def test_a_killed_worker_and_a_removed_node_lose_and_double_nothing(cluster: Any, tmp_path: Path):
    jobs, reported = jobs_of(tmp_path / "raw", *["wait 1"] * 30, "refuse"), []
    total = sum(job.seconds for job in jobs)
    killed: list[int] = []

    def report(seconds: float) -> None:
        reported.append(seconds)
        if seconds > 0.1 * total and not killed:
            killed.extend(running(tmp_path)[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        if seconds > 0.4 * total and len(cluster.list_all_nodes()) > 1:
            cluster.remove_node(cluster.list_all_nodes()[1])

    assert finish(Notes(tmp_path), jobs, "ray", None, report) == {jobs[-1].path: "it is bad"}
    assert len(cluster.list_all_nodes()) == 1
    who = [tries(tmp_path, number) for number in range(len(jobs))]
    assert len(list(tmp_path.glob("*.part"))) == 30
    assert len({pid for one in who for pid in one}) >= 3  # the two at first, and who took over
    assert all(len(one) <= 3 for one in who)
    assert sum(len(one) - 1 for one in who) >= 1
    assert reported == sorted(reported)
    assert reported[-1] == total
    remove_work(tmp_path)
    assert not temporary(tmp_path)


def running(folder: Path) -> list[int]:
    """The processes that are at work."""
    logs = [path.with_suffix(".log") for path in sorted(folder.glob("*.work"))]
    return [int(log.read_text().split()[-1]) for log in logs if log.exists()]


@pytest.mark.proof
def test_twenty_kills_of_the_command_change_nothing(tmp_path: Path):
    make_raw(tmp_path / "raw", (5, 7, 9))
    command = [sys.executable, "-m", "higgstune", "collect", tmp_path / "raw", "--workers", "2", "--out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    start = time.monotonic()
    subprocess.run([*command, tmp_path / "alone"], env=environment, check=True, capture_output=True)
    whole, out, die = time.monotonic() - start, tmp_path / "out", random.Random(0)
    seen = []
    for number in range(20):
        process = subprocess.Popen(
            with_parent([*command, out]), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if number % 2:  # at any time; else when a certain file appears
            time.sleep(die.uniform(0.3, 1.0) * whole)
        else:
            pattern = die.choice(["clips/*.tmp", "clips/*.flac", "*.new", ".cache/.written*", ".cache/*.work/full.f32"])
            wait_for(lambda process=process, pattern=pattern: any(out.glob(pattern)) or process.poll() is not None)
        process.kill()
        process.wait()
        seen += [path.name for path in temporary(out)]
        if number % 4 == 3:  # else most find all done
            for path in [*out.glob(".cache/*.part.json"), *out.glob("clips/*"), *out.glob(".cache/written.jsonl")]:
                path.unlink(missing_ok=True)
    assert seen
    subprocess.run([*command, out], env=environment, check=True, capture_output=True)
    assert everything(out) == everything(tmp_path / "alone")
    assert not temporary(out)
    assert {name: sorted(lines) for name, lines in journals(out).items()} == {
        name: sorted(lines) for name, lines in journals(tmp_path / "alone").items()
    }
