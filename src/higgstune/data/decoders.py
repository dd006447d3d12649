"""Processes that decode, measure and resample recordings, while this one checks rows and feeds the codec.

Each reads tasks from its standard input and answers row by row; where the answers are not fetched, it waits. It ends
with its standard input, and so with this process, however that ends.
"""

import os
import pickle
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from higgstune.data.audio import resample
from higgstune.data.clips import Candidate, Checker, ClipReader, Limits, Segment
from higgstune.data.readings import Readings
from higgstune.data.rejection import RowError
from higgstune.data.source import SourceRow
from higgstune.errors import WorkError

_ALONE = 2.0  # CPU-seconds that one process decodes before others, which take a second to start, may help
_PAYS = 4.0  # CPU-seconds that are left then, about
_MOST = 16  # processes: one codec seldom needs more
_SHARE = 4  # tasks that each process gets of what is left, so that all end at about the same time
_ROWS = 64  # of a task at most, but for the segments of one file
_PIPE = 1 << 20  # bytes: two clips of six seconds

Decoded = dict[str, tuple[np.ndarray, int]]  # waveform [samples] float32 and rate in Hz, by audio hash


class RowClips(NamedTuple):
    """What must be decoded for a row."""

    row: int
    clips: list[tuple[Path, Segment]]
    size: int  # bytes of the first file: about how long it takes


class Answer(NamedTuple):
    """What was decoded for a row."""

    row: int
    records: list[bytes]  # for `Readings.add_record`
    refused: dict[bytes, tuple[Any, str]]  # reason and message, by key: see `ClipReader.refused`
    decoded: Decoded  # at the codec's rate


def available() -> int:
    """The number of processes that this machine has room for; 0 where one process does all as well."""
    if sys.platform == "win32":  # no `select` for pipes
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores < 2 else min(cores, _MOST)


def check_rows(
    rows: Sequence[SourceRow], checker: Checker, limits: Limits, readings: Readings, rate: int
) -> Iterator[tuple[int, Candidate | RowError, Decoded]]:
    """Check every row -> its number, the candidate or the reason against it, and the waveforms that were decoded.

    Here, and soon in other processes where that pays: the rows then come in another order. A waveform from another
    process has the codec's `rate` in Hz. Raises WorkError where a process is killed.
    """
    left = deque(range(len(rows)))
    spent = 0.0
    while left and not (spent > _ALONE and spent / (len(rows) - len(left)) * len(left) > _PAYS and available()):
        began = time.process_time()
        index = left.popleft()
        checked = _checked(checker, rows[index])
        spent += time.process_time() - began
        yield index, checked, checker.reader.decoded
    clips = [RowClips(index, *checker.unknown_clips(rows[index])) for index in left]
    todo = sorted((row for row in clips if row.clips), key=lambda row: (-row.size, row.clips[0][0]))
    for row in clips:
        if not row.clips:
            yield row.row, _checked(checker, rows[row.row]), checker.reader.decoded
    if not todo:
        return
    with Decoders(available(), limits, rate) as decoders:
        for answer in decoders.read(todo):
            for record in answer.records:
                readings.add_record(record)
            for key, reason in answer.refused.items():
                checker.reader.refused[key] = RowError(*reason)
            checked = _checked(checker, rows[answer.row])
            yield answer.row, checked, checker.reader.decoded | answer.decoded


def _checked(checker: Checker, row: SourceRow) -> Candidate | RowError:
    try:
        return checker.check(row)
    except RowError as error:
        return error


class Decoders:
    """Such processes, from `with` to its end."""

    def __init__(self, count: int, limits: Limits, rate: int) -> None:
        """`rate` is the codec's, in Hz."""
        self._count = count
        self._setup = limits, rate
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        # The same modules as here, and none from the current folder, which may be a stranger's.
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"]
        try:
            for _ in range(self._count):
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for this process
                )
                self._processes.append(process)
                _widen(process.stdout)
        except OSError as error:
            self.__exit__()
            raise WorkError(
                f"no process that decodes recordings can be started ({error.strerror}); the clips encoded so far are "
                "kept: end other programs, and run it again"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()

    def read(self, rows: Sequence[RowClips]) -> Iterator[Answer]:
        """The answers in the order in which they come. Raises WorkError where a process is killed.

        Rows with the same first file should follow each other: they go to one process, which decodes it once.
        """
        left = deque(rows)
        total = sum(row.size for row in rows)
        waiting: dict[int, list[int]] = {}  # rows without an answer, by process
        with selectors.DefaultSelector() as selector:
            for number, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, number)
                _send(process, self._setup)
                waiting[number] = []
            while left or any(waiting.values()):
                for number, process in enumerate(self._processes):
                    if left and not waiting[number]:
                        task = _next_task(left, total, self._count)
                        total -= sum(row.size for row in task)
                        waiting[number] = [row.row for row in task]
                        _send(process, task)
                for key, _ in selector.select():
                    process = self._processes[key.data]
                    answer: Answer | None = _receive(process.stdout)
                    if answer is None:
                        raise WorkError(
                            f"a process that decodes recordings ended with status {process.wait()} (-9: the memory was "
                            "full, or someone killed it); the clips encoded so far are kept: run it again"
                        )
                    waiting[key.data].remove(answer.row)
                    yield answer


def _next_task(left: deque[RowClips], total: int, count: int) -> list[RowClips]:
    """Rows for one process: a share of what is left by size, and all rows with the same first file."""
    task = [left.popleft()]
    size = task[0].size
    while left:
        is_same = left[0].clips[0][0] == task[-1].clips[0][0]
        if not is_same and (len(task) >= _ROWS or size + left[0].size > total / (count * _SHARE)):
            break
        task.append(left.popleft())
        size += task[-1].size
    return task


def _widen(pipe: IO[bytes] | None) -> None:
    """Let more answers wait in a pipe, where the system allows it: then its process seldom does."""
    import fcntl  # there is none on Windows

    with suppress(OSError, AttributeError):
        fcntl.fcntl(pipe or 0, fcntl.F_SETPIPE_SZ, _PIPE)


def _send(process: "subprocess.Popen[bytes]", message: Any) -> None:
    assert process.stdin is not None
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    try:
        _write(process.stdin, len(data).to_bytes(8, "little") + data)
    except BrokenPipeError:
        return  # it ended: the next `_receive` finds that out


def _write(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _receive(file: IO[bytes] | None) -> Any:
    """The next message; None where the other side has ended."""
    assert file is not None
    size = _exactly(file, 8)
    data = size and _exactly(file, int.from_bytes(size, "little"))
    return pickle.loads(data) if data else None


def _exactly(file: IO[bytes], size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return None
        view = view[count:]
    return data


def serve() -> None:
    """The other side, in a process of its own."""
    source, out = os.fdopen(0, "rb", buffering=0), os.fdopen(1, "wb", buffering=0)
    limits, rate = _receive(source)
    while (task := _receive(source)) is not None:
        readings = Readings()
        reader = ClipReader(limits, readings)
        for row in task:
            data = pickle.dumps(_answer(row, reader, readings, rate), pickle.HIGHEST_PROTOCOL)
            _write(out, len(data).to_bytes(8, "little") + data)


def _answer(row: RowClips, reader: ClipReader, readings: Readings, rate: int) -> Answer:
    known = set(reader.refused)
    readings.added = []
    reader.decoded.clear()
    for path, segment in row.clips:
        # The same is in the readings, or in `refused`.
        with suppress(RowError):
            reader.read(path, segment)
    refused = {key: (error.reason, str(error)) for key, error in reader.refused.items() if key not in known}
    decoded = {sha256: (resample(*sound, rate), rate) for sha256, sound in reader.decoded.items()}
    return Answer(row.row, readings.added, refused, decoded)
