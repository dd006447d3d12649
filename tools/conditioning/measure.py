"""Measures the effect of stages, audio attention and Whisper: every arm has the same data, steps and seeds.

    python tools/conditioning/measure.py --out runs/mini --recordings corpus/            the miniature
    python tools/conditioning/measure.py --out runs/real --model DIR --data STORE ...    a checkpoint; see README.md

Resumes where it was stopped. Leaves a run for each arm and seed, and results.json, results.md and curves.png in --out.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml

from higgstune.batch.collate import pack, tensors_to
from higgstune.batch.dataset import Rendering, row_example
from higgstune.codec import CODEC_FOLDER
from higgstune.config.recipe import Recipe, parse_recipe
from higgstune.data.manifest import Utterance, read_manifest, write_manifest
from higgstune.data.prepare import prepare
from higgstune.data.store import CodeStore
from higgstune.data.whisper_features import FeatureStore
from higgstune.families.higgs_v2.packed import with_training_forward
from higgstune.kernels.loss import LossWeights, add_sums, label_counts
from higgstune.model.adapters import load_adapter
from higgstune.model.load import load_model
from higgstune.model.tokenizer import load_prompter
from higgstune.training.metrics import loss_metrics
from higgstune.training.run import train

TEXT_ONLY = {"kind": "text", "text_weight": 1.0, "audio_weight": 0.0}
TEXT_AND_AUDIO = {"kind": "text", "text_weight": 1.0, "audio_weight": 1.0}
FULL = {"kind": "full", "text_weight": 0.1, "audio_weight": 1.0}
VOICES = ("awb", "kal16", "rms", "slt")  # of the miniature's arms with references
CLIPS_OF_A_VOICE = 45


@dataclass(frozen=True)
class Arm:
    """One way to spend the steps."""

    what: str
    first: dict[str, Any] | None = None  # the first stage, 30 % of the steps; None: one stage
    attention: Any = False
    whisper: bool = False
    reference: str | None = None  # where a reference stands; None: one voice, without references


ARMS = {
    "full": Arm("one full stage"),
    "full-full": Arm("full, then full: the effect of restarting the optimizer", FULL),
    "text-full": Arm("text loss only, audio frozen; then full", TEXT_ONLY),
    "both-full": Arm("text loss, and audio loss through frozen audio modules; then full", TEXT_AND_AUDIO),
    "attention": Arm("full, with audio attention by LoRA", attention="lora"),
    "attention-full": Arm("full, with audio attention trained in full", attention="full"),
    "turn": Arm("reference as an earlier turn, by its codes", reference="turn"),
    "scene": Arm("reference in the scene, by its codes", reference="scene"),
    "whisper": Arm("reference in the scene, through Whisper", whisper=True, reference="scene"),
    "whisper-attention": Arm(
        "the same, and audio attention by LoRA", attention="lora", whisper=True, reference="scene"
    ),
    "turn-attention": Arm("reference as a turn, and audio attention by LoRA", attention="lora", reference="turn"),
}


def main() -> None:
    """Train every arm with every seed, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="checkpoint; the default: the demo's miniature")
    parser.add_argument("--recordings", type=Path, help="for the miniature: a folder of metadata.jsonl for each voice")
    parser.add_argument("--data", help="for a checkpoint: store of one voice (arms without a reference)")
    parser.add_argument(
        "--references", help="for a checkpoint: store with references, several voices, Whisper features"
    )
    parser.add_argument("--whisper", help="Whisper checkpoint; without it, arms that need it are left out")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--recipe", type=Path, help="YAML with lora, learning_rate, batch_size, ... of all arms")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if args.model is None:
        torch.set_num_threads(1)
        unpack_miniature(args)
    arms = {name: ARMS[name] for name in args.arms if args.whisper or not ARMS[name].whisper}
    results = {}
    for seed in args.seeds:
        for name, arm in arms.items():
            results[name, seed] = measure(args, name, arm, seed)
            write_results(args.out, {n: a for n, a in arms.items() if (n, args.seeds[0]) in results}, results)


def unpack_miniature(args: argparse.Namespace) -> None:
    """The demo's base, and stores of the recordings below --recordings, a folder of metadata.jsonl for each voice."""
    out = args.out / "miniature"
    args.model, codec = str(out / "base"), out / "base" / CODEC_FOLDER
    if not codec.exists():
        with resources.as_file(resources.files("higgstune.demo") / "assets") as assets:
            shutil.copytree(assets / "base", out / "base", dirs_exist_ok=True)
            shutil.copytree(assets / "codec", codec)
    args.data, args.references = str(out / "one"), str(out / "several")
    for store, voices, references in ((args.data, ["rms"], "none"), (args.references, VOICES, "same_speaker")):
        if not Path(store).exists():
            write_manifest(args.recordings / f"{Path(store).name}.jsonl", recordings(args.recordings, voices))
            prepare(
                args.recordings / f"{Path(store).name}.jsonl",
                store,
                codec=codec,
                model=args.model,
                references=references,  # type: ignore[arg-type]
                whisper=args.whisper if references != "none" else None,
                validation_fraction=0.1 if references == "none" else 0.2,
            )


def recordings(folder: Path, voices: Sequence[str]) -> list[Utterance]:
    """The utterances of some voices; of several, `CLIPS_OF_A_VOICE` each."""
    rows: list[Utterance] = []
    for voice in voices:
        found = [row for _, row in read_manifest(folder / voice / "metadata.jsonl") if isinstance(row, Utterance)]
        for row in found[: CLIPS_OF_A_VOICE if len(voices) > 1 else None]:
            rows.append(row.model_copy(update={"audio": f"{voice}/{row.audio}"}))
    return rows


def measure(args: argparse.Namespace, name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """The curve and the figures of one arm with one seed; a finished arm is not trained a second time."""
    folder = args.out / f"{name}-{seed}"
    kept = folder / "measured.json"
    if kept.exists():
        return json.loads(kept.read_text())
    print(f"{name}, seed {seed}", flush=True)
    recipe = recipe_of(args, arm, seed)
    state = folder / "run.json"
    if not state.exists() or json.loads(state.read_text())["status"] != "finished":
        train(recipe, folder, resume=state.exists())
    stages = json.loads(state.read_text())["stages"]
    result = {"curve": curve(stages), **figures(args, arm, recipe, folder)}
    if "first" in stages:
        result["after_first"] = curve({"first": stages["first"]})[-1][1]
    kept.write_text(json.dumps(result))
    return result


def recipe_of(args: argparse.Namespace, arm: Arm, seed: int) -> Recipe:
    """The recipe of an arm; all arms have the same steps, data and seeds."""
    shape: dict[str, Any] = {"lora": {"r": 64, "alpha": 128}, "stage": {"learning_rate": 4e-3, "batch_size": 4}}
    if args.recipe is not None:
        shape = yaml.safe_load(args.recipe.read_text())
    warm = {"warmup_steps": 0.06, **shape["stage"]}
    first = 0 if arm.first is None else round(0.3 * args.steps)
    stages = [] if arm.first is None else [{"name": "first", "max_steps": first, **warm, **arm.first}]
    if arm.first is not None and arm.first["kind"] == "text":
        stages[0]["learning_rate"] = warm["learning_rate"] / 2
    stages.append({"name": "last", "max_steps": args.steps - first, **warm, **FULL})
    tree = {
        "model": {
            "checkpoint": args.model,
            "audio_attention": arm.attention,
            "whisper": args.whisper if arm.whisper else None,
            **shape.get("model", {"device": "cpu", "dtype": "float32"}),
        },
        "data": {
            "store": args.data if arm.reference is None else args.references,
            "reference": arm.reference or "turn",
        },
        "lora": shape["lora"],
        "stages": stages,
        "seed": seed,
        "log_steps": 12,
        "eval_steps": 30,
        "evaluation": {"clips": 0},
        "save_steps": 10_000,
        "report_to": [],
    }
    return parse_recipe(tree, where="measure.py")


def curve(stages: dict[str, Any]) -> list[tuple[int, float, float | None]]:
    """(step over all stages, validation audio loss, validation text loss), in order."""
    points, before = [], 0
    for stage in stages.values():
        for entry in stage["history"]:
            if "eval_audio_loss" in entry:
                points.append((before + entry["step"], entry["eval_audio_loss"], entry.get("eval_text_loss")))
        before += stage["steps"]
    return points


def figures(args: argparse.Namespace, arm: Arm, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Losses of the last adapter with every row's own reference and with another speaker's."""
    adapter = folder / "last" / "adapter"
    store = CodeStore.open(recipe.data.store)
    found: dict[str, Any] = {}
    if arm.reference is not None:
        found["other_voice"] = audio_loss(recipe, store, adapter, "validation", swap=True)
    return found


def audio_loss(recipe: Recipe, store: CodeStore, adapter: Path, split: str, *, swap: bool) -> float:
    """Audio loss over a split; with `swap` every row gets the reference of a row of another speaker."""
    base = load_model(recipe.model.checkpoint, dtype=recipe.model.dtype, device=recipe.model.device)
    model = with_training_forward(base)
    adapted = load_adapter(model, adapter)
    prompter = load_prompter(recipe.model.checkpoint)
    features = None if recipe.model.whisper is None else FeatureStore.open(store.folder, recipe.model.whisper)
    rendering = Rendering(recipe.data.reference, features)
    rows = list(store.split(split))
    if swap:
        rows = [with_reference_of(row, next(other for other in rows if other.speaker != row.speaker)) for row in rows]
    config = model.config
    sums, counts = [], []
    with torch.no_grad():
        for row in rows:
            batch = tensors_to(pack([row_example(prompter, row, "transcript", rendering)]), base.device)
            sums.append(adapted(**batch))
            counts.append(label_counts(batch, eos_id=config.audio_stream_eos_id))
    return loss_metrics(add_sums(sums), add_sums(counts), LossWeights())["audio_loss"]


def with_reference_of(row: Any, other: Any) -> Any:
    """A row with the reference of another row."""
    return replace(
        row,
        reference_codes=other.reference_codes,
        reference_text=other.reference_text,
        reference_sha256=other.reference_sha256,
    )


def write_results(out: Path, arms: dict[str, Arm], results: dict[tuple[str, int], dict[str, Any]]) -> None:
    """results.json, results.md and curves.png."""
    table = {name: summary([value for (arm, _), value in results.items() if arm == name]) for name in arms}
    (out / "results.json").write_text(json.dumps(table, indent=1))
    columns = ["after_first", "best", "last", "last_text", "other_voice"]
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, row in table.items():
        values = ["-" if row.get(c) is None else f"{row[c][0]:.3f} ± {row[c][1]:.3f}" for c in columns]
        lines.append(f"| {name} | {row['seeds']} | " + " | ".join(values) + " |")
    (out / "results.md").write_text("\n".join(lines) + "\n")
    draw(out / "curves.png", table)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure, and the mean curve with its spread."""
    losses = np.array([[point[1] for point in run["curve"]] for run in runs])
    values: dict[str, list[float]] = {
        "best": losses.min(1).tolist(),
        "last": losses[:, -1].tolist(),
        "last_text": [run["curve"][-1][2] for run in runs],
        **{key: [run[key] for run in runs] for key in ("other_voice", "after_first") if key in runs[0]},
    }
    spread = {key: [float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0] for key, v in values.items()}
    steps = [point[0] for point in runs[0]["curve"]]
    return {
        "seeds": len(runs),
        **spread,
        "steps": steps,
        "mean": losses.mean(0).tolist(),
        "std": losses.std(0).tolist(),
    }


def draw(path: Path, table: dict[str, Any]) -> None:
    """Validation audio loss by step, mean and spread over seeds."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name, row in table.items():
        mean, std = np.array(row["mean"]), np.array(row["std"])
        axis.plot(row["steps"], mean, label=name, marker=".")
        axis.fill_between(row["steps"], mean - std, mean + std, alpha=0.15)
    axis.set(xlabel="steps over all stages", ylabel="validation audio loss, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
