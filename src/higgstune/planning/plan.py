"""A recipe's plan: what each stage takes, whether the device has it, how many steps, how long."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import psutil
import torch

from higgstune.batch.collate import Packed
from higgstune.config.recipe import Recipe, Stage
from higgstune.environment import choose_dtype
from higgstune.planning.dry_run import ADAPTER, KINDS, OPTIMIZER, WEIGHTS, Bytes, Peaks, StepSpec, dry_run
from higgstune.planning.survey import Machine, Packs, Survey, dtype_of, packs_of, steps_of, survey

_DRY_RUN_LAYERS = 2  # layers of a sort
_LASTING = (WEIGHTS, ADAPTER, OPTIMIZER)  # there between two steps


@dataclass
class Footprint:
    """What one stage takes with a pack, for any number of recomputed layers; dry runs are kept."""

    spec: StepSpec
    pack: Packed
    validation: Packed | None = None
    _dry_runs: dict[tuple[int, int, bool], Peaks] = field(default_factory=dict)

    def peak(self, again: int) -> Bytes:
        """Bytes by kind when they are most, in a step or in a validation, with so many recomputed layers."""
        layers = self.spec.base.layers
        return max(self.segments(again, layers - again).values(), key=Counter.total)

    def segments(self, again: int, kept: int) -> Peaks:
        """As `dry_run` gives them."""
        few = min(again, _DRY_RUN_LAYERS), min(kept, _DRY_RUN_LAYERS)
        smallest = self._dry_run(few, self.validation)
        result = {name: Counter(value) for name, value in smallest.items()}
        for added, more in ((again - few[0], (few[0] + 1, few[1])), (kept - few[1], (few[0], few[1] + 1))):
            if added:
                _add_layers(result, smallest, self._dry_run(more), added)
        return result

    def _dry_run(self, layers: tuple[int, int], validation: Packed | None = None) -> Peaks:
        key = *layers, validation is not None
        if key not in self._dry_runs:
            self._dry_runs[key] = dry_run(self.spec, self.pack, layers, validation=validation)
        return self._dry_runs[key]


def _add_layers(result: Peaks, few: Peaks, more: Peaks, layers: int) -> None:
    """Add so many layers, each of which adds what the model with one more has beyond the one with few."""
    for name, value in result.items():
        for kind in value.keys() | more.get(name, {}).keys():
            if name in more:
                value[kind] += layers * (more[name][kind] - few[name][kind])
            elif kind in _LASTING:  # a validation keeps nothing of a layer that is done
                value[kind] += layers * (more["start"][kind] - few["start"][kind])


_CUDA_WORKSPACE = 40_000_000  # cuBLAS keeps it once it has computed
# On a CPU, beside what is counted; fitted to measured runs, see docs/planning.md.
_CPU_LIBRARIES = 150_000_000  # once they have computed, with the trainer and this planner
_CPU_SCATTERED = {ADAPTER: 0.5, OPTIMIZER: 0.5}  # what malloc keeps between pieces that are alive
_CPU_SCATTERED_RECOMPUTED = 0.3  # likewise, of what recomputed layers do not keep, which leaves holes
_CPU_MOST_SCATTERED = 250_000_000  # larger pieces go back to the system when they are freed


@dataclass(frozen=True)
class StagePlan:
    """One stage: its memory in bytes, its packs and steps."""

    name: str
    kind: str
    layers: int
    checkpointed: int  # number of layers that the backward pass recomputes
    memory: dict[str, int]  # by kind, at the peak of training
    loading: int  # while the weights are read
    peak: int
    fits: bool | None
    positions: int  # of the largest pack
    tokens_per_pack: float
    packs: int  # of an epoch
    tokens: int  # of an epoch
    steps_per_epoch: int
    steps: int


@dataclass(frozen=True)
class RunPlan:
    """All stages of a recipe on one machine."""

    machine: Machine
    dtype: str
    stages: tuple[StagePlan, ...]

    @property
    def peak(self) -> int:
        """Bytes of the stage that takes most."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether the device has the memory; None where that is not known."""
        return None if self.machine.memory is None else self.peak <= self.machine.memory


class Planner:
    """Plans a recipe and its variants on one machine; data and dry runs are kept for the next variant."""

    def __init__(self, recipe: Recipe, machine: Machine, *, seen: Survey | None = None) -> None:
        """Raises CheckpointError, DataError or ConfigError for anything that the recipe names and that is missing."""
        self.recipe = recipe
        self.machine = machine
        self.seen = survey(recipe) if seen is None else seen
        self.process = _process_bytes() if machine.kind == "cpu" else 0
        self.codec = self.seen.codec_bytes if machine.kind == "cpu" else 0
        self._packs: dict[Any, Packs | None] = {}
        self._footprints: dict[Any, list[Footprint]] = {}

    def plan(self, recipe: Recipe | None = None) -> RunPlan:
        """The plan of the recipe, or of a variant with the same checkpoint and data."""
        recipe = recipe or self.recipe
        stages = tuple(self._stage(recipe, stage) for stage in recipe.stages)
        return RunPlan(self.machine, str(self.dtype(recipe)).removeprefix("torch."), stages)

    def dtype(self, recipe: Recipe) -> torch.dtype:
        """The dtype of the base's weights on the machine."""
        if self.machine.at_hand:
            return choose_dtype(recipe.model.dtype, torch.device(self.machine.kind))
        return dtype_of(recipe, self.machine.kind)

    def checkpointed(self, recipe: Recipe, stage: Stage) -> int:
        """The number of recomputed layers: all, none or, with `auto`, the fewest with which the stage fits."""
        layers = self.seen.spec.layers
        if recipe.gradient_checkpointing != "auto":
            return layers if recipe.gradient_checkpointing else 0
        usable = self.machine.usable()
        if usable is None:
            return layers
        return fewest(lambda again: self.peak(recipe, stage, again), layers, usable)

    def peak(self, recipe: Recipe, stage: Stage, again: int) -> int:
        """Bytes that a stage takes at the most, loading apart."""
        taken = self._taken(recipe, stage, again)
        return taken.total() + self._beside(recipe, stage, again, taken)

    def packs(self, recipe: Recipe, stage: Stage, split: str = "train") -> Packs | None:
        """The packs of a stage."""
        exact = self.dtype(recipe) == torch.float32 and split == "train"
        epochs = stage.epochs, stage.max_steps, stage.gradient_accumulation
        key = (split, stage.pack_size, *epochs, stage.text_targets, recipe.seed, recipe.lora.dropout == 0, exact)
        if key not in self._packs:
            self._packs[key] = packs_of(self.seen, recipe, stage, split=split, keeps_probabilities=exact)
        return self._packs[key]

    def footprints(self, recipe: Recipe, stage: Stage) -> list[Footprint]:
        """The dry runs of a stage: each of the packs that may take the most, the first with a validation."""
        spec = self.spec(recipe, stage)
        epochs = stage.epochs, stage.max_steps, stage.gradient_accumulation
        key = (repr(spec), stage.pack_size, *epochs, stage.text_targets)
        if key not in self._footprints:
            train, validation = self.packs(recipe, stage), self.packs(recipe, stage, "validation")
            assert train is not None
            first, *others = train.heaviest
            self._footprints[key] = [
                Footprint(spec, first, validation.heaviest[0] if validation else None),
                *(Footprint(spec, pack) for pack in others),
            ]
        return self._footprints[key]

    def spec(self, recipe: Recipe, stage: Stage) -> StepSpec:
        """What is trained in a stage."""
        return StepSpec(
            family=self.seen.family,
            config=self.seen.config,
            base=self.seen.spec,
            dtype=self.dtype(recipe),
            lora=recipe.lora,
            kind=stage.kind,
            own=self.seen.own,
            trained=self.seen.trained,
            attention=recipe.model.audio_attention or "lora",
            quantize=recipe.model.quantize,
            on_cuda=self.machine.kind == "cuda",
            accumulation=stage.gradient_accumulation > 1,
        )

    def _taken(self, recipe: Recipe, stage: Stage, again: int) -> Bytes:
        return max((one.peak(again) for one in self.footprints(recipe, stage)), key=Counter.total)

    def _stage(self, recipe: Recipe, stage: Stage) -> StagePlan:
        again = self.checkpointed(recipe, stage)
        taken = self._taken(recipe, stage, again)
        train = self.packs(recipe, stage)
        assert train is not None
        per_epoch = steps_of(stage, len(train.packs))
        memory = {kind: taken[kind] for kind in KINDS}
        loading = self._loading(recipe, taken[WEIGHTS])
        beside = self._beside(recipe, stage, again, taken)
        peak = max(loading, taken.total() + beside)
        return StagePlan(
            name=stage.name,
            kind=stage.kind,
            layers=self.seen.spec.layers,
            checkpointed=again,
            memory=memory | {"process": beside},
            loading=loading,
            peak=peak,
            fits=None if self.machine.memory is None else peak <= self.machine.memory,
            positions=max(train.positions),
            tokens_per_pack=float(train.lengths.sum()) / len(train.packs),
            packs=len(train.packs),
            tokens=int(train.lengths.sum()),
            steps_per_epoch=per_epoch,
            steps=stage.max_steps if stage.max_steps is not None else math.ceil((stage.epochs or 1) * per_epoch),
        )

    def _beside(self, recipe: Recipe, stage: Stage, again: int, taken: Bytes) -> int:
        """What the process and its libraries take beside the tensors."""
        if self.machine.kind == "cuda":
            return _CUDA_WORKSPACE
        scattered = sum(share * taken[kind] for kind, share in _CPU_SCATTERED.items())
        if again:
            scattered += _CPU_SCATTERED_RECOMPUTED * max(0, self._taken(recipe, stage, 0).total() - taken.total())
        return self.process + self.codec + _CPU_LIBRARIES + min(int(scattered), _CPU_MOST_SCATTERED)

    def _loading(self, recipe: Recipe, weights: int) -> int:
        """While the weights are read, on the CPU: the file is mapped, and copied where dtype or layout change."""
        if self.machine.kind == "cuda":
            return weights + _CUDA_WORKSPACE
        files, dtype = self.seen.files, {torch.float32: "F32", torch.bfloat16: "BF16"}.get(self.dtype(recipe))
        as_it_lies = self.seen.is_plain and recipe.model.quantize is None
        copied = sum(size for stored, size in files.items() if not as_it_lies or stored != dtype)
        return self.process + self.codec + weights + copied


def _process_bytes() -> int:
    """The interpreter with all libraries of a run, the tokenizer and the store: they are in this process already."""
    import_module("higgstune.training.run")
    return psutil.Process().memory_info().rss


def fewest(peak: Callable[[int], int], most: int, room: int) -> int:
    """The smallest number up to `most` whose peak is within `room`; where there is none, the one with the least."""
    fitting = (again for again in range(most + 1) if peak(again) <= room)
    found = next(fitting, None)
    return min(range(most + 1), key=peak) if found is None else found


def with_stages(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe with changes to its stages by name, checked anew."""
    stages = tuple(Stage.model_validate(stage.model_dump() | dict(changes[stage.name])) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})
