"""Judges that are commands with fixed answers."""

import sys
from pathlib import Path


def answering(folder: Path, name: str, answer: str) -> str:
    """A command that judges each `file` by the Python expression `answer`, which gives key and value of a JSON line."""
    script = folder / f"{name}.py"
    script.write_text(
        "import json, sys\n"
        "files = sys.argv[sys.argv.index('--') + 1:] if '--' in sys.argv else sys.argv[1:]\n"
        f"for file in files: print(json.dumps({{'file': file, {answer}}}))\n"
    )
    return f"{sys.executable} {script}"
