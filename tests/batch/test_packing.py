"""Which clips go together: full packs, every clip once, the same for all processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgstune.batch.packing import PackSampler, PackSize, fill, pack_indices
from higgstune.errors import ConfigError


def flat(packs: list[list[int]]) -> list[int]:
    return sorted(index for pack in packs for index in pack)


LENGTHS = {
    "lognormal": lambda g, n: np.clip(g.lognormal(np.log(130), 0.6, n), 35, 420),
    "uniform": lambda g, n: g.uniform(50, 800, n),
    "narrow": lambda g, n: g.uniform(320, 420, n),
    "clips of 10 to 13 s": lambda g, n: 40 + 28.3 * g.uniform(10, 13, n),
    "all equal": lambda g, n: np.full(n, 190),
    "short and long": lambda g, n: np.where(g.random(n) < 0.5, 60, 700),
    "short": lambda g, n: g.integers(30, 60, n),
    "sorted": lambda g, n: np.sort(g.uniform(40, 400, n)),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("epoch", [0, 3])
def test_packs_are_full(name: str, epoch: int) -> None:
    lengths = LENGTHS[name](np.random.default_rng(1), 1000).astype(np.int64)
    tokens = int(np.ceil(16 * lengths.mean()))
    packs = PackSampler(lengths, PackSize(tokens=tokens), seed=0).packs(epoch)
    assert fill(packs, lengths, tokens) >= 0.98
    assert max(lengths[pack].sum() for pack in packs) <= tokens
    assert flat(packs) == list(range(1000))


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    tokens=st.integers(50, 200),
    processes=st.integers(1, 5),
    epoch=st.integers(0, 6),
    seed=st.integers(0, 3) | st.none(),
)
def test_every_clip_once_and_as_many_packs_for_all_processes(
    lengths: list[int], tokens: int, processes: int, epoch: int, seed: int | None
) -> None:
    array = np.array(lengths)
    samplers = [
        PackSampler(array, PackSize(tokens=tokens), seed=seed, rank=rank, processes=processes)
        for rank in range(processes)
    ]
    shares = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
    assert {len(share) for share in shares} == {len(samplers[0])}
    loud = [[index for index in pack if index >= 0] for share in shares for pack in share]
    assert flat(loud) == list(range(len(lengths)))
    assert all(pack for share in shares for pack in share)
    assert all(array[pack].sum() <= tokens for pack in loud)
    assert sum(len(share) for share in shares) - sum(bool(pack) for pack in loud) < processes


@given(
    clips=st.integers(1, 60), per_step=st.integers(1, 6), processes=st.integers(1, 8), epoch=st.integers(0, 3)
)  # fmt: skip
def test_a_step_has_the_same_clips_on_any_number_of_processes(
    clips: int, per_step: int, processes: int, epoch: int
) -> None:
    lengths = np.random.default_rng(clips).integers(20, 90, clips)

    def shares(count: int) -> list[list[list[int]]]:
        samplers = [
            PackSampler(lengths, PackSize(tokens=200), seed=5, rank=rank, processes=count, per_step=per_step)
            for rank in range(count)
        ]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        packs = [list(sampler) for sampler in samplers]
        assert {len(share) for share in packs} == {len(samplers[0])}  # no process waits for one that has no more
        return packs

    rounds = -(-per_step // processes)  # of each process in a step
    one, several = shares(1)[0], shares(processes)
    for step in range(-(-len(one) // per_step)):
        expected = one[step * per_step : (step + 1) * per_step]
        found = [pack for share in several for pack in share[step * rounds : (step + 1) * rounds]]
        labelled = sorted(pack for pack in found if pack[0] >= 0)
        assert labelled == sorted(expected)
        assert sorted(pack for pack in found if pack[0] < 0) == [[~expected[0][0]]] * (len(found) - len(expected))
        sampler = PackSampler(lengths, PackSize(tokens=200), seed=5, per_step=per_step)
        steps_before = epoch * -(-len(one) // per_step)
        assert sorted(sampler.of_step(steps_before + step)) == labelled


def test_the_processes_of_a_step_have_the_packs_of_one_process() -> None:
    lengths = np.random.default_rng(0).integers(20, 90, 200)
    one = list(PackSampler(lengths, PackSize(tokens=300), seed=5))
    four = [list(PackSampler(lengths, PackSize(tokens=300), seed=5, rank=r, processes=4)) for r in range(4)]
    in_order = [share[step] for step in range(len(four[0])) for share in four]
    assert in_order[: len(one)] == one
    assert all(len(pack) == 1 and pack[0] < 0 for pack in in_order[len(one) :])


def test_epochs_differ_and_come_again() -> None:
    lengths = np.random.default_rng(0).integers(20, 90, 300)
    first, again = (PackSampler(lengths, PackSize(tokens=500), seed=7) for _ in range(2))
    epochs = [first.packs(epoch) for epoch in range(4)]
    assert [again.packs(epoch) for epoch in range(4)] == epochs
    assert len({tuple(map(tuple, packs)) for packs in epochs}) == 4
    assert PackSampler(lengths, PackSize(tokens=500), seed=8).packs(0) != epochs[0]


def test_a_number_of_clips() -> None:
    lengths = np.arange(1, 11)
    assert pack_indices(lengths, PackSize(clips=4), seed=None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = pack_indices(lengths, PackSize(clips=4), seed=1)
    assert [len(pack) for pack in shuffled] == [4, 4, 2]
    assert flat(shuffled) == list(range(10))


def test_a_clip_that_is_longer_than_a_pack_is_named() -> None:
    with pytest.raises(ConfigError, match=r"batch_tokens is 100, but clip 1 .*has 101 tokens.*raise batch_tokens"):
        pack_indices(np.array([20, 101, 7]), PackSize(tokens=100), seed=0)
