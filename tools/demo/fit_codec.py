"""Fit the demo's codec to synthesised speech, and encode a corpus with it.

    python fit_codec.py fit OUT hibari_folder:30 rms_folder:15     folder of `make_voices.py corpus`, minutes
    python fit_codec.py encode CODEC CORPUS_FOLDER OUT.parquet     columns id, text, speaker, codes, words, sounds
    python fit_codec.py encode CODEC CORPUS_FOLDER OUT.parquet --shift 0.8 1.2 --copies 2     the same as other voices

Needs higgstune and scikit-learn.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr

from higgstune.codec.mel import MelCodec

SAMPLE_RATE = 24_000
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("speaker", pa.string()),
        ("codes", pa.list_(pa.list_(pa.uint16(), 8))),
        ("words", pa.list_(pa.list_(pa.float32()))),
        ("sounds", pa.list_(pa.string())),
    ]
)
ROWS_PER_GROUP = 500


def read_corpus(folder: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each row of `metadata.jsonl` with its clip, [samples] float32 at 24 kHz."""
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        waveform, rate = soundfile.read(folder / row["audio"], dtype="float32")
        yield row, soxr.resample(waveform, rate, SAMPLE_RATE).astype(np.float32)


def first_minutes(folder: Path, minutes: float) -> Iterator[np.ndarray]:
    left = minutes * 60 * SAMPLE_RATE
    for _, waveform in read_corpus(folder):
        yield waveform
        left -= len(waveform)
        if left <= 0:
            break


def fit(out: Path, sources: list[str], seed: int) -> None:
    waveforms: list[np.ndarray] = []
    for source in sources:
        folder, minutes = source.rsplit(":", 1)
        waveforms.extend(first_minutes(Path(folder), float(minutes)))
    MelCodec.fit(waveforms, seed).save_pretrained(out)


def shifted(row: dict[str, Any], waveform: np.ndarray, factor: float) -> tuple[dict[str, Any], np.ndarray]:
    """The clip played `factor` times as fast: higher or lower, in pitch and in the size of the speaker's throat."""
    faster = soxr.resample(waveform, SAMPLE_RATE * factor, SAMPLE_RATE).astype(np.float32)
    words = [(start / factor, end / factor) for start, end in row["words"]]
    return row | {"speaker": "other", "words": words}, np.clip(faster, -1, 1)


def copies_of(
    corpus: Path, copies: int, low: float, high: float, seed: int
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each clip `copies` times, with factors from `low` to `high`."""
    generator = np.random.default_rng(seed)
    for row, waveform in read_corpus(corpus):
        for _ in range(copies):
            yield shifted(row, waveform, generator.uniform(low, high))


def encode(codec_folder: Path, clips: Iterator[tuple[dict[str, Any], np.ndarray]], out: Path) -> None:
    codec = MelCodec.from_pretrained(codec_folder)
    schema = SCHEMA.with_metadata({"codec_revision": codec.revision})
    rows: list[dict[str, object]] = []
    with pq.ParquetWriter(out, schema) as writer:
        for row, waveform in clips:
            kept = {name: row[name] for name in ("id", "text", "speaker", "words", "sounds")}
            rows.append(kept | {"codes": codec.encode(waveform).tolist()})
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fitting = commands.add_parser("fit")
    fitting.add_argument("out", type=Path)
    fitting.add_argument("sources", nargs="+", metavar="FOLDER:MINUTES")
    fitting.add_argument("--seed", type=int, default=0)
    encoding = commands.add_parser("encode")
    encoding.add_argument("codec", type=Path)
    encoding.add_argument("corpus", type=Path)
    encoding.add_argument("out", type=Path)
    encoding.add_argument("--shift", type=float, nargs=2, metavar=("LOW", "HIGH"), help="play each clip so much faster")
    encoding.add_argument("--copies", type=int, default=1)
    encoding.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "fit":
        fit(options.out, options.sources, options.seed)
    else:
        clips = read_corpus(options.corpus)
        if options.shift:
            clips = copies_of(options.corpus, options.copies, *options.shift, options.seed)
        encode(options.codec, clips, options.out)


if __name__ == "__main__":
    main()
