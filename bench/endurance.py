"""Does memory grow during a run? A real run of the demo's miniature; its resident memory by steps."""

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

from report import BENCH, Row, finish, parser

EXAMPLE = "python bench/endurance.py --json endurance.json --figure dev/figures/endurance.png"
FIGURE = BENCH.parent / "docs" / "figures" / "endurance.png"
CLIPS = 24
_STEP = re.compile(r"^long (\d+)/\d+  ")
Sample = tuple[int, float]  # step, bytes


def prepare_run(folder: Path, steps: int) -> Path:
    """Base, store and recipe; everything that a run does happens often: logs, validations, checkpoints."""
    import yaml

    from higgstune.data.manifest import Utterance, read_manifest, write_manifest
    from higgstune.data.prepare import prepare

    with resources.as_file(resources.files("higgstune.demo").joinpath("assets")) as assets:
        shutil.copytree(assets / "base", folder / "base")
        shutil.copytree(assets / "codec", folder / "base" / "codec")
        shutil.copytree(assets / "voices", folder / "voices")
    voices = folder / "voices"
    rows = [row for _, row in read_manifest(voices / "metadata.jsonl") if isinstance(row, Utterance)]
    write_manifest(voices / "some.jsonl", rows[:CLIPS])
    prepare(voices / "some.jsonl", folder / "data", codec=folder / "base" / "codec", validation_fraction=0.2)
    stage = {"name": "long", "kind": "full", "max_steps": steps, "learning_rate": 1e-4, "batch_size": 1}
    tree = {
        "model": {"checkpoint": str(folder / "base"), "dtype": "float32", "device": "cpu"},
        "data": {"store": str(folder / "data")},
        "lora": {"r": 8, "alpha": 16},
        "stages": [stage],
        "log_steps": max(1, steps // 500),
        "eval_steps": max(1, steps // 20),
        "save_steps": max(1, steps // 40),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def watch(recipe: Path, out: Path) -> list[Sample]:
    """Train, and note the memory of the process that trains whenever it says at which step it is."""
    import psutil

    command = [sys.executable, "-m", "higgstune", "train", str(recipe), "--out", str(out)]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert training.stderr is not None
    process, samples = psutil.Process(training.pid), []
    for line in training.stderr:
        if step := _STEP.match(line):
            samples.append((int(step[1]), float(process.memory_info().rss)))
    if training.wait() != 0:
        sys.exit(f"training ended with the exit code {training.returncode}")
    return samples


def growth(samples: list[Sample]) -> tuple[list[float], list[float]]:
    """The memory of the second tenth of all steps, the first being that of a beginning, and of the last."""
    last = samples[-1][0]
    early = [memory for step, memory in samples if 0.1 * last < step <= 0.2 * last]
    late = [memory for step, memory in samples if step > 0.9 * last]
    return early, late


def draw(samples: list[Sample], path: Path) -> None:
    """Memory by steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    axis.plot([step for step, _ in samples], [memory / 1e6 for _, memory in samples])
    axis.set(xlabel="optimizer step", ylabel="resident memory (MB)", title="A run of the miniature")
    axis.set_ylim(0)
    axis.grid(True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Train, print, draw, write; exits with 1 when memory has grown by more than --max-growth."""
    options = parser(__doc__ or "", EXAMPLE)
    options.add_argument("--steps", type=int, help="optimizer steps (default: 10,000, with --quick 60)")
    options.add_argument("--figure", type=Path, help="draw there")
    options.add_argument("--max-growth", type=float, default=0.02, help="share of the memory that may be added")
    given = options.parse_args()
    steps = given.steps or (60 if given.quick else 10_000)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        samples = watch(prepare_run(Path(folder), steps), Path(folder) / "run")
    if given.figure is not None:
        draw(samples, given.figure)
    early, late = (statistics.median(memory) / 1e6 for memory in growth(samples))
    rows = [Row(f"memory late in {steps} steps, against early", [early], [late], "MB")]
    finish("endurance", rows, given, samples=samples, seconds=time.monotonic() - started)
    if late > (1 + given.max_growth) * early:
        sys.exit(f"memory has grown from {early:.1f} to {late:.1f} MB")


if __name__ == "__main__":
    main()
