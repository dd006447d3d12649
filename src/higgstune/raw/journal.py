"""What was computed of a recording, kept so that it is never computed twice.

A line of JSON each: the stage, a hash of all that the result depends on, and the result. A line that a killed process
left unfinished is dropped.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from higgstune.files import lock_file, writing

Value = TypeVar("Value")


def key_of(*parts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Journal:
    """Results by stage and what they depend on, in one file for a recording, which one process has at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, once no other process has it. Raises WorkError where that fails."""
        self._path = path
        self._known: dict[str, Any] = {}
        self.computed: dict[str, int] = {}  # in this process, by stage
        with writing(path, "nothing was lost"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(path.with_suffix(".lock"))
            self._lock.acquire()  # the same recording may lie there under two names
            self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
            whole = 0
            with open(path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    found = json.loads(line)
                    self._known[found["key"]] = found["value"]
                    whole += len(line)
            os.truncate(path, whole)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._lock.release()

    def find(self, stage: str, *parts: Any) -> Any | None:
        """What was kept, or None."""
        return self._known.get(f"{stage} {key_of(*parts)}")

    def keep(self, value: Value, stage: str, *parts: Any) -> Value:
        """Append a result of plain data, which then survives a kill."""
        key = f"{stage} {key_of(*parts)}"
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n"
        with writing(self._path, "what was computed before is kept"):
            self._file.write(line.encode())
            self._file.flush()
        self._known[key] = value
        self.computed[stage] = self.computed.get(stage, 0) + 1
        return value

    def get(self, make: Callable[[], Value], stage: str, *parts: Any) -> Value:
        """The result of a stage that depends on `parts`, which are plain data; it is made once."""
        found = self.find(stage, *parts)
        return self.keep(make(), stage, *parts) if found is None else found


def packed(values: np.ndarray) -> str:
    """Numbers as text: one line of JSON holds thousands of them."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def unpacked(text: str, kind: Any) -> np.ndarray:
    """The numbers of `packed`."""
    return np.frombuffer(base64.b64decode(text), kind)
