"""Rows that are taken out of a store: nothing is encoded anew, and they stay out until they are restored."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_whisper_encoder import FakeWhisperEncoder
from preparing import ids, manifest, recordings, rejected, run
from recordings import CountingCodec, clip, speech, write

from higgstune.data import shard_writer as shards
from higgstune.data.prepare import prepare
from higgstune.data.shard_reader import read_index
from higgstune.data.store import CodeStore
from higgstune.data.summary import PrepareSummary
from higgstune.data.whisper_features import FeatureStore
from higgstune.errors import ConfigError, DataError, WorkError


def change(out: Path, **lists: list[str]) -> PrepareSummary:
    """Drop or restore rows without their source."""
    return prepare(None, out, **lists)


def test_a_row_is_taken_out_and_stays_out(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 5), tmp_path / "out"
    run(source, out, speaker="one", references="same_speaker", seed=3)
    codes = {row.id: row.codes.tolist() for row in CodeStore.open(out).rows()}
    summary = change(out, drop=["001", "003"])
    assert (summary.dropped, sum(summary.rows.values()), summary.encoded) == (2, 3, 0)
    assert {row.id: row.codes.tolist() for row in CodeStore.open(out).rows()} == {
        row_id: codes[row_id] for row_id in ("000", "002", "004")
    }
    assert {row.reference_id for row in CodeStore.open(out).rows("train")} <= {"000", "002", "004"}
    assert CodeStore.open(out).info.settings["seed"] == 3
    codec = CountingCodec()
    again = run(source, out, codec, speaker="one", references="same_speaker", seed=3)
    assert (again.refused, codec.calls, ids(out)) == ({"dropped": 2}, 0, ["000", "002", "004"])
    assert "--restore" in rejected(out)[0]["message"]
    assert change(out, drop=["001"]).dropped == 0  # as before


@pytest.mark.parametrize("changed", ["moved", "corrected", "renamed"])
def test_a_dropped_row_is_recognised(tmp_path: Path, changed: str) -> None:
    source, out = recordings(tmp_path / "in", 3), tmp_path / "out"
    run(source, out)
    change(out, drop=["001"])
    if changed == "moved":
        source = source.rename(tmp_path / "moved")
    elif changed == "corrected":
        (source / "001.txt").write_text("Corrected.")
    else:
        (source / "001.wav").rename(source / "x.wav")
        (source / "001.txt").rename(source / "x.txt")
    assert run(source, out).refused == {"dropped": 1}
    assert ids(out) == ["000", "002"]


def test_a_new_take_and_another_text_of_the_same_audio_are_other_rows(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    clip(source, "a.wav", 1, "Right")
    clip(source, "b.wav", 1, "Wrong")
    clip(source, "c.wav", 2)
    run(source, out)
    change(out, drop=["b", "c"])
    clip(source, "c.wav", 3)
    assert run(source, out).refused == {"dropped": 1}
    assert ids(out) == ["a", "c"]


def test_a_row_comes_back_once_it_is_restored(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 3), tmp_path / "out"
    run(source, out)
    change(out, drop=["001", "002"])
    summary = change(out, restore=["001"])
    assert (summary.restored, ids(out)) == (1, ["000"])
    assert run(source, out).refused == {"dropped": 1}
    assert ids(out) == ["000", "001"]
    run(source, out, restore=["002"], drop=["000"])
    assert ids(out) == ["001", "002"]


def test_what_cannot_be_dropped_or_restored(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 2), tmp_path / "out"
    run(source, out)
    before = (out / "store.json").read_bytes()
    for lists, problem in (
        ({"drop": ["000", "x", "y"]}, r"ids to drop that no row has: 2 \(x, y\)"),
        ({"drop": ["000", "001"]}, "no row of .* would be left"),
        ({"restore": ["000"]}, r"ids to restore that no dropped row has: 1 \(000\)"),
    ):
        with pytest.raises(DataError, match=problem):
            change(out, **lists)
    with pytest.raises(ConfigError, match="nothing to prepare"):
        change(out)
    with pytest.raises(ConfigError, match="speaker has no effect without a source"):
        prepare(None, out, drop=["000"], speaker="one")
    with pytest.raises(DataError, match="is not a code store"):
        change(tmp_path / "nowhere", drop=["000"])
    assert (out / "store.json").read_bytes() == before


def test_a_clip_in_the_prompt_of_another_row_is_not_dropped_alone(tmp_path: Path) -> None:
    for n, name in enumerate(("voice", "a", "b", "c")):
        write(tmp_path / "in" / f"{name}.wav", speech(0.5, n))
    voiced = {"id": "b", "audio": "b.wav", "text": "B", "reference_audio": "voice.wav"}
    turns = [
        {"role": "user", "content": [{"type": "audio", "url": "voice.wav"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": {"type": "audio", "url": "c.wav"}},
    ]
    rows = [{"id": name, "audio": f"{name}.wav", "text": f"{name} words"} for name in ("voice", "a")]
    manifest(tmp_path / "in", *rows, voiced, {"id": "talk", "messages": turns})
    out = tmp_path / "out"
    run(tmp_path / "in", out)
    with pytest.raises(DataError, match=r"their reference or in their conversation: 2 \(.*\); drop them, too"):
        change(out, drop=["voice"])
    change(out, drop=["voice", "b", "talk"])
    assert ids(out) == ["a"]
    new = {"id": "new", "audio": "c.wav", "text": "C", "reference_audio": "voice.wav", "reference_text": "V"}
    manifest(tmp_path / "in", new)
    assert run(tmp_path / "in", out).refused == {"dropped": 1}
    assert "the clip of the dropped row 'voice'" in rejected(out)[0]["message"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    source, out = recordings(tmp_path / "in", 4), tmp_path / "out"
    run(source, out)
    row_id = CodeStore.open(out)[0].id  # of several in its shard, which is written anew
    calls = 0
    replace = os.replace

    def refuse(*names: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        replace(*names)

    monkeypatch.setattr(shards.os, "replace", refuse)
    with pytest.raises(WorkError, match="No space left on device"):
        change(out, drop=[row_id])
    assert len(ids(out)) == 4
    monkeypatch.undo()
    change(out, drop=[row_id])
    assert len(ids(out)) == 3


def test_an_interrupted_preparation_keeps_its_clips(tmp_path: Path) -> None:
    class Interrupted(CountingCodec):
        def encode(self, waveform: np.ndarray) -> np.ndarray:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().encode(waveform)

    source, out = recordings(tmp_path / "in", 3), tmp_path / "out"
    run(source, out)
    recordings(source, 3, first=3)
    with pytest.raises(KeyboardInterrupt):
        run(source, out, Interrupted())
    report = (out / "rejected.jsonl").read_bytes()
    change(out, drop=["001"])
    assert (out / "rejected.jsonl").read_bytes() == report
    summary = run(source, out)
    assert (summary.encoded, summary.reused) == (1, 4)
    change(out, drop=["002"])
    assert not (out / ".partial").exists()


def test_whisper_features_of_a_dropped_clip_are_deleted(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 4), tmp_path / "out"
    encoder = FakeWhisperEncoder()
    run(source, out, speaker="one", references="same_speaker", validation_fraction=0.0, whisper=encoder)
    audio = {row.id: row.audio_sha256 for row in CodeStore.open(out).rows()}
    gone = next(row.reference_id for row in CodeStore.open(out).rows())
    before = FeatureStore.open(out, encoder.checkpoint)
    kept = next(sha256 for row_id, sha256 in audio.items() if sha256 in before and row_id != gone)
    features = before.read(kept)
    summary = change(out, drop=[str(gone)])
    after = FeatureStore.open(out, encoder.checkpoint)
    assert audio[str(gone)] in before
    assert audio[str(gone)] not in after
    assert np.array_equal(after.read(kept).features, features.features)
    assert any("--whisper" in warning for warning in summary.warnings)
    assert len(list(out.glob("whisper/*/features-*"))) == len(after.index.files)


def test_the_record_of_a_dropped_row_holds_no_text(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 3), tmp_path / "out"
    clip(source, "secret.wav", 9, "Something private")
    run(source, out)
    change(out, drop=["secret"])
    assert [row.id for row in read_index(out).info.dropped] == ["secret"]
    assert not [path for path in out.rglob("*") if path.is_file() and b"private" in path.read_bytes()]
    values = json.loads((out / "store.json").read_text())
    for damaged in ([{"id": "x"}], "x", [1]):
        values["info"]["dropped"] = damaged
        (out / "store.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match="is damaged"):
            read_index(out)


def test_a_row_that_is_refused_now_is_named_with_what_to_do(tmp_path: Path) -> None:
    """A transcript that was deleted leaves the row in the store; the summary must not hide it."""
    source, out = recordings(tmp_path / "in", 4), tmp_path / "out"
    run(source, out)
    (source / "001.txt").unlink()
    (source / "002.wav").unlink()
    (source / "003.txt").write_text("...")
    summary = run(source, out)
    assert (sorted(summary.stale), summary.not_in_source) == (["001", "003"], ["002"])
    assert any("old text: 2 (" in line and f"--drop FILE --out {out}" in line for line in summary.warnings)
    manifest(tmp_path / "table", {"audio": "a.wav", "text": "A"}, {"audio": "a.wav", "text": "<|a|>"})
    write(tmp_path / "table" / "a.wav", speech(0.5, 77))
    assert run(tmp_path / "table", out).stale == []
