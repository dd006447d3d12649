"""Processes that end with the one that started them, also where that is killed (on Linux).

with_parent.py COMMAND...     runs it so
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """This process is killed when the one that has started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def with_parent(command: Sequence[object]) -> list[str]:
    """A command line whose process ends with the one that starts it."""
    return [sys.executable, __file__, *map(str, command)]


if __name__ == "__main__":
    end_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
