"""What a command must not import before it needs it: help and usage errors answer at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from export_world import make_world

pytestmark = pytest.mark.processes

TRAINING = ("matplotlib", "tensorboard", "sklearn", "scipy.signal", "scipy.optimize", "bitsandbytes")
HEAVY = ("torch", "transformers", "peft", "pyarrow", "scipy", "pandas", *TRAINING)
OTHER_VERBS = tuple(
    f"higgstune.{name}" for name in ("training", "planning", "evaluation", "diagnostics", "exporting.export")
)
RECIPE = "data: {store: x}\nstages: [{name: voice, kind: full, epochs: 1}]\n"
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
    ("speak Hello --model nowhere --out x.mp3", 2, HEAVY),
    ("speak Hello --model nowhere", 2, HEAVY),
    ("speak Hello --adapter nowhere", 2, HEAVY),
    ("prepare nowhere --out x", 2, HEAVY),
    ("prepare recipe.yaml --out x", 2, HEAVY),  # a source of an unknown kind
    ("inspect nowhere", 2, HEAVY),
    ("review nowhere", 2, HEAVY),
    ("train nowhere.yaml --out x", 2, HEAVY),
    ("train recipe.yaml --out x", 2, HEAVY),  # no such store
    ("train recipe.yaml --set sedd=1 --out x", 2, HEAVY),  # an unknown key
    ("train recipe.yaml", 2, HEAVY),
    ("evaluate nowhere/at/all", 2, HEAVY),
    ("export nowhere --out x", 2, HEAVY),
    ("inspect data", 0, ("torch", "transformers", "peft", *TRAINING, *OTHER_VERBS)),
    ("inspect data --row 0", 0, ("torch", "transformers", "peft", "scipy", *TRAINING, *OTHER_VERBS)),
    (
        "inspect data --row 0 --tokens --model base",
        0,
        ("torch", "peft", "scipy", "higgstune.diagnostics.examine", *TRAINING),
    ),
    ("speak Hello. --model base --max-seconds 0.2 --json", 0, ("peft", *TRAINING, *OTHER_VERBS)),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`recipe.yaml`, `base` with its codec, and the store `data`."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.mark.parametrize(("arguments", "code", "forbidden"), ROWS, ids=[row[0] for row in ROWS])
def test_a_command_imports_no_more_than_it_needs(
    world: Path, arguments: str, code: int, forbidden: tuple[str, ...]
) -> None:
    command = [sys.executable, "-c", PROGRAM, *arguments.split()]
    done = subprocess.run(command, cwd=world, capture_output=True, text=True, check=True)
    result = json.loads(done.stderr.splitlines()[-1])
    assert result["code"] == code, done.stderr
    assert not set(forbidden) & set(result["modules"])
