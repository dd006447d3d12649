"""Preparation as a whole: formats, segments, splits, references, labels, warnings and progress."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import manifest, recordings, run
from recordings import clip, speech, write

from higgstune.data.store import CodeStore

SPEECH = Path(__file__).parents[3] / "shared" / "speech"


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


def test_near_duplicates_share_a_split(tmp_path: Path) -> None:
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


def test_rows_without_a_speaker_are_counted_in_a_warning(tmp_path: Path) -> None:
    summary = run(recordings(tmp_path / "in", 3), tmp_path / "out", references="same_speaker")
    assert summary.references.without_speaker == 3
    assert "name no speaker, and so have no reference: 3" in summary.warnings[0]


def test_one_recording_has_no_validation(tmp_path: Path) -> None:
    summary = run(recordings(tmp_path / "in", 1), tmp_path / "out")
    assert summary.rows == {"train": 1, "validation": 0}
    assert "no validation row" in summary.warnings[0]
    assert run(recordings(tmp_path / "in", 2), tmp_path / "out").rows == {"train": 1, "validation": 1}


def test_progress_is_reported(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    run(recordings(tmp_path / "in", 3), tmp_path / "out", progress=lambda *step: steps.append(step))
    assert [step for step in steps if step[0] == "encoding"] == [("encoding", n, 3) for n in range(4)]
    assert steps[-1] == ("writing", 1, 1)


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


def test_a_clip_shared_by_rows_is_encoded_once(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / "in" / f"{n}.wav", speech(0.5, n))
    voice = {"reference_audio": "2.wav", "reference_text": "A voice."}
    rows = [{"audio": f"{n}.wav", "text": f"Number {n}.", **voice} for n in range(2)]
    manifest(tmp_path / "in", *rows)
    assert run(tmp_path / "in", tmp_path / "out").encoded == 3


@pytest.mark.skipif(not SPEECH.is_dir(), reason=f"the real recordings are missing: {SPEECH.name}")
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


def test_marks_and_prefixes_that_would_be_read_aloud_are_warned_of(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 6)
    for number, path in enumerate(sorted(source.glob("*.txt"))):
        mark = "[inaudible]" if number == 2 else "[Laughter]"
        path.write_text(f"Speaker 0: number {number} {mark}")
    marks, prefix = run(source, tmp_path / "out").warnings[-2:]
    assert marks == "texts with marks that a voice reads aloud, such as [inaudible]: 1 (002)"
    assert prefix == "every text begins with 'Speaker 0:', which is trained on as words"
    for path in source.glob("*.txt"):
        path.write_text(f"Plain words {path.stem}")
    assert not [warning for warning in run(source, tmp_path / "plain").warnings if "begins with" in warning]
    texts = [row["text"] for row in CodeStore.open(tmp_path / "out").metadata.to_pylist()]
    assert sum("<SE>[Laughter]</SE>" in text for text in texts) == 5


def test_rows_that_are_held_out_are_for_validation(tmp_path: Path) -> None:
    clips = [clip(tmp_path / "in", f"{n}.wav", n) for n in range(6)]
    rows = [{"audio": f"{n}.wav", "text": f"Number {n}.", "held_out": n in (1, 4)} for n in range(len(clips))]
    manifest(tmp_path / "in", *rows)
    for _ in range(2):
        assert run(tmp_path / "in", tmp_path / "out").rows == {"train": 4, "validation": 2}
    moved = [{**row, "held_out": not row["held_out"], "text": f"{row['text']} Again."} for row in rows]
    manifest(tmp_path / "in", *moved)  # a recording stays where it is
    assert run(tmp_path / "in", tmp_path / "out").rows == {"train": 4, "validation": 2}
    manifest(tmp_path / "in", *rows)
    run(tmp_path / "in", tmp_path / "out")
    assert {row.text for row in CodeStore.open(tmp_path / "out") if row.split == "validation"} == {
        "Number 1.",
        "Number 4.",
    }
