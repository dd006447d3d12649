"""Files that are written whole or not at all, and the errors of a disk that refuses them."""

import errno
import glob
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from higgstune.errors import ConfigError, DataError, WorkError

_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name a folder that you may write to",
    errno.EPERM: "name a folder that you may write to",
    errno.ENOENT: "name a folder that can be written",
    errno.ENOSYS: "name a folder on a file system that can lock files (flock)",
    errno.ENOLCK: "name a folder on a file system that can lock files (flock)",
    errno.EOPNOTSUPP: "name a folder on a file system that can lock files (flock)",
}
_LOG = logging.getLogger(__name__)
_TEMPORARY = re.compile(r".+\.((?P<host>[\w-]+)-)?(?P<pid>\d{1,9})\.tmp", re.DOTALL)
NOTHING_KEPT = "nothing of it was kept"


@contextmanager
def writing(path: Path, kept: str, *, again: str = "run it again") -> Iterator[None]:
    """Turn what the disk refuses into a WorkError: see `refusal`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WorkError(refusal(path, error, kept, again=again)) from error


def refusal(path: Path, error: Exception, kept: str, *, again: str = "run it again") -> str:
    """Why a file cannot be written, what is kept (a clause), and what to do."""
    number, reason = (error.errno or 0, error.strerror) if isinstance(error, OSError) else (0, None)
    advice = ", and ".join(filter(None, [_ADVICE.get(number), again]))
    return f"{path} cannot be written: {reason or error}; {kept}: {advice}"


def write_file(path: Path, text: str, *, kept: str = "the old file is unchanged") -> None:
    """Replace a text file in one step, so that a reader sees the old or the new one. Raises WorkError, with `kept`."""
    temporary = path.with_name(f".{path.name}.new")
    with writing(path, kept):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def sync_files(folder: Path) -> None:
    """Flush the files of a folder, and their names, to the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot sync a folder
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone_in(folder: Path, what: str, kept: str) -> Iterator[None]:
    """Hold a folder, made if needed, for one `what` (a preparation) at a time; a killed process lets go of it.

    Raises DataError when another one holds it or it is not a folder; WorkError, with `kept`, when the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / f".{what}.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"another {what} is writing to {folder}: wait for it to end, or name another folder") from None
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder} is not a folder: name one for the {what}") from error
    except OSError as error:
        raise WorkError(refusal(folder, error, kept)) from error
    try:
        yield
    finally:
        lock.release()


def lock_file(path: Path) -> FileLock:
    """A lock that is released however its process ends.

    Acquiring it raises OSError where the file system has no locks: a plain file would outlive a killed job.
    """
    return FileLock(path, fallback_to_soft=False)


def check_folder(out: Path) -> None:
    """Raise ConfigError when a folder to write into, which may exist, is a file or lies inside one."""
    for place in (out, *out.parents):
        if place.exists():
            if not place.is_dir():
                raise ConfigError(f"{place} is not a folder: name one")
            return


def check_new(out: Path, *untouched: Path) -> None:
    """Raise ConfigError when `out` exists, or would lie inside a folder that must not change."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists and is not overwritten: remove it, or give another --out")
    for folder in untouched:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{out} would lie inside {folder}, which is not changed: give another --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` to write into; it is renamed to `out` at the end, and removed on any error.

    What a killed process left of such folders for `out` is removed first. Raises WorkError where the disk refuses.
    """
    remove_left(out.parent.glob(f"{glob.escape(out.name)}.*.tmp"))
    temporary = temporary_beside(out)
    try:
        with writing(out, NOTHING_KEPT):
            temporary.mkdir(parents=True)
        yield temporary
        check_new(out)
        with writing(out, NOTHING_KEPT):
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_beside(path: Path) -> Path:
    """A name beside `path` to write under first. It names this process, so that `remove_left` knows what it left."""
    return path.with_name(f"{path.name}.{_host()}-{os.getpid()}.tmp")


def remove_left(found: Iterable[Path]) -> None:
    """Remove what killed processes of this machine left under names of `temporary_beside`, with a warning.

    What another machine, or a process that runs, may be writing stays, with a warning.
    """
    for path in found:
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        if match["host"] not in (None, _host()) or _is_other(int(match["pid"])):
            _LOG.warning("%s belongs to another process: remove it if that has ended", path)
            continue
        _LOG.warning("%s was left by a process that was killed: it is removed", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _is_other(pid: int) -> bool:
    """Whether this is a running process other than the own one, whose number may be that of one that was killed."""
    import psutil

    return pid != os.getpid() and psutil.pid_exists(pid)


def format_bytes(count: float) -> str:
    """A number of bytes for people, in MB below 1 GB: 872 MB, 4.22 GB."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
