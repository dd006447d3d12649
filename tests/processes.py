"""Several processes that train together, started in a moment: they are forked from one that has imported everything."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from higgstune.errors import HiggstuneError

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["higgstune.training.run", "bitsandbytes"])


class Together:
    """Processes with ranks, as torchrun starts them. What they print is in `log(rank)`."""

    def __init__(self, folder: Path, count: int, work: Callable[..., None], *arguments: Any) -> None:
        """`work(*arguments)` is a function of a module; `folder` gets the logs."""
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

    def exit_codes(self, seconds: float = 120.0) -> list[int | None]:
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
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])


def _run(rank: int, count: int, port: int, folder: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
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
        # What is raised is told here: a forked process must not go on with its parent's clean-up.
        traceback.print_exc(file=log)
        os._exit(1)
