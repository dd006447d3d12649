"""The plan of a recipe with its speed, and with changes that would fit if it does not."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from higgstune.config.recipe import Recipe, Stage, load_recipe
from higgstune.files import format_bytes
from higgstune.planning.dry_run import KINDS
from higgstune.planning.plan import Planner, RunPlan, StagePlan
from higgstune.planning.speed import Speed, measure
from higgstune.planning.suggestions import Option, options, summary
from higgstune.planning.survey import machine_for, parse_memory, row_examples
from higgstune.progress import Progress, duration, silent

_ROWS = {
    "weights": "weights of the base", "adapter": "adapter", "gradients": "gradients at the peak",
    "optimizer": "optimizer moments", "activations": "activations", "transient": "transient",
    "process": "process and libraries",
}  # fmt: skip


@dataclass(frozen=True)
class PlanReport:
    """A recipe's plan, its speed (None: not measured), and the changes that would fit if it does not."""

    plan: RunPlan
    tokens_per_second: dict[str, float | None]  # by stage, for one process
    seconds: dict[str, float | None]  # by stage
    options: list[Option]

    @property
    def fits(self) -> bool | None:
        """Whether the device has the memory; None if its memory is unknown."""
        return self.plan.fits

    def as_json(self) -> dict[str, Any]:
        """Plain values; sizes in bytes, times in seconds."""
        machine = self.plan.machine
        return {
            "fits": self.fits,
            "peak": self.plan.peak,
            "device": {"kind": machine.kind, "memory": machine.memory, "available": machine.available},
            "dtype": self.plan.dtype,
            "stages": [
                asdict(stage)
                | {"tokens_per_second": self.tokens_per_second[stage.name], "seconds": self.seconds[stage.name]}
                for stage in self.plan.stages
            ],
            "options": [{"change": option.change, "peak": option.peak, "time": option.time} for option in self.options],
        }

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The rows of a table: a label, then a value for each stage."""
        stages = self.plan.stages
        for kind in (*KINDS, "process"):
            yield _ROWS[kind], *(format_bytes(stage.memory[kind]) for stage in stages)
        yield "while loading", *(format_bytes(stage.loading) for stage in stages)
        yield "peak", *(format_bytes(stage.peak) for stage in stages)
        yield "recomputed layers", *(f"{stage.checkpointed} of {stage.layers}" for stage in stages)
        yield "largest pack", *(f"{stage.max_tokens_per_pack} tokens" for stage in stages)
        yield "mean pack", *(f"{stage.tokens_per_pack:.0f} tokens" for stage in stages)
        yield "an epoch", *(f"{stage.packs} packs, {stage.steps_per_epoch} steps" for stage in stages)
        yield "steps in all", *(str(stage.steps) for stage in stages)
        yield "tokens/s, about", *(_known(self.tokens_per_second[stage.name], "{:.0f}") for stage in stages)
        yield (
            "time of the steps",
            *("unknown" if s is None else duration(s) for s in (self.seconds[stage.name] for stage in stages)),
        )

    def verdict(self) -> str:
        """Whether it fits, in words, with options where it does not."""
        machine, peak = self.plan.machine, format_bytes(self.plan.peak)
        if self.fits is None:
            return f"The peak is {peak}. The memory of the {machine.kind} device is unknown: give it with --memory 16GB"
        assert machine.memory is not None
        of = f"{peak} of {format_bytes(machine.memory)} on {machine.kind}"
        return f"It fits: {of}" if self.fits else f"It does not fit: it needs {of}\n{summary(self.options)}"


def plan(
    recipe: Recipe | str | Path,
    *,
    memory: str | int | None = None,
    device: str | None = None,
    timed: bool = True,
    progress: Progress = silent,
) -> PlanReport:
    """Plan the memory, steps and time of a recipe's training, without loading its model.

        plan("voice.yaml", memory="16GB", device="cuda").fits

    `memory` (bytes, or a size such as "16GB") replaces the free memory; `device` (cpu or cuda) plans for another
    machine. `timed` times a layer if the device is available and the run fits. `progress` is called after each stage
    that was planned or timed. Raises ConfigError, DataError, CheckpointError.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    budget = parse_memory(memory) if isinstance(memory, str) else memory
    planner = Planner(recipe, machine_for(recipe, memory=budget, device=device))
    made = planner.plan(progress=progress)
    seconds, tokens = {}, {}
    for done, (stage, planned) in enumerate(zip(recipe.stages, made.stages, strict=True), 1):
        speed = _speed(planner, stage, planned) if timed and planner.machine.available and made.fits else None
        seconds[stage.name], tokens[stage.name] = _time(speed, stage, planned)
        if speed is not None:
            progress("timing stages", done, len(made.stages))
    return PlanReport(made, tokens, seconds, options(planner) if made.fits is False else [])


def _speed(planner: Planner, stage: Stage, planned: StagePlan) -> Speed | None:
    packs = planner.packs(planner.recipe, stage)
    assert packs is not None
    largest = max(packs.packs, key=lambda indices: packs.lengths[indices].sum())
    rows = row_examples(planner.survey, stage, "train")
    spec = planner.spec(planner.recipe, stage)
    examples, device = [rows[i] for i in largest], torch.device(planner.machine.kind)
    return measure(spec, examples, device, layers=planned.layers, checkpointed=planned.checkpointed)


def _time(speed: Speed | None, stage: Stage, planned: StagePlan) -> tuple[float | None, float | None]:
    """Seconds of a stage, and tokens per second."""
    if speed is None:
        return None, None
    step = speed.step(planned.tokens_per_pack, planned.layers, planned.checkpointed, stage.gradient_accumulation)
    return planned.steps * step, stage.gradient_accumulation * planned.tokens_per_pack / step


def _known(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)
