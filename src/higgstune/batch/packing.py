"""Decides which clips form a pack: packs have a budget of tokens, or a number of clips.

The packs of an epoch follow from lengths, seed and epoch alone, so that all processes have the same ones and each takes
its share. Every clip is in exactly one pack of an epoch.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from higgstune.errors import ConfigError

Pack = list[int]  # indices of clips
_LOOKAHEAD = 512  # clips that are searched for one that fills a gap
_MIN_CLIPS_TO_FILL = 16  # from so many clips a pack can always be filled
_MIN_FILL = 0.985  # share of its budget that a pack should hold


@dataclass(frozen=True)
class PackSize:
    """The size of a pack: at most `tokens` tokens, or exactly `clips` clips."""

    tokens: int | None = None
    clips: int = 1


def pack_indices(lengths: NDArray[np.int64], size: PackSize, *, seed: int | None) -> list[Pack]:
    """Packs of all clips by their lengths [clips] in tokens; shuffled by `seed`, in the given order without it.

    Raises ConfigError for a clip that is longer than a pack.
    """
    if size.tokens is not None and len(lengths) and lengths.max() > size.tokens:
        longest = int(lengths.argmax())
        raise ConfigError(
            f"batch_tokens is {size.tokens}, but clip {longest} (counted from 0) has {lengths[longest]} tokens, 25 a "
            "second of audio and those of its text: raise batch_tokens, or prepare with a smaller --max-seconds"
        )
    generator = None if seed is None else np.random.default_rng(seed)
    order = np.arange(len(lengths)) if generator is None else generator.permutation(len(lengths))
    if size.tokens is None:
        return [order[first : first + size.clips].tolist() for first in range(0, len(order), size.clips)]
    small = len(lengths) > 0 and lengths.mean() * _MIN_CLIPS_TO_FILL <= size.tokens
    spare = int((1 - _MIN_FILL) * size.tokens) if small else size.tokens
    packs = _draw(order.tolist(), lengths.tolist(), size.tokens, spare)
    return _tightened(packs, lengths, size.tokens) if small else packs


def _tightened(drawn: list[Pack], lengths: NDArray[np.int64], budget: int) -> list[Pack]:
    """Repack the last packs by length alone, as few as needed, if short clips ran out before long ones."""
    best, back = drawn, 8
    while fill(best, lengths, budget) < _MIN_FILL and back < 2 * len(drawn):
        tail = [index for pack in drawn[-back:] for index in pack]
        tried = [*drawn[:-back], *_best_fit(tail, lengths.tolist(), budget)]
        best = max(best, tried, key=lambda packs: fill(packs, lengths, budget))
        back *= 2
    return best


def _draw(order: Sequence[int], lengths: Sequence[int], budget: int, spare: int) -> list[Pack]:
    """Take clips in their order; if the next one does not fit, the longest following one that does, as in best fit.

    If none fits and more than `spare` tokens are left, a longer clip replaces one of the pack, which moves to the next
    pack. So a pack is a random draw, except for the few clips that fill its end.
    """
    packs: list[Pack] = []
    following: deque[int] = deque()  # the next clips in their order, some of which are taken already
    by_length: list[tuple[int, int]] = []  # the same, without taken ones
    coming = iter(order)
    pack: Pack = []
    room = budget
    while True:
        for index in islice(coming, _LOOKAHEAD - len(by_length)):
            following.append(index)
            insort(by_length, (lengths[index], index))
        if not by_length:
            return [*packs, pack] if pack else packs
        while not _is_in(by_length, (lengths[following[0]], following[0])):
            following.popleft()
        taken = (lengths[following[0]], following[0])
        if taken[0] > room:
            place = bisect_right(by_length, (room, len(lengths))) - 1
            if place < 0:
                exchange = _best_exchange(pack, room, lengths, by_length) if room > spare else None
                if exchange is not None:
                    at, longer = exchange
                    following.appendleft(pack[at])
                    insort(by_length, (lengths[pack[at]], pack[at]))
                    by_length.remove(longer)
                    pack[at] = longer[1]
                packs.append(pack)
                pack, room = [], budget
                continue
            taken = by_length[place]
        by_length.remove(taken)
        pack.append(taken[1])
        room -= taken[0]


def _best_exchange(
    pack: Pack, room: int, lengths: Sequence[int], by_length: Sequence[tuple[int, int]]
) -> tuple[int, tuple[int, int]] | None:
    """The index in a pack, and the (length, clip) that fills the room best in place of the clip there."""
    found, most = None, 0
    for at, index in enumerate(pack):
        place = bisect_right(by_length, (lengths[index] + room, len(lengths))) - 1
        if place >= 0 and by_length[place][0] - lengths[index] > most:
            found, most = (at, by_length[place]), by_length[place][0] - lengths[index]
    return found


def _best_fit(pool: Sequence[int], lengths: Sequence[int], budget: int) -> list[Pack]:
    """Put each clip, the longest first, into the pack that it fills best; the least full pack comes last."""
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for index in sorted(pool, key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[index], -1))
        if place == len(rooms):
            packs.append([])
            rooms.append((budget, len(packs) - 1))
        room, pack = rooms.pop(place)
        packs[pack].append(index)
        insort(rooms, (room - lengths[index], pack))
    return [packs[pack] for _, pack in rooms]


def _is_in(ascending: Sequence[tuple[int, int]], item: tuple[int, int]) -> bool:
    place = bisect_left(ascending, item)
    return place < len(ascending) and ascending[place] == item


def fill(packs: Sequence[Pack], lengths: NDArray[np.int64], tokens: int) -> float:
    """The mean share of its budget that a pack uses, without the last pack."""
    counted = packs[:-1] or packs
    return float(np.mean([lengths[pack].sum() / tokens for pack in counted]))


class PackSampler:
    """A batch sampler of one process's packs of each epoch; all processes have equally many.

    Packs belong to optimizer steps: `per_step` to each, fewer to the last one of an epoch, whatever the number of
    processes. If a step has too few packs for all processes, some get a muted clip: an index i < 0 stands for clip ~i
    without its labels. It adds nothing to the loss, so every clip still counts once.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        size: PackSize,
        *,
        seed: int | None,
        rank: int = 0,
        processes: int = 1,
        per_step: int | None = None,
    ) -> None:
        """`seed` None keeps the order of the clips in every epoch; `per_step` None means one pack for each process.

        Raises ConfigError as `pack_indices`.
        """
        self.lengths = lengths
        self.size = size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.per_step = processes if per_step is None else per_step
        self.epoch = 0
        self._first = pack_indices(lengths, size, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is over the packs of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps, rest = divmod(len(self._first), self.per_step)
        return steps * self._rounds(self.per_step) + self._rounds(rest)

    def __iter__(self) -> Iterator[Pack]:
        for packs in self._steps(self.epoch):
            empty = self._rounds(len(packs)) * self.processes - len(packs)
            yield from (packs + [[~packs[0][0]]] * empty)[self.rank :: self.processes]

    @property
    def idle(self) -> int:
        """The number of processes that get only muted clips in every step."""
        return max(0, self.processes - min(self.per_step, len(self._first)))

    def of_step(self, step: int) -> list[Pack]:
        """All processes' packs of an optimizer step, counted from 0 over all epochs."""
        epoch, place = divmod(step, -(-len(self._first) // self.per_step))
        return self._steps(epoch)[place]

    def _rounds(self, packs: int) -> int:
        """The number of packs of each process, given the number of all packs."""
        return -(-packs // self.processes)

    def _steps(self, epoch: int) -> list[list[Pack]]:
        packs = self.packs(epoch)
        return [packs[first : first + self.per_step] for first in range(0, len(packs), self.per_step)]

    def packs(self, epoch: int) -> list[Pack]:
        """All processes' packs of an epoch. Every epoch has as many as the first, by which schedules are planned."""
        if self.seed is None or epoch == 0:
            return list(self._first)
        packs = pack_indices(self.lengths, self.size, seed=self.seed + epoch * 1_000_003)
        if len(packs) > len(self._first):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self._first))
            return [self._first[i] for i in order]
        while len(packs) < len(self._first):
            largest = max(range(len(packs)), key=lambda i: len(packs[i]))
            half = len(packs[largest]) // 2
            packs.append(packs[largest][half:])
            packs[largest] = packs[largest][:half]
        return packs
