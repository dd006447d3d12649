"""What a command must not import before it needs it: help and usage errors answer at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

HEAVY = (
    "torch", "transformers", "peft", "bitsandbytes", "pyarrow", "matplotlib", "tensorboard", "sklearn", "scipy.signal",
)  # fmt: skip
DRAWING = ("matplotlib", "tensorboard")
RECIPE = "data: {store: x}\nstages: [{name: voice, kind: full, epochs: 1}]\nsedd: 1\n"
PROGRAM = """
import json, sys
from higgstune.cli.main import main
sys.argv[0] = "higgstune"
try:
    main()
except SystemExit as ended:
    print(json.dumps({"code": ended.code or 0, "modules": sorted(sys.modules)}), file=sys.stderr)
"""

# The command line; its exit code; what it must not import. To tighten a row, add modules to its last column.
ROWS: list[tuple[str, int, tuple[str, ...]]] = [
    ("--help", 0, HEAVY),
    ("train --help", 0, HEAVY),
    ("no-such-verb", 2, HEAVY),
    ("speak", 2, HEAVY),
    ("prepare nowhere --out x", 2, ("transformers", "peft", "bitsandbytes", *DRAWING)),
    ("train recipe.yaml --out x", 2, DRAWING),  # an unknown key
    ("speak Hello --model nowhere --out x.mp3", 2, DRAWING),
    ("inspect nowhere", 2, DRAWING),
]


@pytest.mark.parametrize(("arguments", "code", "forbidden"), ROWS, ids=[row[0] for row in ROWS])
def test_a_command_imports_no_more_than_it_needs(
    tmp_path: Path, arguments: str, code: int, forbidden: tuple[str, ...]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", PROGRAM, *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = json.loads(done.stderr.splitlines()[-1])
    assert result["code"] == code, done.stderr
    assert not set(forbidden) & set(result["modules"])
