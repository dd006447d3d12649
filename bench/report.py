"""What all benches share: repeated measurements in fresh processes, one table, one JSON file, the machine.

    found = alternate({"baseline": Case(baseline, {...}), "ours": Case(ours, {...})}, repeats=3, threads=1)
    rows = [Row("tokens", rates(found["baseline"], "tokens"), rates(found["ours"], "tokens"), "tokens/CPU-s")]
    finish("train_step", rows, arguments)

A case is a function of a module that returns a dictionary; it measures its own part with `Meter`.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# A checkout is enough: benches import this module before anything of higgstune.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

Found = dict[str, Any]
BENCH = Path(__file__).resolve().parent
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Row:
    """One line of the table: the repeats of the baseline, if there is one, and of ours."""

    name: str
    baseline: Sequence[float] | None
    ours: Sequence[float]
    unit: str

    @property
    def ratios(self) -> list[float]:
        """Ours / baseline, each repeat against the one that ran beside it."""
        return [] if self.baseline is None else [o / b for o, b in zip(self.ours, self.baseline, strict=True)]


@dataclass
class Meter:
    """Measures what runs inside `with`: all threads of this process, and of those it has waited for."""

    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    _started: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def __enter__(self) -> "Meter":
        self._started = _cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_seconds += _cpu_seconds() - self._started[0]
        self.wall_seconds += time.perf_counter() - self._started[1]

    def found(self, **more: Any) -> Found:
        """What was measured, with `more` beside it: what a case returns."""
        return {"cpu_seconds": self.cpu_seconds, "wall_seconds": self.wall_seconds, **more}


def _cpu_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def peak_bytes() -> int:
    """The largest resident memory of this process so far. Of this program alone, whatever started it."""
    of_process = _status()
    if "VmHWM" in of_process:  # getrusage would begin with the memory of the process that started this one
        return of_process["VmHWM"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def own_bytes() -> int | None:
    """The resident memory of this process without pages of mapped files; None where the system does not say."""
    return _status().get("RssAnon")


def _status() -> dict[str, int]:
    """What Linux says of this process's memory, in bytes; elsewhere nothing."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


@dataclass(frozen=True)
class Case:
    """A function of a module in this folder, and its arguments, which JSON can carry."""

    function: Callable[..., Found]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def run(self, *, threads: int = 1) -> Found:
        """Call it in a fresh process; what it returns, with `peak_bytes` of the process.

        Raises RuntimeError with the last of its output where it fails.
        """
        module = Path(sys.modules[self.function.__module__].__file__ or "").stem  # __main__ has a file, too
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            call = {"module": module, "function": self.function.__name__, "arguments": dict(self.arguments)}
            done = subprocess.run(
                [sys.executable, __file__, json.dumps(call), str(answer)],
                env=os.environ | dict.fromkeys(_THREADS, str(threads)),
                capture_output=True,
                text=True,
            )
            if done.returncode:
                said = (done.stdout + done.stderr)[-4000:]
                raise RuntimeError(
                    f"{module}.{self.function.__name__} failed with exit status {done.returncode}:\n{said}"
                )
            found: Found = json.loads(answer.read_text())
            return found


def alternate(
    cases: Mapping[str, Case], *, repeats: int, threads: int = 1, fresh: bool = True
) -> dict[str, list[Found]]:
    """Every case `repeats` times: one of each, then again, so that what else runs here falls on all of them.

    Without `fresh` in this process: for tests, where nothing is concluded from times.
    """
    found: dict[str, list[Found]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name, case in cases.items():
            say(f"{name}: {repeat + 1} of {repeats}")
            found[name].append(case.run(threads=threads) if fresh else case.function(**case.arguments))
    return found


def rates(found: Sequence[Found], counted: str, *, per: str = "cpu_seconds") -> list[float]:
    """How much of what a case counted it did in a second."""
    return [one[counted] / one[per] for one in found]


def values(found: Sequence[Found], name: str, *, scale: float = 1.0) -> list[float]:
    """One figure of each repeat."""
    return [one[name] * scale for one in found]


def same_work(*sides: Sequence[Found], counted: str) -> Any:
    """What all sides did in all repeats. Raises ValueError where it is not the same."""
    amounts = {one[counted] for side in sides for one in side}
    if len(amounts) != 1:
        raise ValueError(f"the sides did not do the same work: {counted} is {sorted(amounts)}")
    return amounts.pop()


def machine() -> Found:
    """The machine and the libraries, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    described: Found = {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    for package in ("numpy", "torch", "transformers", "peft", "pyarrow"):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = None
    return described


def table(rows: Sequence[Row]) -> str:
    """Baseline, ours and ratio as a Markdown table: the median, and from the least to the most of the repeats."""
    lines = [
        "| what | unit | baseline | ours | ours / baseline |",
        "|---|---|---|---|---|",
        *(f"| {r.name} | {r.unit} | {_spread(r.baseline)} | {_spread(r.ours)} | {_spread(r.ratios)} |" for r in rows),
    ]
    return "\n".join(lines)


def _spread(repeats: Sequence[float] | None) -> str:
    if not repeats:
        return "-"
    median = _number(statistics.median(repeats))
    return median if len(repeats) == 1 else f"{median} ({_number(min(repeats))} to {_number(max(repeats))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_json(path: str | Path, bench: str, rows: Sequence[Row], *, settings: Mapping[str, Any], **more: Any) -> None:
    """The rows with all repeats, the arguments, the machine, and `more`."""
    content = {
        "bench": bench,
        "machine": machine(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "rows": [
            {
                "name": row.name,
                "unit": row.unit,
                "baseline": None if row.baseline is None else list(row.baseline),
                "ours": list(row.ours),
                "ratio": statistics.median(row.ratios) if row.ratios else None,
            }
            for row in rows
        ],
        **more,
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def finish(bench: str, rows: Sequence[Row], arguments: argparse.Namespace, **more: Any) -> None:
    """Print the table, and write the JSON if --json was given."""
    sys.stdout.write(table(rows) + "\n")
    if arguments.json:
        write_json(arguments.json, bench, rows, settings=vars(arguments), **more)


def say(text: str) -> None:
    """A line about progress, on stderr."""
    sys.stderr.write(text + "\n")


def parser(description: str, example: str, *, repeats: int = 3) -> argparse.ArgumentParser:
    """With what all benches take."""
    made = argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", metavar="PATH", type=Path, help="write all repeats and the machine there, too")
    made.add_argument("--quick", action="store_true", help="small sizes: whether it works, not how fast")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each process (default: 1)")
    made.add_argument(
        "--repeats", type=int, default=repeats, metavar="N", help=f"measurements of each side (default: {repeats})"
    )
    return made


def _answer(call: str, path: str) -> None:
    """The fresh process: see `Case.run`."""
    request = json.loads(call)
    function = getattr(importlib.import_module(request["module"]), request["function"])
    found = function(**request["arguments"])
    Path(path).write_text(json.dumps({"peak_bytes": peak_bytes()} | found))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
