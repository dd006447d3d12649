"""The code store: opened by row, by other software, and refused where it is damaged."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recordings import CountingCodec, clip, speech, write
from tiny_checkpoint import tiny_prompter

from higgstune.batch.dataset import RowExamples
from higgstune.data.audio import resample
from higgstune.data.entry import stored_entries
from higgstune.data.prepare import prepare
from higgstune.data.store import CodeStore
from higgstune.errors import CheckpointError, DataError

TURNS = [
    {"role": "system", "content": "Generate audio following instruction."},
    {"role": "user", "content": "What was said before"},
    {"role": "assistant", "content": [{"type": "audio", "url": "before.wav"}]},
    {
        "role": "user",
        "content": [{"type": "audio", "url": "question.wav"}, {"type": "text", "text": "Say this"}],
    },
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "Said."}, {"type": "audio", "url": "target.wav"}],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 150 utterances of three speakers, one with a reference of its own, and a conversation."""
    source = tmp_path_factory.mktemp("source")
    rows: list[dict[str, Any]] = []
    for n in range(150):
        write(source / f"{n}.wav", speech(0.4 + 0.004 * n, seed=n))
        rows.append({"audio": f"{n}.wav", "text": f"Number {n}.", "speaker": f"s{n % 3}", "language": "en"})
    for n, name in enumerate(["before", "question", "target", "voice"]):
        write(source / f"{name}.wav", speech(0.5, seed=1000 + n))
    rows[7] |= {"reference_audio": "voice.wav", "reference_text": "a voice", "scene": "A hall."}
    rows.append({"id": "talk", "messages": TURNS, "start_index": 3})
    manifest = source / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path_factory.mktemp("store")
    prepare(source, out, codec=CountingCodec(), references="same_speaker", validation_fraction=0.1)
    return out


@pytest.fixture
def store(folder: Path) -> CodeStore:
    return CodeStore.open(folder)


def test_rows_and_splits(store: CodeStore) -> None:
    train, validation = store.split("train"), store.split("validation")
    assert len(store) == 151 == len(train) + len(validation)
    assert 0 < len(validation) < 40
    assert store[0].id == train[0].id
    assert store[-1].id == validation[-1].id == list(store.rows("validation"))[-1].id
    assert [row.split for row in store.rows()] == ["train"] * len(train) + ["validation"] * len(validation)
    assert [row.id for row in train[3:6]] == [store[n].id for n in (3, 4, 5)]
    with pytest.raises(IndexError):
        store[151]
    with pytest.raises(DataError, match="no split 'test'"):
        store.split("test")


def test_codes_are_those_of_the_codec(store: CodeStore) -> None:
    row = store[store.index_of("20")]
    expected = CountingCodec().encode(read_24k(row.id, store))
    assert row.codes.dtype == np.uint16
    assert row.codes.flags.writeable
    assert np.array_equal(row.codes, expected)


def read_24k(name: str, store: CodeStore) -> np.ndarray:
    n = int(name)
    samples = np.clip(np.floor(speech(0.4 + 0.004 * n, seed=n).astype(np.float64) * 32768), -32768, 32767) / 32768
    return np.clip(resample(samples.astype(np.float32), 16_000, store.info.sample_rate), -1, 1)


def test_lengths_are_known_without_codes(store: CodeStore) -> None:
    for view in (store, store.split("train"), store.split("validation")):
        assert view.frames.tolist() == [len(row.codes) for row in view]
        context = [
            sum(map(len, row.context_codes)) + (0 if row.reference_codes is None else len(row.reference_codes))
            for row in view
        ]
        assert view.context_frames.tolist() == context
    assert store.frames.dtype == np.int64


@pytest.mark.parametrize("split", ["train", "validation"])
def test_lengths_of_examples_are_known_without_codes(store: CodeStore, split: str) -> None:
    _, prompter = tiny_prompter()
    examples = RowExamples(store.split(split), prompter, "transcript")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodeStore, "codes", no_codes_of_utterances(store))
        lengths = examples.lengths()
    assert lengths.tolist() == [len(examples[i]) for i in range(len(examples))]


def no_codes_of_utterances(store: CodeStore) -> Any:
    """`CodeStore.codes` that is allowed for conversations alone."""
    read = CodeStore.codes

    def codes(self: CodeStore, index: int) -> Any:
        assert store.metadata["messages"][index].as_py() is not None
        return read(self, index)

    return codes


def test_references(store: CodeStore) -> None:
    row = store[store.index_of("7")]
    assert (row.reference_id, row.reference_text, row.scene) == (None, "a voice.", "A hall.")
    assert row.reference_codes is not None
    for row in store.rows():
        if row.messages is None and row.reference_id is not None:
            other = store[store.index_of(row.reference_id)]
            assert (other.speaker, other.split, other.text) == (row.speaker, row.split, row.reference_text)
            assert np.array_equal(row.reference_codes, other.codes)


def test_a_conversation(store: CodeStore) -> None:
    row = store[store.index_of("talk")]
    assert row.messages is not None
    assert [message["role"] for message in row.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert row.messages[2]["content"] == [{"type": "audio", "url": "before.wav"}]
    assert row.messages[3]["content"][1] == {"type": "text", "text": "Say this."}
    assert (row.text, row.start_index, row.reference_codes) == ("Said.", 3, None)
    assert [codes.shape for codes in row.context_codes] == [(13, 8), (13, 8)]
    assert not np.array_equal(row.context_codes[0], row.context_codes[1])


def test_info(store: CodeStore) -> None:
    info = store.info
    assert (info.codec, info.codec_revision, info.sample_rate) == ("CountingCodec", "fake-1", 24_000)
    assert (info.frame_rate, info.num_codebooks, info.codebook_size) == (25.0, 8, 1024)
    assert info.rows == {name: len(store.split(name)) for name in ("train", "validation")}
    assert info.settings["references"] == "same_speaker"


def test_a_store_can_go_to_another_process(store: CodeStore) -> None:
    first = store[3]
    reopened = pickle.loads(pickle.dumps(store))
    assert np.array_equal(reopened[3].codes, first.codes)


def test_codes_are_typed_columns(folder: Path) -> None:
    for path in folder.glob("*.parquet"):
        field = pq.read_schema(path).field("codes")
        assert field.type == pa.list_(pa.list_(pa.uint16(), 8))


def test_columns_keep_their_names(folder: Path) -> None:
    """Old stores can be read: a field of `Entry` with another name is mapped to its column."""
    store = CodeStore.open(folder)
    rows = {row["id"]: row["linked_recordings"] for row in store.metadata.to_pylist()}
    assert {entry.id: entry.context_recordings for entry in stored_entries(store)} == rows
    assert (len(rows["7"]), len(rows["talk"]), rows["8"]) == (1, 2, [])


@pytest.mark.processes
def test_datasets_opens_it(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, since `datasets` reads its settings when it is imported."""
    pytest.importorskip("datasets")
    script = f"""
import os
os.environ |= {{"HF_HOME": {str(tmp_path)!r}, "HF_HUB_OFFLINE": "1"}}
import datasets, json
folder = {str(folder)!r}
by_folder = datasets.load_dataset("parquet", data_dir=folder)
files = {{name: f"{{folder}}/{{name}}-*.parquet" for name in ("train", "validation")}}
by_files = datasets.load_dataset("parquet", data_files=files)
row = by_folder["train"][0]
print(json.dumps({{
    "by_folder": {{name: len(rows) for name, rows in by_folder.items()}},
    "by_files": {{name: len(rows) for name, rows in by_files.items()}},
    "id": row["id"], "codes": row["codes"], "type": str(by_folder["train"].features["codes"]),
}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    store = CodeStore.open(folder)
    assert result["by_folder"] == result["by_files"] == store.info.rows
    assert "uint16" in result["type"]
    assert np.array_equal(store.split("train")[0].codes, result["codes"])
    assert store.split("train")[0].id == result["id"]


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def shard(folder: Path) -> Path:
    return next(folder.glob("train-*.parquet"))


def test_a_folder_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="higgstune prepare"):
        CodeStore.open(tmp_path)


def test_a_missing_shard(copied: Path) -> None:
    shard(copied).unlink()
    with pytest.raises(DataError, match="missing or damaged"):
        CodeStore.open(copied)


def test_a_shard_that_was_cut(copied: Path) -> None:
    shard(copied).write_bytes(shard(copied).read_bytes()[:-10])
    with pytest.raises(DataError, match="store's index says"):
        CodeStore.open(copied)


@pytest.mark.parametrize("place", [0.001, 0.2, 0.5, 0.8])
def test_a_flipped_byte_is_noticed(copied: Path, place: float) -> None:
    data = bytearray(shard(copied).read_bytes())
    for n in range(8):  # somewhere in the pages, not only in the room between them
        data[int(len(data) * place) + 50 * n] ^= 0xFF
    shard(copied).write_bytes(data)
    with pytest.raises(DataError, match="missing or damaged"):
        list(CodeStore.open(copied))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema_version": 1', '"schema_version": 99', "schema version 99"),
        ('"codec_revision"', '"codec_version"', "is damaged"),
        ('"name": "train-', '"name": "../train-', "not a shard of a store"),
        ("{", "", "cannot be read"),
    ],
)
def test_a_damaged_index(copied: Path, old: str, new: str, message: str) -> None:
    index = copied / "store.json"
    index.write_text(index.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        CodeStore.open(copied)


def test_a_shard_that_is_listed_twice_is_refused(copied: Path) -> None:
    index = json.loads((copied / "store.json").read_text())
    index["shards"].append(index["shards"][0])
    (copied / "store.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"lists train-.*\.parquet twice"):
        CodeStore.open(copied)


def test_an_index_whose_rows_are_not_those_of_its_shards_is_refused(copied: Path) -> None:
    index = json.loads((copied / "store.json").read_text())
    index["info"]["rows"]["train"] += 1
    (copied / "store.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is damaged"):
        CodeStore.open(copied)


def test_other_files_do_not_belong_to_it(copied: Path) -> None:
    (copied / "train-00099-000000000000.parquet").write_bytes(shard(copied).read_bytes())
    assert len(CodeStore.open(copied)) == 151


def test_one_split_may_be_empty(tmp_path: Path) -> None:
    clip(tmp_path / "in", "a.wav", 1)
    prepare(tmp_path / "in", tmp_path / "out", codec=CountingCodec())
    store = CodeStore.open(tmp_path / "out")
    assert (len(store.split("train")), len(store.split("validation"))) == (1, 0)
    assert store.split("validation").frames.tolist() == []


def test_a_codec_that_returns_something_else_is_named(tmp_path: Path) -> None:
    class Broken(CountingCodec):
        def __init__(self, codes: np.ndarray) -> None:
            super().__init__()
            self.codes = codes

        def encode(self, waveform: np.ndarray) -> np.ndarray:
            return self.codes

    clip(tmp_path / "in", "a.wav", 1)
    for codes in (
        np.zeros((8, 20), np.int64),
        np.full((20, 8), 1024),
        np.zeros((20, 8)),
        np.full((20, 8), -1),
    ):
        with pytest.raises(CheckpointError, match="the codec returned codes"):
            prepare(tmp_path / "in", tmp_path / "out", codec=Broken(codes))
