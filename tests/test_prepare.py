"""Preparation as a whole: what is refused, what is encoded once, what a kill or a full disk leaves."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import RATE, CountingCodec, clip, speech, write

from higgstune.data import shards
from higgstune.data.prepare import PrepareSummary, prepare
from higgstune.data.store import CodeStore
from higgstune.errors import ConfigError, DataError, WorkError

SPEECH = Path(__file__).parents[2] / "shared" / "speech"


def run(source: Path, out: Path, codec: CountingCodec | None = None, **options: Any) -> PrepareSummary:
    return prepare(source, out, codec=codec or CountingCodec(), **options)


def manifest(folder: Path, *rows: dict[str, Any] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / "manifest.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rejected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def ids(out: Path) -> list[str]:
    return sorted(row.id for row in CodeStore.open(out).rows())


def recordings(folder: Path, count: int, first: int = 0) -> Path:
    for n in range(first, first + count):
        clip(folder, f"{n:03d}.wav", n)
    return folder


def test_every_format_and_rate(tmp_path: Path) -> None:
    for n, (suffix, rate) in enumerate(
        [(".wav", 8_000), (".flac", 22_050), (".mp3", 44_100), (".ogg", 48_000), (".opus", 48_000)]
    ):
        write(tmp_path / "in" / f"{n}{suffix}", speech(1.0, n, rate), rate)
        (tmp_path / "in" / f"{n}.txt").write_text(f"Format {suffix[1:]}")
    summary = run(tmp_path / "in", tmp_path / "out")
    assert summary.refused == {}
    assert sum(summary.rows.values()) == 5
    for row in CodeStore.open(tmp_path / "out"):
        assert row.codes.shape == (25, 8)
        assert row.duration == pytest.approx(1.0)


def awkward(folder: Path) -> list[dict[str, Any]]:
    """One row for each reason to be refused, by the name of the reason, with a good row between each two."""
    write(folder / "good.wav", speech(2.0, 1))
    write(folder / "other.wav", speech(1.0, 2))
    write(folder / "voice.wav", speech(1.0, 9))
    write(folder / "short.wav", speech(0.31, 3))
    write(folder / "long.wav", speech(30.1, 4))
    write(folder / "silent.wav", np.zeros(RATE))
    write(folder / "quiet.wav", speech(1.0, 5) * 0.002, subtype="PCM_24")
    broken = speech(1.0, 6)
    broken[500] = np.nan
    write(folder / "nan.wav", broken, subtype="FLOAT")
    write(folder / "loud.wav", speech(1.0, 7) * 32768, subtype="FLOAT")
    (folder / "text.wav").write_bytes(b"no audio" * 100)
    (folder / "cut.flac").write_bytes(write(folder / "whole.flac", speech(1.0, 8)).read_bytes()[:3000])
    talk = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": {"type": "audio", "url": "good.wav"}},
    )
    return [
        {"id": "bad_row", "audio": "good.wav", "txt": "A slip."},
        {"id": "missing_audio", "audio": "nowhere.wav", "text": "Hello."},
        {"id": "unreadable_audio", "audio": "text.wav", "text": "Hello."},
        {"id": "unreadable_audio", "audio": "cut.flac", "text": "Hello."},
        {"id": "empty_text", "audio": "good.wav", "text": " \u200b—\n "},
        {"id": "control_token", "audio": "good.wav", "text": "Hello <|eot_id|>"},
        {"id": "control_token", "audio": "good.wav", "text": "Hello", "scene": "<|scene_desc_end|>"},
        {"id": "segment_outside", "audio": "good.wav", "text": "Hello.", "start": 1.0, "end": 2.5},
        {"id": "segment_outside", "audio": "good.wav", "text": "Hello.", "start": 3.0},
        {"id": "too_short", "audio": "short.wav", "text": "Hello."},
        {"id": "too_short", "audio": "good.wav", "text": "Hello.", "start": 0.0, "end": 0.31},
        {"id": "too_long", "audio": "long.wav", "text": "Hello."},
        {"id": "silent", "audio": "silent.wav", "text": "Hello."},
        {"id": "silent", "audio": "quiet.wav", "text": "Hello."},
        {"id": "not_finite", "audio": "nan.wav", "text": "Hello."},
        {"id": "out_of_range", "audio": "loud.wav", "text": "Hello."},
        {
            "id": "reference_without_text",
            "audio": "good.wav",
            "text": "Hello.",
            "reference_audio": "voice.wav",
        },
        {
            "id": "reference_is_target",
            "audio": "good.wav",
            "text": "Hello.",
            "start": 1.0,
            "reference_audio": "good.wav",
            "reference_text": "Hello.",
        },
        {
            "id": "silent",
            "audio": "good.wav",
            "text": "Hello.",
            "reference_audio": "silent.wav",
            "reference_text": "Hello.",
        },
        {"id": "no_target", "messages": talk[:1]},
        {
            "id": "missing_audio",
            "messages": [{"role": "user", "content": {"type": "audio", "url": "x"}}, *talk],
        },
        {"id": "duplicate", "audio": "good.wav", "text": "Good "},
        {"id": "duplicate_id", "audio": "other.wav", "text": "Good."},
    ]


def test_what_is_refused_and_why(tmp_path: Path) -> None:
    rows = awkward(tmp_path / "in")
    good = {"id": "good", "audio": "good.wav", "text": "Good."}
    rows[-1]["id"] = "good"
    manifest(tmp_path / "in", good, *rows, "not JSON", {"audio": "whole.flac", "text": "Last."})
    summary = run(tmp_path / "in", tmp_path / "out")
    expected = ["duplicate_id" if row["id"] == "good" else row["id"] for row in rows] + ["bad_row"]
    found = rejected(tmp_path / "out")
    assert [row["reason"] for row in found] == expected
    assert [row["location"] for row in found] == [f"manifest.jsonl:{n}" for n in range(2, len(expected) + 2)]
    assert summary.refused == {reason: expected.count(reason) for reason in set(expected)}
    assert all(row["message"] for row in found)
    assert found[1]["audio"] == "nowhere.wav"
    assert ids(tmp_path / "out") == ["good", "whole"]
    json.dumps(dataclasses.asdict(summary))


def test_limits_are_exact(tmp_path: Path) -> None:
    """Eight frames and -60 dBFS are enough, thirty seconds are not too many, a rounded end is inside."""
    write(tmp_path / "in" / "frames.wav", speech(0.32, 1, 24_000), 24_000)
    write(tmp_path / "in" / "long.wav", speech(30.0, 2))
    quiet = speech(1.0, 3)
    write(tmp_path / "in" / "quiet.wav", quiet * (0.0011 / np.abs(quiet).max()), subtype="FLOAT")
    write(tmp_path / "in" / "end.wav", speech(1.004, 4))
    for path in (tmp_path / "in").glob("*.wav"):
        path.with_suffix(".txt").write_text(path.stem)
    assert run(tmp_path / "in", tmp_path / "out").refused == {}
    manifest(tmp_path / "more", {"audio": "../in/end.wav", "text": "Rounded.", "start": 0.68, "end": 1.01})
    assert run(tmp_path / "more", tmp_path / "out").refused == {}


def test_long_clips_where_they_are_allowed(tmp_path: Path) -> None:
    clip(tmp_path / "in", "a.wav", 1, seconds=31.0)
    with pytest.raises(DataError, match="too_long"):
        run(tmp_path / "in", tmp_path / "out")
    assert rejected(tmp_path / "out")[0]["reason"] == "too_long"
    assert run(tmp_path / "in", tmp_path / "out", allow_long=True).refused == {}
    assert run(tmp_path / "in", tmp_path / "other", max_seconds=40.0).refused == {}


def test_segments_of_one_recording(tmp_path: Path) -> None:
    write(tmp_path / "in" / "book.flac", speech(20.0, 1))
    clip(tmp_path / "in", "other.wav", 2)
    rows = [{"audio": "book.flac", "text": f"Part {n}.", "start": n * 2.0, "end": n * 2.0 + 1.5} for n in range(10)]
    manifest(tmp_path / "in", *rows, {"audio": "other.wav", "text": "Other."})
    summary = run(tmp_path / "in", tmp_path / "out")
    store = CodeStore.open(tmp_path / "out")
    book = [row for row in store if row.id.startswith("book@")]
    assert len({row.recording_sha256 for row in book}) == 1
    assert len({row.audio_sha256 for row in book}) == 10
    assert len({row.split for row in book}) == 1
    assert summary.rows == {"train": 10, "validation": 1}


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


def test_nothing_is_encoded_for_rows_that_the_store_refuses(tmp_path: Path) -> None:
    for n in range(2):
        write(tmp_path / "in" / f"{n}.wav", speech(0.5, n))
    manifest(tmp_path / "in", *({"id": "same", "audio": f"{n}.wav", "text": f"Number {n}."} for n in range(2)))
    for encoded in (1, 0):
        summary = run(tmp_path / "in", tmp_path / "out")
        assert (summary.encoded, summary.refused) == (encoded, {"duplicate_id": 1})


def test_a_clip_that_cannot_be_encoded_makes_room(tmp_path: Path) -> None:
    """Its codec may find a clip too short; the row that was its duplicate is then taken."""

    class Picky(CountingCodec):
        def encode(self, waveform: np.ndarray) -> np.ndarray:
            codes = super().encode(waveform)
            return codes[:7] if self.calls == 1 else codes

    for n in range(2):
        write(tmp_path / "in" / f"{n}.wav", speech(0.5, n))
    manifest(tmp_path / "in", *({"id": "same", "audio": f"{n}.wav", "text": f"Number {n}."} for n in range(2)))
    assert run(tmp_path / "in", tmp_path / "out", Picky()).refused == {"too_short": 1}
    assert CodeStore.open(tmp_path / "out")[0].text == "Number 1."


def test_a_store_grows(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 5), tmp_path / "out"
    run(source, out)
    splits = {row.id: row.split for row in CodeStore.open(out).rows()}
    recordings(source, 3, first=5)
    grown = run(source, out)
    assert (grown.encoded, grown.reused, grown.added) == (3, 5, 3)
    other = run(recordings(tmp_path / "elsewhere", 2, first=20), out)
    assert (other.encoded, sum(other.rows.values()), sum(other.accepted.values())) == (2, 10, 2)
    after = {row.id: row.split for row in CodeStore.open(out).rows()}
    assert {row_id: after[row_id] for row_id in splits} == splits
    assert len(list(out.glob("*.parquet"))) == 2


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


def test_a_recording_that_was_made_again_replaces_the_old_one(tmp_path: Path) -> None:
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
    said = [{"audio": "0.wav", "text": f"Reading {n}."} for n in range(3)]
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": {"type": "audio", "url": "1.wav"}},
            ]
        }
        for n in range(3)
    ]
    manifest(tmp_path / "in", *said[1:], *talks[1:])
    run(tmp_path / "in", tmp_path / "out")
    before = {row.text: row.id for row in CodeStore.open(tmp_path / "out").rows()}
    for rows, added in ((said[2:] + talks[2:], 0), (said + talks, 2)):
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


def test_the_same_clip_under_two_names_is_taken_once(tmp_path: Path) -> None:
    samples = (speech(0.5, 1) * 32767).astype(np.int16)
    for name in ("a.wav", "b.flac", "c.wav"):
        write(tmp_path / "in" / name, samples)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("Other words." if name[0] == "c" else "Words.")
    summary = run(tmp_path / "in", tmp_path / "out")
    assert summary.refused == {"duplicate": 1}
    assert "'a'" in rejected(tmp_path / "out")[0]["message"]
    assert (ids(tmp_path / "out"), summary.encoded) == (["a", "c"], 1)


def test_twins_never_meet_across_splits(tmp_path: Path) -> None:
    """Written from floats, a WAV and a FLAC differ in their last bits; a good OGG differs more."""
    for n in range(12):
        for suffix in (".wav", ".flac", ".ogg"):
            path = write(tmp_path / "in" / f"{n}{suffix}", speech(1.0, n))
            path.with_name(f"{n}.txt").write_text(f"Number {n}.")
    run(tmp_path / "in", tmp_path / "out", validation_fraction=0.4)
    splits: dict[str, set[str]] = {}
    for row in CodeStore.open(tmp_path / "out").rows():
        splits.setdefault(row.text, set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "validation"}


def test_the_split_does_not_depend_on_names_or_places(tmp_path: Path) -> None:
    for n in range(20):
        clip(tmp_path / "one", f"{n}.wav", n)
        clip(tmp_path / "two", f"other/{99 - n}.wav", n)
    by_audio = []
    for name in ("one", "two"):
        run(tmp_path / name, tmp_path / f"out {name}", validation_fraction=0.2)
        by_audio.append({row.audio_sha256: row.split for row in CodeStore.open(tmp_path / f"out {name}").rows()})
    assert by_audio[0] == by_audio[1]


def test_explicit_references(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / "in" / f"{n}.wav", speech(0.5 + n / 10, n))
    manifest(
        tmp_path / "in",
        {"audio": "0.wav", "text": "Zero.", "reference_audio": "1.wav"},
        {"audio": "1.wav", "text": "One.", "reference_audio": "2.wav", "reference_text": "Only a voice"},
    )
    summary = run(tmp_path / "in", tmp_path / "out", references="same_speaker")
    assert (summary.encoded, summary.references.explicit, summary.references.paired) == (3, 2, 0)
    store = CodeStore.open(tmp_path / "out")
    zero, one = store[store.index_of("0")], store[store.index_of("1")]
    assert (zero.reference_id, zero.reference_text, zero.split) == ("1", "One.", one.split)
    assert np.array_equal(zero.reference_codes, one.codes)
    assert (one.reference_id, one.reference_text) == (None, "Only a voice.")
    assert one.reference_codes is not None
    assert one.reference_codes.shape == (18, 8)


def test_references_of_the_same_speaker(tmp_path: Path) -> None:
    for n in range(12):
        clip(tmp_path / "in", f"{n}.wav", n)
    options: dict[str, Any] = {"references": "same_speaker", "validation_fraction": 0.3, "speaker": "anna"}
    summary = run(tmp_path / "in", tmp_path / "out", **options)
    rows = {row.id: row for row in CodeStore.open(tmp_path / "out").rows()}
    for row in rows.values():
        if row.reference_id is not None:
            assert rows[row.reference_id].split == row.split
            assert row.reference_id != row.id
    assert summary.references.paired >= 10
    pairs = {row.id: row.reference_id for row in rows.values()}
    run(tmp_path / "in", tmp_path / "out", **options)
    assert {row.id: row.reference_id for row in CodeStore.open(tmp_path / "out").rows()} == pairs
    run(tmp_path / "in", tmp_path / "out", **options | {"references": "none"})
    assert {row.reference_id for row in CodeStore.open(tmp_path / "out").rows()} == {None}


def test_labels_for_all_rows(tmp_path: Path) -> None:
    recordings(tmp_path / "in", 2)
    run(tmp_path / "in", tmp_path / "out", speaker="anna", language="de", scene="A hall.")
    for row in CodeStore.open(tmp_path / "out").rows():
        assert (row.speaker, row.language, row.scene) == ("anna", "de", "A hall.")


def test_rows_without_a_speaker_are_told_of(tmp_path: Path) -> None:
    summary = run(recordings(tmp_path / "in", 3), tmp_path / "out", references="same_speaker")
    assert summary.references.without_speaker == 3
    assert "name no speaker and stay without a reference: 3" in summary.warnings[0]


def test_one_recording_has_no_validation(tmp_path: Path) -> None:
    summary = run(recordings(tmp_path / "in", 1), tmp_path / "out")
    assert summary.rows == {"train": 1, "validation": 0}
    assert "no validation row" in summary.warnings[0]
    assert run(recordings(tmp_path / "in", 2), tmp_path / "out").rows == {"train": 1, "validation": 1}


def test_another_codec_is_refused(tmp_path: Path) -> None:
    recordings(tmp_path / "in", 2)
    run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="codec revision fake-1, this one has fake-2: prepare into a new folder"):
        run(tmp_path / "in", tmp_path / "out", CountingCodec("fake-2"))


def test_a_damaged_store_is_not_added_to(tmp_path: Path) -> None:
    run(recordings(tmp_path / "in", 2), tmp_path / "out")
    next((tmp_path / "out").glob("train-*")).unlink()
    with pytest.raises(DataError, match=r"missing or damaged.*move it away"):
        run(tmp_path / "in", tmp_path / "out")


def test_a_store_with_older_texts_is_refused(tmp_path: Path) -> None:
    recordings(tmp_path / "in", 2)
    run(tmp_path / "in", tmp_path / "out")
    index = tmp_path / "out" / "store.json"
    index.write_text(index.read_text().replace('"text_normalization": "1"', '"text_normalization": "0"'))
    with pytest.raises(DataError, match="normalised by version 0"):
        run(tmp_path / "in", tmp_path / "out")


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    manifest(tmp_path / "in", {"audio": "none.wav", "text": "Hello."}, "broken")
    with pytest.raises(
        DataError, match=r"'missing_audio': 1, 'bad_row': 1.*rejected\.jsonl, first manifest.jsonl:1: there is no"
    ):
        run(tmp_path / "in", tmp_path / "out")
    assert len(rejected(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"validation_fraction": float("nan")}, "validation_fraction"),
        ({"references": "any"}, "references is 'any'"),
        ({"max_seconds": 0.0}, "max_seconds"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(recordings(tmp_path / "in", 1), tmp_path / "out", **options)


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="folder of its own"):
        run(source, source)
    with pytest.raises(DataError, match="is no folder"):
        run(source, source / "000.txt")
    with pytest.raises(DataError, match="there is no"):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run(recordings(tmp_path / "in", 3), tmp_path / "out", progress=lambda *step: told.append(step))
    assert [step for step in told if step[0] == "encoding"] == [("encoding", n, 3) for n in range(4)]
    assert told[-1] == ("writing", 1, 1)


def test_parts_of_files_in_a_conversation(tmp_path: Path) -> None:
    """As in the original format: offset and duration in seconds, and the end of the file at the latest."""
    write(tmp_path / "in" / "a.wav", speech(3.0, 1))
    parts = [{"type": "audio", "audio_url": "a.wav", "offset": n, "duration": d} for n, d in ((0.0, 1.0), (1.5, 9.0))]
    user = {"role": "user", "content": [{"type": "text", "text": "Hello."}, parts[0]]}
    turns = [user, {"role": "assistant", "content": parts[1]}]
    path = tmp_path / "in" / "chat.json"
    path.write_text(json.dumps([{"messages": turns}]))
    run(path, tmp_path / "out")
    row = CodeStore.open(tmp_path / "out")[0]
    assert (row.duration, len(row.codes), len(row.context_codes[0])) == (1.5, 38, 25)
    assert row.messages is not None
    assert row.messages[1]["content"] == [{"type": "audio", "url": "a.wav"}]


def test_a_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    recordings(tmp_path / "in", 1)
    os.rename(tmp_path / "in" / "000.wav", os.fsencode(tmp_path / "in") + b"/caf\xe9.wav")
    clip(tmp_path / "in", "001.wav", 1)
    assert run(tmp_path / "in", tmp_path / "out").refused == {"bad_row": 1}
    assert rejected(tmp_path / "out")[0]["audio"] == "caf\udce9.wav"


def test_a_clip_shared_by_rows_is_encoded_once(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / "in" / f"{n}.wav", speech(0.5, n))
    voice = {"reference_audio": "2.wav", "reference_text": "A voice."}
    rows = [{"audio": f"{n}.wav", "text": f"Number {n}.", **voice} for n in range(2)]
    manifest(tmp_path / "in", *rows)
    assert run(tmp_path / "in", tmp_path / "out").encoded == 3


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
    process = subprocess.Popen([sys.executable, "-c", SLOW, source, out, Path(__file__).parent])
    for _ in range(600):
        if sum(path.stat().st_size for path in out.glob(".partial/*.bin")) > 1000:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the preparation did not begin to encode")


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    source, out = recordings(tmp_path / "in", 40), tmp_path / "out"
    process = start_slow_run(source, out)
    with pytest.raises(DataError, match="another preparation is writing"):
        run(source, out)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (journal,) = out.glob(".partial/*.bin")
    with open(journal, "ab") as file:
        file.write(b"a record that was cut short")
    with pytest.raises(DataError, match="no code store"):
        CodeStore.open(out)
    summary = run(source, out)
    assert 0 < summary.encoded < 40
    assert summary.encoded + summary.reused == 40
    run(source, tmp_path / "at once")
    at_once = {path.name for path in (tmp_path / "at once").glob("*.parquet")}
    assert {path.name for path in out.glob("*.parquet")} == at_once
    assert not (out / ".partial").exists()


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
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


@pytest.mark.skipif(not SPEECH.is_dir(), reason=f"the real recordings are not there: {SPEECH.name}")
def test_real_speech(tmp_path: Path) -> None:
    options: dict[str, Any] = {"references": "same_speaker"}
    first = run(SPEECH / "ljspeech", tmp_path / "out", speaker="lj", **options)
    second = run(SPEECH / "librispeech", tmp_path / "out", **options)
    assert (first.refused, second.refused) == ({}, {})
    assert sum(second.rows.values()) == 135
    store = CodeStore.open(tmp_path / "out")
    assert all(len(row.codes) == pytest.approx(row.duration * 25, abs=1) for row in store.rows())
    assert not {row.recording_sha256 for row in store.rows("train")} & {
        row.recording_sha256 for row in store.rows("validation")
    }
    assert run(SPEECH / "ljspeech", tmp_path / "out", speaker="lj", **options).encoded == 0
