"""What the readers of files from strangers must keep to, whatever they are given; for the tests and for the fuzzers.

Each check calls a reader on bytes. The reader may succeed, or raise the one error that it documents; any other
exception is a finding, and so is a result that breaks a rule.
"""

import csv
import io
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

from higgstune.data.audio import read_audio, read_recording
from higgstune.data.clips import Checker, Limits
from higgstune.data.entry import SourceKeys, fallback_ids, new_entry
from higgstune.data.importers import read_source
from higgstune.data.manifest import Utterance
from higgstune.data.rejection import REASONS, Rejection, RowError
from higgstune.data.source import SourceRow
from higgstune.errors import ConfigError, DataError

RECORDING, OTHER = "a.wav", "b.wav"  # the files beside every source
SECRET = "secret.wav"  # a recording outside of the source's folder: no row may come to it
FORMATS = ("manifest.jsonl", "metadata.csv", "data.json", "metadata.json", "a.txt")


def source_folder(parent: Path) -> Path:
    """A folder for `check_source`, with two recordings, and another one outside of it."""
    rate = 8_000
    folder = parent / "source"
    folder.mkdir()
    for number, path in enumerate((folder / RECORDING, folder / OTHER, parent / SECRET)):
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, rate // 2)
        soundfile.write(path, noise, rate, subtype="PCM_16")
    (folder / "out").symlink_to(parent)
    return folder


def check_source(folder: Path, name: str, content: bytes) -> tuple[int, int]:
    """Every row of a source that holds `content` as the file `name` -> (rows that are fit, rows refused).

    (0, 0) where the source as a whole is refused. `folder` is from `source_folder`.
    """
    path = folder / name
    path.write_bytes(content)
    fit, refused = 0, 0
    checker = Checker(Limits(frame_rate=25.0, max_seconds=30.0))
    keys = SourceKeys()
    try:
        for row in read_source(folder if name == "a.txt" else path):
            try:
                _check_row(row, checker, keys, folder)
                fit += 1
            except RowError as error:
                _check_refusal(row, error)
                refused += 1
    except RowError as error:
        raise AssertionError("a row's error came as that of the whole source") from error
    except DataError as error:
        _must(str(error) != "", "an error without a message")
    finally:
        path.unlink()
    return fit, refused


def _must(holds: bool, rule: str) -> None:
    if not holds:
        raise AssertionError(rule)


def _check_row(row: SourceRow, checker: Checker, keys: SourceKeys, folder: Path) -> None:
    candidate = checker.check(row)
    assert isinstance(row.content, Utterance)
    for clip in candidate.clips:
        assert clip.path.resolve().parent == folder.resolve(), f"{clip.path} is outside"
    entry = new_entry(candidate, keys.of(row, candidate.utterance))
    fallback_ids(candidate.utterance, row.location)
    for value in asdict(entry).values():
        json.dumps(value, ensure_ascii=False).encode()  # as Parquet will have it: no half of a surrogate pair


def _check_refusal(row: SourceRow, error: RowError) -> None:
    assert error.reason in REASONS
    assert 0 < len(str(error)) < 10_000
    Rejection(row.location, row.id, row.audio, error.reason, str(error)).to_json().encode()


def check_recipe(folder: Path, content: bytes, overrides: list[str]) -> bool:
    """Read a recipe, save it, and read the copy -> whether it is valid."""
    from higgstune.config.recipe import load_recipe, save_recipe  # brings torch

    path = folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        recipe = load_recipe(path, overrides)
    except ConfigError as error:
        _must(0 < len(str(error)) < 100_000, "an error without a message, or with a whole file in it")
        return False
    for stage in recipe.stages:
        assert (folder / stage.name).parent == folder
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe
    return True


def check_audio(folder: Path, content: bytes, start: float | None = None, end: float | None = None) -> bool:
    """Read a recording as a whole, and a part of it -> whether it is valid."""
    path = folder / "clip.wav"
    path.write_bytes(content)
    recording = None
    try:
        recording = read_recording(path)
    except RowError as error:
        _must(error.reason == "unreadable_audio", error.reason)
    try:
        waveform, rate = read_audio(path, start, end, max_seconds=60.0)
    except RowError as error:
        _must(error.reason in ("unreadable_audio", "segment_outside", "too_long"), error.reason)
        return recording is not None
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert len(waveform) <= 60 * rate
    if recording is not None:
        assert rate == recording.rate
        assert all(np.isfinite(recording.sketch))
        if start is None and end is None:
            assert len(waveform) == recording.samples
    return recording is not None


TARGET = {"role": "assistant", "content": [{"type": "audio", "url": RECORDING}]}
ROWS: list[Any] = [
    {"audio": RECORDING, "text": "Hello.", "id": "1", "speaker": "anna", "language": "en", "scene": "In a hall."},
    {"audio": RECORDING, "text": "Hello.", "start": 0.0, "end": 0.4},
    {"audio": "../" + SECRET, "text": "Hello."},
    {"audio": "out/" + SECRET, "text": "Hello."},
    {"audio": RECORDING, "text": "Hello.", "reference_audio": OTHER, "reference_text": "Hello."},
    {"audio": RECORDING, "text": "Hello.", "reference_audio": "../" + SECRET, "reference_text": "Hello."},
    {"messages": [{"role": "user", "content": "Hello."}, TARGET], "start_index": 1},
    {
        "messages": [
            {"role": "system", "content": "Talk.\n<|scene_desc_start|>\nA hall.\n\nTwo voices.\n<|scene_desc_end|>"},
            {"role": "user", "content": [{"type": "text", "text": "Hello."}, {"type": "audio", "audio_url": OTHER}]},
            {"role": "assistant", "content": [{"type": "audio", "url": RECORDING, "offset": 0.1, "duration": 0.35}]},
        ]
    },
]
SAMPLES: list[Any] = [
    {"audio_file": RECORDING, "transcript": "Hello.", "speaker_id": "anna", "scene": "quiet_room", "language": "en"},
    {"audio_file": RECORDING, "transcript_file": "../" + SECRET},
    {"audio_file": RECORDING, "transcript": "Hello.", "ref_audio_file": OTHER, "ref_transcript": "Hello."},
    {
        "audio_file": RECORDING,
        "transcript": "Hello.",
        "ref_speakers": [{"speaker_tag": "[SPEAKER0]", "ref_audio_file": OTHER, "ref_transcript": "Hello."}],
    },
]
RECIPE: dict[str, Any] = {
    "model": {"checkpoint": "base", "dtype": "auto", "audio_attention": True, "whisper": None},
    "data": {"store": "data", "reference": "turn"},
    "lora": {"r": 16, "alpha": 32.0, "dropout": 0.05, "dora": False},
    "stages": [
        {"name": "text", "kind": "text", "max_steps": 5, "learning_rate": "1e-4", "text_targets": "transcript"},
        {"name": "voice", "kind": "full", "epochs": 1.5, "codebook_weights": [2, 1, 1, 1, 1, 1, 1, 1], "batch_size": 2},
    ],
    "seed": 7,
    "report_to": ["tensorboard"],
}


def source_seeds() -> Iterator[tuple[str, bytes]]:
    """A whole source of each format."""
    yield "manifest.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    yield "data.json", json.dumps([row for row in ROWS if "messages" in row]).encode()
    yield "metadata.json", json.dumps({"samples": SAMPLES}).encode()
    yield "metadata.csv", f"a|Hello.|Hello.\n../{SECRET[:-4]}|Hello.|Hello.\n".encode()
    table = io.StringIO()
    csv.writer(table).writerows([["file_name", "text", "speaker"], [RECORDING, "Hello, you.", "anna"]])
    yield "metadata.csv", table.getvalue().encode()
    yield "a.txt", "Hello.".encode("utf-16")


def recipe_seeds() -> Iterator[bytes]:
    """Recipes with what YAML has."""
    yield yaml.safe_dump(RECIPE).encode()
    yield json.dumps(RECIPE).encode()
    yield b"data: {store: x}\nstages:\n- &a {name: a, kind: full, epochs: 1}\n- {<<: *a, name: b}\n"


def audio_seeds(folder: Path) -> Iterator[bytes]:
    """A short recording in each format that is read."""
    rate = 8_000
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (rate // 4, 2))
    formats = {
        "WAV": ("PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"),
        "WAVEX": ("PCM_16",),
        "RF64": ("PCM_16",),
        "FLAC": ("PCM_16", "PCM_24"),
        "OGG": ("VORBIS", "OPUS"),
        "MP3": ("MPEG_LAYER_III",),
    }
    path = folder / "seed"
    for format, subtypes in formats.items():
        for subtype in subtypes:
            channels = 1 if subtype == "GSM610" else 2
            soundfile.write(path, noise[:, :channels], rate, format=format, subtype=subtype)
            yield path.read_bytes()
    path.unlink()


def wav(
    data: bytes = bytes(2_000),
    *,
    rate: int = 8_000,
    channels: int = 1,
    bits: int = 16,
    tag: int = 1,
    data_size: int | None = None,
    extra: bytes = b"",
) -> bytes:
    """A WAV with any header; sizes that are not given are correct."""
    align = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits)
    size = len(data) if data_size is None else data_size
    chunks = b"fmt \x10\0\0\0" + form + extra + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", (4 + len(chunks) - len(data) + size) & 0xFFFFFFFF) + b"WAVE" + chunks


def rf64(data: bytes = bytes(2_000), *, data_size: int | None = None) -> bytes:
    """An RF64 file: a WAV with sizes of 64 bits."""
    size = len(data) if data_size is None else data_size
    sizes = b"ds64" + struct.pack("<IQQQI", 28, (size + 100) & (1 << 64) - 1, size, size // 2, 0)
    form = b"fmt \x10\0\0\0" + struct.pack("<HHIIHH", 1, 1, 8_000, 16_000, 2, 16)
    return b"RF64\xff\xff\xff\xffWAVE" + sizes + form + b"data\xff\xff\xff\xff" + data
