"""The layouts that people have, each as its program writes it, and the tables that do not say what they mean."""

import gc
import json
import os
import re
import subprocess
import sys
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlparse

import pyarrow.parquet
import pytest
from recordings import speech, write

from higgstune.data.importers import hub, read_source
from higgstune.data.manifest import Utterance
from higgstune.data.rejection import RowError
from higgstune.data.source import Source
from higgstune.data.text import spoken_length
from higgstune.errors import ConfigError, DataError

WAVS = ("wavs/1.wav", "wavs/2.wav", "wavs/3.wav")
Row = dict[str, Any]


def make(folder: Path, recordings: tuple[str, ...], files: dict[str, str | bytes]) -> Path:
    for number, name in enumerate(recordings):
        write(folder / name, speech(0.4, seed=number))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(source: Source) -> list[Row | str]:
    """The values of each row without its id, or the reason why it is refused."""
    return [
        row.content.reason
        if isinstance(row.content, RowError)
        else row.content.model_dump(exclude_none=True, exclude={"id"})
        for row in source
    ]


def one(**values: Any) -> Row:
    return {"audio": "wavs/1.wav", "text": "Hello one."} | values


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# Name, recordings, files, the rows.
LAYOUTS: list[tuple[str, tuple[str, ...], dict[str, str | bytes], list[Row | str]]] = [
    (
        "LJSpeech",
        WAVS,
        {"metadata.csv": "1|In 1998 Dr. A.|In nineteen ninety-eight Doctor A.\n2|Two.|Two.\n3|Good 3.|Good three.\n"},
        [
            {"audio": "wavs/1.wav", "text": "In nineteen ninety-eight Doctor A."},
            {"audio": "wavs/2.wav", "text": "Two."},
            {"audio": "wavs/3.wav", "text": "Good three."},
        ],
    ),
    (
        "Piper, one speaker, a pipe in a text",
        WAVS,
        {"metadata.csv": "1|Hello one.\n2|Left|right now.\n3|2024\n"},
        [one(), {"audio": "wavs/2.wav", "text": "Left|right now."}, {"audio": "wavs/3.wav", "text": "2024"}],
    ),
    (
        "Piper, several speakers",
        WAVS,
        {"metadata.csv": "1|anna|Hello one.\n2|ben|Two.\n3|anna|Three.\n"},
        [
            one(speaker="anna"),
            {"audio": "wavs/2.wav", "text": "Two.", "speaker": "ben"},
            {"audio": "wavs/3.wav", "text": "Three.", "speaker": "anna"},
        ],
    ),
    (
        "TensorFlowTTS and StyleTTS2, with letters",
        WAVS,
        {"train.txt": "wavs/1.wav|Hello one.|22\nwavs/2.wav|Two here.|22\nwavs/3.wav|Three.|55\n"},
        [
            one(speaker="22"),
            {"audio": "wavs/2.wav", "text": "Two here.", "speaker": "22"},
            {"audio": "wavs/3.wav", "text": "Three.", "speaker": "55"},
        ],
    ),
    (
        "a table with phonemes",
        WAVS,
        {"metadata.csv": "1|Hello one.|həlˈoʊ wˈʌn\n2|Hello two.|həlˈoʊ tˈuː\n3|Three.|θɹˈiː\n"},
        [one(), {"audio": "wavs/2.wav", "text": "Hello two."}, {"audio": "wavs/3.wav", "text": "Three."}],
    ),
    (
        "F5",
        WAVS,
        {"metadata.csv": "audio_file|text\nwavs/1.wav|Hello one.\nwavs/2.wav|Left|right now.\n"},
        [one(), {"audio": "wavs/2.wav", "text": "Left|right now."}],
    ),
    (
        "GPT-SoVITS from Windows",
        WAVS,
        {"anna.list": "D:\\set\\1.wav|anna|EN|Hello one.\nD:\\set\\2.wav|anna|ZH|2024\nout/3.wav|ben|ja|a|b\n"},
        [
            one(speaker="anna", language="EN"),
            {"audio": "wavs/2.wav", "text": "2024", "speaker": "anna", "language": "ZH"},
            {"audio": "wavs/3.wav", "text": "a|b", "speaker": "ben", "language": "ja"},
        ],
    ),
    (
        "Common Voice, whose quotes are literal",
        ("clips/a.wav", "clips/b.wav"),
        {
            "validated.tsv": "client_id\tpath\tsentence_id\tsentence\tup_votes\tlocale\n"
            '9f\ta.wav\tx\t"Hello," he said.\t2\ten\n8e\tb.wav\ty\t"Whole."\t0\ten\n'
        },
        [
            {"audio": "clips/a.wav", "text": '"Hello," he said.', "speaker": "9f", "language": "en"},
            {"audio": "clips/b.wav", "text": '"Whole."', "speaker": "8e", "language": "en"},
        ],
    ),
    (
        "datasets, a folder per split",
        ("train/0.wav", "test/0.wav"),
        {
            "train/metadata.csv": "file_name,transcription\n0.wav,Hello.\n",
            "test/metadata.csv": "file_name,transcription\n0.wav,Two.\n",
        },
        [{"audio": "0.wav", "text": "Two."}, {"audio": "0.wav", "text": "Hello."}],
    ),
    (
        "Orpheus",
        WAVS,
        {"data.csv": "wav_path,speakerID,text\nwavs/1.wav,a,Hello one.\n"},
        [one(speaker="a")],
    ),
    (
        "DeepSpeech",
        WAVS,
        {"train.csv": "wav_filename,wav_filesize,transcript\nwavs/1.wav,33,Hello one.\n"},
        [one()],
    ),
    (
        "Excel in UTF-16 with TABs",
        WAVS,
        {"metadata.csv": 'file_name\ttext\r\n1.wav\t"Hello ""one""."\r\n'.encode("utf-16")},
        [{"audio": "wavs/1.wav", "text": 'Hello "one".'}],
    ),
    (
        "semicolons, and UTF-32 without a mark",
        WAVS,
        {"metadata.csv": "file_name;text\n1.wav;Hello; one\n".encode("utf-32-le")},
        [{"audio": "wavs/1.wav", "text": "Hello; one"}],
    ),
    *(
        (
            f"JSON lines in {encoding}",
            WAVS,
            {"rows.jsonl": ('{"audio": "wavs/1.wav", "text": "Hello one."}\n').encode(encoding)},
            [one()],
        )
        for encoding in ("utf-8-sig", "utf-16", "utf-16-be", "utf-32")
    ),
    (
        "a list in UTF-16",
        WAVS,
        {"rows.json": '[{"audio": "wavs/1.wav", "text": "Hello one."}]'.encode("utf-16")},
        [one()],
    ),
    (
        "NeMo, as JSON lines named .json",
        WAVS,
        {
            "train.json": lines(
                {"audio_filepath": "wavs/1.wav", "duration": 0.4, "text": "Hello one."},
                {"audio_filepath": "wavs/2.wav", "duration": 0.2, "offset": 0.1, "text": "Two."},
            )
        },
        [one(), {"audio": "wavs/2.wav", "text": "Two.", "start": 0.1, "end": pytest.approx(0.3)}],
    ),
    (
        "Emilia",
        WAVS,
        {"en.jsonl": lines({"id": "E1", "wav": "wavs/1.wav", "text": "Hello one.", "speaker": 7, "dnsmos": 3.1})},
        [one(speaker="7")],
    ),
    (
        "Emilia, a .json beside each recording",
        ("a.wav",),
        {"a.json": json.dumps({"id": "a", "wav": "a.mp3", "text": "Hello.", "speaker": "s", "language": "en"})},
        [{"audio": "a.wav", "text": "Hello.", "speaker": "s", "language": "en"}],
    ),
    (
        "Qwen3-TTS, whose references have no text",
        WAVS,
        {"raw.jsonl": lines({"audio": "wavs/1.wav", "text": "Hello one.", "ref_audio": "wavs/3.wav"})},
        [one()],
    ),
    ("VoxCPM", WAVS, {"v.jsonl": lines({"audio": "wavs/1.wav", "text": "Hello one.", "duration": 0.4})}, [one()]),
    (
        "ms-swift",
        WAVS,
        {
            "s.jsonl": lines(
                {
                    "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "<audio>"}],
                    "audios": ["wavs/1.wav"],
                }
            )
        },
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
                    {"role": "assistant", "content": [{"type": "audio", "url": "wavs/1.wav"}]},
                ]
            }
        ],
    ),
    (
        "a list of objects",
        WAVS,
        {"data.json": json.dumps([{"file": "wavs/1.wav", "transcript": "Hello one."}])},
        [one()],
    ),
    (
        "WhisperX",
        ("a.wav",),
        {
            "a.json": json.dumps(
                {"segments": [{"start": 0, "end": 0.2, "text": " One."}, {"start": 0.2, "end": 0.4, "text": "Two."}]}
            )
        },
        [
            {"audio": "a.wav", "text": "One.", "start": 0.0, "end": 0.2},
            {"audio": "a.wav", "text": "Two.", "start": 0.2, "end": 0.4},
        ],
    ),
    (
        "LibriSpeech",
        ("84/121123/84-121123-0000.flac",),
        {"84/121123/84-121123.trans.txt": "84-121123-0000 HELLO ONE\n84-121123-0001 LOST\n"},
        [{"audio": "84/121123/84-121123-0000.flac", "text": "HELLO ONE", "speaker": "84"}],
    ),
    (
        "LibriTTS",
        ("84/121123/84_121123_000007_000001.wav",),
        {
            "84/121123/84_121123_000007_000001.normalized.txt": "Hello one.",
            "84/121123/84_121123_000007_000001.original.txt": "Hello 1.",
        },
        [{"audio": "84/121123/84_121123_000007_000001.wav", "text": "Hello one.", "speaker": "84"}],
    ),
    (
        "VCTK, two microphones",
        ("wav48/p225/p225_001_mic1.flac", "wav48/p225/p225_001_mic2.flac"),
        {"txt/p225/p225_001.txt": "Please call Stella."},
        [{"audio": "wav48/p225/p225_001_mic1.flac", "text": "Please call Stella.", "speaker": "p225"}],
    ),
    ("texts in another folder", ("wav/1.wav",), {"txt/1.txt": "Hello."}, [{"audio": "wav/1.wav", "text": "Hello."}]),
    ("1.wav.txt", ("1.wav",), {"1.wav.txt": "Hello."}, [{"audio": "1.wav", "text": "Hello."}]),
    (
        "Kaldi, with a command that is not run",
        ("a.wav",),
        {
            "wav.scp": "r1 a.wav\nr2 touch pwned |\n",
            "segments": "u1 r1 0.0 0.3\nu2 r2 0 1\n",
            "text": "u1 hello there\nu2 no\nu3 lost\n",
            "utt2spk": "u1 anna\n",
        },
        [
            {"audio": "a.wav", "text": "hello there", "speaker": "anna", "start": 0.0, "end": 0.3},
            "missing_audio",
            "bad_row",
        ],
    ),
]


@pytest.mark.parametrize(
    ("recordings", "files", "expected"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS]
)
def test_a_layout(
    tmp_path: Path, recordings: tuple[str, ...], files: dict[str, str | bytes], expected: list[Row | str]
) -> None:
    source = read_source(make(tmp_path, recordings, files))
    assert read(source) == expected
    assert source.read_as
    assert not (tmp_path / "pwned").exists()


def test_a_command_of_kaldi_is_refused_as_one(tmp_path: Path) -> None:
    [row] = read_source(make(tmp_path, (), {"wav.scp": "u1 touch pwned |\n", "text": "u1 hello\n"}))
    assert "wav.scp has a command for 'u1', which is not run" in str(row.content)


class Hub(BaseHTTPRequestHandler):
    """What the hub's client needs of the hub for one data set, `owner/files`."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        address = urlparse(self.path)
        if "/resolve/" in address.path:
            self._file(address.path.split("/resolve/")[1].split("/", 1)[1])
        elif "/tree/" in address.path:
            below = Path(*Path(address.path.split("/tree/")[1]).parts[1:])
            every = "recursive=true" in address.query.lower()
            self._json([entry for entry in self._entries() if self._is_listed(Path(entry["path"]), below, every)])
        elif address.path.startswith("/api/datasets/owner/files"):
            siblings = [{"rfilename": name} for name in self.files]
            self._json({"id": "owner/files", "sha": "0" * 40, "siblings": siblings})
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:  # paths-info
        wanted = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self._json([entry for entry in self._entries() if entry["path"] in wanted])

    def _entries(self) -> list[dict[str, Any]]:
        folders = {parent.as_posix() for name in self.files for parent in Path(name).parents} - {"."}
        found = [{"type": "directory", "path": name, "oid": name, "size": 0} for name in sorted(folders)]
        return found + [
            {"type": "file", "path": n, "oid": n, "size": len(content)} for n, content in self.files.items()
        ]

    @staticmethod
    def _is_listed(path: Path, below: Path, every: bool) -> bool:
        return path != below and (below in path.parents if every else path.parent == below)

    def _json(self, found: Any) -> None:
        self._answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        if name not in self.files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content, headers = self.files[name], {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": "0" * 40}
        if (wanted := self.headers.get("Range")) is not None:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            self._answer(206, content[int(first) : end + 1], headers)
        else:
            self._answer(200, content, headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_data_set_at_the_hub_that_is_a_folder_of_files(tmp_path: Path) -> None:
    """Downloaded by the hub's client from a hub on this machine, then read as any folder."""
    pytest.importorskip("datasets")
    folder = make(tmp_path / "files", ("train/1.wav", "test/2.wav"), {})
    table = b"file_name,text\n%b.wav,Hello %b.\n"
    for split, name in (("train", b"1"), ("test", b"2")):
        (folder / split / "metadata.csv").write_bytes(table % (name, name))
    Hub.files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    code = """
from higgstune.data.importers import read_source
from higgstune.errors import DataError
for source in ("hf:owner/files", "hf:owner/files:test"):
    print([(row.content.text, row.path(row.content.audio).is_file()) for row in read_source(source)])
try:
    read_source("hf:owner/files:nowhere")
except DataError as error:
    print(error)
"""
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    env = os.environ | hub | {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[('Hello 1.', True)]",
        "[('Hello 2.', True)]",
        "the data set owner/files has no folder nowhere: name one that it has, or none",
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("1|anna|happy|Hello one.\n2|anna|sad|Two here.\n3|ben|sad|Three.\n", "several columns could be the speaker"),
        ("1|anna\n2|anna\n3|anna\n", "one value stands in all rows"),
        ("1.wav|ðɪs ɪz ɐ tˈɛst|0\n2.wav|ənˈʌðɚ wʌn|0\n3.wav|θɹˈiː|1\n", "looks like phonemes"),
        ("1|Turn left now.|Rechts bitte gehen.\n2|Two here.|Etwas anderes.\n", "several columns could be the text"),
        ("1|Hello one.|Hello one.\n2|Two.\n", "1 rows have 3 columns"),
        ("file_name|ipa\n1.wav|həlˈoʊ\n", "its columns are file_name, ipa; say which"),
        ("1|10|Hello one.\n2|20|Two here.\n3|30|Three.\n", "column 2 has another number in each row"),
    ],
)
def test_a_table_that_does_not_say_what_it_means_is_refused(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_source(make(tmp_path, WAVS, {"metadata.csv": table}))


def test_columns_decide(tmp_path: Path) -> None:
    table = "1|anna|happy|Hello one.\n2|anna|sad|Two here.\n3|ben|sad|Three.\n"
    folder = make(tmp_path, WAVS, {"metadata.csv": table})
    source = read_source(folder, columns="audio,speaker,-,text")
    assert read(source)[0] == one(speaker="anna")
    assert "audio | speaker | - | text" in source.read_as
    make(tmp_path, (), {"metadata.csv": "where;who;words\nwavs/1.wav;anna;Hello one.\n"})
    assert read(read_source(folder, columns="audio=where,text=words,speaker=who")) == [one(speaker="anna")]
    make(tmp_path, (), {"metadata.csv": "", "rows.jsonl": lines({"where": "wavs/1.wav", "words": "Hello one."})})
    assert read(read_source(folder / "rows.jsonl", columns="audio=where,text=words")) == [one()]
    with pytest.raises(DataError, match="its keys are where, words; say which"):
        read_source(folder / "rows.jsonl")
    for columns, message in (
        ("audio,words", "'words' is not one of"),
        ("audio,speaker", "it has no text"),
        ("audio,text,text", "text stands there twice"),
        ("audio=where,text=spoken", "there is no column 'spoken'"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_source(folder / "rows.jsonl", columns=columns)
    with pytest.raises(ConfigError, match="has no effect"):
        read_source(make(tmp_path / "plain", ("a.wav",), {"a.txt": "Hello."}), columns="audio,text")


def test_no_cell_is_dropped_and_a_bad_row_is_alone(tmp_path: Path) -> None:
    table = (
        'file_name,text,speaker\n1.wav,Hello, you,anna\n2.wav,"He said\nhello, there.",ben\n3.wav,"Open,ben\n'
        '1.wav,"He said "hi".",anna\n3.wav,fine,ben\n'
    )
    source = read_source(make(tmp_path, WAVS, {"metadata.csv": table}))
    found = {row.location.partition(":")[2]: row.content for row in source}
    messages = {place: str(content) for place, content in found.items() if isinstance(content, RowError)}
    assert list(found) == ["2", "3", "5", "6", "7"]
    assert "4 cells, and the table has 3 columns" in messages["2"]
    assert "the quote at column 7 is not closed" in messages["5"]
    assert "write it twice" in messages["6"]
    assert isinstance(found["3"], Utterance)
    assert found["3"].text == "He said\nhello, there."


def test_a_text_with_separators_in_the_last_column_is_whole_and_counted(tmp_path: Path) -> None:
    table = "file_name,text\n1.wav,Hello, my friend, how are you?\n2.wav,Two.\n"
    source = read_source(make(tmp_path, WAVS, {"metadata.csv": table}))
    assert read(source)[0] == {"audio": "wavs/1.wav", "text": "Hello, my friend, how are you?"}
    assert list(source.notes()) == [
        ", in a text, which is the last column and was kept whole: 1 rows",
        "recordings that no row names: 1",
    ]


def test_a_recording_is_found_under_another_spelling_where_it_is_the_only_one(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Élodie_été")
    names = ("wavs/1.WAV", f"wavs/{decomposed}.wav", "ben/1.wav", "anna/2.wav", "wavs/3.wma")
    rows = [
        "/home/other/1.wav",
        "C:\\wavs\\Élodie_été.wav",
        "Ben/1.WAV",
        "Anna/2.WAV",
        "Carl/2.wav",
        "wavs\\3.wav",
    ]
    table = "".join(f"{name}|Words of {number}.\n" for number, name in enumerate(rows))
    source = read_source(make(tmp_path, names[:4], {names[4]: b"x", "metadata.csv": table}))
    found = [row.get("audio") if isinstance(row, dict) else row for row in read(source)]
    assert found == ["wavs/1.WAV", names[1], "ben/1.wav", "anna/2.wav", "missing_audio", "unsupported_format"]
    table = "/x/anna/1.wav|Of Anna.\n/x/ben/1.wav|Of Ben.\n"
    refused = read(read_source(make(tmp_path / "b", ("wavs/1.wav",), {"metadata.csv": table})))
    assert refused == ["missing_audio"] * 2
    assert next(iter(source.notes())) == "recordings found under another case, spelling or folder than written: 4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0.0\t0.3\tHello.\n0.3\t0.4\tYou.\n", "Audacity labels"),
        ("WEBVTT\n\n00:00.000 --> 00:00.600\nHello.", "WebVTT"),
        ("1\n00:00:00,000 --> 00:00:01,000\nHello.\n", "subtitles"),
        ("[00:01.00]la la", "lyrics"),
        ('File type = "ooTextFile"\n', "TextGrid"),
        ("0 3000000 sil\n3000000 5000000 hh\n", "HTK"),
        ("{\\rtf1 Hello}", "RTF"),
        ('{"text": "Hello."}', "JSON"),
        ("<speak>Hello</speak>", "markup"),
        ("<b>Hello</b>", "tag"),
        ("Hello \0 there", "NUL"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_a_file_of_another_format_is_not_a_transcript(tmp_path: Path, content: str, message: str) -> None:
    [row] = read_source(make(tmp_path, ("a.wav",), {"a.txt": content}))
    assert isinstance(row.content, RowError)
    assert message in str(row.content)


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("a.srt", True), ("a.VTT", True), ("a.TextGrid", True), ("a.labels.txt", True), ("a.txt", True), ("a.eaf", False)],
)
def test_a_recording_with_cues_is_refused_with_the_verb_that_cuts_it(tmp_path: Path, name: str, cuts: bool) -> None:
    [row] = read_source(make(tmp_path, ("a.wav",), {name: "0.0\t0.3\tHello.\n"}))
    assert isinstance(row.content, RowError)
    folder = "FOLDER" if name == "a.txt" else tmp_path
    assert (f"cut it by its times: higgstune collect {folder} --out DATASET" in str(row.content)) == cuts
    assert "write the words of the clip" in str(row.content)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"Tom &amp; Jerry said\\nhi.", "Tom & Jerry said hi."),
        (b"AT&T, R&D; I <3 you & a < b > c", "AT&T, R&D; I <3 you & a < b > c"),
        ("Hello.".encode("utf-16-le"), "Hello."),
        ("Hello.".encode("utf-16-be"), "Hello."),
        ("Hello.".encode("utf-32"), "Hello."),
        ("Hello.".encode("utf-32-be"), "Hello."),
        (b"10 20 thirty", "10 20 thirty"),
        (b"<SE>[Laughter]</SE> Hello.", "<SE>[Laughter]</SE> Hello."),
    ],
)
def test_a_transcript_is_read_in_its_encoding(tmp_path: Path, content: bytes, text: str) -> None:
    assert read(read_source(make(tmp_path, ("a.wav",), {"a.txt": content}))) == [{"audio": "a.wav", "text": text}]


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "anna/a.txt": "A.",
        "ben/b.txt": "B.",
        "orphan.txt": "C.",
        "x.raw": b"x",
        "x.pdf": b"x",
    }
    source = read_source(make(tmp_path, ("anna/a.wav", "ben/b.wav"), files))
    assert len(read(source)) == 2
    assert list(source.notes()) == [
        "texts without a recording: 1",
        "files of other kinds: 2 (.pdf 1, .raw 1)",
        "names of sub-folders (anna, ben), which are not taken for speakers: prepare each with --speaker",
    ]


def test_a_refused_folder_says_what_it_holds(tmp_path: Path) -> None:
    make(tmp_path, (), {"a.xlsx": b"x", "b.xlsx": b"x"})
    with pytest.raises(DataError, match=r"2 files \*\.xlsx"):
        read_source(tmp_path)
    make(tmp_path, (), {"LJSpeech-1.1/metadata.csv": "1|Hello.\n"})
    with pytest.raises(DataError, match=r"there is a metadata\.csv in .*LJSpeech-1\.1: name that folder"):
        read_source(tmp_path)
    make(tmp_path, (), {"train.tsv": "path\tsentence\n", "test.tsv": "path\tsentence\n"})
    with pytest.raises(DataError, match=r"test\.tsv and train\.tsv: name the one to read"):
        read_source(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_data_set_at_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed by `datasets` from a local folder of the same name: the recordings' bytes are decoded here."""
    datasets = pytest.importorskip("datasets")
    make(tmp_path, ("1.wav",), {})
    features = datasets.Features(
        {
            "audio": datasets.Audio(decode=False),
            "sentence": datasets.Value("string"),
            "speaker": datasets.ClassLabel(names=["anna", "ben"]),
        }
    )
    sound = {"bytes": (tmp_path / "1.wav").read_bytes(), "path": "1.wav"}
    content = [{"audio": sound, "sentence": "Hello one.", "speaker": 1}]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(content, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "owner" / "name" / "train.parquet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    [row] = read_source("hf:owner/name")
    assert isinstance(row.content, Utterance)
    assert (row.content.text, row.content.speaker) == ("Hello one.", "ben")
    assert row.path(row.content.audio or "").read_bytes() == sound["bytes"]
    table = pyarrow.table({"audio": [{"bytes": None, "path": "/etc/hosts"}], "text": ["Hello."]})
    (tmp_path / "owner" / "paths").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "owner" / "paths" / "train.parquet")
    with pytest.raises(DataError, match=r"hf download --repo-type dataset owner/paths"):
        read_source("hf:owner/paths")
    gc.collect()  # of the files that datasets leaves open, where that is not an error
    with pytest.raises(ConfigError, match="is not the name of a data set"):
        read_source("hf:name")
    with pytest.raises(DataError, match="cannot be read"):
        read_source("hf:owner/name:nowhere")


def test_parquet_files_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wavs = make(tmp_path / "wavs", ("1.wav", "2.wav"), {})
    features = datasets.Features({"audio": datasets.Audio(decode=False), "sentence": datasets.Value("string")})
    sounds = [{"bytes": (wavs / f"{n}.wav").read_bytes(), "path": f"{n}.wav"} for n in (1, 2)]
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for split, sound, text in zip(("test", "train"), sounds, ("Hello one.", "Hello two."), strict=True):
        rows = pyarrow.Table.from_pylist([{"audio": sound, "sentence": text}], schema=features.arrow_schema)
        pyarrow.parquet.write_table(rows, folder / f"{split}-00000-of-00001.parquet")
    found = list(read_source(tmp_path / "set"))
    contents = [row.path(row.audio or "").read_bytes() for row in found]
    assert contents == [sound["bytes"] for sound in sounds]
    assert [row["text"] for row in read(found)] == ["Hello one.", "Hello two."]
    [last] = read(read_source(folder / "train-00000-of-00001.parquet"))
    assert last["text"] == "Hello two."
    (tmp_path / "plain").mkdir()
    plain = pyarrow.table({"audio": sounds, "text": ["One.", "Two."], "speaker": ["anna", "ben"]})
    pyarrow.parquet.write_table(plain, tmp_path / "plain" / "rows.parquet")
    assert [row["speaker"] for row in read(read_source(tmp_path / "plain"))] == ["anna", "ben"]
    paths = pyarrow.table({"audio": [{"bytes": None, "path": "/etc/hosts"}], "text": ["Hello."]})
    pyarrow.parquet.write_table(paths, tmp_path / "plain" / "rows.parquet")
    with pytest.raises(DataError, match=r"plain has the paths of its recordings in its rows, not their bytes"):
        read_source(tmp_path / "plain")
    (tmp_path / "plain" / "rows.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match="plain cannot be read"):
        read_source(tmp_path / "plain")
    gc.collect()  # of the files that datasets leaves open, where that is not an error
    monkeypatch.setattr(hub, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'higgstune\[datasets\]'"):
        read_source(tmp_path / "set")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("1|yes|Anna Smith\n2|no|Ben Jones\n3|yes|Cid Black\n", "could be the text or a name"),
        ("1|Hello|anna\n2|Hello|ben\n3|Bye|cid\n4|Bye|dan\n", "could be the text or a name"),
        ("1|Hello there my friend, how are you?|Hello there\n2|We went home.|We went\n", "several columns could be"),
        ("1|3.52\n2|4.1\n", "the text would be a number"),
        ("1|txt/1.txt\n2|txt/2.txt\n", "the text would be a path"),
        ("1|ni3 hao3 peng2 you3\n2|jin1 tian1 xia4 yu3\n", "looks like phonemes"),
        ("file_name,text\n1.wav,HH AH0 L OW1\n2.wav,W ER1 L D\n", "looks like phonemes"),
        ("file_name,start_ms,end_ms,text\n1.wav,0,100,Hello.\n", "look like times"),
    ],
)
def test_what_is_not_certainly_a_transcript_is_refused(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_source(make(tmp_path, WAVS, {"metadata.csv": table}))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("1|Jeg bor på en lille ø ved søen.\n2|Hun købte æbler.\n", {"text": "Jeg bor på en lille ø ved søen."}),
        ("1|Θέλω να πάω στη θάλασσα.\n2|Καλημέρα.\n", {"text": "Θέλω να πάω στη θάλασσα."}),
        ("1|Hello there.|male\n2|We went.|female\n3|Rain.|male\n", {"text": "Hello there."}),
        ("1|Hello there.|22050\n2|We went.|22050\n3|Rain.|22050\n", {"text": "Hello there."}),
        ("1|Hello there.|eng\n2|We went.|eng\n3|Rain.|eng\n", {"text": "Hello there.", "language": "eng"}),
        (
            "1|太郎|やあ元気\n2|花子|今日は雨\n3|太郎|明日行く\n4|花子|おはよう\n",
            {"text": "やあ元気", "speaker": "太郎"},
        ),
        ('"1.wav"\t"Hello there"\n"2.wav"\t"We went"\n', {"text": "Hello there"}),
        ('1.wav\t"Hello there,\nmy friend."\n2.wav\tWe went\n', {"text": "Hello there,\nmy friend."}),
        ("sep=;\nfile_name;text\n1.wav;Hello there\n", {"text": "Hello there"}),
        ("1|hello there\r2|we went\r", {"text": "hello there"}),
        ("file,onset,offset,text\n1.wav,0.1,0.3,Hello\n", {"text": "Hello", "start": 0.1, "end": 0.3}),
    ],
)
def test_labels_languages_and_lines_are_what_they_are(tmp_path: Path, table: str, expected: Row) -> None:
    first = read(read_source(make(tmp_path, WAVS, {"metadata.csv": table})))[0]
    assert first == {"audio": "wavs/1.wav", **expected}


def test_no_recording_is_taken_for_another_rows(tmp_path: Path) -> None:
    table = "file_name,text\nanna/1.wav,Other words.\n1.wav,Hello there.\n"
    assert read(read_source(make(tmp_path / "a", ("1.wav",), {"metadata.csv": table}))) == [
        "missing_audio",
        {"audio": "1.wav", "text": "Hello there."},
    ]
    table = "1|Hello there.\n2|We went.\n"
    source = read_source(make(tmp_path / "b", ("wav/1.wav", "clips/1.mp3", "wav/2.wav"), {"metadata.csv": table}))
    assert read(source) == ["missing_audio", {"audio": "wav/2.wav", "text": "We went."}]


def test_no_text_is_taken_for_another_recordings(tmp_path: Path) -> None:
    source = make(tmp_path / "a", ("anna/1.wav", "ben/1.wav"), {"ben/1.txt": "Ben's words."})
    assert read(read_source(source)) == ["no_transcript", {"audio": "ben/1.wav", "text": "Ben's words."}]
    source = make(tmp_path / "b", ("wav/anna/1.wav", "wav/ben/1.wav"), {"txt/anna/1.txt": "Anna's words."})
    assert read(read_source(source)) == [{"audio": "wav/anna/1.wav", "text": "Anna's words."}, "no_transcript"]
    source = make(tmp_path / "d", ("a/x/1.wav", "b/x/1.wav"), {"b/x/1.txt": "Hers."})
    assert read(read_source(source)) == ["no_transcript", {"audio": "b/x/1.wav", "text": "Hers."}]
    source = make(tmp_path / "c", ("1.wav",), {"1.txt": "Hello.", "durations.csv": "1.wav,3.2\n"})
    assert read(read_source(source)) == [{"audio": "1.wav", "text": "Hello."}]


def test_whisperxs_speakers_are_those_of_their_file(tmp_path: Path) -> None:
    segments = [{"start": 0, "end": 0.2, "text": "One.", "speaker": "SPEAKER_00"}]
    files: dict[str, str | bytes] = {f"{name}.json": json.dumps({"segments": segments}) for name in "ab"}
    rows = read(read_source(make(tmp_path, ("a.wav", "b.wav"), files)))
    assert [row["speaker"] for row in rows if isinstance(row, dict)] == ["a SPEAKER_00", "b SPEAKER_00"]


@pytest.mark.parametrize("name", ["metadata.csv", "list.csv", "text", "train"])
def test_a_link_to_a_list_outside_is_not_followed(tmp_path: Path, name: str) -> None:
    outside = make(tmp_path / "outside", ("1.wav",), {"list.csv": "file_name,text\n1.wav,A secret.\n"})
    (outside / "metadata.csv").write_bytes((outside / "list.csv").read_bytes())
    inside = make(tmp_path / "in", ("1.wav",), {"wav.scp": "1 1.wav\n"} if name == "text" else {})
    (inside / name).symlink_to(outside if name == "train" else outside / "list.csv")
    with pytest.raises(RowError, match="--allow-outside"):
        read_source(inside)


def test_a_fault_of_a_row_refuses_the_row(tmp_path: Path) -> None:
    table = "file_name,start,end,text\n1.wav,0.4,0.1,Hello.\n2.wav,nan,1,Two.\n3.wav,0,0.2,Three.\n"
    found = read(read_source(make(tmp_path / "a", WAVS, {"metadata.csv": table})))
    assert found[:2] == ["bad_row", "bad_row"]
    assert isinstance(found[2], dict)
    row = '{"audio": "wavs/1.wav", "text": "Hello.", "start": 1' + "0" * 400 + ', "duration": 1}\n'
    assert read(read_source(make(tmp_path / "b", WAVS, {"rows.jsonl": row}))) == ["bad_row"]
    rows = '[{"audio": "wavs/1.wav", "text": "One.", "text": "Two."}, {"audio": "wavs/2.wav", "text": "Three."}]'
    found = read(read_source(make(tmp_path / "e", WAVS, {"rows.json": rows})))
    assert found == ["bad_row", {"audio": "wavs/2.wav", "text": "Three."}]
    one = '{"audio": "wavs/1.wav", "text": "One.", "text": "Two."}'
    assert read(read_source(make(tmp_path / "f", WAVS, {"rows.json": f"[{one}]"}) / "rows.json")) == ["bad_row"]
    with pytest.raises(DataError, match=r"rows\.json: the key 'text' occurs twice"):
        read_source(make(tmp_path / "g", WAVS, {"rows.json": one}) / "rows.json")
    inner = '{"role": "user", "role": "system", "content": "Hi."}'
    for number, content in enumerate(
        (
            '[{"audio": "wavs/1.wav", "text": {"a": "One.", "a": "Two."}}]',
            '[{"audio": "wavs/1.wav", "text": ["One.", {"a": "One.", "a": "Two."}]}]',
            f'[{{"messages": [{inner}, {{"role": "assistant", "content": [{{"type": "audio"}}]}}]}}]',
            '{"samples": [{"audio_file": "wavs/1.wav", "transcript": {"a": "One.", "a": "Two."}}]}',
        )
    ):
        (row,) = read_source(make(tmp_path / f"nested{number}", WAVS, {"rows.json": content}) / "rows.json")
        assert re.fullmatch("the key '(a|role)' occurs twice", str(row.content))
    files: dict[str, str | bytes] = {"wav.scp": "u1 a.wav\n", "text": "u1 K\xe4se\nu1 again\n".encode("latin-1")}
    assert read(read_source(make(tmp_path / "c", ("a.wav",), files))) == ["bad_row", "duplicate_id"]
    table = "file_name,text,speaker\n1.wav,nan,anna\n2.wav,Two.,nan\n"
    found = read(read_source(make(tmp_path / "d", WAVS, {"metadata.csv": table})))
    assert found == ["empty_text", {"audio": "wavs/2.wav", "text": "Two."}]


def test_columns_by_place_decide_over_a_header(tmp_path: Path) -> None:
    folder = make(tmp_path, WAVS, {"metadata.csv": "path,text,speaker\n1.wav,anna,Hello one.\n"})
    assert read(read_source(folder, columns="audio,speaker,text")) == [one(speaker="anna")]
    with pytest.raises(ConfigError, match="these are 2 columns, and the table has 3"):
        read_source(folder, columns="audio,text")
    rows = make(tmp_path / "b", WAVS, {"rows.jsonl": lines({"audio": "wavs/1.wav", "text": "Hello."})})
    with pytest.raises(ConfigError, match="keys have no order"):
        read_source(rows / "rows.jsonl", columns="audio,text")


def test_names_in_another_form_and_hidden_folders(tmp_path: Path) -> None:
    name = "é"
    composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    source = make(tmp_path / "a", (f"wav/{decomposed}.wav",), {f"txt/{composed}.txt": "Hello."})
    assert read(read_source(source)) == [{"audio": f"wav/{decomposed}.wav", "text": "Hello."}]
    source = make(tmp_path / "b", ("1.wav",), {".old/1.txt": "Old words.", ".git/x.bin": ""})
    found = read_source(source)
    assert read(found) == ["no_transcript"]
    assert list(found.notes()) == []


def test_one_odd_file_does_not_refuse_the_others(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"a.txt": "A.", "config.json": '{"endpoint": 1}'}
    files["b.json"] = '{"text": "B.", "start_ms": 3}'
    source = make(tmp_path / "a", ("a.wav", "b.wav"), files)
    (source / "README").symlink_to("/etc/hosts")
    assert read(read_source(source)) == [{"audio": "a.wav", "text": "A."}, "no_transcript"]
    files = {f"{name}.json": json.dumps({"id": name, "text": "Hi."}) for name in "12"}
    assert len(read(read_source(make(tmp_path / "b", ("1.WAV", "2.WAV"), files)))) == 2


@pytest.mark.parametrize("text", ["So\nit\nis" + "\n" * 50_000 + "!", " " * 50_000 + "a", "<SE>a" * 20_000])
def test_long_texts_take_no_longer_than_their_length(tmp_path: Path, text: str) -> None:
    assert len(read(read_source(make(tmp_path, ("a.wav",), {"a.txt": text})))) == 1
    assert spoken_length(text) >= 0


@pytest.mark.parametrize("text", ["No\nI\ndo\nso", "1.5 2.5 liters", "Call me at 12:30\nor later", "Null"])
def test_short_and_odd_transcripts_are_words(tmp_path: Path, text: str) -> None:
    assert read(read_source(make(tmp_path / "a", ("a.wav",), {"a.txt": text}))) == [{"audio": "a.wav", "text": text}]
    table = f'file_name,text\n1.wav,"{text}"\n2.wav,Two.\n'
    assert read(read_source(make(tmp_path / "b", WAVS, {"metadata.csv": table})))[0] == one(text=text)
