"""Files that are written whole or not at all, the errors of a disk that refuses them, and sizes for people."""

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest
from full_disk import largest_file
from safetensors import SafetensorError

from higgstune.errors import WorkError
from higgstune.files import format_bytes, lock_file, refusal, write_file, writing


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


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MB"), (872_400_000, "872 MB"), (10**9, "1.00 GB"), (4_221_911_648, "4.22 GB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
