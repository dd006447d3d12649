"""`higgstune review`: its link, its end, and what it says of a wrong folder."""

import json
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from review_world import small_data_set, utterance

from higgstune.files import alone_in
from higgstune.pages.server import PageServer


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ctrl-C at once; the links that a browser was opened with."""
    opened: list[str] = []

    def serve(server: PageServer) -> None:
        server._server.server_close()
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve", serve)
    monkeypatch.setattr(webbrowser, "open", opened.append)
    return opened


def test_the_link_is_printed_and_opened_and_the_end_names_the_next_command(
    command: Command, tmp_path: Path, ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data_set(tmp_path)
    (data / "review.jsonl").write_text(json.dumps({"id": utterance(0)["id"], "keep": True}) + "\n")
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("review", "data")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("6 utterances: http://127.0.0.1:")
    assert ended == [lines[0].partition(": ")[2]]
    assert "1 decision in data/review.jsonl" in lines
    assert "left to look at: 5 utterances" in lines
    assert lines[-1] == "next: to apply them, collect as before: higgstune collect raw --out data"
    summary: dict[str, Any] = {
        "raw": "../raw",
        "command": ["higgstune", "collect", "raw", "--out", "data", "--asr", "b"],
    }
    (data / "collect.json").write_text(json.dumps(summary))
    code, out, _ = command("review", "data", "--no-browser")
    assert out.splitlines()[-1].endswith("higgstune collect raw --out data --asr b")
    assert len(ended) == 1


def test_one_review_at_a_time(command: Command, tmp_path: Path, ended: list[str]) -> None:
    data = small_data_set(tmp_path)
    with alone_in(data, "review", ""):
        code, _, err = command("review", data)
    assert code == 2
    assert "another review is writing" in err
    assert not ended


def test_a_folder_that_is_not_a_data_set_is_not_touched(command: Command, tmp_path: Path) -> None:
    code, _, err = command("review", tmp_path / "nowhere")
    assert code == 2
    assert "holds no manifest.jsonl" in err
    assert not (tmp_path / "nowhere").exists()
