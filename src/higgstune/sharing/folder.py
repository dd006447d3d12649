"""A folder that comes into being whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from higgstune.errors import ConfigError, WorkError


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
        with writing(out):
            temporary.mkdir(parents=True)
        yield temporary
        check_new(out)
        with writing(out):
            os.replace(temporary, out)
    except torch.OutOfMemoryError as error:
        raise WorkError(f"the model does not fit into the device's memory: use --device cpu [{error}]") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises WorkError where the disk refuses."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WorkError(f"{out} cannot be written: {error}; make room, or give another --out") from error
