"""Files from strangers: nothing of them runs, leads out of its folder, or takes more memory and time than it should."""

import ast
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from commands import Command
from hostile_input import rf64, wav
from preparing import manifest, rejected, run
from recordings import RATE, clip, speech, write
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_codec import save_tiny_codec

import higgstune
from higgstune.codec import load_codec
from higgstune.data import audio
from higgstune.data.audio import read_audio, read_recording
from higgstune.data.import_folder import read_transcript
from higgstune.data.importers import read_source
from higgstune.data.manifest import MAX_LINE, Utterance, parse_line, read_manifest
from higgstune.data.rejection import RowError
from higgstune.data.store import CodeStore
from higgstune.data.text import normalize_text
from higgstune.data.whisper_features import WhisperFeatures, read_feature_index
from higgstune.errors import CheckpointError, ConfigError, DataError
from higgstune.model.adapters import Lora, add_lora, find_adapter, load_adapter
from higgstune.model.conditioning import Conditioning
from higgstune.model.layout import read_json, safetensors_keys
from higgstune.model.load import load_model, load_tokenizer
from higgstune.training.recipe import load_recipe

PACKAGE = Path(higgstune.__file__).parent
DEMO_CODEC = PACKAGE / "demo" / "assets" / "codec"


# The package itself


def calls(tree: ast.AST) -> list[tuple[str, dict[str, str]]]:
    """The calls in a module: what is called and its keywords, as written."""
    return [
        (ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_unpickles_evaluates_or_starts_a_shell(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "torch.load", "os.system", "os.popen", "yaml.unsafe_load"), name
        assert not re.match(r"(pickle|joblib|dill|cloudpickle|shelve|marshal|zipfile|tarfile)\.(?!dumps?$)", name), name
        assert name != "yaml.load" or keywords == {"Loader": "_Loader"}, "another loader of YAML"
        assert keywords.get("shell", "False") == "False", f"{name} starts a shell"
        assert keywords.get("allow_pickle", "False") == "False", f"{name} unpickles"
        assert keywords.get("trust_remote_code", "False") == "False", f"{name} runs code from elsewhere"


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


def test_a_pipe_is_no_transcript(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(RowError, match="no transcript"):
        read_transcript(tmp_path / "a.txt")  # would wait for a writer for ever


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
def test_formats_that_nobody_promised_never_reach_libsndfile(tmp_path: Path, format: str) -> None:
    """It knows them by their content, whatever the file is called; that is where most of its faults were found."""
    path = tmp_path / "a.wav"
    soundfile.write(path, speech(0.5), RATE, format=format)
    with pytest.raises(RowError, match="is no wav, flac, mp3, ogg or opus"):
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
def test_parts_that_cannot_be(tmp_path: Path, part: tuple[float, float | None]) -> None:
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
    ("content", "told"),
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
        (PLAIN + "seed: 0b_", "is no number"),
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
def test_recipes_of_strangers(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    begun = time.process_time()
    with pytest.raises(ConfigError, match=told):
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
    ("override", "told"),
    [
        ("stages." + "9" * 5_000 + ".name=b", "no entry of a list"),
        ("lora.r={a: 1, a: 2}", "stands twice"),
        ("lora.r=!!python/name:os.system", "is not read"),
        ("lora.r=" + "[" * 5_000, "levels deep"),
        ("lora.r=\udcff", "not UTF-8"),
    ],
)
def test_overrides_of_strangers(tmp_path: Path, override: str, told: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(PLAIN)
    with pytest.raises(ConfigError, match=told):
        load_recipe(path, [override])


def test_an_override_changes_one_stage_of_two_that_an_alias_made(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {store: x}\nlora: &a {r: 4}\nstages: [&s {name: a, kind: full, epochs: 1}, *s]\n")
    assert [s.name for s in load_recipe(path, ["stages.1.name=b"]).stages] == ["a", "b"]


@pytest.mark.parametrize("name", ["..", "a/b", "CON", "nul.txt", "x" * 65, "run.json", "Recipe.yaml", "a.", ""])
def test_stage_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(PLAIN.replace("name: a", f"name: {json.dumps(name)}"))
    with pytest.raises(ConfigError, match=r"stages\.0\.name"):
        load_recipe(path)


# Code stores and Whisper features


@pytest.fixture
def store(tmp_path: Path) -> Path:
    clip(tmp_path / "in", "a.wav", 1)
    run(tmp_path / "in", tmp_path / "store")
    return tmp_path / "store"


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["shards"][0].update(name="../../etc/passwd"),
        lambda index: index["shards"][0].update(name="/etc/passwd"),
        lambda index: index["shards"][0].update(name=5),
        lambda index: index["shards"][0].update(split="test"),
        lambda index: index["shards"][0].update(split="validation"),
        lambda index: index["shards"][0].update(rows="many"),
        lambda index: index["shards"].append([]),
        lambda index: index.update(shards=None),
        lambda index: index["info"].update(num_codebooks=None),
        lambda index: index["info"].update(frame_rate="fast"),
        lambda index: index["info"].update(rows={"train": "x"}),
        lambda index: index["info"].update(settings=[]),
    ],
)
def test_an_index_of_a_stranger(store: Path, change: Callable[[Any], Any]) -> None:
    edited(store / "store.json", change)
    with pytest.raises(DataError, match=r"store\.json"):
        CodeStore.open(store)


def test_an_index_that_is_nested_deeply(store: Path) -> None:
    (store / "store.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"store\.json cannot be read"):
        CodeStore.open(store)


FEATURES = {
    "checkpoint": "x", "revision": "0123456789abcdef", "d_model": 4, "chunk_frames": 8,
    "files": [{"name": "features-0123456789ab.safetensors", "bytes": 1, "sha256": "x", "clips": ["a" * 64]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda index: index.update(revision="../../elsewhere"), "not that of its folder"),
        (lambda index: index["files"][0].update(name="../../../secret.safetensors"), "no file of features"),
        (lambda index: index["files"][0].update(clips=["../x"]), "than its hash"),
        (lambda index: index["files"][0].update(clips=5), "is damaged"),
        (lambda index: index["files"][0].update(name=None), "is damaged"),
        (lambda index: index.update(d_model="x"), "d_model a number"),
        (lambda index: index.update(files=7), "is damaged"),
        (lambda index: index.update(more=7), "is damaged"),
    ],
)
def test_an_index_of_features_of_a_stranger(tmp_path: Path, change: Callable[[Any], Any], told: str) -> None:
    path = tmp_path / "whisper" / str(FEATURES["revision"]) / "index.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(FEATURES))
    assert read_feature_index(path).d_model == 4
    edited(path, change)
    with pytest.raises(DataError, match=told):
        read_feature_index(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a" * 64: np.zeros((3, 4), np.float16)},
        {"a" * 64: np.zeros((3, 5), np.float16), "a" * 64 + ".chunks": np.array([3], np.int32)},
        {"a" * 64: np.zeros((3, 4), np.float16), "a" * 64 + ".chunks": np.array([2], np.int32)},
        {"a" * 64: np.zeros((3, 4), np.float32), "a" * 64 + ".chunks": np.array([3], np.int32)},
    ],
    ids=["no chunks", "another width", "another length", "another dtype"],
)
def test_features_that_are_not_as_their_index_says(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    import hashlib

    from safetensors.numpy import save_file as save

    path = tmp_path / "whisper" / str(FEATURES["revision"]) / "features-0123456789ab.safetensors"
    path.parent.mkdir(parents=True)
    save(tensors, path)
    index = json.loads(json.dumps(FEATURES))
    index["files"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name("index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="copy or prepare it again"):
        WhisperFeatures.open(tmp_path, "x").heard("a" * 64)


# Checkpoints


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "checkpoint")


def with_header(path: Path, header: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(100))


def shards(folder: Path, name: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder / "config.json", lambda written: written.update(changes))


def header(content: bytes, length: int | None = None) -> Callable[[Path], None]:
    return lambda folder: with_header(folder / "model.safetensors", content, length)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: shards(f, "../../outside.safetensors"), "of its own folder alone"),
        (lambda f: shards(f, "/outside.safetensors"), "of its own folder alone"),
        (lambda f: shards(f, "pytorch_model.bin"), "of its own folder alone"),
        (lambda f: shards(f, 5), "of its own folder alone"),
        (header(b"[]"), "broken header"),
        (header(b'{"a": 5}'), "broken header"),
        (header(b'{"a": {"data_offsets": [0]}}'), "broken header"),
        (header(b'{"a": {"data_offsets": [0, "x"]}}'), "broken header"),
        (header(b"[" * 100_000), "broken header"),
        (header(b"{}", length=1 << 62), "truncated or no safetensors"),
        (config(num_hidden_layers=10**9), "layers of"),
        (config(num_hidden_layers=-1), "layers of"),
        (config(num_hidden_layers="2"), "is damaged"),
        (config(hidden_size=64 * 10**6), "cannot hold"),
        (config(vocab_size=10**12), "cannot hold"),
        (config(num_attention_heads=0), "is damaged"),
        (config(pad_token_id=10**9), "token id is outside"),
        (config(audio_delay_token_id=-5), "token id is outside"),
        (config(hidden_act="os.system"), "is damaged"),
        (config(rope_parameters={"rope_type": "x"}), "is damaged"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"a":' * 100 + "1" + "}" * 100), "levels deep"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter in it"),
    ],
)
def test_a_checkpoint_of_a_stranger(checkpoint: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=told):
        load_model(checkpoint, device="cpu")


def test_a_config_cannot_name_code_for_its_attention(checkpoint: Path) -> None:
    """transformers would fetch it from the hub and run it, where the package `kernels` is installed."""
    config(_attn_implementation="owner/kernel", attn_implementation="owner/kernel")(checkpoint)
    assert load_model(checkpoint, device="cpu").config._attn_implementation == "sdpa"


def test_what_a_config_says_of_the_architecture_counts_in_every_spelling(checkpoint: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 1024
    edited(checkpoint / "config.json", lambda written: written.pop("rope_parameters"))
    config(rope_theta=123.0, rope_scaling=rope, rms_norm_eps=1e-3)(checkpoint)
    loaded = load_model(checkpoint, device="cpu").config
    assert loaded.rope_parameters == {**rope, "rope_theta": 123.0}
    assert loaded.rms_norm_eps == 1e-3


def test_a_huge_file_of_json_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 36)  # 64 GB, of which the disk has none
    with pytest.raises(CheckpointError, match="larger than 64 MB"):
        read_json(path, "")
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        safetensors_keys(path)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer.json", "[" * 100_000, "cannot be read"),
        (
            "tokenizer.json",
            '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
            "cannot",
        ),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}', "cannot be read"),
        ("tokenizer_config.json", '{"bos_token": 5}', "cannot be read"),
        ("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}', "names a file by vocab_file"),
        ("special_tokens_map.json", "[]", "cannot be read"),
    ],
)
def test_a_tokenizer_of_a_stranger(checkpoint: Path, file: str, content: str, told: str) -> None:
    (checkpoint / file).write_text(content)
    with pytest.raises(CheckpointError, match=told):
        load_tokenizer(checkpoint, load_model(checkpoint, device="cpu").config)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_no_code_of_a_checkpoint_runs(checkpoint: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is asked whether it may: an answer would come from whatever is on stdin."""
    ran = checkpoint / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Tokenizer: pass\nclass Model: pass\n")
    auto_map = {
        "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
        "AutoConfig": "evil.Model",
        "AutoModel": "evil.Model",
    }
    edited(checkpoint / place, lambda written: written.update(auto_map=auto_map))
    edited(checkpoint / "tokenizer_config.json", lambda written: written.pop("tokenizer_class", None))
    monkeypatch.setattr("builtins.input", lambda text: "y")
    model = load_model(checkpoint, device="cpu")
    if place == "tokenizer_config.json":
        with pytest.raises(CheckpointError, match="custom code"):
            load_tokenizer(checkpoint, model.config)
    else:
        load_tokenizer(checkpoint, model.config)
    assert not ran.exists()


# Adapters


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as plain peft saves it: no card, so nothing but its content speaks against a change."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    add_lora(load_model(base, device="cpu"), Lora(r=2), "text", Conditioning()).save_pretrained(str(folder))  # type: ignore[call-arg]
    return folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "adapter")


def lora(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder / "adapter_config.json", lambda written: written.update(changes))


def tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({key: change(value) for key, value in load_file(path).items()}, path)

    return rewrite


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def test_a_plain_adapter_is_loaded(base: Path, adapter: Path) -> None:
    assert load_adapter(load_model(base, device="cpu"), adapter).peft_config["default"].r == 2
    named = ["q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    lora(target_modules=named)(adapter)
    assert load_adapter(load_model(base, device="cpu"), adapter).peft_config["default"].r == 2
    lora(target_modules=[*named, "audio_mlp.up_proj"])(adapter)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(load_model(base, device="cpu"), adapter)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (pickled, "pickled weights only"),
        (lora(peft_type="PREFIX_TUNING"), "is not a LoRA configuration: peft_type"),
        (lora(peft_type=None), "is not a LoRA configuration: peft_type"),
        (lora(megatron_config={"a": 1}, megatron_core="evil"), "asks for megatron_config"),
        (lora(layer_replication=[[0, 1000]]), "asks for layer_replication"),
        (lora(rank_pattern={"(a+)+$": 3}), "asks for rank_pattern"),
        (lora(loftq_config={"a": 1}), "asks for loftq_config"),
        (lora(something_new=True), "asks for something_new"),
        (lora(init_lora_weights="pissa"), "init_lora_weights"),
        (lora(target_modules="(a+)+$"), "a pattern that Higgstune did not write"),
        (lora(target_modules=["(a+)+$"]), "target_modules"),
        (lora(target_modules=5), "target_modules"),
        (lora(target_modules=["embed_tokens"]), "is no linear layer"),
        (lora(modules_to_save=["(.*.*)*"]), "modules_to_save"),
        (lora(r="2"), "is not a LoRA configuration: r"),
        (lora(r=-2), "is not a LoRA configuration: r"),
        (lora(r=10**9), r"does not fit this base: .*expected \(1000000000"),
        (lora(lora_alpha=float("nan")), "lora_alpha"),
        (lora(bias="all"), "bias"),
        (tensors(lambda value: value * float("nan")), "holds NaN or infinity"),
        (tensors(lambda value: value.to(torch.int64)), "no floats"),
        (tensors(lambda value: value[:1].contiguous()), "does not fit"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}"), "does not fit"),
        (lambda f: (f / "higgstune.json").write_text('{"codec": ["x"]}'), "codec must be a text"),
        (lambda f: (f / "higgstune.json").write_text('{"recipe": {"lora": 5}}'), r"recipe\.lora must be an object"),
        (lambda f: (f / "higgstune.json").write_text('{"recipe":' * 100 + "1" + "}" * 100), "levels deep"),
    ],
)
def test_an_adapter_of_a_stranger(base: Path, adapter: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(adapter)
    with pytest.raises(CheckpointError, match=told):
        load_adapter(load_model(base, device="cpu"), adapter)


@pytest.mark.parametrize("place", ["../elsewhere", "/elsewhere", "stage/../../elsewhere"])
def test_a_run_names_no_adapter_outside_of_itself(tmp_path: Path, place: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"adapter": place}))
    with pytest.raises(CheckpointError, match="outside of its run"):
        find_adapter(tmp_path)
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        find_adapter(tmp_path)


# Codecs


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    return save_tiny_codec(tmp_path / "codec")


def test_a_pickled_codec_is_refused(codec: Path) -> None:
    tensors = load_file(codec / "model.safetensors")
    (codec / "model.safetensors").unlink()
    torch.save(tensors, codec / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load_codec(codec)


@pytest.mark.parametrize("part", ["", "semantic_model_config"])
def test_a_codec_cannot_name_code_for_its_attention(codec: Path, part: str) -> None:
    def change(written: dict[str, Any]) -> None:
        (written[part] if part else written)["_attn_implementation"] = "owner/kernel"

    edited(codec / "config.json", change)
    with pytest.raises(CheckpointError, match="brings _attn_implementation"):
        load_codec(codec)


@pytest.mark.parametrize(
    "change", [{"num_mels": 10**9}, {"n_fft": "x"}, {"hop": 0}, {"n_fft": 10**12}, {"components": 2.5}, {"more": 1}]
)
def test_a_fitted_codec_of_a_stranger(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(DEMO_CODEC, tmp_path / "codec")
    edited(folder / "config.json", lambda written: written.update(change))
    with pytest.raises(CheckpointError, match="cannot be read as a fitted codec"):
        load_codec(folder)


def test_a_checksum_of_a_file_elsewhere_is_refused(checkpoint: Path) -> None:
    (checkpoint / "higgstune.json").write_text(json.dumps({"files": {"../../secret": "0" * 64}}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        load_model(checkpoint, device="cpu")
