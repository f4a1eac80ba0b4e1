"""Advantages of completions from their rewards.

Shape suffixes: R completions, G groups (the completions of one prompt).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polm.errors import RecipeError

RewardScale = Literal["std", "none"]
STD_FLOOR = 1e-4


def compute_group_advantages(rewards_R: Tensor, groups_R: Tensor, scale: RewardScale) -> Tensor:
    """Advantages within each group (GRPO, arXiv 2402.03300, section 4.1.2), [R] float32.

    rewards_R   one number a completion
    groups_R    int64, any number that the completions of one prompt share
    scale       "std": (reward - mean) / (std + 1e-4), std with n - 1 below the sum, as TRL has it;
                "none": reward - mean (Dr. GRPO, arXiv 2503.20783)

    A group of equal rewards, and a group of one, gives exact zeros.
    """
    if scale not in ("std", "none"):
        raise RecipeError(f"the scale of advantages is {scale!r}; it must be 'std' or 'none'")
    rewards_R = rewards_R.float()
    _, index_R, counts_G = torch.unique(groups_R, return_inverse=True, return_counts=True)
    zeros_G = rewards_R.new_zeros(len(counts_G))
    mean_G = zeros_G.index_add(0, index_R, rewards_R) / counts_G
    centred_R = rewards_R - mean_G[index_R]
    # The mean of equal numbers may be off by a bit, which the division by a tiny std would blow up.
    lowest_G = zeros_G.scatter_reduce(0, index_R, rewards_R, "amin", include_self=False)
    highest_G = zeros_G.scatter_reduce(0, index_R, rewards_R, "amax", include_self=False)
    centred_R = torch.where((lowest_G == highest_G)[index_R], torch.zeros_like(centred_R), centred_R)
    if scale == "none":
        return centred_R
    variance_G = zeros_G.index_add(0, index_R, centred_R**2) / (counts_G - 1).clamp(min=1)
    advantages_R: Tensor = centred_R / (variance_G.sqrt()[index_R] + STD_FLOOR)
    return advantages_R
