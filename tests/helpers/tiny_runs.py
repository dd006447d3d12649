"""Recordings, recipes and histories of runs that take seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from processes import forked_proofs  # noqa: F401
from tiny_checkpoint import SENTENCES

import higgstune
from higgstune.config.recipe import Recipe, parse_recipe

DEMO_CODEC = Path(higgstune.__file__).parent / "demo" / "assets" / "codec"


def make_recordings(folder: Path, clips: int = 8, *, step: float = 40, glide: float = 300) -> Path:
    """Short glides of a tone, each with a text; the smaller `step` and `glide` (Hz), the sooner codes are learnt."""
    folder.mkdir()
    for i in range(clips):
        seconds = np.arange(int(24_000 * (0.6 + 0.1 * i))) / 24_000
        tone = 0.3 * np.sin(2 * np.pi * (200 + step * i + glide * seconds) * seconds)
        soundfile.write(folder / f"clip{i}.wav", tone, 24_000)
        (folder / f"clip{i}.txt").write_text(f"{SENTENCES[i % len(SENTENCES)]} {i}")
    return folder


def recipe(world: Path, **changes: Any) -> Recipe:
    stage = {"max_steps": 6, "learning_rate": 5e-3, "batch_size": 2}
    tree: dict[str, Any] = {
        "model": {"checkpoint": str(world / "base"), "device": "cpu", "dtype": "float32"},
        "data": {"store": str(world / "data")},
        "lora": {"r": 4, "alpha": 8},
        "stages": [{"name": "stage1", "kind": "text", **stage}, {"name": "stage2", "kind": "full", **stage}],
        "log_steps": 2, "eval_steps": 3, "save_steps": 2, "evaluation": {"clips": 0},
    }  # fmt: skip
    return parse_recipe(tree | changes, where="test")


def history(run: Path, stage: str) -> list[dict[str, Any]]:
    return json.loads((run / "run.json").read_text())["stages"][stage]["history"]
