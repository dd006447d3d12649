"""Sources, recordings and recipes from strangers: they stay in their folder, and take no more than they should."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from commands import Command
from hostile_input import rf64, wav
from preparing import manifest, rejected, run
from recordings import RATE, clip, speech, write

import higgstune
from higgstune.config.recipe import load_recipe
from higgstune.data import audio
from higgstune.data.audio import read_audio, read_recording
from higgstune.data.importers import read_source
from higgstune.data.importers.transcripts import read_transcript
from higgstune.data.manifest import MAX_LINE, Utterance, parse_line, read_manifest
from higgstune.data.rejection import RowError
from higgstune.data.text import normalize_text
from higgstune.errors import ConfigError

DEMO_CODEC = Path(higgstune.__file__).parent / "demo" / "assets" / "codec"

# Paths in sources

TALK = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": {"type": "audio", "url": "URL"}}]


def in_messages(url: str) -> dict[str, Any]:
    return json.loads(json.dumps({"messages": TALK}).replace("URL", url))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A source folder with a recording and links that lead out of it, to another recording and its folder."""
    write(tmp_path / "in" / "own.wav", speech(0.5, 1))
    clip(tmp_path / "out", "voice.wav", 2)
    (tmp_path / "in" / "link.wav").symlink_to(tmp_path / "out" / "voice.wav")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out")
    return tmp_path


@pytest.mark.parametrize(
    "row",
    [
        {"audio": "../out/voice.wav", "text": "Hello."},
        {"audio": "ROOT/out/voice.wav", "text": "Hello."},
        {"audio": "link.wav", "text": "Hello."},
        {"audio": "linked/voice.wav", "text": "Hello."},
        {"audio": "linked/../in/own.wav", "text": "Hello.", "id": "by a detour"},
        {"audio": "own.wav", "text": "Hello.", "reference_audio": "../out/voice.wav", "reference_text": "Hello."},
        in_messages("../out/voice.wav"),
    ],
)
def test_a_row_that_leads_out_of_its_folder_needs_an_option(world: Path, row: dict[str, Any]) -> None:
    row = json.loads(json.dumps(row).replace("ROOT", str(world)))
    good = {"audio": str(world / "in" / "own.wav"), "text": "Absolute, and inside.", "id": "good"}
    source = manifest(world / "in", row, good)
    inside = row.get("id") == "by a detour"
    assert run(source, world / "store").refused == ({} if inside else {"outside_folder": 1})
    assert inside or "--allow-outside" in rejected(world / "store")[0]["message"]
    assert run(source, world / "other", allow_outside=True).refused == {}


def test_tables_and_samples_lead_nowhere_either(world: Path) -> None:
    (world / "in" / "metadata.csv").write_text("../out/voice|Hello.\n../out/none|Hello.\nown|Mine.\n")
    reasons = [row.content.reason for row in read_source(world / "in" / "metadata.csv") if row.id != "own"]
    assert reasons == ["outside_folder"] * 2  # the same for a file that is there and one that is not
    secret = world / "secret.txt"
    secret.write_text("A secret.")
    samples = [{"audio_file": "own.wav", "transcript_file": str(secret)}]
    (world / "in" / "metadata.json").write_text(json.dumps({"samples": samples}))
    (row,) = read_source(world / "in" / "metadata.json")
    assert isinstance(row.content, RowError)
    assert row.content.reason == "outside_folder"
    (row,) = read_source(world / "in" / "metadata.json", allow_outside=True)
    assert isinstance(row.content, Utterance)


def test_links_in_a_folder_of_recordings(world: Path) -> None:
    (world / "in" / "own.txt").symlink_to(world / "out" / "voice.txt")
    clip(world / "in", "good.wav", 3)
    found = {row.location: row.content for row in read_source(world / "in")}
    refused = {place: content.reason for place, content in found.items() if isinstance(content, RowError)}
    assert refused == dict.fromkeys(["link.wav", "own.wav", "linked"], "outside_folder")
    trusted = {row.location for row in read_source(world / "in", allow_outside=True)}
    assert trusted == {"link.wav", "own.wav", "good.wav", "linked/voice.wav"}


def test_the_command_has_the_option(world: Path, command: Command) -> None:
    source = manifest(world / "in", {"audio": "../out/voice.wav", "text": "Hello."})
    options = ("prepare", source, "--out", world / "store", "--codec", DEMO_CODEC, "--device", "cpu", "--json")
    code, _, err = command(*options)
    assert code == 2
    assert "give --allow-outside" in err
    code, out, _ = command(*options, "--allow-outside")
    assert (code, json.loads(out)["refused"]) == (0, {})


def test_a_pipe_is_not_a_transcript(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(RowError, match="no transcript"):
        read_transcript(tmp_path / "a.txt")  # reading it would block for ever


# Manifests


def test_a_line_without_end_is_refused_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    good = b'{"audio": "a.wav", "text": "Hello."}\n'
    path.write_bytes(good + b'{"audio": "' + b"x" * 3 * MAX_LINE + b'"}\n' + good + b"y" * 2 * MAX_LINE)
    rows = list(read_manifest(path))
    assert [number for number, _ in rows] == [1, 2, 3, 4]
    assert [isinstance(row, RowError) and row.reason for _, row in rows] == [False, "bad_row", False, "bad_row"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"audio": ' + b"[" * 900 + b"]" * 900 + b', "text": "x"}',
        b'{"messages": [{"role": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        b'{"audio": "a.wav", "text": "b", "start": 1' + b"0" * 5000 + b"}",
        b'{"audio": "a.wav", "text": "b", "start": 1e999}',
        b"{" + b",".join(b'"k%d": 1' % n for n in range(200_000)) + b"}",
        b'{"' + b"k" * 1_000_000 + b'": 1}',
        b'{"messages": [' + b",".join([b"1"] * 20_000) + b"]}",
    ],
    ids=["deep", "deep role", "digits", "infinite", "keys", "long key", "many wrong messages"],
)
def test_odd_lines_are_refused_soon_and_shortly(line: bytes) -> None:
    begun = time.process_time()
    with pytest.raises(RowError) as refused:
        parse_line(line)
    assert time.process_time() - begun < 5
    assert len(str(refused.value)) < 2_000


def test_a_text_of_combining_marks_takes_no_minutes() -> None:
    """Normalising sorts the marks after a letter, in the square of their number."""
    text = "a" + "\u0301\u0323" * 200_000 + " and the rest"
    begun = time.process_time()
    normal = normalize_text(text)
    assert time.process_time() - begun < 5
    assert normal.endswith("and the rest.")
    assert normalize_text(normal) == normal
    assert normalize_text("e\u0301 \u1ee5\u0308".replace("\u1ee5", "u\u0323")) == "é ụ̈."


# Recordings

LIES: dict[str, bytes] = {
    "RF64 of 4 TB": rf64(data_size=4 << 40),
    "RF64 of 8 EB": rf64(data_size=(1 << 63) - 1),
    "WAV of 2 GB": wav(data_size=0x7FFFEFF0),
    "rate 0": wav(rate=0),
    "rate 2^31": wav(rate=1 << 31),
    "rate 2^32 - 1": wav(rate=(1 << 32) - 1),
    "no channel": wav(channels=0),
    "65 channels": wav(channels=65),
    "65535 channels": wav(channels=65535),
    "no bits": wav(bits=0),
    "65535 bits": wav(bits=65535),
    "chunk of 2 GB": wav(extra=b"LIST\xff\xff\xff\x7fINFO"),
    "cues of 2 GB": wav(extra=b"cue \xf0\xff\xff\x7f\xff\xff\xff\x0f"),
    "broadcast extension of 2 GB": wav(extra=b"bext\xf0\xff\xff\x7f"),
    "AIFF": b"FORM\xff\xff\xff\xffAIFFCOMM\0\0\0\x12\xff\xff\xff\xff\xff\xff\0\x10" + bytes(10),
    "CAF": b"caff\0\1\0\0desc" + struct.pack(">Q", 32) + bytes(32) + b"data" + b"\xff" * 8,
    "W64": b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00" + b"\xff" * 100,
    "MAT5": b"MATLAB 5.0 MAT-file" + bytes(200),
    "a program": b"\x7fELF" + bytes(200),
}


def claiming(path: Path, samples: int) -> bytes:
    """A FLAC whose header claims so many samples."""
    data = bytearray(write(path, speech(1.0)).read_bytes())
    data[21:26] = bytes([data[21] & 0xF0 | samples >> 32]) + (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.processes
def test_headers_that_lie_are_refused_before_any_memory_is_taken(tmp_path: Path) -> None:
    """In a process of its own, whose peak of memory and time is known."""
    for name, content in LIES.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
    (tmp_path / "hours.flac").write_bytes(claiming(tmp_path / "x.flac", 1 << 33))
    (tmp_path / "x.flac").write_bytes(claiming(tmp_path / "x.flac", (1 << 36) - 1))
    write(tmp_path / "x.wav", speech(0.5))
    program = """
import resource, sys, time
from pathlib import Path
from higgstune.data.audio import read_audio, read_recording
from higgstune.data.rejection import RowError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
read_recording(Path(sys.argv[1]) / "x.wav")
for path in sorted(Path(sys.argv[1]).iterdir()):
    before, begun = peak(), time.process_time()
    try:
        read_recording(path)
        reason = "read"
    except RowError as error:
        reason = error.reason
    try:
        read_audio(path)
    except RowError:
        pass
    print(path.name, reason, peak() - before, round(time.process_time() - begun, 2), sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == len(LIES) + 3
    for name, reason, megabytes, seconds in lines:
        assert reason == ("read" if name == "x.wav" else "unreadable_audio"), name
        assert int(megabytes) < 200, name
        assert float(seconds) < 1, name


@pytest.mark.parametrize("format", ["AIFF", "AU", "CAF", "W64", "MAT5", "PAF", "VOC", "NIST"])
def test_unsupported_formats_never_reach_libsndfile(tmp_path: Path, format: str) -> None:
    """It knows them by their content, whatever the file is called; that is where most of its faults were found."""
    path = tmp_path / "a.wav"
    soundfile.write(path, speech(0.5), RATE, format=format)
    with pytest.raises(RowError, match="is not a wav, flac, mp3, ogg, opus, m4a, "):
        read_recording(path)


def test_hours_of_compressed_silence_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.flac", np.zeros(RATE * 120, np.int16))
    assert read_recording(path).seconds == 120
    monkeypatch.setattr(audio, "_MAX_IN_MEMORY", RATE * 60)  # as if that were the hours
    for read in (read_recording, read_audio):
        with pytest.raises(RowError, match="as only silence or a damaged header does"):
            read(path)
    assert read_recording(write(tmp_path / "b.flac", speech(120.0))).seconds == 120


@pytest.mark.parametrize("part", [(float("nan"), None), (1e308, None), (-1.0, None), (0.0, float("inf"))])
def test_impossible_parts(tmp_path: Path, part: tuple[float, float | None]) -> None:
    with pytest.raises(RowError) as refused:
        read_audio(write(tmp_path / "a.wav", speech(0.5)), *part)
    assert refused.value.reason == "segment_outside"


def test_an_rf64_that_is_cut_off_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    whole = rf64(bytes(RATE))
    path.write_bytes(whole)
    assert read_recording(path).samples == RATE // 2
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RowError, match="cut off"):
        read_recording(path)


# Recipes

PLAIN = "data: {store: x}\nstages: [{name: a, kind: full, epochs: 1}]\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS, "more than 10000 values"),
        (MERGES, "more than 10000 values"),
        ("[" + "1, " * 50_000 + "]", "more than 10000 values"),
        ("[" * 100_000, "more than 32 levels"),
        ("\n".join(" " * n + "a:" for n in range(500)), "more than 32 levels"),
        ("a: &a [*a]", "inside of itself"),
        (PLAIN + "seed: " + "1" * 10_000, "too large"),
        (PLAIN + "seed: 0x" + "f" * 90, "too large"),
        (PLAIN + "seed: " + "1:" * 5_000 + "1", "too large"),
        (PLAIN + "seed: " + "1:" * 200 + "1.5", "too large"),
        (PLAIN + "seed: 0b_", "is not a number"),
        (PLAIN + "seed: 4294967296", "seed: .*less than"),
        (PLAIN + "seed: 1\nlog_steps: 2\nseed: 3", r"the key 'seed' stands twice(.|\n)*line 5"),
        ("data: {store: x, store: y}", "the key 'store' stands twice"),
        (PLAIN + "init_adapter: !!python/object/apply:os.system [id]", "the tag .*os.system' is not read"),
        (PLAIN + "seed: !!int x", "the tag .* is not read"),
        (PLAIN + "init_adapter: !!timestamp x", "the tag .* is not read"),
        (PLAIN + "init_adapter: a\0b", "not valid YAML"),
        (PLAIN + "#" * (1 << 18), "larger than 256 kB"),
        ("? " + "k" * 200_000 + "\n: 1", "unknown key"),
    ],
)
def test_recipes_of_strangers(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    begun = time.process_time()
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)
    assert time.process_time() - begun < 5


def test_what_yaml_is_still_good_for(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "\ufeffdata: {store: 2024-01-31}\nstages:\n"
        "- &a {name: a, kind: full, epochs: 1.5}\n- {<<: *a, name: b, epochs: 2}\n",
        encoding="utf-8",
    )
    recipe = load_recipe(path, ["stages.0.learning_rate=5e-5"])
    assert recipe.data.store == "2024-01-31"
    assert [(stage.name, stage.epochs, stage.learning_rate) for stage in recipe.stages] == [
        ("a", 1.5, 5e-5),
        ("b", 2.0, 1e-4),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages." + "9" * 5_000 + ".name=b", "is not an index of a list"),
        ("lora.r={a: 1, a: 2}", "stands twice"),
        ("lora.r=!!python/name:os.system", "is not read"),
        ("lora.r=" + "[" * 5_000, "levels deep"),
        ("lora.r=\udcff", "not UTF-8"),
    ],
)
def test_overrides_of_strangers(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(PLAIN)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, [override])


def test_an_override_changes_one_stage_of_two_that_an_alias_made(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {store: x}\nlora: &a {r: 4}\nstages: [&s {name: a, kind: full, epochs: 1}, *s]\n")
    assert [s.name for s in load_recipe(path, ["stages.1.name=b"]).stages] == ["a", "b"]


@pytest.mark.parametrize("name", ["..", "a/b", "CON", "nul.txt", "x" * 65, "run.json", "Recipe.yaml", "a.", ""])
def test_stage_names_that_cannot_name_a_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(PLAIN.replace("name: a", f"name: {json.dumps(name)}"))
    with pytest.raises(ConfigError, match=r"stages\.0\.name"):
        load_recipe(path)
