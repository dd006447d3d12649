"""Who works on which recording: this process, several on this machine, or those of a Ray cluster.

Engines only schedule. Whoever works on a recording writes its part into the shared cache, under a lock, and keeps each
result on the way in the recording's journal: who is killed loses the utterance in work, and another continues with the
rest. So nothing is lost or doubled, whatever the engine, and all of them give the same data set.
"""

import logging
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal, Protocol

import psutil
from filelock import Timeout

from higgstune.errors import ConfigError, HiggstuneError, WorkError
from higgstune.files import lock_file, writing

Engine = Literal["local", "ray"]
_WORTH = 1200  # seconds of recordings that each process must have, to be worth the seconds that it needs to start
_MEMORY = 500_000_000  # bytes that a process needs beside its models
_TRIES = 3  # of a recording whose process is killed, maybe by what is in it
_PATIENCE = 1800.0  # seconds without progress of a cluster; a recording of 10 h takes a third to find its speech
_POLL = 1.0  # seconds
_ENDING = 30.0  # seconds
_SHARE = 0.9  # of one CPU that Ray reserves for all workers together: see `_in_cluster`
_ENDED = "{} processes that worked on it ended{}: is there memory enough?"
_RESUMES = "what was computed is kept"
_LOG = logging.getLogger(__name__)

Report = Callable[[float], None]


@dataclass(frozen=True)
class Job:
    """A recording to work on."""

    path: Path
    seconds: float  # about, of its duration


class Work(Protocol):
    """What is done to a recording; it can be pickled without its models."""

    device: str

    def do(self, path: Path, report: Report) -> str | None:
        """Write the part of a recording, and report the share that is done. -> why there is none, if so."""
        ...

    def unload(self) -> None:
        """Let go of the models, which are loaded again when they are needed."""
        ...


@contextmanager
def work_folder(part: Path) -> Iterator[Path]:
    """An empty folder for temporary files, for the one process at a time that makes a part."""
    folder, lock = part.with_suffix(".work"), lock_file(part.with_suffix(".lock"))
    with writing(part, _RESUMES):
        lock.acquire()
    try:
        with writing(folder, _RESUMES):
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def remove_work(cache: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    for folder in cache.glob("*.work"):
        lock = lock_file(folder.with_suffix(".lock"))
        with suppress(Timeout), lock.acquire(timeout=0):  # else somebody works there
            shutil.rmtree(folder, ignore_errors=True)


def finish(work: Work, jobs: Sequence[Job], engine: Engine, workers: int | None, report: Report) -> dict[Path, str]:
    """Work on all recordings, the longest first; report the seconds that are done. -> why some have no part.

    Without `workers`, as many as pay. Raises what the work raises, WorkError where processes end on their own.
    """
    jobs = sorted(jobs, key=lambda job: (-job.seconds, job.path))
    progress = _Progress(jobs, report)
    if engine == "ray":
        return _with_ray(work, jobs, workers, progress) if jobs else {}
    count = min(_worthwhile(work.device, jobs) if workers is None else workers, len(jobs))
    if count > 1 and _can_travel(work):
        work.unload()
        with _Crew(work, jobs, count, progress) as crew:
            return crew.run()
    found = {}
    for number, job in enumerate(jobs):
        found[job.path] = work.do(job.path, partial(progress.reached, number))
        progress.reached(number, 1.0)
    return _refused(found)


class _Progress:
    """How much of all recordings is done."""

    def __init__(self, jobs: Sequence[Job], report: Report) -> None:
        self._seconds = [job.seconds for job in jobs]
        self._shares = [0.0] * len(jobs)
        self._report = report
        report(0.0)

    def reached(self, number: int, share: float) -> None:
        """A recording, by its number, has reached a share of its work; one that is done again starts at what it had."""
        self._shares[number] = max(share, self._shares[number])
        self._report(sum(share * seconds for share, seconds in zip(self._shares, self._seconds, strict=True)))


def _refused(found: Mapping[Path, str | None]) -> dict[Path, str]:
    return {path: why for path, why in found.items() if why is not None}


def _worthwhile(device: str, jobs: Sequence[Job]) -> int:
    """How many processes pay here: one on a GPU, else as many as there are cores, memory and recordings for."""
    if device != "cpu":
        return 1
    cores = min(psutil.cpu_count(logical=False) or 1, _logical())
    rooms = psutil.virtual_memory().available // _need()
    return max(1, min(cores, rooms, int(sum(job.seconds for job in jobs) // _WORTH)))


def _logical() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _need() -> int:
    """Bytes for one more process like this one, which has loaded the models."""
    return int(psutil.Process().memory_info().rss) + _MEMORY


def _can_travel(work: Work) -> bool:
    """Whether other processes can have the models, too: those that are named can."""
    try:
        pickle.dumps(work)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        _LOG.warning("one process does all the work, because others cannot have these models: %s", error)
        return False
    return True


# Messages: a worker that has loaded says (None, 0.0); then (number, share) as it works, and (number, result) at the
# end of a recording.
class _Crew:
    """Processes of this machine. One that ends on its own is replaced, and its recording is done again."""

    def __init__(self, work: Work, jobs: Sequence[Job], count: int, progress: _Progress) -> None:
        self._work, self._jobs, self._progress = work, jobs, progress
        self._threads = max(1, _logical() // count)
        self._left = list(range(len(jobs)))[::-1]
        self._deaths: Counter[int | None] = Counter()
        self._doing: dict[Connection, int | None] = {}  # once it has begun
        self._processes: dict[Connection, Any] = {}
        self._found: dict[Path, str | None] = {}
        self._count = count

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.kill()  # at any place: see above
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    def run(self) -> dict[Path, str]:
        """Until every recording is done."""
        for _ in range(self._count):
            self._start()
        while len(self._found) < len(self._jobs):
            for connection in wait(list(self._processes)):
                assert isinstance(connection, Connection)
                try:
                    number, said = connection.recv()
                except (EOFError, OSError):  # also in the middle of a message
                    self._replace(connection)
                else:
                    self._receive(connection, number, said)
        return _refused(self._found)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have the locks of threads that it has not
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(self._work, [job.path for job in self._jobs], there))
        with _threads(self._threads):
            process.start()
        there.close()
        self._processes[here] = process

    def _receive(self, connection: Connection, number: int | None, said: Any) -> None:
        if isinstance(said, BaseException):
            raise said
        if isinstance(said, float):
            if number is not None:
                self._progress.reached(number, said)
                return
        elif number is not None:
            self._found[self._jobs[number].path] = said
            self._progress.reached(number, 1.0)
        self._doing[connection] = self._left.pop() if self._left else None
        if self._doing[connection] is not None:
            with suppress(ConnectionError):  # its end is noticed next
                connection.send(self._doing[connection])

    def _replace(self, connection: Connection) -> None:
        has_begun, process = connection in self._doing, self._processes.pop(connection)
        number = self._doing.pop(connection, None)
        connection.close()
        process.join()
        if has_begun and number is None:  # it had nothing to do
            return
        how = _ending(process.exitcode)
        self._deaths[number] += 1
        if number is None:
            if self._deaths[None] >= _TRIES:
                raise WorkError(
                    f"workers end before they begin ({how}): a script that calls `collect` with several must do so "
                    'below `if __name__ == "__main__":`; --workers 1 needs none'
                )
        elif self._deaths[number] < _TRIES:
            _LOG.warning("a worker ended (%s): another continues with %s", how, self._jobs[number].path)
            self._left.append(number)
        else:
            self._found[self._jobs[number].path] = _ENDED.format(_TRIES, f" ({how})")
        self._start()


def _ending(code: int) -> str:
    with suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"exit code {code}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Have processes that are started use so many threads, unless the user says how many."""
    mine = "OMP_NUM_THREADS" not in os.environ
    if mine:
        os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if mine:
            del os.environ["OMP_NUM_THREADS"]


def _serve(work: Work, paths: Sequence[Path], connection: Connection) -> None:
    """A worker: it ends when the process that has started it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; who has started it ends it
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()

    def send(number: int | None, said: Any) -> None:
        try:
            connection.send((number, said))
        except ConnectionError:
            os._exit(1)

    send(None, 0.0)
    while True:
        number = connection.recv()
        send(number, _result(work, paths[number], partial(send, number)))


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # as if it were killed


def _result(work: Work, path: Path, report: Report) -> "str | Exception | None":
    """Why a recording has no part, or what was raised, to be raised again by whom the work is done for."""
    try:
        return work.do(path, report)
    except HiggstuneError as error:
        return error
    except Exception as error:  # noqa: BLE001 (nothing is passed over: see above)
        return WorkError(f"{path}: {type(error).__name__}: {error}")


def _with_ray(work: Work, jobs: Sequence[Job], workers: int | None, progress: _Progress) -> dict[Path, str]:
    """By Ray Data, in the cluster of RAY_ADDRESS or one of this machine. Raises ConfigError, WorkError."""
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread of Ray Data would begin anew what has ended
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"--engine ray needs more: pip install 'higgstune[ray]' [{error}]") from error
    if not _can_travel(work):
        raise ConfigError("--engine ray needs its models by name: other processes cannot have these")
    need = _need()
    work.unload()
    is_ours = not ray.is_initialized()
    if is_ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it says is raised here
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"there is no Ray cluster at {os.environ.get('RAY_ADDRESS')}: {error}") from error
    try:
        return _in_cluster(ray, work, jobs, min(workers or _rooms(ray, work.device, need), len(jobs)), progress)
    finally:
        if is_ours:
            ray.shutdown()


def _rooms(ray: Any, device: str, need: int) -> int:
    """How many workers the nodes of a cluster have room for: all CPUs but one of each, or all GPUs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if device != "cpu":
        found = sum(int(node.get("GPU", 0)) for node in nodes)
    else:
        rooms = [(int(node.get("CPU", 0)), int(node.get("memory", need) // need)) for node in nodes]
        found = sum(max(1, min(cores - 1, memory)) for cores, memory in rooms if cores)
    if not found:
        raise ConfigError(f"no node of the Ray cluster has a {device} for workers")
    return found


def _in_cluster(ray: Any, work: Work, jobs: Sequence[Job], count: int, progress: _Progress) -> dict[Path, str]:
    """Each task gets the path of a recording, and gives back its number and result.

    All workers together claim less than one CPU, wherever they are: once a node is gone, those that are started again
    elsewhere would else hold every CPU while Ray waits for one, for ever. Ray spreads them over the nodes.
    """
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), False)
    board = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()
    items = [{"number": number, "path": os.fsencode(job.path)} for number, job in enumerate(jobs)]
    context = ray.data.DataContext.get_current()
    quiet, context.enable_progress_bars = context.enable_progress_bars, False
    tolerant, context.max_errored_blocks = context.max_errored_blocks, 0
    done = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _RayWorker,
        fn_constructor_args=(work, board),
        compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
        num_cpus=max(math.floor(_SHARE / count * 10_000), 1) / 10_000,
        num_gpus=0 if work.device == "cpu" else 1,
    )
    context.enable_progress_bars, context.max_errored_blocks = quiet, tolerant  # `done` has its own
    rows: Queue[Any] = Queue()
    thread = threading.Thread(target=_pass_on, args=(done, rows), daemon=True)
    thread.start()
    found: dict[Path, str | None] = {}
    moved = time.monotonic()
    try:
        while len(found) < len(jobs):
            with suppress(Empty):
                row = rows.get(timeout=_POLL)
                if isinstance(row, Exception):
                    raise row
                result = pickle.loads(row["result"])
                if isinstance(result, Exception):
                    raise result
                found[jobs[row["number"]].path] = result
            shares = ray.get(board.news.remote())
            for number, share in shares.items():
                progress.reached(number, share)
            moved = time.monotonic() if shares else moved
            if time.monotonic() - moved > _PATIENCE:
                raise WorkError(
                    f"no recording has progressed for {_PATIENCE / 60:.0f} minutes in a Ray cluster of which "
                    f"{ray.available_resources().get('CPU', 0):.1f} CPUs are free: see `ray status`; {_RESUMES}: run "
                    "it again"
                )
        return _refused(found)
    except BaseException:  # also Ctrl-C: Ray Data ends when its workers do, and has no other way
        with suppress(ray.exceptions.RayError):
            for worker in ray.get(board.workers.remote(), timeout=_ENDING):
                ray.kill(worker)
        raise
    finally:
        thread.join(_ENDING)
        ray.kill(board)


def _pass_on(done: Any, rows: "Queue[Any]") -> None:
    try:
        for row in done.iter_rows():
            rows.put(row)
        rows.put(WorkError(f"Ray has lost a recording; {_RESUMES}: run it again"))
    except Exception as error:  # noqa: BLE001 (it is raised by whom the rows are for)
        rows.put(error)


class _Board:
    """An actor beside the command, to which workers report how far they are."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()
        self._news: dict[int, float] = {}
        self._workers: list[Any] = []

    def begin(self, number: int, worker: Any) -> int:
        """A worker, an actor, begins a recording. -> for the which time."""
        if worker not in self._workers:
            self._workers.append(worker)
        self._begun[number] += 1
        self._news[number] = 0.0
        return self._begun[number]

    def reached(self, number: int, share: float) -> None:
        """A worker has done a share of a recording."""
        self._news[number] = share

    def workers(self) -> list[Any]:
        """All that have begun."""
        return self._workers

    def news(self) -> dict[int, float]:
        """What was reported since the last call."""
        news, self._news = self._news, {}
        return news


class _RayWorker:
    """An actor of a cluster, which loads its models once."""

    def __init__(self, work: Work, board: Any) -> None:
        self._work, self._board = work, board

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The result for a recording: rows, not errors, because Ray would try those again or give all up."""
        import ray

        number, path = int(row["number"]), Path(os.fsdecode(row["path"]))
        if ray.get(self._board.begin.remote(number, ray.get_runtime_context().current_actor)) > _TRIES:
            result: Any = _ENDED.format(_TRIES, "")
        else:
            result = _result(self._work, path, partial(self._board.reached.remote, number))
        self._board.reached.remote(number, 1.0)
        return {"number": number, "result": pickle.dumps(result)}
