"""What a name on the command line means: runs and adapters, also one folder above."""

import json
from pathlib import Path

import pytest

from higgstune.errors import CheckpointError
from higgstune.inputs import ADAPTER, CLIPS, find_adapter, find_run, is_unusable_run, kind_of


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def run(folder: Path, status: str = "finished") -> Path:
    adapter(folder / "voice" / "adapter")
    (folder / "run.json").write_text(json.dumps({"status": status, "adapter": "voice/adapter"}))
    return folder


def test_the_only_run_in_a_folder_is_taken(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    made = run(demo / "run", "not usable")
    (demo / "base").mkdir()
    (demo / "base" / "config.json").write_text("{}")
    for path in (demo, made):
        assert find_run(path) == made
        assert find_adapter(path) == made / "voice" / "adapter"
        assert kind_of(path) == ADAPTER
        assert is_unusable_run(path)


def test_the_only_adapter_in_a_folder_is_taken(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    assert find_adapter(made / "voice") == made / "voice" / "adapter"


def test_of_several_none_is_taken(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "b")
    adapter(tmp_path / "runs" / "a")
    for find in (find_run, find_adapter, kind_of):
        with pytest.raises(CheckpointError, match=r"runs holds several runs or adapters: name one of \S+/a, \S+/b$"):
            find(tmp_path / "runs")


def test_a_folder_of_clips_stays_one(tmp_path: Path) -> None:
    adapter(tmp_path / "clips" / "inside")
    (tmp_path / "clips" / "clips.jsonl").write_text("")
    assert kind_of(tmp_path / "clips") == CLIPS


def test_what_holds_neither_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither an adapter"):
        find_adapter(tmp_path)
