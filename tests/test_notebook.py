"""The notebook: its cells run in order, in one process, without Jupyter."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import forked_proofs  # noqa: F401

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


@pytest.mark.processes
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["clip"].seconds > 0
    assert names["clip"]._repr_html_().startswith("<audio")
