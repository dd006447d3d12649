"""Progress of a long operation, reported through a callback."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # the current stage, items done, items in all


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that reports nothing."""
