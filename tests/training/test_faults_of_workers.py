"""Processes that build examples: how they end, and what is said of it."""

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import pytest
from accelerate import skip_first_batches
from packs import CODES, examples
from tiny_checkpoint import tiny_prompter

from higgstune.batch.loader import PackLoader, watched
from higgstune.batch.packing import PackSize
from higgstune.errors import DataError, WorkError
from higgstune.families.base import Example

pytestmark = pytest.mark.processes


class Faulty:
    """Examples, of which a worker process cannot build one."""

    def __init__(self, fault: str) -> None:
        _, prompter = tiny_prompter(codes=CODES)
        self.made = examples(prompter) * 4
        self.fault = fault

    def __len__(self) -> int:
        return len(self.made)

    def lengths(self) -> np.ndarray:
        return np.array([len(example) for example in self.made])

    def __getitem__(self, index: int) -> Example:
        if index == 6:
            FAULTS[self.fault](**workers_own())
        return self.made[index]


def workers_own() -> dict[str, Any]:
    """What torch's loop in a worker has in hand."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_worker_loop":
        assert frame.f_back is not None
        frame = frame.f_back
    return {name: frame.f_locals[name] for name in ("data_queue", "done_event")}


def killed_by(number: signal.Signals) -> Any:
    return lambda **_: os.kill(os.getpid(), number)


def with_the_queues_lock(data_queue: Any, done_event: Any) -> None:
    data_queue._wlock.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def with_the_events_lock(data_queue: Any, done_event: Any) -> None:
    done_event._cond.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def with_half_a_batch_sent(data_queue: Any, done_event: Any) -> None:
    with data_queue._wlock:
        os.write(data_queue._writer.fileno(), struct.pack("!i", 1000) + b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)


def damaged(**_: Any) -> None:
    try:
        raise OSError("it has changed")
    except OSError as error:
        raise DataError("row 7 of the train split: a shard is damaged: prepare it again") from error


FAULTS = {
    "killed": killed_by(signal.SIGKILL),
    "bus error": killed_by(signal.SIGBUS),
    "exit": lambda **_: os._exit(3),
    "killed with the queue's lock": with_the_queues_lock,
    "killed with the event's lock": with_the_events_lock,
    "killed with half a batch sent": with_half_a_batch_sent,
    "damaged": damaged,
    "a mistake": lambda **_: {}["mistake"],
    "none": lambda **_: None,
}


@contextmanager
def soon(seconds: float = 10.0) -> Iterator[None]:
    """Fails where it takes longer, rather than to wait for ever."""

    def late(*_: Any) -> None:
        pytest.fail(f"more than {seconds} s")  # no Exception: torch would catch that

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def loader(fault: str, workers: int = 2) -> PackLoader:
    return PackLoader(Faulty(fault), PackSize(clips=2), seed=None, workers=workers)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", "SIGKILL, as the system does where memory runs out"),
        ("killed with the queue's lock", "SIGKILL"),
        ("killed with the event's lock", "SIGKILL"),
        ("killed with half a batch sent", "SIGKILL"),
        ("bus error", "SIGBUS, as happens where /dev/shm is too small"),
        ("exit", "exit code 3"),
    ],
)
def test_a_worker_that_ends(fault: str, message: str) -> None:
    with soon(), pytest.raises(WorkError, match=rf"\(data.workers\) was ended by {message}.*go on from it with --res"):
        list(loader(fault))


def test_a_worker_that_ends_when_a_run_goes_on() -> None:
    """Batches that were trained on already are skipped by a loader of another class."""
    packs = iter(skip_first_batches(loader("killed"), 1))

    def train() -> None:
        while True:
            next(watched(packs))

    with soon(), pytest.raises(WorkError, match="SIGKILL"):
        train()


def test_a_worker_that_is_killed_while_nobody_waits_for_it() -> None:
    """The parent is not interrupted in what it does; it is told when it asks for the next batch."""
    packs = iter(loader("none"))
    next(packs)
    worker = packs._packs._workers[0]  # type: ignore[attr-defined]
    os.kill(worker.pid, signal.SIGKILL)
    with soon():
        for _ in range(100):  # in which a signal of its end would arrive
            time.sleep(0.005)
        with pytest.raises(WorkError, match="SIGKILL"):
            next(packs)
        assert not any(process.is_alive() for process in packs._packs._workers if process.join(5) is None)  # type: ignore[attr-defined]


def test_half_a_batch_that_was_sent_while_nobody_waited() -> None:
    packs = iter(loader("killed with half a batch sent"))
    wait([worker.sentinel for worker in packs._packs._workers])  # type: ignore[attr-defined]
    with soon(), pytest.raises(WorkError, match="SIGKILL"):
        list(packs)


def test_a_loader_that_is_left_goes_though_a_worker_was_killed() -> None:
    """With the lock that torch wants for the others' good-bye."""
    packs = iter(loader("killed with the event's lock"))
    workers = list(packs._packs._workers)  # type: ignore[attr-defined]
    wait([worker.sentinel for worker in workers])
    with soon():
        del packs
        assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_workers_leave_signals_of_others_to_the_parent(name: str) -> None:
    packs = iter(loader("none"))
    seen = [next(packs), next(packs)]  # one of each worker: both have begun
    workers = packs._packs._workers  # type: ignore[attr-defined]
    subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)  # as a scheduler does
    with soon():
        seen += packs
    assert len(seen) == len(loader("none"))


def test_workers_end_when_the_parent_says_so() -> None:
    packs = iter(loader("none"))
    next(packs)
    worker = packs._packs._workers[0]  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_says_arrives_as_it_is(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not workers:
        monkeypatch.setitem(globals(), "workers_own", dict)
    with soon(), pytest.raises(DataError) as error:
        list(loader("damaged", workers))
    assert str(error.value) == "row 7 of the train split: a shard is damaged: prepare it again"


def test_a_mistake_in_a_worker_keeps_its_traceback() -> None:
    with soon(), pytest.raises(KeyError, match=r"(?s)test_faults_of_workers.py.*mistake"):
        list(loader("a mistake"))
