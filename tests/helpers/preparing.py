"""Preparation with a codec that costs nothing, and a look at its results."""

import json
from pathlib import Path
from typing import Any

from recordings import CountingCodec, clip

from higgstune.data.prepare import prepare
from higgstune.data.store import CodeStore
from higgstune.data.summary import PrepareSummary


def run(source: Path, out: Path, codec: CountingCodec | None = None, **options: Any) -> PrepareSummary:
    """`prepare`, with the codec for tests where none is given."""
    return prepare(source, out, codec=codec or CountingCodec(), **options)


def manifest(folder: Path, *rows: dict[str, Any] | str) -> Path:
    """Write `manifest.jsonl`: rows, or lines as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / "manifest.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rejected(out: Path) -> list[dict[str, Any]]:
    """The rows that were refused."""
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def ids(out: Path) -> list[str]:
    """The ids in a store, sorted."""
    return sorted(row.id for row in CodeStore.open(out).rows())


def recordings(folder: Path, count: int, first: int = 0) -> Path:
    """Numbered recordings, each with a transcript."""
    for n in range(first, first + count):
        clip(folder, f"{n:03d}.wav", n)
    return folder
