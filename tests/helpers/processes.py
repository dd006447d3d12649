"""Processes that train together. They start at once: each is forked from one that has imported everything."""

import atexit
import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from with_parent import end_with_parent

from higgstune.errors import HiggstuneError
from higgstune.training import verify

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["higgstune.training.run", "bitsandbytes"])
PATIENCE = 300.0  # seconds, on a machine that has other work to do


def _kill_all() -> None:
    for process in multiprocessing.active_children():
        process.kill()


atexit.register(_kill_all)  # where tests were interrupted: multiprocessing itself would wait for them


@pytest.fixture(scope="module", autouse=True)
def forked_proofs() -> Iterator[None]:
    """Verify adapters in forked processes: a new interpreter needs seconds for its imports.

    Applies to every test of a module that imports this.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_run", _forked_proof)
        yield


def _forked_proof(request: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    process = _CONTEXT.Process(target=_prove, args=(request, dict(environment)))
    process.start()
    process.join()
    printed = [request.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".out", ".err")]
    return subprocess.CompletedProcess([], process.exitcode or 0, *printed)


def _prove(request: Path, environment: dict[str, str]) -> None:
    end_with_parent()
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    out, err = (request.with_suffix(suffix).open("w", encoding="utf-8") for suffix in (".out", ".err"))
    with out, err, redirect_stdout(out), redirect_stderr(err):
        try:
            verify.main(str(request))
        except SystemExit as ended:  # with a message, which the interpreter would print
            err.write(str(ended))
            ended.code = 1
            raise


class Together:
    """Processes with ranks, as torchrun starts them. `log(rank)` is their output."""

    def __init__(self, folder: Path, count: int, work: Callable[..., None], *arguments: Any) -> None:
        """Run `work(*arguments)`, a function of a module, in `count` processes; their logs go to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        port = _free_port()
        self.all = [
            _CONTEXT.Process(target=_run, args=(rank, count, port, folder, work, arguments)) for rank in range(count)
        ]
        for process in self.all:
            process.start()

    def log(self, rank: int = 0) -> str:
        return _log_of(self.folder, rank).read_text(encoding="utf-8")

    def exit_codes(self, seconds: float = PATIENCE) -> list[int | None]:
        """Once all have ended; None for one that has not in this time, and is killed then."""
        codes = []
        for process in self.all:
            process.join(seconds)
            codes.append(process.exitcode)
            process.kill()
        return codes

    def succeeded(self) -> None:
        codes = self.exit_codes()
        assert codes == [0] * len(codes), "\n".join(self.log(rank) for rank in range(len(codes)))


def _log_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.log"


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])


def _run(rank: int, count: int, port: int, folder: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    gc.freeze()  # see conftest.py
    log = _log_of(folder, rank).open("w", encoding="utf-8", buffering=1)  # open until the process ends
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    try:
        work(*arguments)
        os._exit(0)
    except HiggstuneError as error:
        log.write(f"{type(error).__name__}: {error}\n")
        os._exit(error.exit_code)
    finally:
        # Errors are printed here: a forked process must not run its parent's clean-up.
        traceback.print_exc(file=log)
        os._exit(1)
