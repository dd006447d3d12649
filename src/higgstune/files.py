"""Files that are written whole or not at all, and what is said where the disk refuses them."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
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


@contextmanager
def writing(path: Path, kept: str, *, again: str = "run it again") -> Iterator[None]:
    """Raises WorkError, in place of what the disk refuses inside of it: see `refusal`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WorkError(refusal(path, error, kept, again=again)) from error


def refusal(path: Path, error: Exception, kept: str, *, again: str = "run it again") -> str:
    """Why a file cannot be written, what is kept (a clause), and what to do."""
    number, said = (error.errno or 0, error.strerror) if isinstance(error, OSError) else (0, None)
    advice = ", and ".join(filter(None, [_ADVICE.get(number), again]))
    return f"{path} cannot be written: {said or error}; {kept}: {advice}"


def write_file(path: Path, text: str, *, kept: str = "it is as it was") -> None:
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
    """Let the files of a folder, and their names, reach the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no handle of a folder to sync
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone_in(folder: Path, what: str, kept: str) -> Iterator[None]:
    """Keep a second one of `what` (a preparation) away from a folder, which is made; one that was killed lets go.

    Raises DataError where there is another one, or the folder is none; WorkError, with `kept`, where the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / f".{what}.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"another {what} is writing to {folder}: wait for its end, or name another folder") from None
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder} is no folder: name one for the {what}") from error
    except OSError as error:
        raise WorkError(refusal(folder, error, kept)) from error
    try:
        yield
    finally:
        lock.release()


def lock_file(path: Path) -> FileLock:
    """A lock that its process lets go of however it ends.

    Taking it raises OSError where the file system cannot: a mere file would outlive a job that was killed.
    """
    return FileLock(path, fallback_to_soft=False)


def check_new(out: Path, *untouched: Path) -> None:
    """Raises ConfigError when `out` exists, or would lie inside a folder that is left as it is."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists and is not overwritten: remove it, or give another --out")
    for folder in untouched:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{out} would lie inside {folder}, which is left as it is: give another --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` to write into; it gets the name `out` at the end, and is removed on any error.

    Raises WorkError where the disk refuses, or a device's memory is too small.
    """
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with writing_folder(out):
            temporary.mkdir(parents=True)
        yield temporary
        check_new(out)
        with writing_folder(out):
            os.replace(temporary, out)
    except torch.OutOfMemoryError as error:
        raise WorkError(f"the model does not fit into the device's memory: use --device cpu [{error}]") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing_folder(out: Path) -> Iterator[None]:
    """Raises WorkError where the disk refuses."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WorkError(f"{out} cannot be written: {error}; make room, or give another --out") from error
