"""Prepared data for the benches: a store with random codes, and the same rows in the formats of earlier trainers."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import BENCH

from higgstune.batch.dataset import TARGET
from higgstune.codec import load_codec
from higgstune.data.entry import Entry
from higgstune.data.messages import DEFAULT_SCENE, speech_messages
from higgstune.data.shard_reader import StoreInfo
from higgstune.data.shard_writer import write_store
from higgstune.data.store import CodeStore
from higgstune.data.text import TEXT_NORMALIZATION
from higgstune.families.base import Example
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds
from higgstune.inputs import INDEX_NAME
from higgstune.kernels import IGNORE

CODEBOOKS, CODES, FRAME_RATE = 8, 1024, 25
CHARACTERS_PER_SECOND = 15
ASSETS = BENCH.parent / "src" / "higgstune" / "demo" / "assets"
MANIFEST, ARRAYS = "train.jsonl", "arrays"


def demo_prompter() -> Prompter:
    """For the demo's miniature: a tokenizer of the released one's kind, with fewer words."""
    from transformers import AutoTokenizer, HiggsAudioV2Config

    config = HiggsAudioV2Config.from_pretrained(ASSETS / "base")
    return Prompter(AutoTokenizer.from_pretrained(ASSETS / "base"), SpecialIds.from_config(config))


def make_store(folder: Path, rows: int, *, seed: int = 0, codec: Path | None = None) -> CodeStore:
    """A store of so many utterances by the project's own writer, made once: lognormal lengths of 1 to 15 s, random
    codes (which say that they are of `codec`), texts of the length that such speech has.
    """
    if not (folder / INDEX_NAME).exists():
        from workload import clip_seconds  # brings the model's class, which nothing else here needs

        folder.mkdir(parents=True, exist_ok=True)
        lengths = clip_seconds(rows, low=1, high=15, median=5, sigma=0.6, seed=seed)
        entries = {entry.audio_sha256: entry for entry in _entries(lengths, seed)}
        info = StoreInfo(
            codec="random" if codec is None else str(codec),
            codec_revision="random" if codec is None else load_codec(str(codec)).revision,
            sample_rate=24_000,
            frame_rate=FRAME_RATE,
            num_codebooks=CODEBOOKS,
            codebook_size=CODES,
            text_normalization=TEXT_NORMALIZATION,
            higgstune_version="bench",
            rows={"train": rows, "validation": 0},
            hours={"train": float(lengths.sum()) / 3600, "validation": 0.0},
        )
        write_store(folder, list(entries.values()), lambda sha256: _codes(entries[sha256]), lambda _: None, info)
    return CodeStore.open(folder)


def _entries(lengths: np.ndarray, seed: int) -> Iterator[Entry]:
    sentences = (ASSETS / "voices" / "metadata.jsonl").read_text().splitlines()
    words = sorted({word for line in sentences for word in json.loads(line)["text"].split()})
    generator = np.random.default_rng(seed)
    for number, seconds in enumerate(lengths):
        name = f"{number:06d}"
        sha256 = hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
        yield Entry(
            id=name,
            text=_text(words, max(1, round(seconds * CHARACTERS_PER_SECOND)), generator),
            speaker=f"speaker-{number % 16}",
            language="en",
            scene=None,
            duration=float(seconds),
            reference_id=None,
            reference_text=None,
            messages=None,
            start_index=None,
            audio_sha256=sha256,
            recording_sha256=sha256,
            reference_sha256=None,
            context_sha256=[],
            target_recordings=[sha256],
            context_recordings=[],
            recording_samples=round(seconds * 24_000),
            recording_rate=24_000,
            recording_sketch=generator.normal(size=16).tolist(),
            source_key=sha256[:32],
            frames=round(float(seconds) * FRAME_RATE),
            split="train",
        )


def _text(words: Sequence[str], characters: int, generator: np.random.Generator) -> str:
    drawn = " ".join(words[i] for i in generator.integers(0, len(words), size=1 + characters // 3))
    return drawn[:characters].strip() or words[0]


def _codes(entry: Entry) -> np.ndarray:
    generator = np.random.default_rng(int(entry.audio_sha256[:15], 16))
    return generator.integers(0, CODES, size=(entry.frames, CODEBOOKS)).astype(np.uint16)


def write_as_earlier_trainers(store: CodeStore, folder: Path) -> None:
    """`train.jsonl`, one row a line with its codes as JSON, and `arrays/ID.npy`: made once, from the store."""
    if (folder / MANIFEST).exists():
        return
    (folder / ARRAYS).mkdir(exist_ok=True)
    with open(folder / f"{MANIFEST}.new", "w", encoding="utf-8") as manifest:
        for row in store.split("train"):
            line = {"id": row.id, "text": row.text, "speaker": row.speaker, "duration": row.duration}
            manifest.write(json.dumps(line | {"codes": row.codes.tolist()}) + "\n")
            np.save(folder / ARRAYS / f"{row.id}.npy", row.codes)
    (folder / f"{MANIFEST}.new").rename(folder / MANIFEST)


class ManifestExamples:
    """A data set as earlier trainers have it: the manifest in memory, each example built from its line.

    Prompt, delay and labels are made by the same code as ours, so that only the data's own way is compared.
    """

    def __init__(self, folder: Path, prompter: Prompter, *, arrays: bool) -> None:
        """`arrays`: codes are read from a file for each clip; without, they are lists in the manifest."""
        with open(folder / MANIFEST, encoding="utf-8") as lines:
            self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.prompter = prompter
        self.arrays = folder / ARRAYS if arrays else None
        if arrays:
            for row in self.rows:
                del row["codes"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        codes = np.array(row["codes"]) if self.arrays is None else np.load(self.arrays / f"{row['id']}.npy")
        messages = [*speech_messages(row["text"], scene=DEFAULT_SCENE), TARGET]
        return self.prompter.example(messages, [codes], text_targets="transcript")


def label_entries(batch: dict[str, Any]) -> int:
    """The number of label entries of a batch, of text and audio, which must be equal on both sides."""
    return int((batch["audio_targets"] != IGNORE).sum()) + len(batch["text_targets"])


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Make a store with random codes, to look at or to measure with.")
    options.add_argument("folder", type=Path)
    options.add_argument("rows", type=int)
    given = options.parse_args()
    sys.stdout.write(f"{len(make_store(given.folder, given.rows))} rows in {given.folder}\n")
