"""The estimator k3 in numbers, and its expectation."""

from __future__ import annotations

import math

import pytest
import torch

from polm.signals.kl import compute_kl_k3


def test_in_numbers_with_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    others = torch.tensor([-2.0, -2.0, 0.0])
    k3 = compute_kl_k3(logprobs, others)
    assert k3.tolist() == pytest.approx([math.exp(-1) + 1 - 1, 0.0, math.exp(0.5) - 0.5 - 1], rel=1e-6)
    k3.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([1 - math.exp(-1), 0.0, 1 - math.exp(0.5)], rel=1e-6)


def test_its_expectation_is_the_divergence() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.3])
    expected = 0.5 * math.log(0.5 / 0.1) + 0.3 * math.log(0.3 / 0.6) + 0.2 * math.log(0.2 / 0.3)
    estimates = compute_kl_k3(p.log(), q.log())
    assert float((p * estimates).sum()) == pytest.approx(expected, rel=1e-5)
    assert bool((estimates >= 0).all())


def test_tiny_differences_are_not_lost() -> None:
    # d^2 / 2 for small d; exp(d) - d - 1 in float32 would give 0 or 1e-7.
    assert float(compute_kl_k3(torch.tensor([0.0]), torch.tensor([1e-3]))) == pytest.approx(5e-7, rel=1e-2)
