"""The cache of what decoding showed: nothing is decoded twice, and nothing that has changed is taken for known."""

import os
from pathlib import Path

import numpy as np
import pytest
from preparing import ids, recordings, run
from recordings import RATE, CountingCodec, clip, speech, write

from higgstune.data import clips, readings
from higgstune.data.readings import READINGS_NAME
from higgstune.data.store import CodeStore


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded, as a whole or in part; files count as settled at once."""
    found: list[str] = []
    for name in ("read_recording", "read_audio"):
        read = getattr(clips, name)
        spy = lambda path, *given, read=read, **named: [found.append(path.name), read(path, *given, **named)][1]  # noqa: E731
        monkeypatch.setattr(clips, name, spy)
    monkeypatch.setattr(readings, "_COARSE", 0)
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_each_recording_is_decoded_once(tmp_path: Path, decoded: list[str]) -> None:
    source = recordings(tmp_path / "in", 3)
    run(source, tmp_path / "out")
    assert sorted(decoded) == ["000.wav", "001.wav", "002.wav"]
    before = shards(tmp_path / "out")
    decoded.clear()
    assert run(source, tmp_path / "out").reused == 3
    assert decoded == []
    assert shards(tmp_path / "out") == before
    clip(source, "new.wav", 7)
    run(source, tmp_path / "out")
    assert decoded == ["new.wav"]


def test_a_change_that_hides_is_noticed(tmp_path: Path, decoded: list[str]) -> None:
    """Of the same size, with the old time of change: the inode's cannot be set back."""
    source = recordings(tmp_path / "in", 3)
    run(source, tmp_path / "out")
    decoded.clear()
    before = os.stat(source / "001.wav")
    write(source / "001.wav", speech(0.5, 99))
    os.utime(source / "001.wav", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(source / "001.wav").st_size == before.st_size
    assert run(source, tmp_path / "out").encoded == 1
    assert decoded == ["001.wav"]


def test_a_file_that_was_changed_just_now_is_read_again(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "_COARSE", 1 << 62)
    source = recordings(tmp_path / "in", 2)
    for _ in range(2):
        run(source, tmp_path / "out")
    assert len(decoded) == 4


def test_codes_that_an_interruption_lost_are_all_that_is_decoded_again(tmp_path: Path, decoded: list[str]) -> None:
    class Interrupted(CountingCodec):
        def encode(self, waveform: np.ndarray) -> np.ndarray:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode(waveform)

    source = recordings(tmp_path / "in", 6)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", Interrupted())
    assert len(decoded) == 4
    decoded.clear()
    assert run(source, tmp_path / "out").encoded == 3
    assert len(decoded) == 3
    run(source, tmp_path / "at once")
    assert shards(tmp_path / "out") == shards(tmp_path / "at once")


@pytest.mark.parametrize("damage", ["cut", "flipped", "another version", "deleted"])
def test_a_damaged_cache_costs_time_alone(tmp_path: Path, decoded: list[str], damage: str) -> None:
    source, cache = recordings(tmp_path / "in", 3), tmp_path / "out" / READINGS_NAME
    run(source, tmp_path / "out")
    before, data = shards(tmp_path / "out"), bytearray(cache.read_bytes())
    decoded.clear()
    if damage == "deleted":
        cache.unlink()
    else:
        data[{"cut": 100, "flipped": len(data) - 60, "another version": 19}[damage]] ^= 1
        cache.write_bytes(data[: len(data) - 7] if damage == "cut" else data)
    run(source, tmp_path / "out")
    assert len(decoded) == {"cut": 2, "flipped": 1}.get(damage, 3)
    assert shards(tmp_path / "out") == before
    decoded.clear()
    run(source, tmp_path / "out")
    assert decoded == []


def test_a_limit_that_was_raised_needs_the_measures(tmp_path: Path, decoded: list[str]) -> None:
    write(tmp_path / "in" / "long.wav", speech(3.0, 1)).with_suffix(".txt").write_text("A long one.")
    clip(tmp_path / "in", "short.wav", 2)
    assert run(tmp_path / "in", tmp_path / "out", max_seconds=1.0).refused == {"too_long": 1}
    run(tmp_path / "in", tmp_path / "out", max_seconds=1.0)
    assert len(decoded) == 2
    assert run(tmp_path / "in", tmp_path / "out").refused == {}
    assert decoded[2:] == ["long.wav"]
    assert ids(tmp_path / "out") == ["long", "short"]
    expected = run(tmp_path / "in", tmp_path / "fresh", CountingCodec())
    assert expected.encoded == 2
    rows = [CodeStore.open(tmp_path / name).metadata.sort_by("id").to_pylist() for name in ("out", "fresh")]
    assert rows[0] == rows[1]
    assert rows[0][0]["recording_samples"] == 3 * RATE
