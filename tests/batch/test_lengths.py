"""Lengths of examples that are kept beside a store: those that are measured, and never those of something else."""

import os
from pathlib import Path
from typing import Any

import pytest
from preparing import recordings, run
from tiny_checkpoint import tiny_prompter

from higgstune.batch import lengths
from higgstune.batch.dataset import Rendering, RowExamples
from higgstune.data.shard_reader import LENGTHS_PREFIX
from higgstune.data.store import CodeStore, SplitView


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of 40 rows with references, for whose lengths a file is worth while."""
    monkeypatch.setattr(lengths, "_WORTHWHILE", 1)
    monkeypatch.setattr(lengths, "_PROBED", 2)
    run(recordings(tmp_path / "in", 40), tmp_path / "out", speaker="one", references="same_speaker")
    return tmp_path / "out"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are looked at to measure them."""
    found: list[int] = []
    outline = SplitView.outline
    monkeypatch.setattr(SplitView, "outline", lambda view, index: [found.append(index), outline(view, index)][1])
    return found


def lengths_of(folder: Path, rendering: Any = None) -> list[int]:
    _, prompter = tiny_prompter()
    examples = RowExamples(CodeStore.open(folder).split("train"), prompter, "transcript", rendering or Rendering())
    found = examples.lengths().tolist()
    assert found == [len(examples[i]) for i in range(len(examples))]
    return found


def test_they_are_measured_once(store: Path, measured: list[int]) -> None:
    rows = len(lengths_of(store))
    assert measured == list(range(rows))
    measured.clear()
    lengths_of(store)
    assert measured == [0, rows - 1]


def test_another_place_of_references_is_measured(store: Path, measured: list[int]) -> None:
    turn = lengths_of(store)
    measured.clear()
    assert lengths_of(store, Rendering(reference="scene")) != turn
    assert len(measured) == len(turn)


def test_a_store_that_grew_is_measured(store: Path, measured: list[int]) -> None:
    rows = len(lengths_of(store))
    run(recordings(store.parent / "in", 4, first=40), store, speaker="one", references="same_speaker")
    assert not list(store.glob(f"{LENGTHS_PREFIX}*"))
    measured.clear()
    assert len(lengths_of(store)) == len(measured) > rows


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "prompts have changed"])
def test_a_file_that_is_not_right_is_replaced(
    store: Path, measured: list[int], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = len(lengths_of(store))
    (path,) = store.glob(f"{LENGTHS_PREFIX}*")
    whole = path.read_bytes()
    if damage == "prompts have changed":
        _, prompter = tiny_prompter()
        examples = RowExamples(CodeStore.open(store).split("train"), prompter, "transcript")
        longer = [length + 1 for length in lengths_of(store)]
        path.unlink()
        monkeypatch.setattr(examples, "_measure", lambda _: longer)
        examples.lengths()
    else:
        path.write_bytes({"cut": whole[:-3], "flipped": whole[:-1] + b"\x01", "empty": b""}[damage])
    measured.clear()
    assert len(lengths_of(store)) == rows
    assert len(measured) >= rows
    assert path.read_bytes() == whole


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write everywhere")
def test_a_store_that_may_not_be_written_to(store: Path) -> None:
    store.chmod(0o500)
    try:
        assert lengths_of(store)
        assert not list(store.glob(f"{LENGTHS_PREFIX}*"))
    finally:
        store.chmod(0o700)
