"""What needs neither torch nor transformers to be examined: all that `doctor` can do where they do not import."""

import platform
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from higgstune.config.recipe import load_recipe
from higgstune.data.store import CodeStore
from higgstune.diagnostics.report import Finding, Report, sorted_report
from higgstune.environment import INSTALL, find_wrong_versions
from higgstune.errors import HiggstuneError
from higgstune.files import format_bytes
from higgstune.inputs import find_adapter
from higgstune.model.adapter_folder import check_adapter_files

ENVIRONMENT = "environment"
LOW_DISK = 5e9  # bytes, about the size of two checkpoints with their optimizer and a store
_NO_DISK = 2e8
_SHOWN = ("torch", "transformers", "peft")
_SKIPPED = ("checkpoint", "rotary", "codec", "prompt", "loss", "generation", "memory")


def examine_without_libraries(
    error: Exception, *, adapter: Path | None = None, data: Path | None = None, recipe: Path | None = None
) -> Report:
    """The report where importing the libraries ended with `error`; what needs them is skipped."""
    failed = f"the libraries cannot be imported: {type(error).__name__}: {error}"
    found = [check_versions(), Finding(ENVIRONMENT, "failed", failed, INSTALL), check_disk()]
    if recipe is not None:
        found.append(_finding("recipe", lambda: f"{recipe}: {len(load_recipe(recipe).stages)} stages"))
    if data is not None:
        found.append(_finding("data", lambda: f"{data} has {len(CodeStore.open(data))} rows, and its files are whole"))
    if adapter is not None:
        found.append(_finding("adapter", lambda: _adapter_files(adapter)))
    reason = "it needs the libraries, which cannot be imported"
    return sorted_report([*found, *(Finding(check, "skipped", reason) for check in _SKIPPED)])


def _adapter_files(adapter: Path) -> str:
    folder = find_adapter(adapter)
    check_adapter_files(folder)
    return f"the files of {folder} are whole"


def _finding(check: str, examine: Callable[[], str]) -> Finding:
    try:
        return Finding(check, "ok", examine())
    except HiggstuneError as error:
        return Finding(check, "failed", str(error), "correct it; the rest is examined once the libraries are right")


def check_versions(
    requirements: Sequence[str] | None = None,
    python: str | None = None,
    installed: Callable[[str], str] = metadata.version,
) -> Finding:
    """Check Python and all dependencies against the version ranges of the package."""
    try:
        problems = find_wrong_versions(requirements, python, installed)
    except metadata.PackageNotFoundError:
        text = "higgstune is not installed, so its requirements are unknown"
        return Finding(ENVIRONMENT, "warning", text, "pip install it")
    if problems:
        return Finding(ENVIRONMENT, "failed", "; ".join(problems), INSTALL)
    versions = ", ".join(f"{name} {installed(name)}" for name in _SHOWN)
    return Finding(ENVIRONMENT, "ok", f"Python {python or platform.python_version()}, {versions}: as required")


def check_disk(free: int | None = None) -> Finding:
    """Check the free bytes of the disk that runs are written to."""
    free = shutil.disk_usage(Path.cwd()).free if free is None else free
    text = f"{format_bytes(free)} are free on the disk of {Path.cwd()}"
    advice = "free some space, or work on another disk: checkpoints and stores are written to the working directory"
    if free < _NO_DISK:
        return Finding(ENVIRONMENT, "failed", text, advice)
    if free < LOW_DISK:
        return Finding(ENVIRONMENT, "warning", text, advice)
    return Finding(ENVIRONMENT, "ok", text)
