"""Recordings that other processes decode: the same store, whatever their number, and errors that say what happened."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from preparing import manifest, recordings, rejected, run
from recordings import CountingCodec, clip, speech, write

from higgstune.data import decoders
from higgstune.data.decoders import Decoders
from higgstune.errors import WorkError

pytestmark = pytest.mark.processes


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[Decoders]:
    """Two processes decode from the second row on; the list gets their pool."""
    pools: list[Decoders] = []
    enter = Decoders.__enter__
    monkeypatch.setattr(decoders, "_ALONE", 0.0)
    monkeypatch.setattr(decoders, "_PAYS", 0.0)
    monkeypatch.setattr(decoders, "available", lambda: 2)
    monkeypatch.setattr(Decoders, "__enter__", lambda pool: [pools.append(pool), enter(pool)][1])
    return pools


def source_of_all_kinds(folder: Path) -> Path:
    """Formats, rates, channels, segments, references, and rows that are refused."""
    for number, name in enumerate(("a.wav", "b.flac", "c.mp3", "d.opus", "e.ogg")):
        write(folder / name, speech(1.0 + number / 4, number, 24_000), 24_000)
    write(folder / "long.wav", speech(6.0, 9))
    write(folder / "silent.wav", 0 * speech(1.0))
    write(folder / "short.wav", speech(0.1))
    (folder / "broken.wav").write_bytes(b"RIFF and no more")
    rows: list[dict[str, Any]] = [{"audio": name, "text": f"This is {name[0]}."} for name in ("a.wav", "b.flac")]
    voice = {"reference_audio": "c.mp3", "reference_text": "A voice."}
    rows += [{"audio": name, "text": f"This is {name[0]}.", **voice} for name in ("d.opus", "e.ogg")]
    rows += [{"audio": "long.wav", "text": f"Part {n}.", "start": n, "end": n + 0.9} for n in range(6)]
    rows += [{"audio": "long.wav", "text": "Too far.", "start": 5.0, "end": 9.0}]
    rows += [{"audio": f"{name}.wav", "text": "No."} for name in ("silent", "short", "broken", "broken", "missing")]
    manifest(folder, *rows)
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_the_store_is_that_of_one_process(tmp_path: Path, two: list[Decoders], monkeypatch: pytest.MonkeyPatch) -> None:
    source, codec = source_of_all_kinds(tmp_path / "in"), CountingCodec()
    beside = run(source, tmp_path / "beside", codec)
    assert len(two) == 1
    assert all(process.returncode is not None for process in two[0]._processes)
    monkeypatch.setattr(decoders, "available", lambda: 0)
    alone = run(source, tmp_path / "alone")
    assert len(two) == 1
    assert shards(tmp_path / "beside") == shards(tmp_path / "alone")
    assert rejected(tmp_path / "beside") == rejected(tmp_path / "alone")
    assert len(rejected(tmp_path / "alone")) == 6
    assert (beside.encoded, beside.reused) == (alone.encoded, alone.reused) == (codec.calls, 0)


def test_a_process_that_is_killed_is_an_error_that_says_so(tmp_path: Path, two: list[Decoders]) -> None:
    class Killing(CountingCodec):
        def encode(self, waveform: Any) -> Any:
            if self.calls == 3:
                for process in two[0]._processes:
                    os.kill(process.pid, signal.SIGKILL)
            return super().encode(waveform)

    source = recordings(tmp_path / "in", 40)
    with pytest.raises(WorkError, match=r"ended with status -9 .* encoded so far are kept: run it again"):
        run(source, tmp_path / "out", Killing())
    assert run(source, tmp_path / "out").encoded <= 37


def test_ctrl_c_ends_the_processes(tmp_path: Path, two: list[Decoders]) -> None:
    class Interrupted(CountingCodec):
        def encode(self, waveform: Any) -> Any:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode(waveform)

    for number in range(4):  # more than a pipe holds: the processes wait for someone to fetch it
        clip(tmp_path / "in", f"{number}.wav", number, seconds=25.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "out", Interrupted())
    assert all(process.returncode == -signal.SIGKILL for process in two[0]._processes)
    assert run(tmp_path / "in", tmp_path / "out").encoded == 1
