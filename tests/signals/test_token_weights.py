"""Segment means, ReMiT weights, Rho-1's selection and the shuffle, in numbers."""

from __future__ import annotations

import math

import pytest
import torch

from polm.errors import RecipeError
from polm.signals.token_weights import (
    compute_num_kept,
    compute_remit_weights,
    compute_rho1_selection,
    compute_segment_mean,
    compute_segment_sum,
    compute_shuffled,
)

SEGMENTS = torch.tensor([0, 0, 2, 2, 2])


def test_sums_and_means_over_segments() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0], requires_grad=True)
    sums = compute_segment_sum(values, SEGMENTS, 4)
    assert sums.tolist() == [3.0, 0.0, 15.0, 0.0]
    (sums * torch.tensor([2.0, 7.0, 5.0, 7.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2.0, 2.0, 5.0, 5.0, 5.0]
    assert compute_segment_mean(values.detach(), SEGMENTS, 4).tolist() == [1.5, 0.0, 5.0, 0.0]


def test_remit_weights() -> None:
    delta = torch.tensor([1.0, -1.0, 3.0, 0.0, -3.0])
    weights, clipped = compute_remit_weights(delta, SEGMENTS, 3, eps=0.6, temperature=1.0, centring="sequence")
    near = 2 / (1 + math.exp(-1.0))
    assert weights.tolist() == pytest.approx([near, 2 - near, 1.6, 1.0, 0.4])
    assert clipped.tolist() == [False, False, True, False, True]
    shifted = delta + torch.tensor([5.0, 5.0, -2.0, -2.0, -2.0])  # what a whole sequence shares does not count
    again, _ = compute_remit_weights(shifted, SEGMENTS, 3, eps=0.6, temperature=1.0, centring="sequence")
    assert again.tolist() == pytest.approx(weights.tolist())
    with pytest.raises(RecipeError, match="centring is 'median'"):
        compute_remit_weights(delta, SEGMENTS, 3, eps=0.6, temperature=1.0, centring="median")  # type: ignore[arg-type]


def test_remit_weights_of_extreme_deltas_stay_in_bounds() -> None:
    delta = torch.tensor([1e4, -1e4, 0.0, 0.0, 0.0])
    weights, _ = compute_remit_weights(delta, SEGMENTS, 3, eps=1.0, temperature=0.1, centring="none")
    assert weights.tolist() == [2.0, 0.0, 1.0, 1.0, 1.0]


def test_selection_breaks_ties_by_position() -> None:
    equal = torch.zeros(5)
    assert compute_rho1_selection(equal, SEGMENTS, 3, keep=0.5, scope="batch").tolist() == [True] * 3 + [False] * 2
    by_sequence = compute_rho1_selection(equal, SEGMENTS, 3, keep=0.5, scope="sequence")
    assert by_sequence.tolist() == [True, False, True, True, False]
    late = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0])
    assert compute_rho1_selection(late, SEGMENTS, 3, keep=0.5, scope="sequence").tolist() == [
        False,
        True,
        False,
        True,
        True,
    ]
    with pytest.raises(RecipeError, match="scope is 'tree'"):
        compute_rho1_selection(equal, SEGMENTS, 3, keep=0.5, scope="tree")  # type: ignore[arg-type]


def test_selection_by_sequence_equals_selection_of_each_sequence_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    segments = torch.arange(6).repeat_interleave(torch.tensor([1, 7, 0, 20, 3, 9]))
    excess = torch.randint(0, 4, (40,), generator=generator).float()  # many ties
    together = compute_rho1_selection(excess, segments, 6, keep=0.35, scope="sequence")
    alone = [
        compute_rho1_selection(excess[segments == s], segments[segments == s], 6, keep=0.35, scope="batch")
        for s in range(6)
    ]
    assert together.tolist() == torch.cat(alone).tolist()


def test_number_kept() -> None:
    assert [compute_num_kept(n, 0.6) for n in (0, 1, 5, 6)] == [0, 1, 3, 4]
    assert 0.07 * 100 > 7  # the product is a bit too large, the answer is 7 all the same
    assert compute_num_kept(100, 0.07) == 7
    assert compute_num_kept(3, 1.0) == 3


def test_shuffle() -> None:
    weights = torch.arange(50).float()
    once = compute_shuffled(weights, 3)
    assert once.tolist() == compute_shuffled(weights, 3).tolist()
    assert sorted(once.tolist()) == weights.tolist()
    assert once.tolist() != weights.tolist()
    assert once.tolist() != compute_shuffled(weights, 4).tolist()
