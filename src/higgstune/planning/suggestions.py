"""Options that fit if a plan does not, each with a dry run, the cheapest in time first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from higgstune.config.recipe import Recipe, Stage
from higgstune.files import format_bytes
from higgstune.planning.plan import Planner, RunPlan, with_stages

WANTED = 3
# Time of a step against now, by which options are ordered: what more forward passes, a recomputed forward pass and
# unpacking of 4 bits cost, roughly. Not measured on a GPU.
_HALVED, _AGAIN, _FOUR_BITS, _LESS_RANK = 1.03, 4 / 3, 1.25, 0.99
_RANKS = (64, 32, 16, 8, 4)


@dataclass(frozen=True)
class Option:
    """Another recipe, in words, and what it would take."""

    change: str
    peak: int
    time: float  # of a step, against what it is now
    recipe: Recipe


@dataclass(frozen=True)
class _Variant:
    change: str
    time: float
    recipe: Recipe


def options(planner: Planner, *, room: int | None = None) -> list[Option]:
    """Up to three variants of the planner's recipe that take at most `room` bytes (else: the machine's memory).

    Changes of one kind come before combinations of them, which are tried only where the former are too few. Of each
    kind the mildest that fits is taken.
    """
    room = planner.machine.memory if room is None else room
    if room is None:
        return []
    recipe = planner.recipe
    found = list(_fitting(planner, room, _one_by_one(planner, recipe, room)))
    if len(found) < WANTED:
        found += islice(_fitting(planner, room, _combined(planner, recipe, room)), WANTED - len(found))
    return sorted(found, key=lambda option: option.time)[:WANTED]


def summary(found: list[Option]) -> str:
    """Options as lines of text."""
    if not found:
        return "Nothing that was tried would fit: shorter clips (prepare --max-seconds), or more memory"
    only = "" if len(found) >= WANTED else f" (no more than {len(found)} of those that were tried)"
    lines = [f"  {option.change}: {format_bytes(option.peak)}, about {option.time:.2f} x the time" for option in found]
    return "\n".join([f"What would fit{only}, the quickest first:", *lines])


def _fitting(planner: Planner, room: int, ways: Iterator[list[_Variant]]) -> Iterator[Option]:
    """Of each way the first variant that fits; none is tried of a way whose last one does not."""
    for variants in ways:
        if not variants or planner.plan(variants[-1].recipe).peak > room:
            continue
        for variant in variants:
            plan = planner.plan(variant.recipe)
            if plan.peak <= room:
                yield Option(_with_layers(variant.change, plan), plan.peak, variant.time, variant.recipe)
                break


def _with_layers(change: str, plan: RunPlan) -> str:
    most = max(plan.stages, key=lambda stage: stage.checkpointed)
    return change.replace("LAYERS", f"{most.checkpointed} of {most.layers} layers")


def _one_by_one(planner: Planner, recipe: Recipe, room: int) -> Iterator[list[_Variant]]:
    """Kinds of change, each with its variants from mild to strong."""
    yield list(_checkpointing(planner, recipe, room))
    yield list(_smaller_packs(planner, recipe))
    yield list(_four_bits(recipe))
    yield list(_ranks(recipe))


def _combined(planner: Planner, recipe: Recipe, room: int) -> Iterator[list[_Variant]]:
    """Ways in which two or three changes go together, each with its variants from mild to strong."""
    for whole in list(_checkpointing(planner, recipe, 0))[-1:]:
        yield [_both(whole, v) for v in _smaller_packs(planner, whole.recipe)]
    for four in _four_bits(recipe):
        yield [_both(four, v) for v in _smaller_packs(planner, four.recipe)]
        yield [_both(four, v) for v in _checkpointing(planner, four.recipe, room)]
        for deeper in _checkpointing(planner, four.recipe, 0):
            both = _both(four, deeper)
            yield [_both(both, v) for v in _smaller_packs(planner, both.recipe)]
    for less in list(_ranks(recipe))[:1]:
        yield [_both(less, v) for v in _smaller_packs(planner, less.recipe)]


def _both(one: _Variant, other: _Variant) -> _Variant:
    return _Variant(", ".join(filter(None, (one.change, other.change))), one.time * other.time, other.recipe)


def _checkpointing(planner: Planner, recipe: Recipe, room: int) -> Iterator[_Variant]:
    """Activation checkpointing in as many layers as `room` requires."""
    layers = planner.seen.config.num_hidden_layers
    before = max(planner.checkpointed(recipe, stage) for stage in recipe.stages)
    for count in _layers(planner, recipe, room):
        if count > before:
            changed = recipe.model_copy(update={"gradient_checkpointing": "auto" if count < layers else True})
            time = 1 + (_AGAIN - 1) * (count - before) / layers
            yield _Variant(f"gradient_checkpointing: {'auto' if count < layers else 'true'} (LAYERS)", time, changed)


def _layers(planner: Planner, recipe: Recipe, room: int) -> list[int]:
    """How many layers `auto` would take, and all of them."""
    auto = recipe.model_copy(update={"gradient_checkpointing": "auto"})
    layers = planner.seen.config.num_hidden_layers
    chosen = max(planner.checkpointed(auto, stage) for stage in recipe.stages) if room else layers
    return sorted({chosen, layers})


def _smaller_packs(planner: Planner, recipe: Recipe) -> Iterator[_Variant]:
    """Smaller forward passes, and as many more of them in an optimizer step."""
    for halvings in range(1, 7):
        changes, texts = {}, []
        for index, stage in enumerate(recipe.stages):
            change = _smaller(planner, recipe, stage, 2**halvings)
            if change is None:
                return
            changes[stage.name] = dict(change)
            texts += [f"stages.{index}.{key}: {value}" for key, value in change.items()]
        yield _Variant(", ".join(texts), _HALVED**halvings, with_stages(recipe, changes))


def _smaller(planner: Planner, recipe: Recipe, stage: Stage, parts: int) -> dict[str, int] | None:
    """A stage with packs of that part or less, and the same number of clips or tokens in a step."""
    before = stage.gradient_accumulation
    if stage.pack_size.tokens is None:
        clips = stage.pack_size.clips
        fewer = max((count for count in range(1, clips // parts + 1) if clips % count == 0), default=0)
        return {"batch_size": fewer, "gradient_accumulation": before * clips // fewer} if fewer else None
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
    """A smaller adapter; not if it continues another one, whose shape it must have."""
    for r in _RANKS:
        if r < recipe.lora.r and recipe.init_adapter is None:
            share = r / recipe.lora.r
            alpha = recipe.lora.alpha * (share**0.5 if recipe.lora.rslora else share)  # the same scaling
            lora = recipe.lora.model_copy(update={"r": r, "alpha": alpha})
            change = f"lora.r: {r}, lora.alpha: {lora.alpha:g}"
            yield _Variant(change, _LESS_RANK, recipe.model_copy(update={"lora": lora}))
