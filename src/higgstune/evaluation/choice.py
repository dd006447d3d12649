"""Which of several checkpoints sounds best, by a declared rule: conditions that it must meet, and what is ranked by.

Conditions and ranks are arithmetic over the metrics' names, such as `wer <= recording_wer + 0.1`, and nothing else.
"""

import ast
import difflib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from higgstune.errors import ConfigError
from higgstune.evaluation.metrics import METRICS

STEP = "step"
LOSS = "audio_loss"  # of the validation split
NAMES = (STEP, LOSS, *(metric.name for metric in METRICS))

# What a listener turns away at once; the first of the ranks that was measured counts.
# Of few clips one may fail: it is no more than a share of 1 / clips.
DEFAULT_GATES = ("cap_rate <= {share}", "short_rate <= {share}", "loop_rate <= {share}", "wer <= recording_wer + 0.2")
_SHARE = 0.1
DEFAULT_RANKS = ("similarity", "similarity_reference", "-wer", STEP)

_MAX_EXPRESSION = 500  # characters
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: dict[str, tuple[Callable[..., Any], range]] = {  # with how many arguments
    "min": (min, range(2, 100)), "max": (max, range(2, 100)), "abs": (abs, range(1, 2)),
}  # fmt: skip
_ALLOWED = (
    *(ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.USub, ast.Not, ast.And, ast.Or),
    *_BINARY, *_COMPARED,
)  # fmt: skip

Measures = Mapping[str, float]  # by metric; what was not measured is not there


class Expression:
    """Arithmetic, comparisons, `and`, `or`, `not`, min, max and abs over names of metrics."""

    def __init__(self, text: str) -> None:
        """Raises ConfigError, with the place, for anything else and for names that no metric has."""
        self.text = text = text.strip()
        try:
            if len(text) > _MAX_EXPRESSION:
                raise ValueError(f"longer than {_MAX_EXPRESSION} characters")
            self._tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problem = getattr(error, "msg", error)  # of a syntax error without the place, which is no file's
            raise ConfigError(
                f"{text[:80]!r} is no expression over metrics ({problem}): write it like 'wer <= 0.1' or 'similarity'"
            ) from error
        self.names = sorted({node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)} - set(_FUNCTIONS))
        for name in self.names:
            if name not in NAMES:
                near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{text!r}: there is no metric {name}; the nearest is {near} (of {', '.join(NAMES)})")
        for node in ast.walk(self._tree):
            if not self._is_allowed(node):
                raise self._refusal(node)
        try:
            self.value(dict.fromkeys(self.names, 1.0))
        except RecursionError:
            raise ConfigError(f"{text[:80]!r} is too deep to be computed") from None

    @staticmethod
    def _is_allowed(node: ast.AST) -> bool:
        if isinstance(node, ast.Constant):
            return isinstance(node.value, int | float)
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            return name in _FUNCTIONS and len(node.args) in _FUNCTIONS[name][1] and not node.keywords
        return isinstance(node, _ALLOWED)

    def _refusal(self, node: ast.AST) -> ConfigError:
        return ConfigError(
            f"{self.text!r}: {ast.get_source_segment(self.text, node) or type(node).__name__} is not allowed: numbers, "
            "names of metrics, + - * /, < <= > >=, and, or, not, min, max, abs"
        )

    def value(self, measures: Measures) -> float:
        """NaN where a name was not measured, or for a division by zero."""
        if any(name not in measures for name in self.names):
            return math.nan
        try:
            return float(self._of(self._tree, measures))
        except (ZeroDivisionError, OverflowError):
            return math.nan

    def holds(self, measures: Measures) -> bool:
        """Whether a condition is met; not where one of its names was not measured."""
        value = self.value(measures)
        return not math.isnan(value) and bool(value)

    def _of(self, node: ast.expr, measures: Measures) -> Any:
        match node:
            case ast.Constant(value=int() | float() as value):
                return value
            case ast.Name(id=name) if name in measures:
                return measures[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)](self._of(left, measures), self._of(right, measures))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._of(operand, measures)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._of(operand, measures)
            case ast.BoolOp(op=op, values=values):
                together = all if isinstance(op, ast.And) else any
                return together([self._of(value, measures) for value in values])  # all: what is not allowed is found
            case ast.Compare(left=left, ops=ops, comparators=right) if all(type(op) in _COMPARED for op in ops):
                values = [self._of(part, measures) for part in (left, *right)]
                return all(_COMPARED[type(op)](*values[i : i + 2]) for i, op in enumerate(ops))
            case ast.Call(func=ast.Name(id=name), args=given, keywords=[]) if (
                name in _FUNCTIONS and len(given) in _FUNCTIONS[name][1]
            ):
                return _FUNCTIONS[name][0](*(self._of(argument, measures) for argument in given))
        raise self._refusal(node)


@dataclass(frozen=True)
class Rule:
    """Conditions, and what is ranked by: the highest is best."""

    gates: tuple[Expression, ...]
    rank: Expression

    @classmethod
    def of(cls, gates: Sequence[str] | None, rank: str | None, measured: Sequence[str], *, clips: int) -> "Rule":
        """A rule as it is declared; what is not is the default one, of what is `measured` of so many clips.

        Raises ConfigError for expressions that are none, and for those that need what is not measured.
        """
        known = {STEP, LOSS, *measured}
        for text in (*(gates or ()), *([] if rank is None else [rank])):
            if missing := [name for name in Expression(text).names if name not in known]:
                raise ConfigError(f"{text!r} needs {', '.join(missing)}, which is not measured here: name its judge")
        share = f"{max(_SHARE, 1 / clips):.3g}"
        usual = [Expression(text.format(share=share)) for text in DEFAULT_GATES]
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


@dataclass(frozen=True)
class Choice:
    """The best of several candidates, and why."""

    best: int  # its place among the candidates
    broken: list[list[str]]  # of each candidate: the conditions that it does not meet
    ranks: list[float]  # of each candidate

    @property
    def healthy(self) -> bool:
        """Whether the best one meets all conditions; where none does, it is one that breaks the fewest."""
        return not self.broken[self.best]

    def is_as_good(self, index: int) -> bool:
        """Whether a candidate is the best one, or equal to it."""
        unknown = math.isnan(self.ranks[index]) and math.isnan(self.ranks[self.best])
        same = unknown or self.ranks[index] == self.ranks[self.best]
        return same and len(self.broken[index]) == len(self.broken[self.best])


def choose(candidates: Sequence[Measures], rule: Rule) -> Choice:
    """The candidate that meets all conditions and ranks highest; of equals the later one.

    Where none meets all, those that break the fewest are ranked. Raises ValueError where there is no candidate.
    """
    broken = [[gate.text for gate in rule.gates if not gate.holds(measures)] for measures in candidates]
    ranks = [rule.rank.value(measures) for measures in candidates]

    def order(index: int) -> tuple[int, float, int]:
        rank = ranks[index]
        return -len(broken[index]), -math.inf if math.isnan(rank) else rank, index

    return Choice(max(range(len(candidates)), key=order), broken, ranks)
