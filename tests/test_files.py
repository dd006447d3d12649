"""Files that are written whole or not at all, the errors of a disk that refuses them, and sizes for people."""

import errno
import fcntl
import os
import sys
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from full_disk import largest_file
from safetensors import SafetensorError

from higgstune.errors import WorkError
from higgstune.files import (
    format_bytes,
    lock_file,
    new_folder,
    refusal,
    temporary_beside,
    write_file,
    writing,
)


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("old")
    with (
        pytest.raises(WorkError, match=r"text cannot be written: File too large; the old file is unchanged"),
        largest_file(100),
    ):
        write_file(path, "new" * 100)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"text": b"old"}


def test_the_advice_follows_from_the_error() -> None:
    messages = [
        refusal(Path("file"), OSError(number, "no"), "kept") for number in (errno.ENOSPC, errno.EFBIG, errno.EIO)
    ]
    assert messages == [
        "file cannot be written: no; kept: make room, and run it again",
        "file cannot be written: no; kept: allow larger files (ulimit -f), and run it again",
        "file cannot be written: no; kept: run it again",
    ]


def test_errors_of_safetensors_have_the_same_message(tmp_path: Path) -> None:
    message = "x cannot be written: no space; all is kept: resume"
    with pytest.raises(WorkError, match=message), writing(tmp_path / "x", "all is kept", again="resume"):
        raise SafetensorError("no space")


def test_without_locks_no_plain_file_takes_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    message = "nothing was done: name a folder on a file system that can lock files"
    with pytest.raises(WorkError, match=message), writing(tmp_path, "nothing was done"):
        lock_file(tmp_path / ".lock").acquire(timeout=0)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    host = temporary_beside(tmp_path / "out").name.split(".")[1].rpartition("-")[0]
    gone = [f"out.{host}-{process.pid}.tmp", f"out.{process.pid}.tmp", f"out.{host}-{os.getpid()}.tmp"]
    stays = [f"out.{host}-{os.getppid()}.tmp", f"out.another-host-{process.pid}.tmp", "out.mine.tmp", "out.2"]
    for name in (*gone, *stays):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("x")
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *stays])
    assert sum("was left by a process that was killed" in message for message in caplog.messages) == len(gone)
    assert sum("belongs to another process" in message for message in caplog.messages) == 2


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MB"), (872_400_000, "872 MB"), (10**9, "1.00 GB"), (4_221_911_648, "4.22 GB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
