"""Does a text stage before the full one help? Three arms with equal steps and optimizer resets, rated by judges.

    python tools/two_stage/study.py --out runs/two_stage --synthetic corpus/rms --speech LJSPEECH \\
        --asr base --speaker-judge "python judge.py speaker"
    python tools/two_stage/study.py ... --settings many --shares 0.1 0.5      what the length of stage 1 does

Resumes where it was stopped. Leaves a run for each setting, share of stage 1, arm and seed in --out, and results.json,
results.md and the figures over all of them.
"""

import argparse
import json
import logging
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from results import COMPARED, YARDSTICKS, write_results
from study_data import SETTINGS, RunSetup, Stores, stores_of

from higgstune.codec import CODEC_FOLDER
from higgstune.config.recipe import Recipe, parse_recipe
from higgstune.evaluation.evaluate import RECORDINGS, evaluate
from higgstune.families.sampling import Sampling
from higgstune.inputs import ADAPTER, BaseSpec
from higgstune.training.run import train

sys.path.append(str(Path(__file__).resolve().parent.parent / "conditioning"))
from measure import ARMS, curve, recipe_of

MEASURED = "measured.json"


def main() -> None:
    """Train and evaluate every arm with every seed, then write the results."""
    args = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)  # a model this small loses by more
    base = unpack_base(args.out / "base")
    for seed in args.seeds:
        for name in args.settings:
            stores = stores_of(name, args.out / name, base, args.synthetic, args.speech)
            evaluate_others(args, name, base, stores)
            for share in args.shares:
                for arm in args.arms:
                    measure_arm(args, name, base, stores, share=share, arm=arm, seed=seed)
                    write_results(args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--synthetic", type=Path, required=True, help="corpus of the voice rms, see README.md")
    parser.add_argument("--speech", type=Path, required=True, help="LJSpeech: metadata.csv and wavs/")
    parser.add_argument("--asr", required=True, help="ASR, as in `higgstune evaluate`")
    parser.add_argument("--speaker-judge", required=True, help="speaker judge, as in `higgstune evaluate`")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", default=COMPARED, choices=(*COMPARED, *YARDSTICKS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3], help="of the steps, in stage 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


def unpack_base(base: Path) -> Path:
    """The demo's miniature with its codec, copied once."""
    if not (base / CODEC_FOLDER).exists():
        with resources.as_file(resources.files("higgstune.demo") / "assets") as assets:
            shutil.copytree(assets / "base", base, dirs_exist_ok=True)
            shutil.copytree(assets / "codec", base / CODEC_FOLDER)
    return base


def measure_arm(
    args: argparse.Namespace, name: str, base: Path, stores: Stores, *, share: float, arm: str, seed: int
) -> None:
    """Train an arm, evaluate it and write `measured.json` into its folder, unless it exists."""
    folder = args.out / name / f"{arm}-{share:g}-{seed}"
    if (folder / MEASURED).exists():
        return
    print(f"{name}, stage 1 {share:.0%}, {arm}, seed {seed}", flush=True)
    state = folder / "run.json"
    if not state.exists() or json.loads(state.read_text())["status"] != "finished":
        recipe = recipe_for(SETTINGS[name], base, stores.train, share=share, arm=arm, seed=seed)
        train(recipe, folder, resume=state.exists())
    stages = json.loads(state.read_text())["stages"]
    found = {
        "setting": name, "share": share, "arm": arm, "seed": seed,
        "curve": curve(stages), "after_first": curve({"first": next(iter(stages.values()))})[-1][1],
        **evaluated(args, name, folder, stores, ADAPTER),
    }  # fmt: skip
    (folder / MEASURED).write_text(json.dumps(found))


def recipe_for(setting: RunSetup, base: Path, store: Path, *, share: float, arm: str, seed: int) -> Recipe:
    """The recipe of `conditioning/measure.py` for an arm, with this share of the steps in stage 1.

    Of the yardsticks, `full` has all steps in one stage, `rest` those of stage 2 alone, and `both-full-fast` is
    `both-full` with the learning rate of stage 2 in stage 1, which is otherwise half of it.
    """
    wanted = argparse.Namespace(
        model=str(base), data=str(store), references=None, whisper=None, recipe=None, steps=setting.steps
    )
    known = {"rest": "full", "both-full-fast": "both-full"}.get(arm, arm)
    tree = recipe_of(wanted, ARMS[known], seed).model_dump(mode="json")
    first = round(share * setting.steps)
    lengths = {"full": [setting.steps], "rest": [setting.steps - first]}.get(arm, [first, setting.steps - first])
    for stage, steps in zip(tree["stages"], lengths, strict=True):
        stage |= {"max_steps": steps, "batch_size": setting.batch_size}
    if arm == "both-full-fast":
        tree["stages"][0]["learning_rate"] = tree["stages"][1]["learning_rate"]
    tree |= {"eval_steps": 30, "evaluation": {"clips": 0, "choose": "last"}}
    return parse_recipe(tree, where="study.py")


def evaluated(args: argparse.Namespace, name: str, target: Path, stores: Stores, system: str) -> dict[str, Any]:
    """The evaluation of the test sentences: the rows of all clips, and the judges' names."""
    found = evaluate(
        target, out=args.out / name / "evaluation", data=stores.test, base=BaseSpec(device="cpu"), with_base=False,
        asr=args.asr, speaker_judge=args.speaker_judge, sampling=Sampling(temperature=0),
    )  # fmt: skip
    evaluation = found.texts.systems[system]
    return {"judges": evaluation.judges, "rows": list(evaluation.clips)}


def evaluate_others(args: argparse.Namespace, name: str, base: Path, stores: Stores) -> None:
    """Evaluate the base and the recordings through the codec: the worst and the best that can be expected."""
    for system in ("base", RECORDINGS):
        kept = args.out / name / system / MEASURED
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            found = evaluated(args, name, base, stores, system)
            kept.write_text(json.dumps({"setting": name, "arm": system, **found}))


if __name__ == "__main__":
    main()
