"""Truncation by hand-computed examples; draws that match their probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polm.rollout.sampling import (
    apply_top_k,
    apply_top_p,
    build_key,
    compute_tempered_logprobs,
    compute_uniforms,
    sample_inverse_cdf,
)

PROBS = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def kept(logprobs: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row > float("-inf"))[:, 0].tolist() for row in logprobs]


def test_tempered_logprobs_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(2.0)]])
    at_1, at_half = compute_tempered_logprobs(logits, 1.0), compute_tempered_logprobs(logits, 0.5)
    assert torch.allclose(at_1.exp(), torch.tensor([[1 / 3, 2 / 3]]))
    assert torch.allclose(at_half.exp(), torch.tensor([[1 / 5, 4 / 5]]))  # odds of 2 become odds of 4
    assert torch.equal(compute_tempered_logprobs(logits, 0.0), at_1)


def test_top_k_keeps_the_likeliest_and_their_values() -> None:
    out = apply_top_k(PROBS.log(), 2)
    assert kept(out) == [[1, 3]]
    assert torch.equal(out[0, [1, 3]], PROBS.log()[0, [1, 3]])
    assert kept(apply_top_k(PROBS.log(), 0)) == [[0, 1, 2, 3]]
    assert kept(apply_top_k(PROBS.log(), 9)) == [[0, 1, 2, 3]]
    assert kept(apply_top_k(torch.zeros(1, 4), 3)) in ([[0, 1, 2]], [[0, 1, 3]], [[0, 2, 3]], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 2, 3]),
        (0.89, [1, 2, 3]),
        (0.91, [0, 1, 2, 3]),
    ],
)
def test_nucleus_by_hand(top_p: float, expected: list[int]) -> None:
    """Sorted: 0.4, 0.7, 0.9, 1.0 cumulated, tokens 1, 3, 2, 0."""
    assert kept(apply_top_p(PROBS.log(), top_p)) == [expected]


def test_nucleus_after_top_k_is_of_the_renormalised_rest() -> None:
    """Of 0.4 and 0.3 the first has 4/7 = 0.571."""
    assert kept(apply_top_p(apply_top_k(PROBS.log(), 2), 0.55)) == [[1]]
    assert kept(apply_top_p(apply_top_k(PROBS.log(), 2), 0.6)) == [[1, 3]]


def test_nuclei_wider_than_the_first_try() -> None:
    """Rows from nearly certain to nearly flat."""
    logits = torch.randn(6, 60, generator=torch.Generator().manual_seed(0)) * torch.tensor([[9.0, 4, 2, 1, 0.5, 0.1]]).T
    logprobs = compute_tempered_logprobs(logits, 1.0)
    whole = apply_top_p(logprobs, 0.9, width=60)
    assert torch.equal(apply_top_p(logprobs, 0.9, width=2), whole)
    sizes = [len(row) for row in kept(whole)]
    assert sizes[0] <= 2
    assert sizes[-1] > 16
    for row, out in zip(logprobs.exp(), whole, strict=True):
        inside = row[out > float("-inf")]
        assert inside.sum() >= 0.9 - 1e-6
        assert inside.sum() - inside.min() < 0.9


def test_inverse_cdf_by_hand() -> None:
    """Cumulated in the order of ids: 0.1, 0.5, 0.7, 1.0."""
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.999])
    tokens = sample_inverse_cdf(PROBS.log().expand(8, 4), uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_cut_token_is_never_drawn() -> None:
    logprobs = torch.tensor([[float("-inf"), math.log(0.2), float("-inf"), math.log(0.3), float("-inf")]])
    almost_one = 1.0 - 2.0**-24
    tokens = sample_inverse_cdf(logprobs.expand(4, 5), torch.tensor([0.0, 0.39, 0.41, almost_one]))
    assert tokens.tolist() == [1, 1, 3, 3]


def test_uniforms_are_those_of_splitmix64() -> None:
    """The first outputs of the reference implementation for seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = compute_uniforms(np.full(3, 1234567, dtype=np.uint64), [0, 1, 2])
    assert found.dtype == np.float32
    assert found.tolist() == [(number >> 40) / 2**24 for number in expected]


def test_uniforms_depend_on_their_key_and_step_alone() -> None:
    keys = np.array([build_key(3, prompt, sample) for prompt in range(4) for sample in range(4)])
    assert len(np.unique(keys)) == 16
    whole = compute_uniforms(keys, np.arange(16))
    assert compute_uniforms(keys[5:7], [5, 6]).tolist() == whole[5:7].tolist()
    assert build_key(4, 0, 0) != keys[0]


def test_uniforms_are_uniform_along_steps_and_across_requests() -> None:
    """A chi-square over 64 cells has mean 63 and standard deviation 11.2; 110 is 4 of them away."""
    along = compute_uniforms(np.full(20_000, build_key(0, 1, 2)), np.arange(20_000))
    across = compute_uniforms(np.array([build_key(0, i, 0) for i in range(4000)]), np.zeros(4000, dtype=np.int64))
    for numbers in (along, across):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
        expected = len(numbers) / 64
        assert ((counts - expected) ** 2 / expected).sum() < 110
    assert abs(np.corrcoef(along[:-1], along[1:])[0, 1]) < 0.03


def test_draws_match_their_probabilities() -> None:
    """Chi-square with 5 degrees of freedom: 20.5 has probability 0.001."""
    logprobs = compute_tempered_logprobs(torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.0, -0.5]]), 0.8)
    num_draws = 20_000
    uniforms = torch.from_numpy(compute_uniforms(np.full(num_draws, build_key(7, 0, 0)), np.arange(num_draws)))
    tokens = sample_inverse_cdf(logprobs.expand(num_draws, 6), uniforms)
    counts = np.bincount(tokens.numpy(), minlength=6)
    expected = logprobs[0].exp().numpy() * num_draws
    assert ((counts - expected) ** 2 / expected).sum() < 20.5
