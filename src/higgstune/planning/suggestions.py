"""Changes of a recipe with which its plan would fit, each checked by dry runs, the fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from higgstune.config.recipe import Recipe, Stage
from higgstune.files import format_bytes
from higgstune.planning.plan import Planner, RunPlan, with_stages

MAX_OPTIONS = 3
# Time of a step relative to the recipe's, by which options are sorted: rough costs of more forward passes, recomputed
# layers and dequantization. Not measured on a GPU.
_HALF_PACK, _RECOMPUTED, _FOUR_BITS, _LOWER_RANK = 1.03, 4 / 3, 1.25, 0.99
_RANKS = (64, 32, 16, 8, 4)


@dataclass(frozen=True)
class Option:
    """A changed recipe that fits."""

    change: str  # in the recipe's keys
    peak: int  # bytes
    time: float  # of a step, relative to the recipe's
    recipe: Recipe


@dataclass(frozen=True)
class _Variant:
    change: str
    time: float
    recipe: Recipe


def options(planner: Planner, *, room: int | None = None) -> list[Option]:
    """Up to three variants of the planner's recipe that fit `room` bytes (default: the machine's memory).

    Combinations are tried only if single changes give too few options. Of each kind of change, the mildest that fits
    counts.
    """
    room = planner.machine.memory if room is None else room
    if room is None:
        return []
    recipe = planner.recipe
    found = list(_fitting(planner, room, _single_changes(planner, recipe, room)))
    if len(found) < MAX_OPTIONS:
        found += islice(_fitting(planner, room, _combined_changes(planner, recipe, room)), MAX_OPTIONS - len(found))
    return sorted(found, key=lambda option: option.time)[:MAX_OPTIONS]


def summary(found: list[Option]) -> str:
    """The options as lines of text."""
    if not found:
        return "No change that was tried would fit: use shorter clips (prepare --max-seconds), or more memory"
    only = "" if len(found) >= MAX_OPTIONS else f" (only {len(found)} of the changes that were tried)"
    lines = [f"  {option.change}: {format_bytes(option.peak)}, about {option.time:.2f} x the time" for option in found]
    return "\n".join([f"These changes would fit{only}, the fastest first:", *lines])


def _fitting(planner: Planner, room: int, kinds: Iterator[list[_Variant]]) -> Iterator[Option]:
    """The first variant of each kind of change that fits; if the strongest does not fit, the others are not tried."""
    for variants in kinds:
        if not variants or planner.plan(variants[-1].recipe).peak > room:
            continue
        for variant in variants:
            plan = planner.plan(variant.recipe)
            if plan.peak <= room:
                yield Option(_with_layers(variant.change, plan), plan.peak, variant.time, variant.recipe)
                break


def _with_layers(change: str, plan: RunPlan) -> str:
    stage = max(plan.stages, key=lambda stage: stage.checkpointed)
    return change.replace("LAYERS", f"{stage.checkpointed} of {stage.layers} layers")


def _single_changes(planner: Planner, recipe: Recipe, room: int) -> Iterator[list[_Variant]]:
    """Variants of each kind of change, from mild to strong."""
    yield list(_checkpointing(planner, recipe, room))
    yield list(_smaller_packs(planner, recipe))
    yield list(_four_bits(recipe))
    yield list(_ranks(recipe))


def _combined_changes(planner: Planner, recipe: Recipe, room: int) -> Iterator[list[_Variant]]:
    """Variants of each combination of two or three changes, from mild to strong."""
    for full in list(_checkpointing(planner, recipe, 0))[-1:]:
        yield [_both(full, v) for v in _smaller_packs(planner, full.recipe)]
    for four in _four_bits(recipe):
        yield [_both(four, v) for v in _smaller_packs(planner, four.recipe)]
        yield [_both(four, v) for v in _checkpointing(planner, four.recipe, room)]
        for deeper in _checkpointing(planner, four.recipe, 0):
            both = _both(four, deeper)
            yield [_both(both, v) for v in _smaller_packs(planner, both.recipe)]
    for lower in list(_ranks(recipe))[:1]:
        yield [_both(lower, v) for v in _smaller_packs(planner, lower.recipe)]


def _both(one: _Variant, other: _Variant) -> _Variant:
    return _Variant(", ".join(filter(None, (one.change, other.change))), one.time * other.time, other.recipe)


def _checkpointing(planner: Planner, recipe: Recipe, room: int) -> Iterator[_Variant]:
    """Activation checkpointing in as many layers as `room` requires, and in all."""
    layers = planner.survey.spec.layers
    before = max(planner.checkpointed(recipe, stage) for stage in recipe.stages)
    for count in _layers(planner, recipe, room):
        if count > before:
            changed = recipe.model_copy(update={"gradient_checkpointing": "auto" if count < layers else True})
            time = 1 + (_RECOMPUTED - 1) * (count - before) / layers
            yield _Variant(f"gradient_checkpointing: {'auto' if count < layers else 'true'} (LAYERS)", time, changed)


def _layers(planner: Planner, recipe: Recipe, room: int) -> list[int]:
    """The number of layers that `auto` would recompute within `room` (0: not planned), and that of all layers."""
    auto = recipe.model_copy(update={"gradient_checkpointing": "auto"})
    layers = planner.survey.spec.layers
    chosen = max(planner.checkpointed(auto, stage) for stage in recipe.stages) if room else layers
    return sorted({chosen, layers})


def _smaller_packs(planner: Planner, recipe: Recipe) -> Iterator[_Variant]:
    """Smaller packs, with more gradient accumulation."""
    for halvings in range(1, 7):
        changes, texts = {}, []
        for index, stage in enumerate(recipe.stages):
            change = _smaller(planner, recipe, stage, 2**halvings)
            if change is None:
                return
            changes[stage.name] = dict(change)
            texts += [f"stages.{index}.{key}: {value}" for key, value in change.items()]
        yield _Variant(", ".join(texts), _HALF_PACK**halvings, with_stages(recipe, changes))


def _smaller(planner: Planner, recipe: Recipe, stage: Stage, parts: int) -> dict[str, int] | None:
    """Changes of a stage for packs of at most 1/`parts` of the size, without fewer clips or tokens in a step."""
    before = stage.gradient_accumulation
    if stage.pack_size.tokens is None:
        clips = stage.pack_size.clips
        smaller = max((count for count in range(1, clips // parts + 1) if clips % count == 0), default=0)
        return {"batch_size": smaller, "gradient_accumulation": before * clips // smaller} if smaller else None
    packs = planner.packs(recipe, stage)
    assert packs is not None
    tokens = stage.pack_size.tokens // parts
    if tokens < packs.lengths.max():
        return None
    return {"batch_tokens": tokens, "gradient_accumulation": before * parts}


def _four_bits(recipe: Recipe) -> Iterator[_Variant]:
    if recipe.model.quantize is None:
        model = recipe.model.model_copy(update={"quantize": "4bit"})
        yield _Variant("model.quantize: 4bit", _FOUR_BITS, recipe.model_copy(update={"model": model}))


def _ranks(recipe: Recipe) -> Iterator[_Variant]:
    """An adapter of a lower rank, unless `init_adapter` fixes its shape."""
    for r in _RANKS:
        if r < recipe.lora.r and recipe.init_adapter is None:
            share = r / recipe.lora.r
            alpha = recipe.lora.alpha * (share**0.5 if recipe.lora.rslora else share)  # the same scaling
            lora = recipe.lora.model_copy(update={"r": r, "alpha": alpha})
            change = f"lora.r: {r}, lora.alpha: {lora.alpha:g}"
            yield _Variant(change, _LOWER_RANK, recipe.model_copy(update={"lora": lora}))
