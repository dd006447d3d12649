"""Does `higgstune train --plan` say what training takes? Planned against measured peaks of real runs on a CPU."""

import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import Case, Found, Row, finish, parser, say

EXAMPLE = "python bench/planning.py --json planning.json"
STEPS = 3  # in the second one the moments are there; the heap still fills a little


@dataclass(frozen=True)
class Setting:
    """A model of the released proportions, `scale` times narrower, and how it is trained."""

    scale: int
    layers: int
    tokens: int  # of a pack
    r: int
    kind: str = "full"
    checkpointing: bool = False
    accumulation: int = 1

    @property
    def name(self) -> str:
        """In words."""
        words = [f"width / {self.scale}, {self.layers} layers, {self.kind}", f"packs of {self.tokens:,}", f"r {self.r}"]
        words += ["checkpointing"] * self.checkpointing
        words += [f"accumulation {self.accumulation}"] * (self.accumulation > 1)
        return ", ".join(words)


SETTINGS = (
    Setting(4, 4, 1024, 16),
    Setting(8, 8, 1024, 16),
    Setting(8, 8, 4096, 16),
    Setting(8, 8, 4096, 16, checkpointing=True),
    Setting(8, 8, 2048, 64, kind="text", accumulation=2),
    Setting(16, 28, 2048, 8),
    Setting(16, 28, 1024, 64, checkpointing=True),
)
QUICK = (Setting(16, 4, 512, 8),)


def planned(recipe: str) -> Found:
    """What the plan says."""
    import higgstune

    return {"planned": higgstune.plan(recipe, timed=False).plan.peak}


def measured(recipe: str, out: str) -> Found:
    """A real run; its peak is that of this process."""
    import higgstune

    return {"steps": sum(stage["steps"] for stage in higgstune.train(recipe, out).stages.values())}


def measure(setting: Setting, folder: Path, *, threads: int = 1) -> tuple[Found, Found]:
    """The plan and the run of one setting."""
    recipe = str(prepare_run(setting, folder))
    plan = Case(planned, {"recipe": recipe}).run(threads=threads)
    return plan, Case(measured, {"recipe": recipe, "out": str(folder / "run")}).run(threads=threads)


def prepare_run(setting: Setting, folder: Path) -> Path:
    """Random weights in float32 with the demo's tokenizer and codec, a store of as many clips as the steps need."""
    import torch
    import yaml
    from stores import ASSETS, make_store
    from transformers import HiggsAudioV2Config
    from workload import Shape, random_model

    demo = HiggsAudioV2Config.from_pretrained(ASSETS / "base")
    config = Shape(setting.scale, setting.layers).config()
    ids = [name for name in demo.to_dict() if name.endswith("_id")]  # of the demo's tokenizer and codec
    config.update({name: getattr(demo, name) for name in (*ids, "codebook_size")})
    base = folder / "base"
    shutil.copytree(ASSETS / "base", base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shutil.copytree(ASSETS / "codec", base / "codec")
    random_model(config, dtype=torch.float32, device=torch.device("cpu")).save_pretrained(base)
    clips = math.ceil(STEPS * setting.accumulation * setting.tokens / 150)  # a clip has about that many positions
    make_store(folder / "data", clips, codec=base / "codec")
    stage = {
        "name": "planned", "kind": setting.kind, "max_steps": STEPS, "batch_tokens": setting.tokens,
        "gradient_accumulation": setting.accumulation,
    }  # fmt: skip
    tree: dict[str, Any] = {
        "model": {"checkpoint": str(base), "dtype": "float32", "device": "cpu"},
        "data": {"store": str(folder / "data")},
        "lora": {"r": setting.r, "alpha": 2 * setting.r},
        "stages": [stage],
        "gradient_checkpointing": setting.checkpointing,
        "evaluation": {"clips": 1},  # random weights speak without an end
        "report_to": [],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def main() -> None:
    """Plan, train, print, write."""
    asked = parser(__doc__ or "", EXAMPLE, repeats=1)
    given = asked.parse_args()
    rows, runs = [], []
    for setting in QUICK if given.quick else SETTINGS:
        plans, peaks = [], []
        for repeat in range(given.repeats):
            say(f"{setting.name}: {repeat + 1} of {given.repeats}")
            with tempfile.TemporaryDirectory() as folder:
                plan, run = measure(setting, Path(folder), threads=given.threads)
            plans.append(plan["planned"] / 1e6)
            peaks.append(run["peak_bytes"] / 1e6)
        rows.append(Row(setting.name, peaks, plans, "MB"))
        runs.append(asdict(setting))
    finish("planning", rows, given, runs=runs)


if __name__ == "__main__":
    main()
