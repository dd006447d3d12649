"""Rows of another store among those that are trained on, so that what a model could do before is not forgotten."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from higgstune.data.store import Row, SplitView


class MixedRows(Sequence[Row]):
    """All rows of one split, then as many of another store's as make a share of the whole.

    The others are drawn once, by the seed, without repeating one before all were drawn: every epoch has the same.
    """

    def __init__(self, own: SplitView, replayed: SplitView, *, share: float, seed: int) -> None:
        """`share` is in (0, 1), of all rows; there is one replayed row at the least."""
        self.own = own
        self.replayed = replayed
        wanted = max(1, round(len(own) * share / (1 - share)))
        generator = np.random.default_rng((seed, 1))
        rounds = [generator.permutation(len(replayed)) for _ in range(-(-wanted // len(replayed)))]
        self.drawn: list[int] = np.concatenate(rounds)[:wanted].tolist()

    def __len__(self) -> int:
        return len(self.own) + len(self.drawn)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> "Row | list[Row]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self.own[place] if place < len(self.own) else self.replayed[self.drawn[place - len(self.own)]]

    def outlines(self) -> Iterator[Row]:
        """As `SplitView.outlines`."""
        yield from self.own.outlines()
        for index in self.drawn:
            yield self.replayed.outline(index)
