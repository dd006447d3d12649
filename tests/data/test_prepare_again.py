"""A repeated preparation: clips are encoded once, the store grows, and a kill or a full disk loses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import ids, manifest, recordings, run
from recordings import CountingCodec, clip, speech, write
from with_parent import with_parent

from higgstune.data import shard_writer as shards
from higgstune.data.audio import read_audio, resample
from higgstune.data.shard_reader import read_index
from higgstune.data.store import CodeStore
from higgstune.errors import DataError, WorkError


def test_a_second_run_encodes_nothing(tmp_path: Path) -> None:
    recordings(tmp_path / "in", 6)
    first = run(tmp_path / "in", tmp_path / "out", speaker="one", references="same_speaker")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}
    codec = CountingCodec()
    second = run(tmp_path / "in", tmp_path / "out", codec, speaker="one", references="same_speaker")
    assert (first.encoded, first.reused, first.added) == (6, 0, 6)
    assert (second.encoded, second.reused, second.added, second.updated, codec.calls) == (0, 6, 0, 0, 0)
    assert second.rows == first.rows
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")} == before
    assert not (tmp_path / "out" / ".partial").exists()


def test_a_store_grows(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 5), tmp_path / "out"
    run(source, out)
    splits = {row.id: row.split for row in CodeStore.open(out).rows()}
    recordings(source, 3, first=5)
    grown = run(source, out)
    assert (grown.encoded, grown.reused, grown.added) == (3, 5, 3)
    other = run(recordings(tmp_path / "other", 2, first=20), out)
    assert (other.encoded, sum(other.rows.values()), sum(other.accepted.values())) == (2, 10, 2)
    after = {row.id: row.split for row in CodeStore.open(out).rows()}
    assert {row_id: after[row_id] for row_id in splits} == splits
    assert len(list(out.glob("*.parquet"))) == 2


def test_shards_without_a_changed_row_stay_and_new_rows_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr(shards, "_SHORT", 2)
    source, out = recordings(tmp_path / "in", 20), tmp_path / "out"
    run(source, out, validation_fraction=0.0)
    written: list[str] = []
    real = shards._write_shard
    monkeypatch.setattr(
        shards, "_write_shard", lambda *given: (written.append(f"{given[1]}-{given[2]}"), real(*given))[1]
    )

    def again(count: int, new: list[str]) -> list[int]:
        written.clear()
        run(source, out, validation_fraction=0.0)
        assert written == new
        store = CodeStore.open(out)
        assert [row.id for row in store.rows()] == [f"{n:03d}" for n in range(count)]
        for row in store.rows():
            assert np.array_equal(row.codes, CountingCodec().encode(read_back(source, row.id)))
        assert len(list(out.glob("*.parquet"))) == len(store.shards)
        return [shard.rows for shard in store.shards]

    assert again(20, []) == [8, 8, 4]  # nothing new: nothing written
    recordings(source, 1, first=20)
    assert again(21, ["train-3"]) == [8, 8, 4, 1]
    recordings(source, 1, first=21)
    assert again(22, ["train-3"]) == [8, 8, 4, 2]  # a short one is written anew
    recordings(source, 5, first=22)
    assert again(27, ["train-2", "train-3"]) == [8, 8, 8, 3]
    (source / "009.txt").write_text("Corrected.")
    assert again(27, ["train-1", "train-2", "train-3"]) == [8, 8, 8, 3]
    assert [shard.rows for shard in read_index(out).shards] == [8, 8, 8, 3]
    assert "Corrected." in [row.text for row in CodeStore.open(out).rows()]


def read_back(source: Path, name: str) -> np.ndarray:
    waveform, rate = read_audio(source / f"{name}.wav")
    return resample(waveform, rate, CountingCodec().sample_rate)


def test_rows_that_left_the_source_stay(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 3), tmp_path / "out"
    run(source, out)
    (source / "001.wav").unlink()
    run(source, out)
    assert ids(out) == ["000", "001", "002"]


def test_a_corrected_transcript_is_an_update(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 3), tmp_path / "out"
    run(source, out)
    (source / "001.txt").write_text("Corrected.")
    summary = run(source, out)
    assert (summary.encoded, summary.added, summary.updated) == (0, 0, 1)
    assert sorted(row.text for row in CodeStore.open(out).rows())[0] == "Corrected."
    assert len(ids(out)) == 3


def test_a_new_take_of_a_recording_replaces_the_old_one(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 3), tmp_path / "out"
    run(source, out)
    clip(source, "001.wav", 99, "Again.")
    summary = run(source, out)
    assert (summary.encoded, summary.added, summary.updated) == (1, 0, 1)
    assert ids(out) == ["000", "001", "002"]


def test_a_folder_that_moved_is_the_same_data(tmp_path: Path) -> None:
    recordings(tmp_path / "in", 3)
    run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "moved")
    (tmp_path / "moved" / "001.txt").write_text("Corrected.")
    summary = run(tmp_path / "moved", tmp_path / "out")
    assert (summary.encoded, summary.added, summary.updated, summary.refused) == (0, 0, 1, {})


def test_names_that_occur_twice(tmp_path: Path) -> None:
    clip(tmp_path / "in", "x/same.wav", 1)
    clip(tmp_path / "in", "y/same.wav", 2)
    clip(tmp_path / "in", "same.wav", 3)
    run(tmp_path / "in", tmp_path / "out")
    assert ids(tmp_path / "out") == ["same", "x/same", "y/same"]
    clip(tmp_path / "in", "a/same.wav", 4)
    summary = run(tmp_path / "in", tmp_path / "out")
    assert (summary.added, summary.updated) == (1, 0)
    assert ids(tmp_path / "out") == ["a/same", "same", "x/same", "y/same"]


def test_rows_may_be_put_in_before_others(tmp_path: Path) -> None:
    """Neither a second text of a clip nor a conversation is known by its place alone."""
    for n in range(2):
        write(tmp_path / "in" / f"{n}.wav", speech(0.5, n))
    readings = [{"audio": "0.wav", "text": f"Reading {n}."} for n in range(3)]
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": {"type": "audio", "url": "1.wav"}},
            ]
        }
        for n in range(3)
    ]
    manifest(tmp_path / "in", *readings[1:], *talks[1:])
    run(tmp_path / "in", tmp_path / "out")
    before = {row.text: row.id for row in CodeStore.open(tmp_path / "out").rows()}
    for rows, added in ((readings[2:] + talks[2:], 0), (readings + talks, 2)):
        manifest(tmp_path / "in", *rows)
        summary = run(tmp_path / "in", tmp_path / "out")
        assert (summary.added, summary.updated, summary.refused) == (added, 0, {})
        assert sum(summary.accepted.values()) == len(rows)
    after = {row.text: row.id for row in CodeStore.open(tmp_path / "out").rows()}
    assert {text: after[text] for text in before} == before
    assert len(set(after.values())) == 6


def test_an_id_of_another_source_is_not_overwritten(tmp_path: Path) -> None:
    for n, name in enumerate(("one", "two")):
        write(tmp_path / name / "a.wav", speech(0.5, n))
        manifest(tmp_path / name, {"id": "a", "audio": "a.wav", "text": name})
    run(tmp_path / "one", tmp_path / "out")
    summary = run(tmp_path / "two", tmp_path / "out")
    assert summary.refused == {"duplicate_id": 1}
    assert CodeStore.open(tmp_path / "out")[0].text == "one."


def test_an_interruption_keeps_what_is_encoded(tmp_path: Path) -> None:
    class Interrupted(CountingCodec):
        def encode(self, waveform: np.ndarray) -> np.ndarray:
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().encode(waveform)

    recordings(tmp_path / "in", 10)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "out", Interrupted())
    summary = run(tmp_path / "in", tmp_path / "out")
    assert (summary.encoded, summary.reused) == (6, 4)


SLOW = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from recordings import CountingCodec
from higgstune.data.prepare import prepare
prepare(sys.argv[1], sys.argv[2], codec=CountingCodec(seconds=0.05))
"""


def start_slow_run(source: Path, out: Path) -> subprocess.Popen[bytes]:
    """A preparation in a process of its own, with some clips encoded and most of them not."""
    helpers = Path(__file__).parents[1] / "helpers"
    process = subprocess.Popen(with_parent([sys.executable, "-c", SLOW, source, out, helpers]))
    for _ in range(600):
        if sum(path.stat().st_size for path in out.glob(".partial/*.bin")) > 1000:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the preparation did not begin to encode")


@pytest.mark.processes
def test_a_killed_run_resumes(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 40), tmp_path / "out"
    process = start_slow_run(source, out)
    with pytest.raises(DataError, match="another preparation is writing"):
        run(source, out)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (journal,) = out.glob(".partial/*.bin")
    with open(journal, "ab") as file:
        file.write(b"a record that was cut short")
    with pytest.raises(DataError, match="is not a code store"):
        CodeStore.open(out)
    summary = run(source, out)
    assert 0 < summary.encoded < 40
    assert summary.encoded + summary.reused == 40
    run(source, tmp_path / "at once")
    at_once = {path.name for path in (tmp_path / "at once").glob("*.parquet")}
    assert {path.name for path in out.glob("*.parquet")} == at_once
    assert not (out / ".partial").exists()


@pytest.mark.parametrize("failing", [1, 2, 3])  # a shard, its move, the index
def test_a_full_disk_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    source, out = recordings(tmp_path / "in", 4), tmp_path / "out"
    run(source, out)
    before = [(row.id, row.codes.tolist()) for row in CodeStore.open(out).rows()]
    recordings(source, 4, first=4)
    calls = 0
    replace = os.replace

    def refuse(*names: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing + 1:  # the first replaces rejected.jsonl
            raise OSError(28, "No space left on device")
        replace(*names)

    monkeypatch.setattr(shards.os, "replace", refuse)
    with pytest.raises(WorkError, match="No space left on device"):
        run(source, out)
    assert [(row.id, row.codes.tolist()) for row in CodeStore.open(out).rows()] == before
    monkeypatch.undo()
    summary = run(source, out)
    assert (summary.encoded, summary.added) == (0, 4)
    assert len(list(out.glob("*.parquet"))) == 2
