"""Progress of a long operation, reported through a callback."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # the current stage, items done, items in all


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that reports nothing."""


def duration(seconds: float) -> str:
    """A duration in the unit that people would use.

    >>> duration(231)
    '3.9 minutes'
    """
    unit, size = ("seconds", 1) if seconds < 100 else ("minutes", 60) if seconds < 6000 else ("hours", 3600)
    number = seconds / size
    text = (f"{number:.1f}" if number < 10 else f"{number:.0f}").removesuffix(".0")
    return f"{text} {unit[:-1] if text == '1' else unit}"
