"""Files that are written whole or not at all, and what is said of those that cannot be."""

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest
from full_disk import largest_file
from safetensors import SafetensorError

from higgstune.errors import WorkError
from higgstune.files import lock_file, refusal, write_file, writing


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("old")
    with pytest.raises(WorkError, match=r"text cannot be written: File too large; it is as it was"), largest_file(100):
        write_file(path, "new" * 100)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"text": b"old"}


def test_what_to_do_follows_from_what_the_system_says() -> None:
    said = [refusal(Path("file"), OSError(number, "no"), "kept") for number in (errno.ENOSPC, errno.EFBIG, errno.EIO)]
    assert said == [
        "file cannot be written: no; kept: make room, and run it again",
        "file cannot be written: no; kept: allow larger files (ulimit -f), and run it again",
        "file cannot be written: no; kept: run it again",
    ]


def test_what_safetensors_says_of_the_disk_is_told_alike(tmp_path: Path) -> None:
    told = "x cannot be written: no space; all is kept: go on"
    with pytest.raises(WorkError, match=told), writing(tmp_path / "x", "all is kept", again="go on"):
        raise SafetensorError("no space")


def test_where_no_file_can_be_locked_no_mere_file_takes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    told = "nothing was done: name a folder on a file system that can lock files"
    with pytest.raises(WorkError, match=told), writing(tmp_path, "nothing was done"):
        lock_file(tmp_path / ".lock").acquire(timeout=0)
