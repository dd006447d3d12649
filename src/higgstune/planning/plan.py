"""The plan of a recipe: memory, packs and steps of each stage, and whether it fits the device."""

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
from higgstune.planning.survey import Machine, Packs, Survey, dtype_of, packs_of, steps_of, survey_recipe
from higgstune.progress import Progress, silent

_DRY_RUN_LAYERS = 2  # of those that are recomputed, and of those that are not
_LASTING = (WEIGHTS, ADAPTER, OPTIMIZER)  # kinds that stay from step to step
_CUDA_WORKSPACE = 40_000_000  # of cuBLAS, kept after its first use
# Memory on a CPU that the dry run does not count; fitted to measured runs, see docs/planning.md.
_CPU_LIBRARIES = 150_000_000  # of libraries after their first use, the trainer and this planner
_CPU_FRAGMENTATION = {ADAPTER: 0.5, OPTIMIZER: 0.5}  # what malloc keeps between live blocks
_CPU_FRAGMENTATION_RECOMPUTED = 0.3  # likewise, of the activations that recomputed layers free: they leave holes
_CPU_MAX_FRAGMENTATION = 250_000_000  # larger blocks go back to the system when they are freed


@dataclass(frozen=True)
class StagePlan:
    """One stage: its memory in bytes, its packs and steps."""

    name: str
    kind: str
    layers: int
    checkpointed: int  # layers that are recomputed in the backward pass
    memory: dict[str, int]  # by kind, at the peak of training
    loading: int  # peak while the weights are loaded
    peak: int
    fits: bool | None
    max_tokens_per_pack: int
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
        """Bytes of the stage that needs the most memory."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether the device has the memory; None where that is not known."""
        return None if self.machine.memory is None else self.peak <= self.machine.memory


@dataclass
class Footprint:
    """The memory of one stage with a pack, for any number of recomputed layers; dry runs are cached."""

    spec: StepSpec
    pack: Packed
    validation: Packed | None = None
    _dry_runs: dict[tuple[int, int, bool], Peaks] = field(default_factory=dict)

    def peak(self, recomputed: int) -> Bytes:
        """Bytes by kind at the peak of a step or a validation, with so many layers recomputed."""
        layers = self.spec.base.layers
        return max(self.segments(recomputed, layers - recomputed).values(), key=Counter.total)

    def segments(self, recomputed: int, kept: int) -> Peaks:
        """The peaks of `dry_run` for any number of layers, extrapolated from a few."""
        few = min(recomputed, _DRY_RUN_LAYERS), min(kept, _DRY_RUN_LAYERS)
        smallest = self._dry_run(few, self.validation)
        result = {name: Counter(value) for name, value in smallest.items()}
        for added, more in ((recomputed - few[0], (few[0] + 1, few[1])), (kept - few[1], (few[0], few[1] + 1))):
            if added:
                _add_layers(result, smallest, self._dry_run(more), added)
        return result

    def _dry_run(self, layers: tuple[int, int], validation: Packed | None = None) -> Peaks:
        key = *layers, validation is not None
        if key not in self._dry_runs:
            self._dry_runs[key] = dry_run(self.spec, self.pack, layers, validation=validation)
        return self._dry_runs[key]


def _add_layers(result: Peaks, few: Peaks, more: Peaks, layers: int) -> None:
    """Add the memory of so many layers to `result`: each adds the difference of the dry runs `more` and `few`."""
    for name, value in result.items():
        for kind in value.keys() | more.get(name, {}).keys():
            if name in more:
                value[kind] += layers * (more[name][kind] - few[name][kind])
            elif kind in _LASTING:  # without gradients, a layer leaves no activations
                value[kind] += layers * (more["start"][kind] - few["start"][kind])


class Planner:
    """Plans a recipe and its variants on one machine; packs and dry runs are cached for the next variant."""

    def __init__(self, recipe: Recipe, machine: Machine, *, survey: Survey | None = None) -> None:
        """Raises CheckpointError, DataError or ConfigError for files that the recipe names and that are missing."""
        self.recipe = recipe
        self.machine = machine
        self.survey = survey_recipe(recipe) if survey is None else survey
        self.process = _process_bytes() if machine.kind == "cpu" else 0
        self.codec = self.survey.codec_bytes if machine.kind == "cpu" else 0
        self._packs: dict[Any, Packs | None] = {}
        self._footprints: dict[Any, list[Footprint]] = {}

    def plan(self, recipe: Recipe | None = None, *, progress: Progress = silent) -> RunPlan:
        """The plan of the recipe, or of a variant with the same checkpoint and data."""
        recipe = recipe or self.recipe
        stages = []
        for stage in recipe.stages:
            stages.append(self._stage(recipe, stage))
            progress("planning stages", len(stages), len(recipe.stages))
        return RunPlan(self.machine, str(self.dtype(recipe)).removeprefix("torch."), tuple(stages))

    def dtype(self, recipe: Recipe) -> torch.dtype:
        """The dtype of the base's weights on the machine."""
        if self.machine.available:
            return choose_dtype(recipe.model.dtype, torch.device(self.machine.kind))
        return dtype_of(recipe, self.machine.kind)

    def checkpointed(self, recipe: Recipe, stage: Stage) -> int:
        """The number of recomputed layers: all, none or, with `auto`, the fewest with which the stage fits."""
        layers = self.survey.spec.layers
        if recipe.gradient_checkpointing != "auto":
            return layers if recipe.gradient_checkpointing else 0
        usable = self.machine.usable()
        if usable is None:
            return layers
        return fewest(lambda recomputed: self.peak(recipe, stage, recomputed), layers, usable)

    def peak(self, recipe: Recipe, stage: Stage, recomputed: int) -> int:
        """Bytes at the peak of a stage after loading."""
        peak_bytes = self._peak_bytes(recipe, stage, recomputed)
        return peak_bytes.total() + self._overhead(recipe, stage, recomputed, peak_bytes)

    def packs(self, recipe: Recipe, stage: Stage, split: str = "train") -> Packs | None:
        """The packs of a stage."""
        saves = self.dtype(recipe) == torch.float32 and split == "train"
        epochs = stage.epochs, stage.max_steps, stage.gradient_accumulation
        key = (split, stage.pack_size, *epochs, stage.text_targets, recipe.seed, recipe.lora.dropout == 0, saves)
        if key not in self._packs:
            self._packs[key] = packs_of(self.survey, recipe, stage, split=split, saves_probabilities=saves)
        return self._packs[key]

    def footprints(self, recipe: Recipe, stage: Stage) -> list[Footprint]:
        """The footprint of each pack that may take the most memory, the first together with a validation."""
        spec = self.spec(recipe, stage)
        epochs = stage.epochs, stage.max_steps, stage.gradient_accumulation
        key = (repr(spec), stage.pack_size, *epochs, stage.text_targets)
        if key not in self._footprints:
            train, validation = self.packs(recipe, stage), self.packs(recipe, stage, "validation")
            assert train is not None
            first, *others = train.candidates
            self._footprints[key] = [
                Footprint(spec, first, validation.candidates[0] if validation else None),
                *(Footprint(spec, pack) for pack in others),
            ]
        return self._footprints[key]

    def spec(self, recipe: Recipe, stage: Stage) -> StepSpec:
        """What `dry_run` needs to know about a stage."""
        return StepSpec(
            family=self.survey.family,
            config=self.survey.config,
            base=self.survey.spec,
            dtype=self.dtype(recipe),
            lora=recipe.lora,
            kind=stage.trains,
            builtin_extensions=self.survey.builtin_extensions,
            trained=self.survey.trained,
            attention=recipe.model.audio_attention or "lora",
            quantize=recipe.model.quantize,
            on_cuda=self.machine.kind == "cuda",
            accumulation=stage.gradient_accumulation > 1,
        )

    def _peak_bytes(self, recipe: Recipe, stage: Stage, recomputed: int) -> Bytes:
        return max((one.peak(recomputed) for one in self.footprints(recipe, stage)), key=Counter.total)

    def _stage(self, recipe: Recipe, stage: Stage) -> StagePlan:
        recomputed = self.checkpointed(recipe, stage)
        peak_bytes = self._peak_bytes(recipe, stage, recomputed)
        train = self.packs(recipe, stage)
        assert train is not None
        per_epoch = steps_of(stage, len(train.packs))
        memory = {kind: peak_bytes[kind] for kind in KINDS}
        loading = self._loading(recipe, peak_bytes[WEIGHTS])
        overhead = self._overhead(recipe, stage, recomputed, peak_bytes)
        peak = max(loading, peak_bytes.total() + overhead)
        return StagePlan(
            name=stage.name,
            kind=stage.trains,
            layers=self.survey.spec.layers,
            checkpointed=recomputed,
            memory=memory | {"process": overhead},
            loading=loading,
            peak=peak,
            fits=None if self.machine.memory is None else peak <= self.machine.memory,
            max_tokens_per_pack=max(train.tokens),
            tokens_per_pack=float(train.lengths.sum()) / len(train.packs),
            packs=len(train.packs),
            tokens=int(train.lengths.sum()),
            steps_per_epoch=per_epoch,
            steps=stage.max_steps if stage.max_steps is not None else math.ceil((stage.epochs or 1) * per_epoch),
        )

    def _overhead(self, recipe: Recipe, stage: Stage, recomputed: int, peak_bytes: Bytes) -> int:
        """Bytes of the process and its libraries, beyond the tensors."""
        if self.machine.kind == "cuda":
            return _CUDA_WORKSPACE
        fragmented = sum(share * peak_bytes[kind] for kind, share in _CPU_FRAGMENTATION.items())
        if recomputed:
            fragmented += _CPU_FRAGMENTATION_RECOMPUTED * max(
                0, self._peak_bytes(recipe, stage, 0).total() - peak_bytes.total()
            )
        return self.process + self.codec + _CPU_LIBRARIES + min(int(fragmented), _CPU_MAX_FRAGMENTATION)

    def _loading(self, recipe: Recipe, weights: int) -> int:
        """Peak bytes while loading. On a CPU the file is mapped, and copied where dtype or layout change."""
        if self.machine.kind == "cuda":
            return weights + _CUDA_WORKSPACE
        files, dtype = self.survey.files, {torch.float32: "F32", torch.bfloat16: "BF16"}.get(self.dtype(recipe))
        mapped = self.survey.is_plain and recipe.model.quantize is None
        copied = sum(size for stored, size in files.items() if not mapped or stored != dtype)
        return self.process + self.codec + weights + copied


def _process_bytes() -> int:
    """Bytes of the interpreter with a run's libraries, tokenizer and store, which this process has loaded, too."""
    import_module("higgstune.training.run")
    return psutil.Process().memory_info().rss


def fewest(peak: Callable[[int], int], limit: int, room: int) -> int:
    """The smallest number up to `limit` whose peak is within `room`; if there is none, the one with the lowest peak."""
    fitting = (recomputed for recomputed in range(limit + 1) if peak(recomputed) <= room)
    found = next(fitting, None)
    return min(range(limit + 1), key=peak) if found is None else found


def with_stages(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe with changes to its stages by name, validated."""
    stages = tuple(Stage.model_validate(stage.model_dump() | dict(changes[stage.name])) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})
