"""What a recipe may hold besides plain values: expressions over metrics, and commands as judges.

Expressions are parsed and checked, and never evaluated as Python.
"""

import ast
import difflib
import math
import operator
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from higgstune.errors import ConfigError
from higgstune.metrics import METRICS

STEP = "step"
LOSS = "audio_loss"  # of the validation split
NAMES = (STEP, LOSS, *(metric.name for metric in METRICS))
CHECKPOINT_SUFFIX = ".pt"  # of a judge that is one file of weights
_MAX_EXPRESSION = 500  # characters
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: dict[str, tuple[Callable[..., Any], range]] = {  # by name: the function, and how many arguments it takes
    "min": (min, range(2, 100)), "max": (max, range(2, 100)), "abs": (abs, range(1, 2)),
}  # fmt: skip
_ALLOWED = (
    *(ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.USub, ast.Not, ast.And, ast.Or),
    *_BINARY, *_COMPARED,
)  # fmt: skip
Measures = Mapping[str, float]  # by metric; a metric that was not measured is missing


class Expression:
    """Arithmetic, comparisons, `and`, `or`, `not`, min, max and abs over names of metrics."""

    def __init__(self, text: str) -> None:
        """Raises ConfigError, which names the offending part, for anything else and for unknown metrics."""
        self.text = text = text.strip()
        try:
            if len(text) > _MAX_EXPRESSION:
                raise ValueError(f"longer than {_MAX_EXPRESSION} characters")
            self._tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problem = getattr(error, "msg", error)  # a syntax error without its place, which names no file
            raise ConfigError(
                f"{text[:80]!r} is not an expression over metrics ({problem}): write it like 'wer <= 0.1' or "
                "'similarity'"
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
            raise ConfigError(f"{text[:80]!r} is nested too deeply") from None

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
        """The value; NaN if a metric was not measured, or for a division by zero."""
        if any(name not in measures for name in self.names):
            return math.nan
        try:
            return float(self._of(self._tree, measures))
        except (ZeroDivisionError, OverflowError):
            return math.nan

    def holds(self, measures: Measures) -> bool:
        """Whether a condition is met; False if one of its metrics was not measured."""
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
                return together([self._of(value, measures) for value in values])  # a list: no part is skipped
            case ast.Compare(left=left, ops=ops, comparators=right) if all(type(op) in _COMPARED for op in ops):
                values = [self._of(part, measures) for part in (left, *right)]
                return all(_COMPARED[type(op)](*values[i : i + 2]) for i, op in enumerate(ops))
            case ast.Call(func=ast.Name(id=name), args=given, keywords=[]) if (
                name in _FUNCTIONS and len(given) in _FUNCTIONS[name][1]
            ):
                return _FUNCTIONS[name][0](*(self._of(argument, measures) for argument in given))
        raise self._refusal(node)


def is_command(spec: str) -> bool:
    """Whether a judge's spec is a command (see `command_words`). Finds no program and runs none."""
    try:
        return not is_local_model(spec) and are_command_words(shlex.split(spec))
    except ValueError:  # an open quote, which no model's name has
        return True


def is_local_model(spec: str) -> bool:
    """Whether a judge's spec is a folder, or a checkpoint file (.pt): neither is run."""
    path = Path(spec).expanduser()
    return path.is_dir() or (path.suffix == CHECKPOINT_SUFFIX and path.is_file())


def are_command_words(words: Sequence[str]) -> bool:
    """Whether words are a command: two or more, or the path of one file."""
    return len(words) > 1 or (len(words) == 1 and Path(words[0]).is_file())
