"""Group advantages in numbers."""

from __future__ import annotations

import math

import pytest
import torch

from polm.errors import RecipeError
from polm.signals.advantages import compute_group_advantages


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
