"""Every kind of source, and the errors for those that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
from recordings import clip, speech, write

from higgstune.data.importers import read_source
from higgstune.data.manifest import Utterance
from higgstune.data.rejection import RowError
from higgstune.data.source import SourceRow
from higgstune.errors import DataError

SPEECH = Path(__file__).parents[3] / "shared" / "speech"


def rows(source: Path) -> dict[str, SourceRow]:
    return {row.location: row for row in read_source(source)}


def values(row: SourceRow) -> dict[str, Any]:
    assert isinstance(row.content, Utterance), row.content
    return row.content.model_dump(exclude_none=True)


def refused(row: SourceRow) -> str:
    assert isinstance(row.content, RowError), row.content
    return row.content.reason


def test_a_folder_with_transcripts(tmp_path: Path) -> None:
    clip(tmp_path, "b.flac", 1, "Second.")
    clip(tmp_path, "sub/a.WAV", 2, "\ufeffFirst.\n")
    (tmp_path / "c.lab").write_text("third", encoding="utf-8")
    write(tmp_path / "c.mp3", speech(0.5))
    write(tmp_path / "mute.wav", speech(0.5))
    (tmp_path / "video.wma").write_bytes(b"x")
    (tmp_path / "utf16.txt").write_text("Wide.", encoding="utf-16")
    write(tmp_path / "utf16.wav", speech(0.5))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    write(tmp_path / "latin.wav", speech(0.5))
    clip(tmp_path, ".hidden/x.wav", 3)
    write(tmp_path / "._b.wav", speech(0.5))
    (tmp_path / "notes.md").write_text("not a transcript")
    found = rows(tmp_path)
    assert list(found) == ["b.flac", "c.mp3", "latin.wav", "mute.wav", "utf16.wav", "video.wma", "sub/a.WAV"]
    assert values(found["b.flac"]) == {"audio": "b.flac", "text": "Second."}
    assert values(found["c.mp3"])["text"] == "third"
    assert values(found["sub/a.WAV"]) == {"audio": "sub/a.WAV", "text": "First.\n"}
    assert values(found["utf16.wav"])["text"] == "Wide."
    assert refused(found["mute.wav"]) == refused(found["latin.wav"]) == "no_transcript"
    assert refused(found["video.wma"]) == "unsupported_format"
    assert found["mute.wav"].audio == "mute.wav"


def test_a_link_to_its_own_folder_is_followed_once(tmp_path: Path) -> None:
    clip(tmp_path / "in", "a.wav", 1)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert list(rows(tmp_path / "in")) == ["a.wav"]


@pytest.mark.parametrize("given", ["folder", "table"])
def test_ljspeech(tmp_path: Path, given: str) -> None:
    for name in ("LJ1.wav", "LJ2.flac", "LJ3.wav", "LJ4.wav"):
        write(tmp_path / "wavs" / name, speech(0.4))
    (tmp_path / "metadata.csv").write_text(
        'LJ1|Dr. A|Doctor A\nLJ2|Only text\r\n\nLJ3|Raw "quoted|\nLJ9|Missing|Missing\nLJ4\nLJ4|a|b|c|d\nLJ4|a|b|c\n',
        encoding="utf-8",
    )
    found = rows(tmp_path if given == "folder" else tmp_path / "metadata.csv")
    assert values(found["metadata.csv:1"]) == {"audio": "wavs/LJ1.wav", "text": "Doctor A", "id": "LJ1"}
    assert values(found["metadata.csv:2"]) == {"audio": "wavs/LJ2.flac", "text": "Only text", "id": "LJ2"}
    assert values(found["metadata.csv:4"])["text"] == 'Raw "quoted'
    assert refused(found["metadata.csv:5"]) == "missing_audio"
    assert found["metadata.csv:5"].id == "LJ9"
    assert [refused(found[f"metadata.csv:{n}"]) for n in (6, 7, 8)] == ["bad_row"] * 3


def test_a_table_with_a_speaker_and_a_score(tmp_path: Path) -> None:
    write(tmp_path / "wavs" / "a.flac", speech(0.4))
    (tmp_path / "metadata.csv").write_text("a|84|Some words|0.03\n", encoding="utf-8")
    assert values(rows(tmp_path)["metadata.csv:1"]) == {
        "audio": "wavs/a.flac",
        "text": "Some words",
        "id": "a",
        "speaker": "84",
    }


@pytest.mark.parametrize(
    "table",
    [
        "id|speaker|text|disagreement\na|84|Some words|0.03\n",
        "speaker,file_name,transcription\n84,wavs/a.flac,Some words\n",
        'file_name,text,speaker\nwavs/a.flac,"Some\nwords",84\n',
        "ID | Text | Normalised text | Speaker\na | x | Some words | 84\n",
    ],
)
def test_tables_with_a_header(tmp_path: Path, table: str) -> None:
    write(tmp_path / "wavs" / "a.flac", speech(0.4))
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8")
    (row,) = rows(tmp_path).values()
    assert values(row)["audio"] == "wavs/a.flac"
    assert values(row)["text"].split() == ["Some", "words"]
    assert values(row)["speaker"] == "84"


@pytest.mark.parametrize("content", [b"", b"\n\n", b",", b"id|text\n", b"just,some,numbers\n1,2,3\n"])
def test_files_that_are_not_tables(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"metadata\.csv"):
        rows(tmp_path)


def test_a_table_that_is_not_utf8_loses_those_lines_only(tmp_path: Path) -> None:
    write(tmp_path / "wavs" / "a.wav", speech(0.4))
    (tmp_path / "metadata.csv").write_bytes(b"a|caf\xe9|caf\xe9\na|fine|fine\n")
    found = rows(tmp_path)
    assert refused(found["metadata.csv:1"]) == "bad_row"
    assert values(found["metadata.csv:2"])["text"] == "fine"


@pytest.mark.parametrize("name", ["manifest.jsonl", "metadata.jsonl"])
def test_a_manifest_or_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.wav", speech(0.4))
    (tmp_path / name).write_text('{"audio": "a.wav", "text": "A."}\nbroken\n', encoding="utf-8")
    for source in (tmp_path, tmp_path / name):
        found = rows(source)
        assert values(found[f"{name}:1"]) == {"audio": "a.wav", "text": "A."}
        assert refused(found[f"{name}:2"]) == "bad_row"
        assert found[f"{name}:1"].folder == tmp_path


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_a_chatml_list(tmp_path: Path) -> None:
    target = {"type": "audio", "audio_url": "t.wav", "raw_audio": None, "duration": None}
    turns = [
        {"role": "system", "content": "Generate audio following instruction."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": [target]},
    ]
    path = write_json(
        tmp_path / "train.json",
        [
            {"messages": turns, "start_index": 2.0, "speaker": 7, "misc": {"language": "en"}, "source": "x"},
            {
                "messages": turns,
                "start_index": float("nan"),
                "speaker": float("nan"),
                "misc": {"speaker": "bob"},
            },
            {"messages": turns[:2]},
            {"messages": turns, "startindex": 1},
            "hello",
            {"speaker": "no messages"},
        ],
    )
    found = rows(path)
    first = values(found["train.json[0]"])
    assert (first["start_index"], first["speaker"], first["language"]) == (2, "7", "en")
    assert first["messages"][2]["content"] == [{"type": "audio", "url": "t.wav"}]
    second = values(found["train.json[1]"])
    assert ("start_index" in second, second["speaker"]) == (False, "bob")
    reasons = [refused(found[f"train.json[{n}]"]) for n in range(2, 6)]
    assert reasons == ["no_target", "bad_row", "bad_row", "bad_row"]


SAMPLE = {
    "id": "huo_000",
    "audio_file": "huo_000.wav",
    "transcript_file": "huo_000.txt",
    "duration": 3.86,
    "speaker_id": "huo_speaker",
    "speaker_name": "Huo",
    "scene": "quiet_room",
    "emotion": "alerting",
    "language": "zh",
    "gender": "unknown",
    "quality_score": 1.0,
    "original_audio_path": "original.wav",
    "user_instruction": "<audio> /translate",
    "task_type": "audio_generation",
}


@pytest.fixture
def trainer_folder(tmp_path: Path) -> Path:
    (tmp_path / "huo_000.txt").write_text("你好。\n", encoding="utf-8")
    reference = {"ref_audio_file": "ref.wav", "ref_transcript": "The reference."}
    speakers = [{"speaker_tag": f"[SPEAKER{n}]", "speaker_id": "x", **reference} for n in range(2)]
    samples = [
        SAMPLE,
        SAMPLE | {"id": 5, "task_type": "zero_shot_voice_cloning", "scene": "In a hall.", **reference},
        SAMPLE | {"id": "multi", "ref_speakers": speakers, "num_ref_speakers": 2},
        SAMPLE | {"transcript_file": "none.txt"},
        SAMPLE | {"audio_flie": "typo"},
        {"id": "empty"},
        SAMPLE | {"speaker_id": "unknown_speaker", "speaker_name": "Unknown", "snr": 12, "transcript": "Inline"},
    ]
    write_json(tmp_path / "metadata.json", {"dataset_info": {"total_samples": 7}, "samples": samples})
    return tmp_path


def test_metadata_json_with_samples(trainer_folder: Path) -> None:
    found = rows(trainer_folder)
    assert values(found["metadata.json:samples[0]"]) == {
        "id": "huo_000",
        "audio": "huo_000.wav",
        "text": "你好。\n",
        "speaker": "huo_speaker",
        "language": "zh",
        "scene": "Audio is recorded from quiet room.",
    }
    cloned = values(found["metadata.json:samples[1]"])
    assert (cloned["reference_audio"], cloned["reference_text"]) == ("ref.wav", "The reference.")
    assert (cloned["id"], cloned["scene"]) == ("5", "In a hall.")
    inline = values(found["metadata.json:samples[6]"])
    assert ("speaker" in inline, inline["text"]) == (False, "Inline")
    reasons = [refused(found[f"metadata.json:samples[{n}]"]) for n in (3, 4, 5)]
    assert reasons == ["no_transcript", "bad_row", "no_transcript"]


def test_reference_speakers_become_turns(trainer_folder: Path) -> None:
    messages = values(rows(trainer_folder)["metadata.json:samples[2]"])["messages"]
    assert [message["role"] for message in messages] == ["system", "scene", *["user", "assistant"] * 3]
    assert messages[2]["content"][0]["text"] == "[SPEAKER0] The reference."
    assert messages[-1]["content"] == [{"type": "audio", "url": "huo_000.wav"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"a": 1}', "unknown kind"),
        ("a.json", "[]", "unknown kind"),
        ("a.json", '{"samples": []}', "has no samples"),
        ("a.jsonl", "", "has no row"),
        ("a.wav", "", "unknown kind"),
        ("a.parquet", "", "cannot be read: Parquet file size is 0 bytes"),
    ],
)
def test_files_that_are_not_sources(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        rows(tmp_path / name)


def test_folders_that_are_not_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        rows(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no recording and no manifest(.|\n)*LJSpeech"):
        rows(tmp_path)
    (tmp_path / "metadata.csv").write_text("a|b")
    (tmp_path / "manifest.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.jsonl and metadata\.csv: name the one"):
        rows(tmp_path)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(DataError, match="is a code store"):
        rows(tmp_path)


@pytest.mark.skipif(not SPEECH.is_dir(), reason=f"the real recordings are missing: {SPEECH.name}")
@pytest.mark.parametrize(("name", "count"), [("ljspeech", 35), ("librivox_austen", 5), ("librispeech", 100)])
def test_real_speech_is_imported_whole(name: str, count: int) -> None:
    found = list(read_source(SPEECH / name))
    assert len(found) == count
    assert all(isinstance(row.content, Utterance) for row in found)
    speakers = {values(row).get("speaker") for row in found}
    assert len(speakers) == {"librispeech": 55}.get(name, 1)
