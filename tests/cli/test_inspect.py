"""The verb `inspect`: a store as a whole, a row, and how a row sounds."""

import json
from pathlib import Path

import pytest
import soundfile
from commands import Command
from fake_codec import FakeCodec
from recordings import speech, write
from tiny_runs import DEMO_CODEC, make_recordings

import higgstune
from higgstune.data.overview import store_overview


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of 0.6 to 1.3 s through the miniature's codec, two without a usable text."""
    folder = tmp_path_factory.mktemp("inspect")
    make_recordings(folder / "recordings")
    (folder / "recordings" / "mute.wav").write_bytes((folder / "recordings" / "clip0.wav").read_bytes())
    (folder / "recordings" / "dots.wav").write_bytes((folder / "recordings" / "clip0.wav").read_bytes())
    (folder / "recordings" / "dots.txt").write_text("...")
    higgstune.prepare(folder / "recordings", folder / "data", codec=DEMO_CODEC, speaker="anna", limits=["peak > -90"])
    return folder / "data"


def test_a_store_is_shown_as_a_whole(store: Path, command: Command) -> None:
    code, out, _ = command("inspect", store)
    assert code == 0
    for part in (
        f"{store}: 8 clips, 7.6 seconds of speech",
        "speakers: anna (8 clips, 7.6 seconds)",
        "languages: not named (8 clips",
        "lengths: 0.6 to 1.3 s, half of them",
        "refused from the last source: 1 empty text, 1 no transcript",
        "rows that stand out: 8:",
        "peak > -90 dBFS (8)",
        f"inspect {store} --outliers",
        f"inspect {store} --row 0 --listen row.wav",
    ):
        assert part in out, out
    assert "{" not in out


def test_json_has_all_of_it(store: Path, command: Command) -> None:
    code, out, _ = command("inspect", store, "--json")
    found = json.loads(out)
    assert code == 0
    assert sum(split["rows"] for split in found["splits"].values()) == 8
    assert sum(rows for *_, rows in found["histogram"]) == 8
    assert len(found["texts"]) == 3
    assert [reason for _, reason in found["first_refused"]]


def test_a_row_is_shown_for_the_one_who_spoke_it(store: Path, command: Command) -> None:
    code, out, _ = command("inspect", store, "--row", 0)
    found = json.loads(command("inspect", store, "--row", 0, "--json")[1])
    assert code == 0
    for part in (
        f"text: {found['text']}",
        "speaker: anna",
        f"length: {found['seconds']:.2f} s",
        "level: ",
        "channels: 1",
    ):
        assert part in out
    assert "<|" not in out  # of a prompt
    assert command("inspect", store, "--row", found["id"])[1] == out


@pytest.mark.parametrize(("row", "names"), [("8", "has the rows 0 to 7"), ("-1", "0 to 7"), ("nobody", "no row with")])
def test_an_unknown_row_is_refused(store: Path, command: Command, row: str, names: str) -> None:
    code, _, err = command("inspect", store, "--row", row)
    assert code == 2
    assert names in err


def test_a_row_is_decoded_by_the_codec_of_its_store(store: Path, tmp_path: Path, command: Command) -> None:
    wav = tmp_path / "new" / "row.wav"
    code, out, err = command("inspect", store, "--row", 0, "--listen", wav)
    assert code == 0, err
    assert f"wrote {wav}" in out
    waveform, rate = soundfile.read(wav)
    seconds = json.loads(command("inspect", store, "--row", 0, "--json")[1])["seconds"]
    assert rate == 24_000
    assert len(waveform) / rate == pytest.approx(seconds, abs=0.05)
    assert abs(waveform).max() > 0.01


def test_another_codec_does_not_decode_it(tmp_path: Path, command: Command) -> None:
    make_recordings(tmp_path / "recordings", clips=2)
    higgstune.prepare(tmp_path / "recordings", tmp_path / "data", codec=FakeCodec())
    code, _, err = command("inspect", tmp_path / "data", "--row", 0, "--listen", tmp_path / "x.wav")
    assert code == 2
    assert "--codec" in err
    code, _, err = command(
        "inspect", tmp_path / "data", "--row", 0, "--listen", tmp_path / "x.wav", "--codec", DEMO_CODEC
    )
    assert code == 2
    assert "was encoded with another codec" in err
    assert not (tmp_path / "x.wav").exists()


def test_bars_cover_all_lengths(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name, seconds in (("a", 1.0), ("b", 1.1), ("c", 20.0)):
        write(folder / f"{name}.wav", speech(seconds))
        (folder / f"{name}.txt").write_text(f"Some words of {name}.")
    higgstune.prepare(folder, tmp_path / "data", codec=FakeCodec())
    bars = store_overview(tmp_path / "data").histogram
    assert [bar for bar in bars if bar[2]] == [(0.0, 5.0, 2), (20.0, 25.0, 1)]
    assert bars[1] == (5.0, 10.0, 0)
