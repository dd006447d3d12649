"""The accuracy of `higgstune train --plan`: planned against measured memory peaks of real runs."""

import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import Case, Found, Row, finish, parser, say, values, write_json

EXAMPLE = "python bench/planning.py --json planning.json"
STEPS = 3  # in the second one the moments are there; the heap still fills a little


@dataclass(frozen=True)
class RunSetup:
    """A model of the released proportions, `scale` times narrower, and how it is trained."""

    scale: int
    layers: int
    tokens: int  # of a pack
    r: int
    kind: str = "full"
    checkpointing: bool = False
    accumulation: int = 1
    dropout: float = 0.0
    dora: bool = False
    quantize: str | None = None
    device: str = "cpu"  # in float32; cuda in bfloat16
    compile: bool = False
    steps: int = STEPS

    @property
    def on_cuda(self) -> bool:
        """Whether it is for a GPU."""
        return self.device == "cuda"

    @property
    def name(self) -> str:
        """In words."""
        words = [f"width / {self.scale}, {self.layers} layers, {self.kind}", f"packs of {self.tokens:,}", f"r {self.r}"]
        words += ["checkpointing"] * self.checkpointing
        words += [f"accumulation {self.accumulation}"] * (self.accumulation > 1)
        words += [f"dropout {self.dropout:g}"] * (self.dropout > 0) + ["DoRA"] * self.dora
        words += [f"{self.quantize} base"] * (self.quantize is not None) + ["compiled"] * self.compile
        return ", ".join(words)


SETTINGS = (
    RunSetup(4, 4, 1024, 16),
    RunSetup(8, 8, 1024, 16),
    RunSetup(8, 8, 4096, 16),
    RunSetup(8, 8, 4096, 16, checkpointing=True),
    RunSetup(8, 8, 2048, 64, kind="text", accumulation=2),
    RunSetup(16, 28, 2048, 8),
    RunSetup(16, 28, 1024, 64, checkpointing=True),
    RunSetup(8, 6, 2000, 16, dropout=0.1),
    RunSetup(16, 28, 4096, 16, dropout=0.05),
    RunSetup(8, 8, 2048, 16, dora=True),
    RunSetup(8, 10, 4096, 16, quantize="4bit"),
    RunSetup(8, 10, 4096, 16, quantize="4bit", checkpointing=True),
)
QUICK = (RunSetup(16, 4, 512, 8),)
_ON_A_GPU = {"device": "cuda", "steps": 20}
ON_A_GPU = (
    RunSetup(1, 28, 8192, 16, **_ON_A_GPU),
    RunSetup(1, 28, 8192, 16, compile=True, **_ON_A_GPU),
    RunSetup(1, 28, 4096, 16, quantize="4bit", checkpointing=True, **_ON_A_GPU),
)


def planned(recipe: str, *, timed: bool) -> Found:
    """What the plan says."""
    import higgstune

    report = higgstune.plan(recipe, timed=timed)
    return {"planned": report.plan.peak, "tokens_per_second": report.tokens_per_second["planned"]}


def measured(recipe: str, out: str, *, on_cuda: bool = False) -> Found:
    """A real run; its peak is that of this process, or of its tensors on the GPU."""
    import torch

    import higgstune

    stage = higgstune.train(recipe, out).stages["planned"]
    speeds = [logs["tokens_per_second"] for logs in stage.history if "tokens_per_second" in logs]
    found = {"steps": stage.steps, "compiled": stage.compiled, "tokens_per_second": speeds[-1]}
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated()} if on_cuda else {})


def measure(setting: RunSetup, folder: Path, *, threads: int = 1) -> tuple[Found, Found]:
    """The plan and the run of one setting. What is made in `folder` may serve other settings, too."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        recipe = str(prepare_run(setting, folder, Path(own)))
        plan = Case(planned, {"recipe": recipe, "timed": setting.on_cuda}).run(threads=threads)
        run = Case(measured, {"recipe": recipe, "out": str(Path(own) / "run"), "on_cuda": setting.on_cuda})
        return plan, run.run(threads=threads)


def prepare_run(setting: RunSetup, folder: Path, own: Path) -> Path:
    """The recipe in `own`; a store of as many clips as the steps need; in `folder`, where it is not yet, the base."""
    import yaml
    from stores import make_store

    base = folder / f"base-{setting.scale}-{setting.layers}-{setting.device}"
    if not base.exists():
        _make_base(setting, base)
    clips = math.ceil(setting.steps * setting.accumulation * setting.tokens / 150)  # a clip has about that many
    make_store(own / "data", clips, codec=base / "codec")
    stage = {
        "name": "planned", "kind": setting.kind, "max_steps": setting.steps, "batch_tokens": setting.tokens,
        "gradient_accumulation": setting.accumulation,
    }  # fmt: skip
    tree: dict[str, Any] = {
        "model": {
            "checkpoint": str(base), "dtype": "bfloat16" if setting.on_cuda else "float32", "device": setting.device,
            "quantize": setting.quantize,
        },
        "data": {"store": str(own / "data")},
        "lora": {"r": setting.r, "alpha": 2 * setting.r, "dropout": setting.dropout, "dora": setting.dora},
        "stages": [stage],
        "gradient_checkpointing": setting.checkpointing,
        "compile": setting.compile,
        "log_steps": math.ceil(setting.steps / 2),  # the speed is that of the second half
        "evaluation": {"clips": 0 if setting.on_cuda else 1},  # random weights speak without an end
        "report_to": [],
    }  # fmt: skip
    (own / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return own / "recipe.yaml"


def _make_base(setting: RunSetup, base: Path) -> None:
    """Random weights with the demo's tokenizer and codec."""
    import torch
    from stores import ASSETS
    from transformers import HiggsAudioV2Config
    from workload import Shape, random_model

    demo = HiggsAudioV2Config.from_pretrained(ASSETS / "base")
    config = Shape(setting.scale, setting.layers).config()
    ids = [name for name in demo.to_dict() if name.endswith("_id")]  # of the demo's tokenizer and codec
    config.update({name: getattr(demo, name) for name in (*ids, "codebook_size")})
    shutil.copytree(ASSETS / "base", base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shutil.copytree(ASSETS / "codec", base / "codec")
    dtype = torch.bfloat16 if setting.on_cuda else torch.float32
    random_model(config, dtype=dtype, device=torch.device(setting.device)).save_pretrained(base)
    if setting.on_cuda:
        torch.cuda.empty_cache()  # the runs are other processes on the same card


def main() -> None:
    """Plan, train, print, write."""
    options = parser(__doc__ or "", EXAMPLE, repeats=1)
    options.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the released shape, and its speed"
    )
    given = options.parse_args()
    if given.device == "cuda" and given.quick:
        options.error("--quick is for --device cpu")
    rows, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for setting in ON_A_GPU if given.device == "cuda" else QUICK if given.quick else SETTINGS:
            both = []
            for repeat in range(given.repeats):
                say(f"{setting.name}: {repeat + 1} of {given.repeats}")
                both.append(measure(setting, Path(folder), threads=given.threads))
            plans, peaks = [plan for plan, _ in both], [run for _, run in both]
            name = setting.name
            memory = values(peaks, "peak_bytes", scale=1e-6), values(plans, "planned", scale=1e-6)
            rows.append(Row(f"{name}: peak, measured and planned", *memory, "MB"))
            if given.device == "cuda":
                speeds = [values(side, "tokens_per_second") for side in (peaks, plans)]
                rows.append(Row(f"{name}: measured, and planned for plain layers", *speeds, "tokens/s"))
            runs.append(asdict(setting) | {"compiled": peaks[0]["compiled"]})
            if given.json:
                write_json(given.json, "planning", rows, settings=vars(given), runs=runs)
    finish("planning", rows, given, runs=runs)


if __name__ == "__main__":
    main()
