"""Faults of preparation and of the code store: their effects on disk, and their messages."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from fake_whisper_encoder import FakeWhisperEncoder
from full_disk import largest_file
from preparing import recordings, run
from recordings import CountingCodec, clip

import higgstune
from higgstune import files
from higgstune.data import shard_reader, store, whisper_features
from higgstune.data import shard_writer as shards
from higgstune.data.duplicates import print_of
from higgstune.data.encode import CodeJournal
from higgstune.data.readings import READINGS_NAME
from higgstune.data.shard_reader import PARTIAL_NAME, read_index
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FeatureStore
from higgstune.errors import DataError, WorkError

OLD, NEW = 4, 3  # clips of the store that there is, and of the preparation that fails
DEMO_CODEC = Path(higgstune.__file__).parent / "demo" / "assets" / "codec"


def rows_of(folder: Path) -> list[tuple[str, str, bytes]]:
    return [(row.id, row.split, row.codes.tobytes()) for row in CodeStore.open(folder).rows()]


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder by name, but for the cache, which holds the times of the recordings."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != READINGS_NAME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def prepared(source: Path, out: Path, codec: CountingCodec | None = None) -> Any:
    return run(source, out, codec, speaker="one", references="same_speaker", whisper=FakeWhisperEncoder())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with Whisper features, its source, which has more clips by now, and the store expected from these."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whisper_features, "_CLIPS_PER_FILE", 2)
        prepared(recordings(folder / "in", OLD), folder / "old")
        recordings(folder / "in", NEW, first=OLD)
        (folder / "in" / "silent.wav").write_bytes(b"")
        shutil.copytree(folder / "old", folder / "expected")
        prepared(folder / "in", folder / "expected")
    assert {path.name for path in (folder / "expected").glob("*.parquet")} == {
        shard.name for shard in read_index(folder / "expected").shards
    }
    return folder


# --- kill -9 ---

KILLED = """
import os, shutil, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from fake_whisper_encoder import FakeWhisperEncoder
from preparing import run
from higgstune.data import encode, shard_writer, whisper_features
from higgstune.data.clips import Checker

world, out = Path(sys.argv[2]), Path(sys.argv[3])
whisper_features._CLIPS_PER_FILE = 2
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_record(self, record):
    if len(self._places) == 1:
        self._file.write(record[: len(record) // 2])
        die()
    write_record(self, record)


def half_a_shard(self, table):
    write_table(self, table)
    self.file_handle and self.file_handle.flush()
    die()


def half_a_feature_file(tensors, path):
    save_file(tensors, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()


write_record, write_table = encode.CodeJournal._write, shard_writer.pq.ParquetWriter.write_table
save_file = whisper_features.save_file
MOMENTS = {
    "reading": (Checker, "check", die),
    "encoding": (encode, "encode_clip", die),
    "half a record": (encode.CodeJournal, "_write", half_a_record),
    "half a shard": (shard_writer.pq.ParquetWriter, "write_table", half_a_shard),
    "half a feature file": (whisper_features, "save_file", half_a_feature_file),
}


def prepare(folder, moment):
    if moment in MOMENTS:
        setattr(*MOMENTS[moment])
    else:
        count = 0

        def before(event, arguments):
            nonlocal count
            if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                count += 1
                if count == moment:
                    die()

        sys.addaudithook(before)
    run(world / "in", folder, speaker="one", references="same_speaker", whisper=FakeWhisperEncoder())


def killed(moment):
    shutil.copytree(world / "old", out / str(moment))
    child = os.fork()
    if not child:
        prepare(out / str(moment), moment)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), (moment, status)
    return bool(status)


prepare(out / "imports everything", None)
shutil.rmtree(out / "imports everything")
if sys.argv[4] == "named":
    count = sum(killed(moment) for moment in MOMENTS)
else:
    count = 0
    while killed(count + 1):
        count += 1
print(count)
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forked, so that they import nothing")
@pytest.mark.parametrize(("moments", "kills"), [("named", 5), pytest.param("all", 21, marks=pytest.mark.proof)])
def test_a_preparation_that_is_killed_at_any_moment(
    world: Path, tmp_path: Path, monkeypatch: Any, moments: str, kills: int
) -> None:
    """Named: in the midst of a record, a shard and a file of features. All: before each change of the file system."""
    arguments = [Path(__file__).parents[1] / "helpers", world, tmp_path, moments]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True, capture_output=True, text=True)
    assert int(done.stdout) >= kills
    monkeypatch.setattr(whisper_features, "_CLIPS_PER_FILE", 2)
    old, new, expected = rows_of(world / "old"), rows_of(world / "expected"), content(world / "expected")
    seen = []
    for folder in tmp_path.iterdir():
        seen.append(rows_of(folder))
        assert seen[-1] in (old, new), folder.name
        kept = sum(path.stat().st_size for path in folder.glob(f"{PARTIAL_NAME}/*.bin"))
        summary = prepared(world / "in", folder)
        assert summary.encoded <= NEW - kept // record_size(), folder.name
        assert content(folder) == expected, folder.name
        assert not (folder / PARTIAL_NAME).exists()
    assert old in seen
    assert new in seen


def record_size() -> int:
    """Bytes of a clip in the journal: half a second of audio, and its print."""
    rate = CountingCodec().sample_rate
    return 32 + 4 + 4 + 13 * 8 * 2 + len(print_of(np.zeros(rate // 2, np.float32), rate, coarse=True)) + 4


def test_a_record_that_was_cut_short_hides_none_after_it(tmp_path: Path) -> None:
    path, codes = tmp_path / "journal", np.arange(80, dtype=np.uint16).reshape(10, 8)
    names = [f"{n:064x}" for n in range(4)]
    with CodeJournal(path, 8) as journal:
        journal.append(names[0], codes)
        journal.append(names[1], codes)
    os.truncate(path, path.stat().st_size - 5)
    with CodeJournal(path, 8) as journal:
        assert [name in journal for name in names] == [True, False, False, False]
        journal.append(names[2], codes + 1)
    with CodeJournal(path, 8) as journal:
        assert [name in journal for name in names] == [True, False, True, False]
        assert np.array_equal(journal.read(names[2]), codes + 1)


# --- a full disk, a folder that cannot be written ---


def check_refused(world: Path, out: Path, error: pytest.ExceptionInfo[WorkError], why: str, file: str) -> None:
    """The error is one line that names the file; the store is whole, and the next run resumes."""
    assert why in str(error.value)
    assert "\n" not in str(error.value)
    assert file in str(error.value)
    has_new = file == "whisper"
    assert rows_of(out) == rows_of(world / ("expected" if has_new else "old"))
    assert not [path for path in out.rglob("*") if path.name.endswith(".new") or path.parent.name == "shards"]
    assert len(list(out.glob("*.parquet"))) == 2
    kept = sum(path.stat().st_size for path in out.glob(f"{PARTIAL_NAME}/*.bin")) // record_size()
    assert prepared(world / "in", out).encoded == (0 if has_new else NEW - kept)
    assert content(out) == content(world / "expected")


@pytest.mark.parametrize(("share", "file"), [(0.0, "codes-"), (0.7, "codes-"), (1.1, "train-"), (2.0, "whisper")])
def test_a_file_that_may_not_grow(world: Path, tmp_path: Path, monkeypatch: Any, share: float, file: str) -> None:
    """In the journal, in a shard, in Whisper features: sizes by those of the journal and of the largest shard."""
    monkeypatch.setattr(whisper_features, "_CLIPS_PER_FILE", 2)
    shutil.copytree(world / "old", tmp_path / "out")
    journal, shard = record_size() * NEW, max(path.stat().st_size for path in (world / "expected").glob("*.parquet"))
    limit = int(journal * share) if share < 2 else shard
    with pytest.raises(WorkError) as error, largest_file(limit):
        prepared(world / "in", tmp_path / "out")
    check_refused(world, tmp_path / "out", error, "File too large", file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("file", ["rejected.jsonl", "train-00000", "store.json"])
def test_a_disk_that_is_full(world: Path, tmp_path: Path, monkeypatch: Any, file: str) -> None:
    monkeypatch.setattr(whisper_features, "_CLIPS_PER_FILE", 2)
    shutil.copytree(world / "old", tmp_path / "out")

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        return open("/dev/full" if file in path.name and "w" in mode else path, mode, **options)

    for module in (shards, files):
        monkeypatch.setattr(module, "open", full, raising=False)
    with pytest.raises(WorkError) as error:
        prepared(world / "in", tmp_path / "out")
    for module in (shards, files):
        monkeypatch.delattr(module, "open")
    check_refused(world, tmp_path / "out", error, "No space left on device", file)
    assert "kept: make room, and run it again" in str(error.value) or file == "rejected.jsonl"


def test_the_command_says_why_a_folder_cannot_be_written(tmp_path: Path, command: Command) -> None:
    if not Path("/sys/kernel").is_dir():
        pytest.skip("needs a folder that nobody may write to, such as Linux' /sys")
    clip(tmp_path / "in", "a.wav", 1)
    code, _, err = command("prepare", tmp_path / "in", "--out", "/sys/higgstune", "--codec", DEMO_CODEC)
    assert code == 1
    assert "/sys/higgstune cannot be written: Operation not permitted" in err
    assert "name a folder that you may write to" in err
    assert [line for line in err.splitlines() if line.startswith("error")] == [err.splitlines()[-1]]


# --- a store that changes under its reader ---


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several groups of rows and several blocks."""
    folder = tmp_path_factory.mktemp("large")
    for n in range(200):
        clip(folder / "in", f"{n:03d}.wav", n, seconds=2.0)
    run(folder / "in", folder / "out", speaker="one", references="same_speaker", validation_fraction=0.05)
    return folder / "out"


@pytest.fixture
def copied(large: Path, tmp_path: Path) -> Path:
    shutil.copytree(large, tmp_path / "store")
    return tmp_path / "store"


def shard(folder: Path) -> Path:
    return next(folder.glob("train-*.parquet"))


def test_a_flipped_bit_is_an_error_or_changes_nothing(copied: Path) -> None:
    """Anywhere: in values, in the headers of pages, in the footer; before the store is opened, and after."""
    path, expected = shard(copied), rows_of(copied)
    whole = path.read_bytes()
    assert len(whole) > 2 * 65536
    places = [*np.random.default_rng(0).integers(len(whole), size=20), 0, len(whole) - 1, len(whole) - 700]
    messages = []
    for number, place in enumerate(places):
        opened = CodeStore.open(copied)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 1 << number % 8]))
        with pytest.raises(DataError, match=rf"{path.name} is missing or damaged \(its SHA-256.*prepare it again"):
            CodeStore.open(copied)
        try:
            assert [(row.id, row.split, row.codes.tobytes()) for row in opened.rows()] == expected
        except DataError as error:
            messages.append(str(error))
        path.write_bytes(whole)
    assert len(messages) >= 15
    assert all(f"{path.name} is missing or damaged (it has changed since it was opened)" in line for line in messages)


def test_a_damaged_row_is_named(copied: Path) -> None:
    opened = CodeStore.open(copied)
    path = shard(copied)
    path.write_bytes(bytes(path.stat().st_size))
    row_id = opened.metadata["id"][70].as_py()
    with pytest.raises(DataError, match=rf"^row {row_id} of the train split: \S*{path.name} is missing or damaged"):
        opened[70]


@pytest.mark.parametrize("left", [0.0, 0.5, 0.9])
def test_a_shard_that_is_cut_short_under_its_reader(copied: Path, left: float) -> None:
    """Not a bus error, as through a memory map."""
    opened = CodeStore.open(copied)
    path = shard(copied)
    os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(DataError, match=r"of the train split: .* is missing or damaged"):
        list(opened.rows())
    with pytest.raises(DataError, match="bytes, but the store's index says"):
        CodeStore.open(copied)


def test_a_shard_that_is_deleted_under_its_reader(copied: Path) -> None:
    """A reader that has it open can read on; a process that opens it later cannot."""
    expected = rows_of(copied)
    opened = CodeStore.open(copied)
    shard(copied).unlink()
    assert [(row.id, row.split, row.codes.tobytes()) for row in opened.rows()] == expected
    reopened = pickle.loads(pickle.dumps(opened))
    row_id = reopened.metadata["id"][3].as_py()
    with pytest.raises(DataError, match=rf"row {row_id} of the train split: .*train-00000.* is missing or damaged"):
        reopened[3]


@pytest.mark.parametrize("fault", ["cut", "flipped"])
def test_features_that_are_damaged_under_their_reader(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(shard_reader, "_BLOCK", 4096)  # the file is small
    shutil.copytree(world / "expected", tmp_path / "out")
    features = FeatureStore.open(tmp_path / "out", FakeWhisperEncoder.checkpoint)
    file = features.index.files[0]
    path = features.folder / file.name
    assert features.read(file.clips[0]).features.flags.writeable
    if fault == "cut":
        os.truncate(path, 20_000)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{file.name} is .* not the file that was written \(it has changed since"):
        [features.read(clip) for clip in file.clips]


def test_features_that_no_index_names_go(world: Path, tmp_path: Path) -> None:
    """Such files remain when a preparation is killed between file and index, and then resumes with other clips."""
    shutil.copytree(world / "expected", tmp_path / "out")
    (folder,) = (tmp_path / "out" / "whisper").iterdir()
    (folder / "features-0123456789ab.safetensors").write_bytes(b"left")
    (folder / "features.tmp").write_bytes(b"left")
    prepared(world / "in", tmp_path / "out")
    assert content(tmp_path / "out") == content(world / "expected")


def test_a_store_that_is_prepared_anew_under_its_reader(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "old", tmp_path / "out")
    opened = CodeStore.open(tmp_path / "out")
    prepared(world / "in", tmp_path / "out")
    assert rows_of(tmp_path / "out") == rows_of(world / "expected") != rows_of(world / "old")
    assert [(row.id, row.split, row.codes.tobytes()) for row in opened.rows()] == rows_of(world / "old")


def test_a_store_that_is_prepared_anew_while_it_is_opened(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index that was read names shards that are gone when they are looked for."""
    answers = [read_index(world / "old")]
    monkeypatch.setattr(store, "read_index", lambda folder: answers.pop() if answers else read_index(folder))
    assert rows_of(world / "expected") == rows_of(world / "expected")
    assert not answers


# --- clocks ---


def test_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back by years and forth at every reading of the clock, also in a preparation that is interrupted."""
    source = recordings(tmp_path / "in", 6)
    prepared(source, tmp_path / "expected")
    looks = 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return 2e9 if looks % 2 else 1.0

    class Interrupted(CountingCodec):
        def encode(self, waveform: np.ndarray) -> np.ndarray:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode(waveform)

    monkeypatch.setattr(time, "time", jumping)
    for path in source.iterdir():
        os.utime(path, (jumping(), jumping()))
    with pytest.raises(KeyboardInterrupt):
        prepared(source, tmp_path / "out", Interrupted())
    assert prepared(source, tmp_path / "out").encoded == 3
    assert content(tmp_path / "out") == content(tmp_path / "expected")
