"""Rows that stand out: by their measures, by their text's length, by another row's audio."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from preparing import ids, manifest, rejected, run
from recordings import RATE, CountingCodec, babble, clip, speech, write

from higgstune.data.audio import resample
from higgstune.data.measures import LIMITS, parse_limits
from higgstune.data.outliers import SAME_AUDIO, OutlierReport, store_outliers
from higgstune.data.rejection import REASONS
from higgstune.data.shard_reader import StoreIndex, read_index
from higgstune.data.store import CodeStore
from higgstune.errors import ConfigError

SENTENCE = "This sentence has about forty letters in all of it"  # 41: for clips of 3 s
DATA = Path(__file__).parents[2] / "docs" / "data.md"


def talk(seconds: float, seed: int, rate: int = RATE) -> np.ndarray:
    """Bursts of noise [samples] with pauses between them, in a quiet room: nothing about it stands out."""
    time = np.arange(round(seconds * rate)) / rate
    generator = np.random.default_rng(seed)
    sound, room = generator.standard_normal((2, len(time)))
    return (0.05 * sound * (time % 0.4 < 0.3) + 1e-4 * room).astype(np.float32)


def row(folder: Path, name: str, waveform: np.ndarray, text: str = SENTENCE, rate: int = RATE, **options: Any) -> None:
    """A recording with its transcript."""
    write(folder / f"{name}.wav", waveform, rate, **options)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def found(report: OutlierReport) -> dict[str, list[str]]:
    """Ids by kind."""
    kinds: dict[str, list[str]] = {}
    for outlier in report.outliers:
        kinds.setdefault(outlier.kind, []).append(outlier.id)
    return kinds


def test_rows_that_stand_out_are_listed_and_no_others(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for n in range(3):
        row(source, f"good{n}", talk(3.0, n))
    silence = np.zeros(RATE * 2, np.float32)
    row(source, "late", np.concatenate([silence, talk(3.0, 10)]))
    row(source, "later", np.concatenate([silence, silence, talk(3.0, 11)]))
    row(source, "tail", np.concatenate([talk(3.0, 12), silence]))
    row(source, "pause", np.concatenate([talk(2.0, 22), np.zeros(4 * RATE), talk(2.0, 23)]), SENTENCE)
    row(source, "noise", 0.1 * np.random.default_rng(13).standard_normal(3 * RATE))
    row(source, "overdriven", np.clip(50 * talk(3.0, 14), -1, 1))
    row(source, "quiet", 0.03 * talk(3.0, 15), subtype="FLOAT")
    row(source, "offset", talk(3.0, 16) + 0.3)
    row(source, "telephone", talk(3.0, 17, 8000), rate=8000)
    row(source, "one_channel", np.stack([talk(3.0, 18), np.zeros(3 * RATE)], axis=1))
    row(source, "nearly_reversed", np.stack([talk(3.0, 19), -0.8 * talk(3.0, 19)], axis=1))
    row(source, "slow", talk(20.0, 20), "Hi")
    row(source, "fast", talk(3.0, 21), SENTENCE * 3)
    summary = run(source, out)
    report = store_outliers(out)
    assert summary.outliers == report.outliers
    assert (summary.refused, summary.not_measured, report.rows) == ({}, [], 16)
    assert found(report) == {
        "characters_per_second > 30": ["fast"],
        "characters_per_second < 1.5": ["slow"],
        "leading_silence > 1 s": ["later", "late"],
        "trailing_silence > 1 s": ["tail"],
        "longest_pause > 2 s": ["pause"],
        "snr < 15 dB": ["noise"],
        "clipped > 0.001": ["overdriven"],
        "level < -45 dBFS": ["quiet", "nearly_reversed"],
        "dc > 0.05": ["offset"],
        "bandwidth < 6000 Hz": ["telephone"],
        "silent_channels > 0": ["one_channel"],
        "mix_loss > 7 dB": ["nearly_reversed"],
    }


@pytest.mark.parametrize("language", ["en", None])
def test_speaking_rates_are_compared_within_a_language(tmp_path: Path, language: str | None) -> None:
    """Twenty rows make a median; ideographs are fewer, and only compared with each other."""
    rows = []
    for n in range(40):
        write(tmp_path / "in" / f"{n}.wav", talk(3.0, n))
        text = f"{SENTENCE} {'abcdefghijklmnopqrst'[n]}" if n < 20 else f"一二三四五六七八九十一二{chr(0x4E00 + n)}"
        rows.append({"audio": f"{n}.wav", "text": text, "language": (language if n < 20 else language and "zh")})
    for name, text in (("swapped", SENTENCE * 2), ("short", "Three words only")):
        write(tmp_path / "in" / f"{name}.wav", talk(3.0, 50 + len(name)))
        rows.append({"audio": f"{name}.wav", "text": text, "language": language})
    manifest(tmp_path / "in", *rows)
    run(tmp_path / "in", tmp_path / "out")
    report = store_outliers(tmp_path / "out", ["pace < 0.55"])
    assert found(report) == {"pace > 1.75": ["swapped"], "pace < 0.55": ["short"]}


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_the_same_audio_with_another_text(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "in"
    for name in ("a.wav", f"copy{suffix}"):
        write(source / name, speech(3.0, 1))
        (source / name).with_suffix(".txt").write_text(f"{SENTENCE} {name[:1]}")
    write(source / "other.wav", speech(3.0, 2))
    (source / "other.txt").write_text(SENTENCE)
    run(source, tmp_path / "out")
    report = store_outliers(tmp_path / "out")
    same = {outlier.id: outlier.other for outlier in report.outliers if outlier.kind == SAME_AUDIO}
    assert same == {"a": "copy", "copy": "a"}
    (source / "copy.txt").write_text(f"{SENTENCE.upper()}, a!")
    run(source, tmp_path / "out")
    assert SAME_AUDIO not in found(store_outliers(tmp_path / "out"))


@pytest.mark.parametrize("change", ["trimmed", "with more silence", "at another rate", "in another format", "quieter"])
def test_the_same_audio_of_another_length(tmp_path: Path, change: str) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    silence = 1e-4 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    sound = np.concatenate([silence[:11_000], babble(3, 1), silence[:9_000]])
    cut = sound[7_777:-6_000]
    changed = {
        "trimmed": (cut, RATE, "wav"),
        "with more silence": (np.concatenate([silence[:5_555], sound, silence]), RATE, "wav"),
        "at another rate": (resample(cut, RATE, 44_100), 44_100, "flac"),
        "in another format": (cut, RATE, "mp3"),
        "quieter": (np.stack([0.05 * cut, 0.04 * cut], axis=1), RATE, "wav"),
    }[change]
    row(source, "a", sound, "These are the words that are spoken")
    write(source / f"b.{changed[2]}", *changed[:2])
    (source / "b.txt").write_text("Here are entirely different ones")
    row(source, "same_words", 0.7 * cut, "These are the words that are spoken!")
    row(source, "longer", np.concatenate([cut, babble(2, 2)]), "These are the words that are spoken, and more")
    row(source, "other", babble(3, 3), "This is another sentence altogether")
    for encoded in (5, 0):
        assert run(source, out).encoded == encoded
        assert sorted(found(store_outliers(out))[SAME_AUDIO]) == ["a", "b", "same_words"]


def test_rows_without_prints_are_compared_as_they_were(tmp_path: Path) -> None:
    """A store of an earlier version, to which a clip is added."""
    source, out = tmp_path / "in", tmp_path / "out"
    row(source, "a", babble(3, 1), "These are the words that are spoken")
    run(source, out, validation_fraction=0.0)
    as_earlier_version(out, "print")
    assert SAME_AUDIO not in found(store_outliers(out))
    row(source, "b", 0.5 * babble(3, 1)[2000:], "Here are entirely different ones")
    row(source, "c", babble(3, 1)[1000:], "And here are others again")
    run(source, out)
    assert found(store_outliers(out))[SAME_AUDIO] == ["b", "c"]


def test_limits_can_be_changed_and_are_kept_with_the_store(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    row(source, "late", np.concatenate([np.zeros(RATE * 2, np.float32), talk(3.0, 1)]))
    row(source, "good", talk(3.0, 2))
    summary = run(source, out, limits=["leading_silence > 3", "peak > -30"])
    assert set(found(store_outliers(out))) == {"peak > -30 dBFS"}
    assert summary.outliers == store_outliers(out).outliers
    assert found(store_outliers(out, [])) == {"leading_silence > 1 s": ["late"]}
    assert found(store_outliers(out, ["leading_silence > inf"])) == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("silence > 1", "there is no measure 'silence'"),
        ("leading_silense > 1", "did you mean 'leading_silence'"),
        ("snr", "is not a measure, < or >, and a number"),
        ("snr = 10", "is not a measure"),
        ("snr > nan", "is not a measure"),
        ("snr < 10 dB", "is not a measure"),
    ],
)
def test_a_wrong_limit_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_limits([text])


def test_measures_are_columns(tmp_path: Path) -> None:
    """They are those of the segment, in every channel, and of the text."""
    source, out = tmp_path / "in", tmp_path / "out"
    sound = np.concatenate([np.zeros(2 * RATE, np.float32), talk(4.0, 1)])
    write(source / "a.wav", np.stack([sound, 0 * sound], axis=1))
    manifest(
        source,
        {"id": "whole", "audio": "a.wav", "text": "Number 10."},
        {"id": "part", "audio": "a.wav", "text": "<SE>[Laughter]</SE>", "start": 3.0, "end": 5.0},
    )
    run(source, out, validation_fraction=0.0)
    table = {values["id"]: values for values in CodeStore.open(out).metadata.to_pylist()}
    whole, part = table["whole"], table["part"]
    assert whole["characters_per_second"] == pytest.approx((6 + 8) / 6, abs=0.01)
    assert part["characters_per_second"] is None
    assert (whole["leading_silence"], part["leading_silence"]) == (
        pytest.approx(2.0, abs=0.1),
        pytest.approx(0, abs=0.1),
    )
    assert (whole["channels"], whole["silent_channels"], part["silent_channels"]) == (2, 1, 1)
    for limit in LIMITS:
        assert limit.name == "pace" or limit.name in whole


def test_measures_do_not_depend_on_what_was_encoded_before(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for n in range(3):
        row(source, f"{n}", talk(1.0, n))
    run(source, out)
    before = CodeStore.open(out).metadata
    codec = CountingCodec()
    run(source, out, codec)
    assert (codec.calls, CodeStore.open(out).metadata.equals(before)) == (0, True)


@pytest.mark.parametrize("first", ["characters_per_second", "longest_pause"])
def test_rows_of_a_store_without_measures(tmp_path: Path, first: str) -> None:
    """An earlier version's store is read and grows; its rows have no measures until their source is prepared again."""
    source, out = tmp_path / "in", tmp_path / "out"
    row(source, "old", np.concatenate([np.zeros(2 * RATE, np.float32), talk(3.0, 1)]))
    run(source, out, validation_fraction=0.0)
    as_earlier_version(out, first)
    assert CodeStore.open(out)[0].id == "old"
    report = store_outliers(out)
    assert (report.not_measured, report.outliers) == (["old"], [])
    row(tmp_path / "more", "new", talk(3.0, 2))
    summary = run(tmp_path / "more", out)
    assert (summary.not_measured, summary.not_in_source, ids(out)) == (["old"], ["old"], ["new", "old"])
    codec = CountingCodec()
    summary = run(source, out, codec)
    assert (summary.not_measured, summary.not_in_source, codec.calls) == ([], ["new"], 0)
    assert found(store_outliers(out)) == {"leading_silence > 1 s": ["old"]}


def as_earlier_version(out: Path, first: str) -> None:
    """Write a store of one shard as it was before rows had the column `first` and those behind it."""
    index = read_index(out)
    (shard,) = index.shards
    table = pq.read_table(out / shard.name)
    names = table.schema.names
    pq.write_table(table.select(names[: names.index(first)]), out / shard.name, row_group_size=64)
    content = (out / shard.name).read_bytes()
    values = json.loads(StoreIndex(index.info, [shard]).to_json())
    values["shards"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del values["info"]["dropped"], values["info"]["settings"]["limits"]
    (out / "store.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("waveform", "text", "reason", "message"),
    [
        (np.full(2 * RATE, 0.3), "Hi", "silent", r"constant offset of 0.3 \(DC\)"),
        (np.where(np.arange(2 * RATE) < RATE, 0.1, -0.4), "Hi", "silent", "constant offset"),
        (np.stack([talk(2.0, 1), -talk(2.0, 1)], axis=1), "Hi", "channels_cancel", "2 channels cancel each other"),
        (talk(1.5, 2), "word " * 900, "text_too_long", "3600 characters in 1.50 s are 2400 a second"),
        (talk(1.5, 2), "a" * 91, "text_too_long", "over 60"),
    ],
)
def test_what_cannot_be_speech_with_its_text_is_refused(
    tmp_path: Path, waveform: np.ndarray, text: str, reason: str, message: str
) -> None:
    row(tmp_path / "in", "bad", waveform, text)
    row(tmp_path / "in", "good", talk(1.5, 3), "a" * 89)
    assert run(tmp_path / "in", tmp_path / "out").refused == {reason: 1}
    (rejection,) = rejected(tmp_path / "out")
    assert rejection["reason"] == reason
    assert re.search(message, rejection["message"])


def test_every_measure_and_reason_is_documented() -> None:
    text = DATA.read_text(encoding="utf-8")
    for name in (*{limit.name for limit in LIMITS}, *REASONS):
        assert f"`{name}`" in text, name
    for limit in LIMITS:
        assert f"`{limit.name} {limit.sign} {limit.value:g}`" in text, limit


def test_a_clip_that_is_too_long_is_not_kept(tmp_path: Path) -> None:
    clip(tmp_path / "in", "long.wav", 1, seconds=31.0)
    clip(tmp_path / "in", "good.wav", 2, "Two words", seconds=1.0)
    assert run(tmp_path / "in", tmp_path / "out").refused == {"too_long": 1}
