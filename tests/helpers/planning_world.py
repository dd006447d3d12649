"""A small checkpoint and a code store of clips of known lengths, written without a recording."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tiny_checkpoint import SENTENCES, random_codes, save_tiny_checkpoint

import higgstune
from higgstune.codec import load_codec
from higgstune.config.recipe import Recipe, parse_recipe
from higgstune.data.entry import Entry
from higgstune.data.shard_reader import StoreInfo
from higgstune.data.shard_writer import write_store

CODEC = Path(higgstune.__file__).parent / "demo" / "assets" / "codec"
SHAPE = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}
ROWS = 8


def make_world(folder: Path) -> Path:
    """`folder/base` with its codec, and `folder/data`."""
    save_tiny_checkpoint(folder / "base", **SHAPE)
    shutil.copytree(CODEC, folder / "base" / "codec")
    frames = np.random.default_rng(0).integers(150, 300, ROWS + 2)
    entries, codes = [], {}
    for n, count in enumerate(frames):
        key = hashlib.sha256(str(n).encode()).hexdigest()
        codes[key] = random_codes(int(count), n)
        entries.append(_entry(n, key, int(count)))
    (folder / "data").mkdir()
    info = StoreInfo(
        codec=str(folder / "base" / "codec"), codec_revision=load_codec(str(folder / "base" / "codec")).revision,
        sample_rate=24_000, frame_rate=25.0, num_codebooks=8, codebook_size=1024, text_normalization="none",
        higgstune_version="test", rows={"train": ROWS, "validation": 2}, hours={"train": 0.0, "validation": 0.0},
    )  # fmt: skip
    write_store(folder / "data", entries, codes.__getitem__, {}.get, info)
    return folder


def _entry(n: int, key: str, frames: int) -> Entry:
    return Entry(
        id=f"row{n}", text=f"{SENTENCES[n % len(SENTENCES)]} {n}", speaker="a", language="en", scene=None,
        duration=frames / 25, reference_id=None, reference_text=None, messages=None, start_index=None,
        audio_sha256=key, recording_sha256=key, reference_sha256=None, context_sha256=[], target_recordings=[key],
        context_recordings=[], recording_samples=960 * frames, recording_rate=24_000, recording_sketch=[0.0] * 4,
        source_key=str(n), frames=frames, split="train" if n < ROWS else "validation",
    )  # fmt: skip


def recipe(world: Path, *, stage: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """A recipe of one full stage."""
    tree: dict[str, Any] = {
        "model": {"checkpoint": str(world / "base"), "device": "cpu", "dtype": "float32"},
        "data": {"store": str(world / "data")},
        "lora": {"r": 8, "alpha": 16},
        "stages": [{"name": "voice", "kind": "full", "epochs": 2, "batch_tokens": 1024} | (stage or {})],
        "report_to": [],
    }
    return parse_recipe(tree | changes, where="test")
