"""The loader: packs in their order, built ahead by one thread."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from packs import CODES, examples
from tiny_checkpoint import tiny_prompter

from higgstune.batch.collate import Packed, pack
from higgstune.batch.loader import PackLoader, Prefetched
from higgstune.batch.packing import PackSize
from higgstune.errors import DataError
from higgstune.families.base import Example


class Examples:
    """Of which those at and after `damaged` cannot be read."""

    def __init__(self, damaged: int | None = None) -> None:
        _, prompter = tiny_prompter(codes=CODES)
        self.made = examples(prompter) * 4
        self.damaged = damaged
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return len(self.made)

    def lengths(self) -> np.ndarray:
        return np.array([len(example) for example in self.made])

    def __getitem__(self, index: int) -> Example:
        self.threads.add(threading.current_thread().name)
        if self.damaged is not None and index >= self.damaged:
            raise DataError(f"row {index} of the train split: a shard is damaged: prepare it again")
        return self.made[index]


def loader(source: Any, seed: int | None = None) -> PackLoader:
    return PackLoader(source, PackSize(clips=2), seed=seed)


def assert_equal(found: list[Packed], expected: list[Packed]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


def thread_of(packs: Prefetched) -> threading.Thread:
    [thread] = packs._thread._threads
    return thread


def test_packs_come_in_the_order_of_their_plan_and_from_one_thread() -> None:
    source = Examples()
    made = loader(source, seed=5)
    made.set_epoch(2)
    found = list(made)
    assert len(source.threads) == 1
    assert threading.current_thread().name not in source.threads
    assert_equal(found, [pack([source.made[i] for i in indices]) for indices in made.packs.packs(2)])


def test_the_rest_of_an_epoch_is_what_would_have_come() -> None:
    """As `Trainer` resumes within an epoch: with a loader that accelerate makes from parts of this one."""
    made = loader(Examples(), seed=3)
    rest = skip_first_batches(made, 4)
    assert rest.batch_sampler.batch_sampler is made.packs  # where `Trainer` sets the epoch
    made.set_epoch(1)
    before = torch.get_rng_state()
    assert_equal(list(Prefetched(iter(rest))), list(made)[4:])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_is_raised_in_its_place_and_as_it_is() -> None:
    packs = iter(loader(Examples(damaged=6)))
    assert len([next(packs) for _ in range(3)]) == 3
    with pytest.raises(DataError) as error:
        next(packs)
    assert str(error.value) == "row 6 of the train split: a shard is damaged: prepare it again"


def test_no_more_is_built_than_a_few_packs_ahead() -> None:
    taken = 0

    def counted() -> Iterator[Packed]:
        nonlocal taken
        while True:
            taken += 1
            yield {}

    packs = Prefetched(counted())
    for _ in range(10):
        next(packs)
    packs._coming[-1].result()
    assert taken == 14


@pytest.mark.parametrize("packs_used", [1, 100])
def test_the_thread_ends_with_its_iterator(packs_used: int) -> None:
    packs = iter(loader(Examples()))
    thread = thread_of(packs)
    for _ in zip(range(packs_used), packs, strict=False):
        pass
    assert thread.is_alive()
    del packs
    thread.join(60)
    assert not thread.is_alive()


def test_the_thread_ends_when_its_iterator_is_left_by_an_error() -> None:
    threads = []

    def leave() -> None:
        packs = iter(loader(Examples()))
        threads.append(thread_of(packs))
        for _ in packs:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        leave()
    del raised
    threads[0].join(60)
    assert not threads[0].is_alive()
