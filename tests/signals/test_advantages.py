"""Group advantages in numbers."""

from __future__ import annotations

import math

import pytest
import torch

from polm.errors import RecipeError
from polm.signals.advantages import (
    compute_completion_sum,
    compute_group_advantages,
    compute_leave_one_out_advantages,
    compute_rewards_to_go,
    compute_token_rewards,
    whiten,
)


def test_in_numbers() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 2.0])
    groups = torch.tensor([4, 4, 9, 4, 9, 4])  # interleaved, any numbers
    # group 4: 1, 0, 1, 2, mean 1, squares 0 + 1 + 0 + 1 over 3; group 9: 0, 5, mean 2.5, squares 12.5 over 1
    four, nine = math.sqrt(2 / 3) + 1e-4, math.sqrt(12.5) + 1e-4
    assert compute_group_advantages(rewards, groups, "std").tolist() == pytest.approx(
        [0.0, -1 / four, -2.5 / nine, 0.0, 2.5 / nine, 1 / four], rel=1e-6
    )
    assert compute_group_advantages(rewards, groups, "none").tolist() == [0.0, -1.0, -2.5, 0.0, 2.5, 1.0]


@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_and_single_completions_give_exact_zeros(scale: str) -> None:
    rewards = torch.tensor([0.1] * 7 + [0.3, 1.0, 0.0])
    groups = torch.tensor([0] * 7 + [1, 2, 2])
    assert float(rewards[:7].sum()) / 7 != float(rewards[0])  # the mean of equal numbers is off by a bit
    advantages = compute_group_advantages(rewards, groups, scale)  # type: ignore[arg-type]
    assert advantages[:8].tolist() == [0.0] * 8
    assert advantages[8] > 0 > advantages[9]


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(RecipeError, match="scale of advantages is 'batch'"):
        compute_group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.int64), "batch")  # type: ignore[arg-type]


# ---- leave-one-out -------------------------------------------------------------------------------------------------


def test_leave_one_out_in_numbers() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 2.0, 3.0])
    groups = torch.tensor([4, 4, 9, 4, 9, 4, 7])
    # group 4: 1, 0, 1, 2: the others' means are 3/3, 4/3, 3/3, 2/3; group 9: 0 against 5; group 7: alone
    found = compute_leave_one_out_advantages(rewards, groups)
    assert found.tolist() == pytest.approx([0.0, -4 / 3, -5.0, 0.0, 5.0, 4 / 3, 0.0], abs=1e-6)


def test_leave_one_out_of_equal_rewards_is_exactly_zero() -> None:
    assert (
        compute_leave_one_out_advantages(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64)).tolist() == [0.0] * 7
    )


# ---- tokens --------------------------------------------------------------------------------------------------------

TOKENS = torch.tensor([3, 3, 3, 0, 1, 1])  # completion 2 has no token


def test_token_rewards_and_rewards_to_go_in_numbers() -> None:
    rewards = torch.tensor([1.0, -2.0, 9.0, 4.0])
    kl = torch.tensor([0.5, -1.0, 2.0, 1.0, 0.0, 3.0])
    per_token = compute_token_rewards(rewards, kl, TOKENS, 0.1)
    assert per_token.tolist() == pytest.approx([-0.05, 0.1, 4 - 0.2, 1 - 0.1, 0.0, -2 - 0.3])
    to_go = compute_rewards_to_go(per_token, TOKENS)
    assert to_go.tolist() == pytest.approx([3.85, 3.9, 3.8, 0.9, -2.3, -2.3])
    # The first token of a completion has all of it: the reward less beta times the KL of the whole.
    assert compute_completion_sum(per_token, TOKENS, 4).tolist() == pytest.approx([0.9, -2.3, 0.0, 3.85])


def test_rewards_to_go_lose_no_bits_over_many_completions() -> None:
    completions = torch.arange(3000).repeat_interleave(5)
    rewards = torch.full((3000,), 1e4)
    to_go = compute_rewards_to_go(compute_token_rewards(rewards, torch.zeros(15000), completions, 0.1), completions)
    assert bool((to_go == 1e4).all())


def test_whitening_in_numbers() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    spread = math.sqrt((4 + 1 + 9) / 2 + 1e-8)
    assert whiten(values).tolist() == pytest.approx([-2 / spread, -1 / spread, 3 / spread])
    assert whiten(values, shift_mean=False).tolist() == pytest.approx([3 - 2 / spread, 3 - 1 / spread, 3 + 3 / spread])
    equal = torch.full((7,), 0.1)
    assert whiten(equal).tolist() == [0.0] * 7
    assert torch.equal(whiten(equal, shift_mean=False), equal)
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert whiten(torch.zeros(0)).tolist() == []
