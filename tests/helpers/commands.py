"""`higgstune ...` inside the test's process, where torch is loaded already: a new process needs seconds for that."""

import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from higgstune.cli.main import main


class Command:
    """Runs `higgstune ...`; its exit code, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: Any) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["higgstune", *map(str, arguments)])
            before = signal.getsignal(signal.SIGTERM)
            try:
                with pytest.raises(SystemExit) as stopped:
                    main()
            finally:
                signal.signal(signal.SIGTERM, before)  # the command has it until its process ends
        out, err = self.capsys.readouterr()
        return int(stopped.value.code or 0), out, err


def run_script(path: Path, arguments: list[str]) -> int:
    """Run a Python file as if it had been started; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
    return int(ended.value.code or 0)
