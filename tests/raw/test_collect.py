"""From raw recordings to a data set: what is kept, separated, refused, and never computed twice."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fake_codec import FakeCodec
from full_disk import largest_file
from raw_recordings import RATE, KnowingAsr, KnowingEars, Talk, make_talk

from higgstune.data.audio import read_audio
from higgstune.data.importers import read_source
from higgstune.data.prepare import prepare
from higgstune.errors import ConfigError, DataError, WorkError
from higgstune.evaluation.judges.base import Transcript
from higgstune.raw import dataset
from higgstune.raw.collect import CollectSummary, collect
from higgstune.raw.dataset import WRITTEN
from higgstune.raw.names import CACHE, EDITS
from higgstune.raw.recipe import CollectRecipe

ONE_VOICE = [("rms", n, 0.7) for n in range(12)]
TWO_VOICES = [(("rms", "hibari")[n % 2], n // 2, 0.4) for n in range(16)]


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    """Twelve sentences of one voice."""
    return make_talk(tmp_path_factory.mktemp("one") / "talk.wav", ONE_VOICE)


@pytest.fixture(scope="module")
def dialogue(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    """Sixteen turns of two voices."""
    return make_talk(tmp_path_factory.mktemp("two") / "dialogue.wav", TWO_VOICES)


def rows(out: Path, name: str = "manifest.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def everyone(out: Path) -> list[dict[str, Any]]:
    return rows(out) + rows(out, "refused.jsonl")


def everything(out: Path) -> dict[str, bytes]:
    """All files of a data set, by name."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and CACHE not in path.parts and path.suffix != ".lock"
    }


def subtitles_of(talk: Talk, error: float, late: float = 0.0) -> str:
    """SubRip, each time wrong by up to `error` seconds, and all of them late; a cue may begin at 0 at the earliest."""
    random, lines = np.random.default_rng(0), []
    for n, said in enumerate(talk.said, 1):
        times = (max(time + late + random.uniform(-error, error), 0.0) for time in (said.start, said.end))
        start, end = (f"00:{int(time // 60):02d}:{time % 60:06.3f}".replace(".", ",") for time in times)
        lines.append(f"{n}\n{start} --> {end}\n{said.text}\n")
    return "\n".join(lines)


def words(text: str) -> list[str]:
    return text.split()


def test_every_word_is_in_the_data_set_once_and_in_order(talk: Talk, tmp_path: Path):
    summary = collect(talk.path, tmp_path / "out", asr=KnowingAsr(talk))
    assert summary.refused == {}
    found = rows(tmp_path / "out")
    assert words(" ".join(row["text"] for row in found)) == words(" ".join(said.text for said in talk.said))
    assert all(3 <= row["segment"]["end"] - row["segment"]["start"] <= 15 for row in found)
    assert {row["language"] for row in found} == {"en"}
    edges = [(said.start, said.end) for said in talk.said]
    for row in found:
        (start, _), (_, end) = row["segment"]["speech"][0], row["segment"]["speech"][-1]
        assert min(abs(start - edge) for edge, _ in edges) < 0.15
        assert min(abs(end - edge) for _, edge in edges) < 0.15


def test_clips_are_what_the_manifest_says(talk: Talk, tmp_path: Path):
    collect(talk.path, tmp_path / "out", asr=KnowingAsr(talk))
    loudness = []
    for row in rows(tmp_path / "out"):
        waveform, rate = read_audio(tmp_path / "out" / row["audio"])
        assert rate == 24_000
        segment = row["segment"]
        assert len(waveform) / rate == pytest.approx(segment["end"] - segment["start"], abs=1e-3)
        assert np.abs(waveform).max() <= 10 ** (-1 / 20)
        loudness.append(row["measures"]["loudness"] + row["measures"]["gain"])
    assert np.mean(loudness) == pytest.approx(-23, abs=0.7)
    source = read_source(tmp_path / "out")
    assert [row.content.text for row in source] == [row["text"] for row in rows(tmp_path / "out")]


def test_two_voices_are_separated(dialogue: Talk, tmp_path: Path):
    collect(dialogue.path, tmp_path / "out", asr=KnowingAsr(dialogue), speaker_model=KnowingEars(dialogue))
    found = rows(tmp_path / "out")
    assert len({row["speaker"] for row in found}) == 2
    for row in found:
        segment = row["segment"]
        inside = {
            said.speaker
            for said in dialogue.said
            if min(said.end, segment["end"]) - max(said.start, segment["start"]) > 0.1
        }
        assert len(inside) == 1


def test_without_a_model_of_voices_nobody_is_named(dialogue: Talk, tmp_path: Path):
    summary = collect(dialogue.path, tmp_path / "out", asr=KnowingAsr(dialogue))
    assert all("speaker" not in row for row in rows(tmp_path / "out"))
    assert summary.models["speakers"] is None


def test_the_same_call_again_computes_nothing_and_changes_nothing(talk: Talk, tmp_path: Path):
    asr, ears, out = KnowingAsr(talk), KnowingEars(talk), tmp_path / "out"
    first = collect(talk.path, out, asr=asr, speaker_model=ears)
    before, clips, spans = everything(out), asr.clips, ears.spans
    assert collect(talk.path, out, asr=asr, speaker_model=ears) == first
    assert everything(out) == before
    assert (asr.clips, ears.spans) == (clips, spans)


def test_a_changed_threshold_computes_nothing_again(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asr, out = KnowingAsr(talk), tmp_path / "out"
    collect(talk.path, out, asr=asr)
    clips = asr.clips
    monkeypatch.setattr("higgstune.raw.speech.SpeechDetector.probabilities", None)
    monkeypatch.setattr("higgstune.raw.utterances.decode", None)
    summary = collect(talk.path, out, asr=asr, recipe=CollectRecipe(min_snr=80))
    assert asr.clips == clips
    assert summary.utterances == 0
    assert set(summary.refused) == {"noise"}


def test_other_cuts_keep_what_was_recognised(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asr, out = KnowingAsr(talk), tmp_path / "out"
    collect(talk.path, out, asr=asr)
    monkeypatch.setattr("higgstune.raw.speech.SpeechDetector.probabilities", None)
    collect(talk.path, out, asr=asr, recipe=CollectRecipe(longest=8))
    assert all(row["segment"]["end"] - row["segment"]["start"] <= 8.01 for row in rows(out))


def test_an_interrupted_call_resumes(tmp_path: Path):
    talk = make_talk(tmp_path / "talk.wav", [("rms", n, 0.7) for n in range(32)])
    whole = collect(talk.path, tmp_path / "whole", asr=(reference := KnowingAsr(talk)))
    out, calls, interrupted = tmp_path / "out", 0, 0
    while True:
        asr = KnowingAsr(talk, dies_at=1)  # at the second stretch of every run
        try:
            resumed = collect(talk.path, out, asr=asr)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            calls += asr.clips
        if asr.clips and calls == reference.clips:
            resumed = collect(talk.path, out, asr=asr)
            break
        assert interrupted < 10
    assert interrupted >= 2
    assert {**vars(resumed), "out": ""} == {**vars(whole), "out": ""}
    assert everything(out).keys() == everything(tmp_path / "whole").keys()
    assert rows(out) == rows(tmp_path / "whole")


def test_shards_and_a_merge_give_the_same(talk: Talk, dialogue: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for one in (talk, dialogue):
        (raw / one.path.name).write_bytes(one.path.read_bytes())
    asr, ears = KnowingAsr(talk, dialogue), KnowingEars(talk, dialogue)
    whole = collect(raw, tmp_path / "whole", asr=asr, speaker_model=ears)
    for number in (1, 2):
        collect(raw, tmp_path / "out", asr=asr, speaker_model=ears, shard=(number, 2))
        assert not (tmp_path / "out" / "manifest.jsonl").exists()
    recognised = asr.clips
    merged = collect(raw, tmp_path / "out", asr=asr, speaker_model=ears)
    assert asr.clips == recognised
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    assert {**vars(merged), "out": ""} == {**vars(whole), "out": ""}
    assert len(merged.speakers) == 2  # the same names in both recordings


def test_a_text_beside_it_comes_before_what_is_recognised(talk: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "talk.wav").write_bytes(talk.path.read_bytes())
    own = " ".join(said.text.upper() for said in talk.said)
    (raw / "talk.txt").write_text("CHAPTER ONE OF MANY MORE CHAPTERS. " + own)
    summary = collect(raw, tmp_path / "out", asr=KnowingAsr(talk))
    found = rows(tmp_path / "out")
    assert " ".join(row["text"] for row in found) == own
    assert all(row["recognised"] != row["text"] for row in found)
    assert any("CHAPTER ONE" in note for note in summary.notes)


def test_subtitles_need_no_asr(talk: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "talk.wav").write_bytes(talk.path.read_bytes())
    (raw / "talk.srt").write_text(subtitles_of(talk, 0.25))
    summary = collect(raw, tmp_path / "out")
    assert summary.moved_texts == 0
    assert words(" ".join(row["text"] for row in rows(tmp_path / "out"))) == words(
        " ".join(said.text for said in talk.said)
    )


def test_speech_that_the_text_lacks_is_flagged(talk: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "talk.wav").write_bytes(talk.path.read_bytes())
    (raw / "talk.txt").write_text(" ".join(said.text for said in talk.said[:6]))
    summary = collect(raw, tmp_path / "out", asr=KnowingAsr(talk))
    assert "not in the text" in summary.flagged
    flagged = [
        row for row in rows(tmp_path / "out") if any(check["what"] == "not in the text" for check in row["history"])
    ]
    assert words(" ".join(row["text"] for row in flagged)) == words(
        " ".join(said.text for said in talk.said if said.start > flagged[0]["segment"]["start"])
    )
    assert set(summary.refused) <= {"text"}  # an utterance with speech of both kinds


@pytest.mark.parametrize("name", ["other.srt", "words.txt", "folder"])
def test_a_text_that_lies_elsewhere_is_used(name: str, talk: Talk, tmp_path: Path):
    said = " ".join(one.text for one in talk.said)
    (tmp_path / "talk.wav").write_bytes(talk.path.read_bytes())
    (tmp_path / "folder").mkdir()
    times = f"00:00:{talk.said[0].start:06.3f} --> 00:00:{talk.said[-1].end:06.3f}"
    (tmp_path / "other.srt").write_text(f"1\n{times}\n{said.upper()}\n")
    (tmp_path / "words.txt").write_text(said.upper())
    (tmp_path / "folder" / "talk.txt").write_text(said.upper())
    collect(tmp_path / "talk.wav", tmp_path / "out", transcripts=tmp_path / name, asr=KnowingAsr(talk))
    found = rows(tmp_path / "out") + rows(tmp_path / "out", "refused.jsonl")
    found.sort(key=lambda row: row["segment"]["start"])
    assert words(" ".join(row["text"] for row in found)) == words(said.upper())


def test_texts_that_cannot_be_meant_are_an_error(talk: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("one.wav", "two.wav"):
        (raw / name).write_bytes(talk.path.read_bytes())
    (tmp_path / "text.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nHello.\n")
    with pytest.raises(ConfigError, match="does not exist: name a text"):
        collect(raw, tmp_path / "out", transcripts=tmp_path / "nothing")
    with pytest.raises(ConfigError, match="one text for 2 recordings"):
        collect(raw, tmp_path / "out", transcripts=tmp_path / "text.srt")


def test_speech_beside_subtitles_of_something_else_is_flagged(talk: Talk, tmp_path: Path):
    (tmp_path / "talk.wav").write_bytes(talk.path.read_bytes())
    (tmp_path / "talk.srt").write_text("1\n01:00:00,000 --> 01:00:02,000\nWords of another film.\n")
    summary = collect(tmp_path / "talk.wav", tmp_path / "out", asr=KnowingAsr(talk))
    assert summary.flagged["not in the text"] == summary.utterances > 0
    assert "talk.wav: not spoken: Words of another film." in summary.notes


def test_a_wrong_text_is_refused_with_both_texts(talk: Talk, tmp_path: Path):
    class Deaf(KnowingAsr):
        def _text(self, waveform: np.ndarray) -> str:
            return "this is something else entirely"

    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "talk.wav").write_bytes(talk.path.read_bytes())
    cues = [f"{s.start:.2f}\t{s.end:.2f}\t{s.text}" for s in talk.said]
    (raw / "talk.txt").write_text("\n".join(cues))
    summary = collect(raw, tmp_path / "out", asr=Deaf(talk))
    assert summary.utterances == 0
    assert set(summary.refused) == {"text"}
    assert {row["recognised"] for row in rows(tmp_path / "out", "refused.jsonl")} == {"this is something else entirely"}


def test_a_cut_that_lost_a_word_is_undone(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class HearsMore(KnowingAsr):
        def _text(self, waveform: np.ndarray) -> str:
            return " and ".join(super()._text(waveform).split(". ")) if self.more else super()._text(waveform)

        more = False

    monkeypatch.setattr("higgstune.raw.utterances.is_suspicious", lambda one, other, levels: True)
    cut = CollectRecipe(longest=8)
    asr = HearsMore(talk)
    collect(talk.path, tmp_path / "one", asr=asr, recipe=cut)
    HearsMore.more = True
    collect(talk.path, tmp_path / "other", asr=HearsMore(talk), recipe=cut)
    kept, undone = rows(tmp_path / "one"), rows(tmp_path / "other")
    assert all(row["segment"]["end"] - row["segment"]["start"] <= 8.01 for row in kept)
    assert len(undone) < len(kept)
    assert words(" ".join(row["text"] for row in kept)) == words(" ".join(said.text for said in talk.said))


def test_a_persons_decisions_come_first(talk: Talk, tmp_path: Path):
    out, asr = tmp_path / "out", KnowingAsr(talk)
    collect(talk.path, out, asr=asr)
    first, second = rows(out)[:2]
    edits = [{"id": first["id"], "keep": False}, {"id": second["id"], "text": "Mine.", "speaker": "Anna"}]
    (out / EDITS).write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    clips = asr.clips
    summary = collect(talk.path, out, asr=asr, recipe=CollectRecipe(rate_deviations=1000))
    assert asr.clips == clips
    assert summary.refused == {"dropped": 1}
    assert not (out / first["audio"]).exists()
    changed = next(row for row in rows(out) if row["id"] == second["id"])
    assert (changed["text"], changed["speaker"]) == ("Mine.", "Anna")


def test_validation_is_the_end_of_a_single_recording(talk: Talk, tmp_path: Path):
    collect(talk.path, tmp_path / "out", asr=KnowingAsr(talk), recipe=CollectRecipe(validation=0.2))
    held_out = [row["held_out"] for row in rows(tmp_path / "out")]
    assert held_out == sorted(held_out)  # train first
    assert 1 <= sum(held_out) <= len(held_out) / 2
    summary = prepare(tmp_path / "out", tmp_path / "store", codec=FakeCodec())
    assert summary.rows == {"train": held_out.count(False), "validation": held_out.count(True)}


def test_without_copies_the_manifest_names_the_originals(talk: Talk, tmp_path: Path):
    collect(talk.path, tmp_path / "out", asr=KnowingAsr(talk), copy=False)
    assert not (tmp_path / "out" / "clips").exists()
    row = rows(tmp_path / "out")[0]
    assert not any(row["held_out"] for row in rows(tmp_path / "out"))  # a recording is in one split
    assert (tmp_path / "out" / row["audio"]).resolve() == talk.path.resolve()
    assert row["end"] - row["start"] > 3


def test_bad_recordings_are_named_and_the_good_ones_kept(talk: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    (raw / "deep" / "er").mkdir(parents=True)
    (raw / "deep" / "er" / "good one.wav").write_bytes(talk.path.read_bytes())
    (raw / "text.wav").write_text("this is not audio")
    (raw / "music.wma").write_bytes(b"0" * 100)
    (raw / "loop").symlink_to(raw)
    (raw / "outside.wav").symlink_to(talk.path)
    (raw / "gone.wav").symlink_to(raw / "nothing.wav")
    soundfile.write(raw / "silent.wav", np.zeros(5 * RATE), RATE)
    soundfile.write(raw / "empty.wav", np.zeros(0), RATE)
    soundfile.write(raw / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    summary = collect(raw, tmp_path / "out", asr=KnowingAsr(talk))
    assert set(summary.unreadable) == {"text.wav", "music.wma", "outside.wav", "gone.wav", "empty.wav", "nan.wav"}
    assert "ffmpeg" in summary.unreadable["music.wma"]
    assert summary.recordings == 2
    assert summary.notes == ["silent.wav: no speech is found in it"]
    assert {row["segment"]["recording"] for row in rows(tmp_path / "out")} == {"deep/er/good one.wav"}
    assert len({row["id"] for row in rows(tmp_path / "out")}) == summary.utterances


def test_recordings_never_share_an_id_whatever_their_names(talk: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    one = next(said for said in talk.said[:2] if said.end - said.start > 1)
    names = ["a/b.wav", "c.wav", "a_b.wav", "a+b.wav", "c.flac", "c_wav.wav", f"{'long/' * 60}long.wav"]
    first: dict[str, str] = {}
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(raw / name, talk.samples[: round((one.end + 0.4) * RATE)], RATE)
        Path(f"{raw / name}.srt").write_text(f"1\n00:00:00,500 --> 00:00:{one.end:06.3f}\nthis is {name[-9:]}\n")
        if name == "c.wav":
            collect(raw, tmp_path / "out")
            first = {row["id"]: row["segment"]["recording"] for row in everyone(tmp_path / "out")}
    collect(raw, tmp_path / "out")
    found = everyone(tmp_path / "out")
    assert len(first) == 2
    assert first.items() <= {row["id"]: row["segment"]["recording"] for row in found}.items()  # others change no id
    assert {row["segment"]["recording"] for row in found} == set(names)
    assert len({row["id"] for row in found}) == len(names)
    assert all(row["text"] == f"this is {row['segment']['recording'][-9:]}" for row in found)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_name_that_is_not_utf8_is_refused(talk: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "good.wav").write_bytes(talk.path.read_bytes())
    Path(os.fsdecode(os.fsencode(raw) + b"/bad\xff.wav")).write_bytes(talk.path.read_bytes())
    summary = collect(raw, tmp_path / "out", asr=KnowingAsr(talk))
    assert summary.unreadable == {"bad\\xff.wav": "its path is not UTF-8: rename it"}
    assert summary.utterances


def test_a_truncated_recording_is_used_up_to_its_end(talk: Talk, tmp_path: Path):
    last = talk.said[7]
    seconds = (last.start + last.end) / 2
    cut = tmp_path / "cut.wav"
    cut.write_bytes(talk.path.read_bytes()[: 44 + 2 * round(seconds * RATE)])
    summary = collect(cut, tmp_path / "out", asr=KnowingAsr(talk))
    assert summary.utterances
    assert any("cut off" in note for note in summary.notes)
    [refused] = rows(tmp_path / "out", "refused.jsonl")
    assert refused["reason"] == "cut off"
    assert refused["segment"]["end"] == pytest.approx(seconds, abs=0.01)
    assert all(row["segment"]["end"] < last.start + 0.1 for row in rows(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speakers": 0}, "at least one speaks"),
        ({"speakers": 2}, "needs a --speaker-model"),
        ({"recipe": "nothing.yaml"}, "cannot be read"),
    ],
)
def test_wrong_options_say_what_to_do(talk: Talk, tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        collect(talk.path, tmp_path / "out", **options)


def test_an_unknown_setting_names_the_nearest(tmp_path: Path, talk: Talk):
    (tmp_path / "r.yaml").write_text("longst: 12\n")
    with pytest.raises(ConfigError, match="longest"):
        collect(talk.path, tmp_path / "out", recipe=tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("longest: 2", r"shortest \(3 s\) must be below longest \(2 s\)"),
        ("max_seconds: 0.5", r"min_seconds \(1 s\) must be below max_seconds \(0.5 s\)"),
    ],
)
def test_settings_that_do_not_fit_say_so_in_plain_words(setting: str, message: str, tmp_path: Path, talk: Talk):
    (tmp_path / "r.yaml").write_text(setting)
    with pytest.raises(ConfigError, match=rf"r.yaml:\n  {message}$"):
        collect(talk.path, tmp_path / "out", recipe=tmp_path / "r.yaml")


def test_a_folder_without_recordings_is_an_error(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="holds no recording"):
        collect(tmp_path / "raw", tmp_path / "out")


def test_a_data_set_never_holds_its_recordings(talk: Talk, tmp_path: Path):
    with pytest.raises(ConfigError, match="its own folder"):
        collect(talk.path, talk.path.parent)
    assert isinstance(collect(talk.path, tmp_path / "out", asr=KnowingAsr(talk)), CollectSummary)


def test_cuts_and_joins_are_measured_and_recognised(talk: Talk, tmp_path: Path):
    out, asr = tmp_path / "out", KnowingAsr(talk)
    collect(talk.path, out, asr=asr, recipe=CollectRecipe(rate_deviations=1000))
    first, second, third = rows(out)[:3]
    pauses = [b["speech"][0][0] + a["speech"][-1][1] for a, b in [(first["segment"], second["segment"])]]
    assert pauses
    inner = [(a[1], b[0]) for a, b in zip(third["segment"]["speech"], third["segment"]["speech"][1:], strict=False)]
    start, end = max(inner, key=lambda pause: pause[1] - pause[0])
    edits = [{"id": first["id"], "join": second["id"]}, {"id": third["id"], "cut": [(start + end) / 2]}]
    (out / EDITS).write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    collect(talk.path, out, asr=asr, recipe=CollectRecipe(rate_deviations=1000))
    found = [*rows(out), *rows(out, "refused.jsonl")]
    joined = next(row for row in found if row["id"] == first["id"])
    assert joined["segment"]["end"] == second["segment"]["end"]
    assert words(joined["recognised"]) == words(f"{first['recognised']} {second['recognised']}")
    pieces = [row for row in found if third["segment"]["start"] <= row["segment"]["start"] < third["segment"]["end"]]
    assert len(pieces) == 2
    assert words(" ".join(row["recognised"] for row in sorted(pieces, key=lambda row: row["id"]))) == words(
        third["recognised"]
    )
    clips = asr.clips
    collect(talk.path, out, asr=asr, recipe=CollectRecipe(rate_deviations=1000))
    assert asr.clips == clips


def test_a_changed_table_is_applied(talk: Talk, tmp_path: Path):
    out, asr = tmp_path / "out", KnowingAsr(talk)
    collect(talk.path, out, asr=asr)
    table = (out / "review.csv").read_text(encoding="utf-8-sig")
    name = rows(out)[0]["id"]
    line = next(line for line in table.splitlines() if line.startswith(name))
    changed = tmp_path / "changed.csv"
    changed.write_text(table.replace(line, line.replace(f"{name},yes", f"{name},no")), encoding="utf-8-sig")
    summary = collect(talk.path, out, asr=asr, apply=changed)
    assert summary.refused == {"dropped": 1}
    assert collect(talk.path, out, asr=asr).refused == {"dropped": 1}


def test_a_full_disk_says_what_to_do_and_loses_nothing(talk: Talk, tmp_path: Path):
    with largest_file(100_000), pytest.raises(WorkError, match=r"full\.f32 cannot be written.*is kept.*run it again"):
        collect(talk.path, tmp_path / "out", asr=KnowingAsr(talk))
    assert not list((tmp_path / "out").rglob("*.f32"))
    assert collect(talk.path, tmp_path / "out", asr=KnowingAsr(talk)).utterances


def test_no_decision_changes_another_clip_or_its_split(talk: Talk, tmp_path: Path):
    out, recipe = tmp_path / "out", CollectRecipe(rate_deviations=1000, validation=0.2)
    asr = KnowingAsr(talk)
    collect(talk.path, out, asr=asr, recipe=recipe)
    before, clips = rows(out), {path.name: path.read_bytes() for path in (out / "clips").iterdir()}
    loudest = max(before, key=lambda row: row["measures"]["loudness"])
    edits = [{"id": loudest["id"], "keep": False}, {"id": before[-1]["id"], "text": "Mine."}]
    (out / EDITS).write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    collect(talk.path, out, asr=asr, recipe=recipe)
    after = rows(out)
    assert len(after) == len(before) - 1
    splits = {row["id"]: row["held_out"] for row in before}
    assert all(row["held_out"] == splits[row["id"]] for row in after)
    for row in after:
        name = Path(row["audio"]).name
        assert (out / "clips" / name).read_bytes() == clips[name]


def test_of_two_copies_the_one_with_a_given_text_is_kept(talk: Talk, tmp_path: Path):
    raw = tmp_path / "raw"
    for name in ("a", "b"):
        (raw / name).mkdir(parents=True)
        (raw / name / "talk.wav").write_bytes(talk.path.read_bytes())
    labels = [f"{said.start:.2f}\t{said.end:.2f}\t{said.text}" for said in talk.said]
    (raw / "b" / "talk.txt").write_text("\n".join(labels))
    summary = collect(raw, tmp_path / "out", asr=KnowingAsr(talk))
    assert summary.refused["duplicate"] == summary.utterances
    assert {row["segment"]["recording"] for row in rows(tmp_path / "out")} == {"b/talk.wav"}


@pytest.mark.parametrize("late", [1.0, -0.4, 6.0])
def test_subtitles_that_are_late_throughout_are_moved(talk: Talk, tmp_path: Path, late: float):
    (tmp_path / "talk.wav").write_bytes(talk.path.read_bytes())
    (tmp_path / "talk.srt").write_text(subtitles_of(talk, 0.1, late))
    summary = collect(tmp_path / "talk.wav", tmp_path / "out")
    found = rows(tmp_path / "out")
    assert words(" ".join(row["text"] for row in found)) == words(" ".join(said.text for said in talk.said))
    for row in found:  # no text is beside its neighbour's speech
        first = next(said for said in talk.said if row["text"].startswith(said.text))
        assert row["segment"]["speech"][0][0] == pytest.approx(first.start, abs=0.15)
        [check] = [check for check in row["history"] if check["what"] == "text times"]
        assert check["value"] == pytest.approx(late, abs=0.1)
    assert summary.moved_texts == 1
    assert summary.flagged == {}
    word = "late" if late > 0 else "early"
    assert any(re.search(rf"talk.wav: the times of its text are [0-9.]+ s {word}", note) for note in summary.notes)


def test_unsure_words_are_flagged(talk: Talk, tmp_path: Path):
    class Unsure(KnowingAsr):
        def transcribe_clips(self, waveforms: Any, language: str | None = None) -> list[Transcript]:
            return [Transcript(one.text, -0.9) for one in super().transcribe_clips(waveforms, language)]

    summary = collect(talk.path, tmp_path / "out", asr=Unsure(talk))
    assert summary.flagged["unsure"] == summary.utterances > 0


@pytest.mark.parametrize("content", ["", "1\n00:00:09,000 --> 00:00:01,000\nBackwards.\n", "no times at all\n"])
def test_a_broken_text_is_named_and_the_speech_kept(talk: Talk, tmp_path: Path, content: str):
    (tmp_path / "talk.wav").write_bytes(talk.path.read_bytes())
    (tmp_path / "talk.srt").write_text(content)
    summary = collect(tmp_path / "talk.wav", tmp_path / "out", asr=KnowingAsr(talk))
    assert words(" ".join(row["text"] for row in rows(tmp_path / "out"))) == words(
        " ".join(said.text for said in talk.said)
    )
    assert any("talk.srt" in note for note in summary.notes)
    assert summary.flagged == {}


def test_samples_that_are_not_finite_are_silence_and_counted(talk: Talk, tmp_path: Path):
    samples = talk.samples.copy()
    samples[100:103] = [np.nan, np.inf, -np.inf]
    soundfile.write(tmp_path / "talk.wav", samples, RATE, subtype="FLOAT")
    summary = collect(tmp_path / "talk.wav", tmp_path / "out", asr=KnowingAsr(talk))
    assert summary.utterances
    assert "talk.wav: samples that are not finite, and silence here: 3" in summary.notes


def test_channels_that_cancel_are_named(talk: Talk, tmp_path: Path):
    soundfile.write(tmp_path / "talk.wav", np.stack([talk.samples, -talk.samples], axis=1), RATE, subtype="FLOAT")
    summary = collect(tmp_path / "talk.wav", tmp_path / "out", asr=KnowingAsr(talk))
    assert "cancel each other" in summary.unreadable["talk.wav"]


def test_what_was_written_is_appended_and_survives_a_kill(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw, out, asr = tmp_path / "raw", tmp_path / "out", KnowingAsr(talk)
    raw.mkdir()
    for first in (0, 4, 8):
        start, end = talk.said[first].start - 0.4, talk.said[first + 3].end + 0.4
        soundfile.write(raw / f"{first}.wav", talk.samples[round(start * RATE) : round(end * RATE)], RATE)
    state, written = out / CACHE / WRITTEN, []
    real_file, real_clip = dataset.write_file, dataset._write_clip
    monkeypatch.setattr(dataset, "write_file", lambda path, text: (written.append(path), real_file(path, text)))

    def stop_at(number: int, *clip: Any) -> None:
        if len(list((out / "clips").iterdir())) == number:
            raise KeyboardInterrupt
        real_clip(*clip)

    monkeypatch.setattr(dataset, "_write_clip", lambda *clip: stop_at(2, *clip))
    with pytest.raises(KeyboardInterrupt):
        collect(raw, out, asr=asr)
    two = {path: path.stat().st_mtime_ns for path in (out / "clips").iterdir()}
    with open(state, "a") as file:
        file.write('{"8.wav-0000')  # as a kill leaves it
    monkeypatch.setattr(dataset, "_write_clip", real_clip)
    written.clear()
    assert collect(raw, out, asr=asr).utterances == len(list((out / "clips").iterdir())) > 2
    assert len(two) == 2
    assert {path: path.stat().st_mtime_ns for path in two} == two
    assert written.count(state) == 2  # not once for each recording
    assert len(state.read_text().splitlines()) == len(list((out / "clips").iterdir()))


def test_clips_of_an_earlier_call_go_where_none_are_copied(talk: Talk, tmp_path: Path):
    out, asr = tmp_path / "out", KnowingAsr(talk)
    collect(talk.path, out, asr=asr)
    assert any((out / "clips").iterdir())
    collect(talk.path, out, asr=asr, copy=False)
    assert not any((out / "clips").iterdir())


def test_a_table_is_checked_before_anything_is_done(talk: Talk, tmp_path: Path):
    with pytest.raises(DataError):
        collect(talk.path, tmp_path / "out", asr=(asr := KnowingAsr(talk)), apply=tmp_path / "nothing.csv")
    assert not asr.clips
