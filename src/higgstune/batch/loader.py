"""Packs of examples, one after the other, for training and for validation."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from higgstune.batch.collate import Packed, pack
from higgstune.batch.packing import PackSampler, PackSize
from higgstune.errors import HiggstuneError, WorkError
from higgstune.families.base import Example
from higgstune.kernels.loss import IGNORE

_DYING = 1.0  # seconds until a process whose connection is cut off has ended
_OFTEN = {
    "SIGKILL": ", as the system does where memory runs out (fewer data.workers need less)",
    "SIGBUS": ", as happens where /dev/shm is too small for the batches (data.workers: 0 needs none of it)",
}


class PackLoader(DataLoader[Packed]):
    """A `DataLoader` that gives packed batches: see `batch.packed.pack`. What goes wrong in a worker: see `watched`."""

    def __init__(
        self,
        examples: Any,
        size: PackSize,
        *,
        seed: int | None,
        share_prefix: bool = True,
        rank: int = 0,
        processes: int = 1,
        per_step: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`examples` is map-style and gives `Example`s; where it has `lengths()`, no example is built to know its own.
        `per_step`: see `PackSampler`.

        Raises ConfigError for an example that is longer than a pack.
        """
        self.packs = PackSampler(
            example_lengths(examples), size, seed=seed, rank=rank, processes=processes, per_step=per_step
        )
        super().__init__(
            _MutedOnDemand(examples),  # type: ignore[arg-type]
            batch_sampler=self.packs,
            collate_fn=partial(pack, share_prefix=share_prefix),
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=False,
            generator=torch.Generator(),  # a loader that draws from the common one would change what dropout draws
            prefetch_factor=4 if workers else None,
            worker_init_fn=_leave_signals_to_parent if workers else None,
        )

    def __iter__(self) -> Any:
        """The packs of an epoch."""
        return watched(super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is over the packs of this epoch."""
        self.packs.set_epoch(epoch)


def watched(packs: Iterator[Packed]) -> Iterator[Packed]:
    """An iterator of a `DataLoader`, with what goes wrong in its worker processes said as it is.

    That of a `PackLoader` is so already; one that skips batches, as `accelerate` makes it from a `PackLoader`, is not.

    Raises WorkError, in `next` and nowhere else, when a worker was killed. An error of this package that was raised in
    a worker has its own message, without the worker's traceback.
    """
    return _Watched(packs) if isinstance(packs, _MultiProcessingDataLoaderIter) else packs


class _WorkerEnded(BaseException):
    """Goes through torch's own handling of errors, which may wait for a lock that the dead worker has."""


class _Watched(Iterator[Packed]):
    """See `watched`.

    torch's own watch over its workers raises in the parent wherever that is, also in the midst of writing a file. Here
    the end of a worker interrupts the wait for a batch and nothing else; such a wait might never end, as for the second
    half of what a killed worker was sending.
    """

    def __init__(self, packs: _MultiProcessingDataLoaderIter) -> None:
        self._packs = packs
        if packs._worker_pids_set:
            signal_handling._remove_worker_pids(id(packs))
            packs._worker_pids_set = False

    def __next__(self) -> Packed:
        try:
            with self._interrupted_by_an_end():
                if not self._ended():  # what a dead worker has sent already is of no use without it
                    return next(self._packs)
            raise _WorkerEnded
        except StopIteration:
            raise
        except HiggstuneError as error:
            self._stop()
            if (message := _own_message(error)) is None:
                raise
            raise type(error)(message) from error
        except (_WorkerEnded, RuntimeError, OSError, EOFError, UnpicklingError) as error:
            ended = self._ended(_DYING)
            self._stop()
            if not ended:
                raise
            raise WorkError(
                f"a process that builds examples (data.workers) was ended by {_reason(ended[0])}; the newest "
                "checkpoint is kept: go on from it with --resume"
            ) from error
        except BaseException:
            self._stop()
            raise

    def __del__(self) -> None:
        if self._ended():
            self._stop()

    @contextmanager
    def _interrupted_by_an_end(self) -> Iterator[None]:
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if in_main and hasattr(signal, "SIGCHLD") else None
        if before is None:  # it is not for us to handle; torch looks at its workers every five seconds
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if callable(before):
                before(number, frame)
            if self._ended():
                raise _WorkerEnded

        signal.signal(signal.SIGCHLD, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, before)

    def _ended(self, seconds: float = 0.0) -> list[BaseProcess]:
        """The workers that have ended; where there is none, those that do within this time."""
        if self._packs._shutdown:
            return []
        workers = {worker.sentinel: worker for worker in self._packs._workers}
        return [workers[sentinel] for sentinel in wait(workers, seconds)]  # type: ignore[index]

    def _stop(self) -> None:
        """End the workers at once. Torch's own way waits: for seconds, or for a lock that a dead one has, for ever."""
        if self._packs._shutdown:
            return
        self._packs._shutdown = True
        for worker in self._packs._workers:
            worker.kill()
            worker.join()
        if self._packs._pin_memory:
            self._packs._pin_memory_thread_done_event.set()


def _reason(worker: BaseProcess) -> str:
    worker.join()
    code = worker.exitcode
    name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return name + _OFTEN.get(name, "")


def _own_message(error: HiggstuneError) -> str | None:
    """What an error said in the worker that raised it, without the traceback that torch puts before it."""
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    text = str(error)
    return text.rpartition(name)[2].strip() if text.startswith("Caught ") and name in text else None


def _leave_signals_to_parent(_worker: int) -> None:
    """A terminal sends Ctrl-C to all processes, a scheduler SIGTERM; the parent says when workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # where it can be told who sends a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while (info := signal.sigwaitinfo({signal.SIGTERM})) is not None and info.si_pid != os.getppid():
        pass
    os._exit(0)


def example_lengths(examples: Any) -> NDArray[np.int64]:
    """The positions of each example, [examples]."""
    if hasattr(examples, "lengths"):
        return examples.lengths()
    return np.array([len(examples[i]) for i in range(len(examples))], dtype=np.int64)


class _MutedOnDemand(Dataset[Example]):
    """The examples; index i < 0 is example ~i without labels (see `PackSampler`)."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        if index >= 0:
            return self.examples[index]
        example: Example = self.examples[~index]
        return replace(
            example,
            text_labels=np.full_like(example.text_labels, IGNORE),
            audio_labels=np.full_like(example.audio_labels, IGNORE),
        )
