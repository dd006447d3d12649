"""The two stages as one script with plain flags, alone or under torchrun.

    python unified_lora_training.py --training_stage stage1 --train_manifest clips.jsonl --output_dir runs/me
    python unified_lora_training.py --training_stage stage2 --train_manifest clips.jsonl --output_dir runs/me

OUTPUT_DIR/stage1 and stage2 are run folders; the same command resumes one that was interrupted.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from higgstune.cli.output import mute_libraries
from higgstune.config.recipe import EvaluationSettings, Lora, ModelSettings, Recipe, Stage, parse_recipe
from higgstune.errors import CheckpointError, HiggstuneError, not_usable_code
from higgstune.inputs import INDEX_NAME, check_source, find_adapter

FLAGS: dict[str, tuple[Any, str, float]] = {  # part of the recipe, its key there, default for a GPU of 24 GB
    "batch_size": (Stage, "batch_size", 2), "lr": (Stage, "learning_rate", 1e-4),
    "wd": (Stage, "weight_decay", 0.01), "epochs": (Stage, "epochs", 5.0),
    "grad_accum": (Stage, "gradient_accumulation", 4), "warmup": (Stage, "warmup_steps", 0.05),
    "lora_r": (Lora, "r", 16), "lora_alpha": (Lora, "alpha", 32.0), "lora_dropout": (Lora, "dropout", 0.05),
    "save_steps": (Recipe, "save_steps", 200), "log_steps": (Recipe, "log_steps", 10),
    "val_steps": (Recipe, "eval_steps", 200), "eval_clips": (EvaluationSettings, "clips", 4),
}  # fmt: skip


def main() -> int:
    """0 when the stage is trained, 1 when that failed, 2 when a flag or what it names is wrong."""
    args = arguments()
    is_store = (args.train_manifest / INDEX_NAME).exists()
    store = args.train_manifest if is_store else args.output_dir / "data"
    mute_libraries()
    try:
        recipe = as_recipe(args, store)
        if not is_store:
            check_source(args.train_manifest)
        from higgstune.training.run import train  # imports torch: not for a wrong flag

        if not is_store:
            prepare_once(args, store)
        result = train(recipe, args.output_dir / args.training_stage, resume=True)
    except HiggstuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0 if result.usable else not_usable_code()


def arguments() -> argparse.Namespace:
    """The command line; exits with 2 when it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--training_stage", choices=["stage1", "stage2"], required=True)
    add("--train_manifest", type=Path, required=True, help="what `prepare` takes, or a store that it made")
    add("--output_dir", type=Path, required=True, help="gets stage1, stage2 and, from a manifest, data")
    add("--allow_outside", action="store_true", help="take paths that leave the manifest's folder, too")
    add("--base_ckpt", default=ModelSettings.model_fields["checkpoint"].default, help="folder or hub id")
    add("--from_base", action="store_true", help="start stage2 from the base, without stage1's adapter")
    add(
        "--audio_attention",
        action="store_true",
        help="stage2 also trains audio self-attention, which starts without effect",
    )
    add("--whisper", help="Whisper checkpoint that encodes each clip's reference (another clip of its speaker)")
    for flag, (part, key, default) in FLAGS.items():
        text = f"{part.model_fields[key].description or key} (default: {default})"
        add(f"--{flag}", type=type(default), default=default, help=text)
    return parser.parse_args()


def as_recipe(args: argparse.Namespace, store: Path) -> Recipe:
    """The flags as a recipe of one stage. Raises ConfigError; CheckpointError when stage1 is missing."""
    kind = "text" if args.training_stage == "stage1" else "full"
    parts: dict[Any, dict[str, Any]] = {
        Stage: {"name": kind, "kind": kind},
        Lora: {},
        Recipe: {},
        EvaluationSettings: {},
    }
    for flag, (part, key, _) in FLAGS.items():
        parts[part][key] = getattr(args, flag)
    tree = parts[Recipe] | {"lora": parts[Lora], "stages": [parts[Stage]], "data": {"store": str(store)}}
    tree["evaluation"] = parts[EvaluationSettings]
    tree["model"] = {"checkpoint": args.base_ckpt, "whisper": args.whisper}
    if args.whisper is not None:
        tree["data"]["reference"] = "scene"
    if kind == "full":
        tree["model"]["audio_attention"] = args.audio_attention
    if kind == "full" and not args.from_base:
        tree["init_adapter"] = str(args.output_dir / "stage1")
        try:
            find_adapter(tree["init_adapter"])
        except CheckpointError as error:
            raise CheckpointError(f"stage2 needs stage1 (or --from_base): {error}") from error
    return parse_recipe(tree, where="unified_lora_training.py")


def prepare_once(args: argparse.Namespace, store: Path) -> None:
    """Prepare in the first process, while the others wait."""
    import torch

    from higgstune import prepare
    from higgstune.environment import choose_device
    from higgstune.hub import fetch
    from higgstune.training.distributed import Processes

    processes = Processes(cpu=not torch.cuda.is_available())
    if processes.is_main:
        fetch(args.base_ckpt, what="checkpoint", weights=False)  # a wrong name is an error before hours of encoding
        prepare(
            args.train_manifest,
            store,
            model=args.base_ckpt,
            whisper=args.whisper,
            references="none" if args.whisper is None else "same_speaker",
            device=str(choose_device()),
            allow_outside=args.allow_outside,
        )
    processes.wait()


if __name__ == "__main__":
    sys.exit(main())
