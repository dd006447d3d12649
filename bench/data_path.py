"""The data path: from a prepared store to batches, against a manifest that Python reads and pads."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import Case, Found, Meter, Row, alternate, finish, parser, rates, same_work, say, values
from stores import ManifestExamples, demo_prompter, label_entries, make_store, write_as_earlier_trainers
from torch.utils.data import DataLoader

from higgstune.batch.collate import PaddedCollator, count_tokens
from higgstune.batch.dataset import RowExamples
from higgstune.batch.loader import PackLoader, example_lengths
from higgstune.batch.packing import PackSize
from higgstune.data.store import CodeStore
from higgstune.families.higgs_v2.prompter import Prompter, SpecialIds

EXAMPLE = "python bench/data_path.py --rows 1000 10000 --json data_path.json"
BATCH_TOKENS, BATCH_SIZE = 4096, 16  # about as many clips in both
KINDS = {"json": "codes as JSON", "npy": "a .npy a clip", "store": "store"}


def examples_of(folder: Path, kind: str, prompter: Prompter) -> Any:
    """The training examples of a folder: of its store, or of its manifest."""
    if kind == "store":
        return RowExamples(CodeStore.open(folder).split("train"), prompter, "transcript")
    return ManifestExamples(folder, prompter, arrays=kind == "npy")


def passage(folder: str, kind: str, *, with_lengths: bool = True) -> Found:
    """CPU-seconds from the disk to a data set with random access; of the lengths of all examples, which packing and
    grouping by length need; and of one epoch of batches: packs, or padded ones of a manifest.
    """
    prompter = demo_prompter()
    opening, measuring, epoch = Meter(), Meter(), Meter()
    with opening:
        examples = examples_of(Path(folder), kind, prompter)
    loader = _loader(examples, kind)
    if with_lengths:
        with measuring:
            lengths = example_lengths(examples)
    tokens = labels = 0
    with epoch:
        for batch in loader:
            tokens += count_tokens(batch) if kind == "store" else int(batch["attention_mask"].sum())
            labels += label_entries(batch)
    assert not with_lengths or lengths.sum() == tokens
    parts = {"opening": opening, "lengths": measuring, "epoch": epoch}
    return {"rows": len(examples), "tokens": tokens, "labels": labels} | {k: m.cpu_seconds for k, m in parts.items()}


def _loader(examples: Any, kind: str) -> DataLoader[Any]:
    if kind == "store":
        return PackLoader(examples, PackSize(tokens=BATCH_TOKENS), seed=0)
    collator = PaddedCollator(pad_id=0, stream_eos=examples.prompter.ids.stream_eos)
    return DataLoader(examples, BATCH_SIZE, shuffle=True, collate_fn=collator)


def waiting(folder: str, kind: str, steps: int, tokens: int = BATCH_TOKENS, layers: int = 4) -> Found:
    """Training the miniature for some steps on packs of either data set, and how long it waits for the next one."""
    from miniature import Training, small_config

    config = small_config(scale=16, layers=layers)
    prompter = Prompter(demo_prompter().tokenizer, SpecialIds.from_config(config))
    loader = PackLoader(examples_of(Path(folder), kind, prompter), PackSize(tokens=tokens), seed=0)
    training = Training(config)
    batches = iter(loader)
    training.step(next(batches))  # the first pack: once in an epoch, not in every step
    waited = 0.0
    trained = 0
    began = time.perf_counter()
    for _ in range(steps):
        waits_since = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - waits_since
        training.step(batch)
        trained += count_tokens(batch)
    total = time.perf_counter() - began
    return {"waited_percent": 100 * waited / total, "tokens": trained}


def encoding(seconds: float, size: str) -> Found:
    """From a waveform to codes, as earlier trainers do in every epoch."""
    from codec import random_codec

    codec = random_codec(size)
    waveform = np.random.default_rng(0).normal(scale=0.1, size=round(seconds * codec.sample_rate)).astype(np.float32)
    codec.encode(waveform[: codec.sample_rate])
    with Meter() as meter:
        codes = codec.encode(waveform)
    return meter.found(seconds=len(codes) / codec.frame_rate)


def reading(folder: str, rows: int) -> Found:
    """In its place: codes of rows in random order, from the store."""
    view = CodeStore.open(folder).split("train")
    order = np.random.default_rng(0).permutation(len(view))[:rows]
    with Meter() as meter:
        frames = sum(len(view[int(i)].codes) for i in order)
    return meter.found(seconds=frames / view.store.info.frame_rate)


def measure(folder: Path, size: int, *, repeats: int, threads: int, fresh: bool = True) -> list[Row]:
    """Opening, lengths and an epoch of one size."""
    write_as_earlier_trainers(make_store(folder, size), folder)
    cases = {
        kind: Case(passage, {"folder": str(folder), "kind": kind, "with_lengths": kind != "npy"}) for kind in KINDS
    }
    found = alternate(cases, repeats=repeats, threads=threads, fresh=fresh)
    for counted in ("rows", "tokens", "labels"):
        same_work(*found.values(), counted=counted)
    rows = []
    for part, name, kinds in (
        ("opening", "opening", ("json", "npy")),
        ("lengths", "lengths", ("json",)),
        ("epoch", "an epoch of batches", ("json", "npy")),
    ):
        for kind in kinds:
            sides = [rates(found[side], "rows", per=part) for side in (kind, "store")]
            rows.append(Row(f"{name}, {size:,} rows, against {KINDS[kind]}", *sides, "rows/CPU-s"))
    sides = [rates(found[side], "tokens", per="epoch") for side in ("json", "store")]
    rows.append(Row(f"an epoch of batches, {size:,} rows", *sides, "tokens/CPU-s"))
    if fresh:
        peaks = [values(found[kind], "peak_bytes", scale=1e-6) for kind in ("json", "store")]
        rows.append(Row(f"peak memory of all that, {size:,} rows", *peaks, "MB"))
    return rows


def wait_row(folder: Path, steps: int, *, repeats: int, threads: int, fresh: bool) -> Row:
    """How long the training of the miniature waits for data."""
    cases = {kind: Case(waiting, {"kind": kind, "folder": str(folder), "steps": steps}) for kind in ("json", "store")}
    found = alternate(cases, repeats=repeats, threads=threads, fresh=fresh)
    waited = [values(found[kind], "waited_percent") for kind in ("json", "store")]
    return Row("training waits", *waited, "% of the time")


def encoding_row(folder: Path, *, seconds: float, size: str, repeats: int, threads: int, fresh: bool) -> Row:
    """CPU-seconds for a second of audio in every epoch; no part of any baseline above."""
    cases = {
        "encode": Case(encoding, {"seconds": seconds, "size": size}),
        "read": Case(reading, {"folder": str(folder), "rows": 500}),
    }
    found = alternate(cases, repeats=repeats, threads=threads, fresh=fresh)
    costs = [[one["cpu_seconds"] / one["seconds"] for one in found[name]] for name in cases]
    return Row("codes of an epoch, encoded anew against read", *costs, "CPU-s/s of audio")


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__ or "", EXAMPLE)
    options.add_argument("--rows", type=int, nargs="+", metavar="N", help="sizes of the store (default: 1000 10000)")
    options.add_argument("--steps", type=int, default=15, help="training steps that may wait (default: 15)")
    options.add_argument("--encode-seconds", type=float, default=4.0, help="audio to encode with the full-size codec")
    options.add_argument("--folder", type=Path, help="keep stores and manifests there, and use those of an earlier run")
    given = options.parse_args()
    sizes = given.rows or ([200] if given.quick else [1000, 10_000])
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folders = {size: folder / f"store-{size}" for size in sizes}
        shared = {"repeats": given.repeats, "threads": given.threads}
        rows = [row for size in sizes for row in measure(folders[size], size, **shared)]
        say("encoding")
        size = "small" if given.quick else "full"
        rows.append(encoding_row(folders[sizes[0]], seconds=given.encode_seconds, size=size, **shared, fresh=True))
        rows.append(wait_row(folders[sizes[0]], 3 if given.quick else given.steps, **shared, fresh=True))
    finish("data_path", rows, given)


if __name__ == "__main__":
    main()
