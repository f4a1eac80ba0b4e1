"""Generalised advantages against a worked example, the definition as a sum, and their two limits; the KL controller."""

from __future__ import annotations

import pytest
import torch

from polm.signals.advantages import compute_rewards_to_go
from polm.signals.gae import compute_explained_variance, compute_gae, compute_next_beta

COMPLETIONS = torch.tensor([2, 2, 2, 0, 5, 5])
REWARDS = torch.tensor([-0.1, 0.0, 1.0, 0.5, -0.2, 2.0])
VALUES = torch.tensor([0.4, 0.6, 0.8, 0.1, 1.0, 1.5])


def test_a_worked_example() -> None:
    """gamma 0.9, lam 0.5.

    First completion: deltas -0.1 + 0.9 * 0.6 - 0.4 = 0.04; 0.9 * 0.8 - 0.6 = 0.12; 1 - 0.8 = 0.2; so
    A = 0.2; 0.12 + 0.45 * 0.2 = 0.21; 0.04 + 0.45 * 0.21 = 0.1345.
    """
    advantages, returns = compute_gae(REWARDS, VALUES, COMPLETIONS, gamma=0.9, lam=0.5)
    deltas = [-0.2 + 0.9 * 1.5 - 1.0, 2.0 - 1.5]
    expected = [0.1345, 0.21, 0.2, 0.5 - 0.1, deltas[0] + 0.45 * deltas[1], deltas[1]]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, VALUES.tolist(), strict=True)], abs=1e-6)


def test_it_is_the_sum_of_discounted_errors() -> None:
    """Equation 16 of the paper: A_t = sum over l of (gamma lam)^l delta_{t+l}, on random completions."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (30,), generator=generator)
    completions = torch.repeat_interleave(torch.randperm(30, generator=generator), lengths)
    rewards, values = torch.randn(2, len(completions), generator=generator)
    advantages, _ = compute_gae(rewards, values, completions, gamma=0.97, lam=0.8)
    first = 0
    for length in lengths.tolist():
        r, v = rewards[first : first + length].tolist(), [*values[first : first + length].tolist(), 0.0]
        deltas = [r[t] + 0.97 * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((0.97 * 0.8) ** k * deltas[t + k] for k in range(length - t))
            assert float(advantages[first + t]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        first += length


def test_its_limits() -> None:
    """lam 0: the error of one step. lam 1, gamma 1: what is still to come, less the value; the return is that."""
    one_step, _ = compute_gae(REWARDS, VALUES, COMPLETIONS, gamma=0.9, lam=0.0)
    assert one_step.tolist() == pytest.approx([0.04, 0.12, 0.2, 0.4, 0.15, 0.5], abs=1e-6)
    whole, returns = compute_gae(REWARDS, VALUES, COMPLETIONS, gamma=1.0, lam=1.0)
    to_come = compute_rewards_to_go(REWARDS, COMPLETIONS)
    assert returns.tolist() == pytest.approx(to_come.tolist(), abs=1e-6)
    assert whole.tolist() == pytest.approx((to_come - VALUES).tolist(), abs=1e-6)


def test_nothing_in_nothing_out() -> None:
    advantages, returns = compute_gae(torch.zeros(0), torch.zeros(0), COMPLETIONS[:0], gamma=1.0, lam=1.0)
    assert len(advantages) == len(returns) == 0


def test_explained_variance_in_numbers() -> None:
    returns = torch.tensor([1.0, 2.0, 6.0])
    assert compute_explained_variance(returns, returns) == 1.0
    assert compute_explained_variance(torch.full((3,), 3.0), returns) == pytest.approx(0.0)
    # Errors 1, 0, 2 about their mean 1: 0, 1, 1, so 2/3; the returns about 3: 4, 1, 9, so 14/3.
    assert compute_explained_variance(torch.tensor([0.0, 2.0, 4.0]), returns) == pytest.approx(1 - 2 / 14)
    assert compute_explained_variance(returns, torch.ones(3)) == 0.0


def test_the_controller_in_numbers() -> None:
    """Twice the target counts as 20% too much; 10% too little is 10%; with n / horizon 0.1 as in the paper."""
    steer = lambda kl: compute_next_beta(0.2, kl, target=6.0, horizon=1000.0, num_samples=100)  # noqa: E731
    assert steer(12.0) == pytest.approx(0.2 * (1 + 0.2 * 0.1))
    assert steer(6.0 * 0.9) == pytest.approx(0.2 * (1 - 0.1 * 0.1))
    assert steer(-3.0) == pytest.approx(0.2 * (1 - 0.2 * 0.1))
    assert steer(6.0) == pytest.approx(0.2)
