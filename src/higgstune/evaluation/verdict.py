"""Whether what a stage has trained is usable, by what was measured on the way; no judge is needed.

A run may end well and have learned nothing: its loss is at chance, its adapter changes nothing, or what it speaks never
stops or breaks off.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from higgstune.config.recipe import Stage
from higgstune.evaluation.choice import health_gates

Outcome = Literal["usable", "not usable", "no verdict"]
History = Sequence[Mapping[str, int | float]]  # a stage's log; each entry has its step
NEAR_CHANCE = 0.01  # of chance
GREW = 1.5  # times its start; at two validations running the loss does not come back by itself
_SANE_RATE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """Whether an adapter is usable, and why not; losses are those of audio on the validation split, in nats.

    >>> print(Verdict("no verdict", ["there are no validation rows"]))
    no verdict: there are no validation rows
    """

    outcome: Outcome
    reasons: list[str] = field(default_factory=list)  # why it is not usable, or why there is no verdict
    advice: str = ""  # the likeliest cause, and what to try; empty where it is usable
    warnings: list[str] = field(default_factory=list)
    loss: float | None = None  # at the step that the stage ends with
    base_loss: float | None = None  # before the first step of the run
    chance: float | None = None  # of a model that takes all codes for equally likely
    change: tuple[str, ...] = ()  # what to try, as `--set` takes it; empty where no setting is the cause

    def __str__(self) -> str:
        text = f"{self.outcome}: {'; '.join(self.reasons)}" if self.reasons else self.outcome
        text += f". {self.advice}" if self.advice else ""
        return f"{text}. Warning: {'; '.join(self.warnings)}" if self.warnings else text


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a stage at its end."""

    stage: Stage
    path: str  # of the stage in the recipe, such as stages.0
    is_last: bool
    step: int  # that it ends with
    planned_steps: int
    warmup_steps: int
    history: History
    base_history: History  # of the run's first stage
    chance: float
    spoken: Mapping[str, float]  # measures of the clips of that step
    clips: int
    changes_base: bool = True  # whether the adapter moves the base's logits at all
    modules: int = 0  # of the adapter
    idle: Sequence[str] = ()  # those that change nothing, although they were taught


def chance_of(classes: int) -> float:
    """The loss per label entry of a head for which all its classes are equally likely, in nats."""
    return math.log(classes)


def judge(found: Evidence) -> Verdict:
    """The verdict on a stage. Without validation rows nothing shows that it is usable, though faults may show."""
    loss, base_loss = (_at(history, step) for history, step in ((found.history, found.step), (found.base_history, 0)))
    reasons = list(_reasons(found, loss, base_loss))
    advice, change = _advice(found, loss) if reasons else ("", ())
    outcome: Outcome = "not usable" if reasons else "usable"
    if not reasons and loss is None:
        outcome, reasons = "no verdict", ["without validation rows nothing shows whether it has learned or memorised"]
    return Verdict(outcome, reasons, advice, list(_warnings(found)), loss, base_loss, found.chance, change)


def has_grown(history: History, stage: Stage) -> bool:
    """Whether the validation loss of a stage was over 1.5 times its start at two validations running."""
    losses = validation_losses(history, measured_loss(stage))
    limit = GREW * losses.get(0, math.inf)
    return any(a > limit and b > limit for a, b in pairwise(losses.values()))


def is_warmup_too_long(warmup_steps: int, steps: int) -> bool:
    """Whether a warm-up leaves no step after it; one of a single step is none."""
    return warmup_steps >= max(steps, 2)


def measured_loss(stage: Stage) -> str:
    """The loss by which a stage is followed: of audio, unless that has no weight."""
    return "audio_loss" if stage.audio_weight > 0 else "text_loss"


def validation_losses(history: History, name: str = "audio_loss") -> dict[int, float]:
    """Losses on the validation split by step, in order."""
    return {int(entry["step"]): float(entry[f"eval_{name}"]) for entry in history if f"eval_{name}" in entry}


def warmup_warning(path: str, warmup_steps: int, steps: int) -> str:
    """The warning about a warm-up that is too long."""
    return (
        f"the warm-up of {warmup_steps} steps takes all {steps} steps, so the learning rate never falls and may not "
        f"reach its peak: lower {path}.warmup_steps"
    )


def growth_warning(path: str, rate: float) -> str:
    """The warning about a loss that has grown."""
    return (
        f"the validation loss was over {GREW:g} times its start at two validations running: the learning rate is too "
        f"high, try {path}.learning_rate={_lower(rate)}"
    )


def _at(history: History, step: int, name: str = "audio_loss") -> float | None:
    return validation_losses(history, name).get(step)


def _is_chance(loss: float | None, chance: float) -> bool:
    return loss is not None and abs(loss - chance) <= NEAR_CHANCE * chance


def _reasons(found: Evidence, loss: float | None, base_loss: float | None) -> Iterator[str]:
    """Why the adapter is not usable."""
    if loss is not None and not math.isfinite(loss):
        yield "its validation audio loss is not a number"
    trained = next((float(e["audio_loss"]) for e in reversed(found.history) if "audio_loss" in e), None)
    if _is_chance(loss, found.chance):
        yield f"its validation audio loss, {loss:.3f}, is that of chance, {found.chance:.3f}"
    elif loss and trained and base_loss and min(loss, trained) > found.chance and loss > GREW * base_loss:
        losses = f"{trained:.3f} in training and {loss:.3f} in validation"
        yield f"its audio losses, {losses}, are above chance, and far above the base's"
    if not found.changes_base:
        yield "the adapter hardly changes the base's logits"
    if found.idle:
        yield f"{len(found.idle)} of the adapter's {found.modules} modules change nothing, such as {found.idle[0]}"
    if found.is_last:
        yield from _faults_of_clips(found)


def _faults_of_clips(found: Evidence) -> Iterator[str]:
    words = {"cap_rate": "never stop", "short_rate": "last under a third of their text"}
    for gate in health_gates(found.clips):
        [name] = gate.names
        if name in found.spoken and not gate.holds(found.spoken):
            yield f"{round(found.spoken[name] * found.clips)} of {found.clips} spoken clips {words[name]}"


def _warnings(found: Evidence) -> Iterator[str]:
    name = measured_loss(found.stage)
    loss, base = _at(found.history, found.step, name), _at(found.base_history, 0, name)
    if is_warmup_too_long(found.warmup_steps, found.planned_steps):
        yield warmup_warning(found.path, found.warmup_steps, found.planned_steps)
    if has_grown(found.history, found.stage):
        yield growth_warning(found.path, found.stage.learning_rate)
    if loss is not None and base is not None and round(loss, 3) > round(base, 3):
        kind = name.removesuffix("_loss")
        yield f"the validation {kind} loss, {loss:.3f}, is above the base's, {base:.3f}: {_why_above(found, base)}"

    audio = _at(found.base_history, 0)
    if audio is not None and audio > GREW * found.chance:
        yield (
            f"the base's audio loss, {audio:.3f}, was far above chance, {found.chance:.3f}, before training: the codes "
            "may be of another codec, which `higgstune doctor --data` shows"
        )


def _why_above(found: Evidence, base: float) -> str:
    """A training loss that has fallen all the same was learned by heart."""
    trained = [entry[name] for entry in found.history if (name := measured_loss(found.stage)) in entry]
    if trained and trained[-1] >= base:
        return "training did harm"
    return "it memorised its clips; more of them, fewer steps or a lower learning rate help"


def _advice(found: Evidence, loss: float | None) -> tuple[str, tuple[str, ...]]:
    """The likeliest cause of a result that is not usable, and what to try, in words and as settings."""
    losses = list(validation_losses(found.history).values())
    start = losses[0] if losses else None
    rate = f"{found.path}.learning_rate={_lower(found.stage.learning_rate)}"
    lower = f"try {rate}"
    longer: tuple[str, ...] = (f"{found.path}.max_steps={2 * found.planned_steps}",)
    if found.stage.epochs is not None:
        longer = (f"{found.path}.epochs=null", *longer)
    rose = start is not None and max(losses) > GREW * start
    if rose or (loss is not None and not math.isfinite(loss)):
        return f"The likeliest cause is a learning rate that is too high: {lower}", (rate,)
    if is_warmup_too_long(found.warmup_steps, found.planned_steps):
        cause = f"The likeliest cause is a warm-up that takes all steps: lower {found.path}.warmup_steps"
        return cause, (f"{found.path}.warmup_steps=0.05",)
    if not found.changes_base:
        return "The likeliest cause is too little training: try more steps or a higher learning rate", longer
    if found.idle:
        return (
            "The likeliest cause is a learning rate that is too high, now or in what it started from, or a loss "
            f"weight of 0 that leaves them without a gradient: {lower}, or a stage of another kind"
        ), (rate,)
    if _is_chance(start, found.chance):
        return (
            "The likeliest cause is a base that does not know such audio, as the loss was at chance before: compare "
            "base, codec and store with `higgstune doctor`"
        ), ()
    if start is not None and loss is not None and loss > start:
        cause = f"The likeliest cause is that it memorised its clips: try fewer steps or more clips, or {rate}"
        return cause, (rate,)
    return (
        "The likeliest cause is too little training, or transcripts that do not match their recordings: try more "
        "steps, and check the data with `higgstune doctor`"
    ), longer


def _lower(rate: float) -> str:
    """A tenth, and never above what small models take."""
    return f"{min(rate / 10, _SANE_RATE):g}"
