"""Which of several checkpoints sounds best, by a declared rule: conditions that it must meet (gates), and a rank.

Gates and ranks are arithmetic over the metrics' names, such as `wer <= recording_wer + 0.1`, and nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from higgstune.config.expression import LOSS, STEP, Expression, Measures
from higgstune.errors import ConfigError
from higgstune.evaluation.judges.base import OPTIONS, role_of

# The gates reject what anybody would reject at once. With few clips, one may fail: its share is 1 / clips.
# The first of the ranks that was measured counts.
_HEALTH_GATES = ("cap_rate <= {share}", "short_rate <= {share}")  # they need no judge
DEFAULT_GATES = (*_HEALTH_GATES, "loop_rate <= {share}", "wer <= recording_wer + 0.2")
_SHARE = 0.1
DEFAULT_RANKS = ("similarity", "similarity_reference", "-wer", STEP)


@dataclass(frozen=True)
class Rule:
    """Gates, and a rank: the highest is best."""

    gates: tuple[Expression, ...]
    rank: Expression

    @classmethod
    def of(cls, gates: Sequence[str] | None, rank: str | None, measured: Sequence[str], *, clips: int) -> "Rule":
        """The declared rule; a part that is not declared is the default one, over the metrics `measured` on `clips`.

        Raises ConfigError for invalid expressions, and for those that need a metric that is not measured.
        """
        known = {STEP, LOSS, *measured}
        for text in (*(gates or ()), *([] if rank is None else [rank])):
            if missing := [name for name in Expression(text).names if name not in known]:
                raise ConfigError(f"{text!r} needs {', '.join(missing)}, which is not measured here: name its judge")
        usual = _gates(DEFAULT_GATES, clips)
        ranks = [Expression(text) for text in DEFAULT_RANKS]
        return cls(
            tuple(gate for gate in usual if known.issuperset(gate.names))
            if gates is None
            else tuple(Expression(text) for text in gates),
            next(found for found in ranks if known.issuperset(found.names)) if rank is None else Expression(rank),
        )

    def __str__(self) -> str:
        gates = " and ".join(f"({gate.text})" for gate in self.gates)
        return f"of those with {gates} the highest {self.rank.text}" if gates else f"the highest {self.rank.text}"


def health_gates(clips: int) -> list[Expression]:
    """The gates without which `clips` clips are not speech: they stop by themselves, and not too early."""
    return _gates(_HEALTH_GATES, clips)


def _gates(texts: Sequence[str], clips: int) -> list[Expression]:
    share = max(_SHARE, 1 / clips) if clips > 1 else _SHARE  # of a single clip none may fail
    return [Expression(text.format(share=f"{share:.3g}")) for text in texts]


def check_rules(gates: Sequence[str] | None, rank: str | None, judges: Mapping[str, str | None]) -> None:
    """Find now what would else fail after hours of speaking; `judges` are specs by role, as of `judge_specs`.

    Raises ConfigError for rules over anything that is not measured when systems are compared.
    """
    for text in (*(gates or ()), *([] if rank is None else [rank])):
        for name in Expression(text).names:
            if name in (STEP, LOSS):
                raise ConfigError(f"{text!r}: systems that are compared have no {name}")
            if (role := role_of(name)) is not None and judges[role] is None:
                raise ConfigError(f"{text!r} needs {name}, and no judge of it was named ({OPTIONS[role]})")


@dataclass(frozen=True)
class Choice:
    """The best of several candidates, and why."""

    best: int  # index of the candidate
    broken: list[list[str]]  # of each candidate: the gates that it does not pass
    ranks: list[float]  # of each candidate

    @property
    def healthy(self) -> bool:
        """Whether the best candidate passes all gates; if none does, the best is one that breaks the fewest."""
        return not self.broken[self.best]

    def is_as_good(self, index: int) -> bool:
        """Whether a candidate is the best one or equal to it."""
        unknown = math.isnan(self.ranks[index]) and math.isnan(self.ranks[self.best])
        same = unknown or self.ranks[index] == self.ranks[self.best]
        return same and len(self.broken[index]) == len(self.broken[self.best])


def choose(candidates: Sequence[Measures], rule: Rule) -> Choice:
    """The candidate that passes all gates and ranks highest; among equals, the later one.

    If none passes all, those that break the fewest are ranked. Raises ValueError if there is no candidate.
    """
    broken = [[gate.text for gate in rule.gates if not gate.holds(measures)] for measures in candidates]
    ranks = [rule.rank.value(measures) for measures in candidates]

    def order(index: int) -> tuple[int, float, int]:
        rank = ranks[index]
        return -len(broken[index]), -math.inf if math.isnan(rank) else rank, index

    return Choice(max(range(len(candidates)), key=order), broken, ranks)
