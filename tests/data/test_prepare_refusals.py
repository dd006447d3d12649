"""Rows and sources that preparation refuses, with the reasons."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import ids, manifest, recordings, rejected, run
from recordings import RATE, CountingCodec, clip, speech, write

from higgstune.data.store import CodeStore
from higgstune.errors import ConfigError, DataError


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


def test_each_refusal_has_its_reason(tmp_path: Path) -> None:
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
    assert run(tmp_path / "more", tmp_path / "out", allow_outside=True).refused == {}


def test_long_clips_where_they_are_allowed(tmp_path: Path) -> None:
    clip(tmp_path / "in", "a.wav", 1, seconds=31.0)
    with pytest.raises(DataError, match="1 too long"):
        run(tmp_path / "in", tmp_path / "out")
    assert rejected(tmp_path / "out")[0]["reason"] == "too_long"
    assert run(tmp_path / "in", tmp_path / "out", allow_long=True).refused == {}
    assert run(tmp_path / "in", tmp_path / "other", max_seconds=40.0).refused == {}


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


def test_the_same_clip_under_two_names_is_taken_once(tmp_path: Path) -> None:
    samples = (speech(0.5, 1) * 32767).astype(np.int16)
    for name in ("a.wav", "b.flac", "c.wav"):
        write(tmp_path / "in" / name, samples)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("Other words." if name[0] == "c" else "Words.")
    summary = run(tmp_path / "in", tmp_path / "out")
    assert summary.refused == {"duplicate": 1}
    assert "'a'" in rejected(tmp_path / "out")[0]["message"]
    assert (ids(tmp_path / "out"), summary.encoded) == (["a", "c"], 1)


def test_another_codec_is_refused(tmp_path: Path) -> None:
    recordings(tmp_path / "in", 2)
    run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="codec revision fake-1, but this codec has fake-2: prepare into a new folder"):
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
    index.write_text(index.read_text().replace('"text_normalization": "2"', '"text_normalization": "0"'))
    with pytest.raises(DataError, match="normalised by version 0"):
        run(tmp_path / "in", tmp_path / "out")


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    manifest(tmp_path / "in", {"audio": "none.wav", "text": "Hello."}, "broken")
    with pytest.raises(
        DataError, match=r"1 missing audio, 1 bad row.*rejected\.jsonl, first manifest.jsonl:1: there is no"
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
def test_impossible_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(recordings(tmp_path / "in", 1), tmp_path / "out", **options)


def test_impossible_folders(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="its own folder"):
        run(source, source)
    with pytest.raises(ConfigError, match="is not a folder"):
        run(source, source / "000.txt")
    with pytest.raises(DataError, match="does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    recordings(tmp_path / "in", 1)
    os.rename(tmp_path / "in" / "000.wav", os.fsencode(tmp_path / "in") + b"/caf\xe9.wav")
    clip(tmp_path / "in", "001.wav", 1)
    assert run(tmp_path / "in", tmp_path / "out").refused == {"bad_row": 1}
    assert rejected(tmp_path / "out")[0]["audio"] == "caf\udce9.wav"
