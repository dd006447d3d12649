"""The folder of a checkpoint, which is complete or does not exist; damage is detected."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import largest_file

from higgstune.errors import CheckpointError, WorkError
from higgstune.training.checkpoint import SEAL, new_checkpoint, newest_checkpoint, read_checkpoint

pytestmark = pytest.mark.processes


def write(parent: Path, step: int, *, keep: int | None = None, content: bytes = b"weights" * 1000) -> Path:
    with new_checkpoint(parent, step, {"step": step}, keep=keep) as folder:
        (folder / "weights").write_bytes(content)
        (folder / "more").write_bytes(b"more")
    return parent / f"checkpoint-{step}"


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_it_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_checkpoint(tmp_path, 1, {}) as folder:
            (folder / "weights").write_bytes(b"half")
            assert not (tmp_path / "checkpoint-1").exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert names(tmp_path) == []
    assert newest_checkpoint(tmp_path) is None
    written = write(tmp_path, 1)
    assert read_checkpoint(written)["step"] == 1
    assert newest_checkpoint(tmp_path) == written


def test_the_newest_by_step_not_by_name_or_clock(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no seal", "half a seal", "empty seal"])
def test_a_damaged_one_is_reported_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    older, newer = write(tmp_path, 9), write(tmp_path, 10)
    weights, seal = newer / "weights", newer / SEAL
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:-1])
    elif damage == "flipped":
        weights.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "missing":
        weights.unlink()
    elif damage == "no seal":
        seal.unlink()
    elif damage == "half a seal":
        seal.write_text(seal.read_text()[:40])
    else:
        seal.write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == older
    assert "checkpoint-10" in caplog.text
    assert "skipped, and kept as damaged-checkpoint-10" in caplog.text
    assert (tmp_path / "damaged-checkpoint-10").is_dir()
    write(tmp_path, 10, content=b"again")  # the run reaches this step once more
    assert (newest_checkpoint(tmp_path) or older).name == "checkpoint-10"
    assert weights.read_bytes() == b"again"


def test_what_is_written_after_a_damaged_one_was_skipped_stays(tmp_path: Path) -> None:
    for step in (2, 4, 8):
        write(tmp_path, step)
    (tmp_path / "checkpoint-8" / "weights").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    write(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6", "damaged-checkpoint-8"]
    write(tmp_path, 8, keep=1)
    assert names(tmp_path) == ["checkpoint-8", "damaged-checkpoint-8"]


def test_where_none_is_complete_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (write(tmp_path, 2) / "weights").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) is None
    assert "the stage starts over" in caplog.text
    caplog.clear()
    assert newest_checkpoint(tmp_path / "nothing") is None
    assert not caplog.text


def test_a_whole_one_is_never_taken_away_for_its_like(tmp_path: Path) -> None:
    first = write(tmp_path, 5)
    before = (first / "weights").stat().st_ino
    write(tmp_path, 5)
    assert (first / "weights").stat().st_ino == before


def test_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"")
    seal = json.loads((folder / SEAL).read_text())
    seal["files"] = {"../outside": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    (folder / SEAL).write_text(json.dumps(seal))
    with pytest.raises(CheckpointError, match="outside"):
        read_checkpoint(folder)


def test_a_disk_that_is_full_leaves_those_before(tmp_path: Path) -> None:
    older = write(tmp_path, 1)
    message = r"checkpoint-2 cannot be written.*before it are unchanged.*resume with --resume"
    with pytest.raises(WorkError, match=message), largest_file(4096):
        write(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path) == older
    assert write(tmp_path, 2) == newest_checkpoint(tmp_path)


KILLED_AT = """
import os, sys
from pathlib import Path
from higgstune.training import checkpoint
name, parent, steps = sys.argv[1], Path(sys.argv[2]), 0
module = os if name in ("replace", "fsync") else checkpoint
real = getattr(module, name)
def killed(*arguments):
    global steps
    steps += 1
    if steps == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    return real(*arguments)
setattr(module, name, killed)
with checkpoint.new_checkpoint(parent, 2, {}, keep=1) as folder:
    (folder / "weights").write_bytes(b"two")
    (folder / "more").write_bytes(b"more")
"""


@pytest.mark.parametrize(
    ("at", "nth"), [("fsync", 1), ("fsync", 3), ("replace", 1), ("sync_folder", 2), ("_remove", 2)]
)
def test_killed_while_it_is_written_there_is_a_whole_one(tmp_path: Path, at: str, nth: int) -> None:
    write(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", KILLED_AT, at, str(tmp_path), str(nth)], check=False)
    assert done.returncode == -signal.SIGKILL
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == ("checkpoint-1" if at in ("fsync", "replace") else "checkpoint-2")
    write(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]
