"""Settings of the whole test run, and what tests of several folders share."""

import gc
import os

# Tiny models are slower on several threads than on one. Before anything that may import torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from commands import Command

# Minutes on one core, most of them for starting Python and importing torch. They go first, so that with several
# processes none is left alone with one of them at the end.
LONGEST = (
    "test_launchers.py", "test_faults_of_training.py", "test_faults_of_data.py", "test_conditioned_run.py",
    "test_sample_eval.py", "test_run.py", "test_planning.py", "test_compiled.py", "test_readme.py",
    "test_unified_script.py", "test_bench.py", "test_distributed.py", "test_quantize.py", "test_evaluate.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; within a file, and among the others, the order stays."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish() -> None:
    """Keep `gc.collect()`, which a training run calls, from looking at all that is imported: 0.3 s each time."""
    gc.freeze()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`higgstune ...` in this process, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return Command(capsys)
