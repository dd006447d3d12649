"""Attention over a packed sequence, against the plainest of formulas on each run alone."""

import pytest
import torch
from torch import Tensor

from higgstune.kernels import attention
from higgstune.kernels.attention import Segments, attend
from higgstune.planning.dry_run import Tracker

D = 8


def by_formula(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scaling: float) -> Tensor:
    attended = []
    for query, key, value in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        scores = torch.einsum("phd,khd->hpk", query, key) * scaling
        seen = torch.ones(len(query), len(query), dtype=torch.bool).tril()
        attended.append(torch.einsum("hpk,khd->phd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value))
    return torch.cat(attended)


@pytest.mark.parametrize("lengths", [(1,), (64,), (1, 65, 0, 200), (513, 3), (0,), (0, 5, 600, 70, 2, 520, 514)])
@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_outputs_and_gradients_are_those_of_the_formula(
    lengths: tuple[int, ...], heads: int, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(total, count, D, dtype=dtype, requires_grad=True) for count in (heads, groups, groups))
    upright = torch.ones(total, D, dtype=dtype), torch.zeros(total, D, dtype=dtype)  # cos and sin of no rotation
    found = attend(q, k, v, Segments.of(lengths, upright), 0.3)
    expected = by_formula(q, k, v, lengths, 0.3)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    towards = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), towards) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance)


def test_later_tokens_and_other_segments_are_masked() -> None:
    torch.manual_seed(0)
    lengths, at = (70, 130), 70 + 65
    q, k, v = (torch.randn(200, 2, D, dtype=torch.float64) for _ in range(3))
    runs = Segments.of(lengths, (torch.ones(200, D), torch.zeros(200, D)))
    before = attend(q, k, v, runs, 1.0)
    k[at], v[at] = 1e3, 1e3
    changed = (attend(q, k, v, runs, 1.0) != before).any(-1).any(-1).nonzero().flatten().tolist()
    assert changed == list(range(at, 200))


def kept(*lengths: int) -> int:
    """Bytes that are kept for the backward pass."""
    q, k, v = (torch.randn(sum(lengths), 3, D, requires_grad=True) for _ in range(3))
    runs = Segments.of(lengths, (torch.ones(sum(lengths), D), torch.zeros(sum(lengths), D)))
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attended = attend(q, k, v, runs, 1.0)
    del attended
    return sum(held.values())


def test_memory_of_long_segments_grows_with_their_length_and_not_with_its_square() -> None:
    long = attention.SHORT_SEGMENT + 1
    assert kept(4 * long) == pytest.approx(4 * kept(long), rel=0.05)
    assert kept(attention.SHORT_SEGMENT) > kept(long)


def test_a_long_segment_changes_nothing_for_short_ones() -> None:
    long = attention.SHORT_SEGMENT + 1
    assert kept(400, long, 300) == pytest.approx(kept(400) + kept(long) + kept(300), rel=0.1)


def test_probabilities_are_not_kept_where_no_gradient_is_needed() -> None:
    lengths = (500,) * 4
    q, k, v = (torch.randn(2000, 3, D) for _ in range(3))
    runs = Segments.of(lengths, (torch.ones(2000, D), torch.zeros(2000, D)))
    with Tracker() as tracker:
        tracker.begin("attention", "transient")
        attend(q, k, v, runs, 1.0)
    assert tracker.peaks["attention"].total() < kept(*lengths) / 3
