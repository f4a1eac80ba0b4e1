"""Advantages of completions, and of their tokens, from rewards.

Shape suffixes: R completions, G groups (the completions of one prompt), N tokens of all completions in one row, those
of a completion side by side and in order, C completions that have tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polm.errors import RecipeError

RewardScale = Literal["std", "none"]
STD_FLOOR = 1e-4
WHITEN_FLOOR = 1e-8


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


def compute_leave_one_out_advantages(rewards_R: Tensor, groups_R: Tensor) -> Tensor:
    """reward - mean of the other rewards of its group (RLOO, arXiv 2402.14740, section 3.3), [R] float32.

    Computed as k / (k - 1) times (reward - mean of all k), which is the same. A group of equal rewards, and a group of
    one, gives exact zeros.
    """
    _, index_R, counts_G = torch.unique(groups_R, return_inverse=True, return_counts=True)
    factor_G = counts_G / (counts_G - 1).clamp(min=1)
    advantages_R: Tensor = compute_group_advantages(rewards_R, groups_R, "none") * factor_G[index_R]
    return advantages_R


def whiten(values_N: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(value - mean) / sqrt(variance + 1e-8) over the whole row, with n - 1 below the sum of squares, [N] float32.

    Without `shift_mean` the mean is put back: only the spread becomes 1. Equal values, and a single one, have no
    spread: they become exact zeros, or stay as they are without `shift_mean`.
    """
    values_N = values_N.float()
    if len(values_N) < 2 or bool(values_N.min() == values_N.max()):
        return torch.zeros_like(values_N) if shift_mean else values_N
    variance, mean = torch.var_mean(values_N, correction=1)
    whitened_N = (values_N - mean) * torch.rsqrt(variance + WHITEN_FLOOR)
    return whitened_N if shift_mean else whitened_N + mean


def compute_completion_sum(values_N: Tensor, completions_N: Tensor, num_completions: int) -> Tensor:
    """Sums over the tokens of each completion, [R] float32."""
    return torch.zeros(num_completions).index_add(0, completions_N, values_N.float())


def compute_token_rewards(rewards_R: Tensor, kl_N: Tensor, completions_N: Tensor, beta: float) -> Tensor:
    """-beta * kl at each token, and the completion's reward on top at its last one (Ziegler et al. 2019, arXiv
    1909.08593, section 2.2), [N] float32.

    kl_N           an estimate a token, such as log p - log p_ref (k1)
    completions_N  the completion of each token; tokens of a completion stand side by side, in order
    """
    token_rewards_N = -beta * kl_N.float()
    last_N = find_last_tokens(completions_N)
    return torch.where(last_N, token_rewards_N + rewards_R.float()[completions_N], token_rewards_N)


def find_last_tokens(completions_N: Tensor) -> Tensor:
    """Whether a token is the last of its completion, [N] bool."""
    last_N = torch.ones_like(completions_N, dtype=torch.bool)
    last_N[:-1] = completions_N[1:] != completions_N[:-1]
    return last_N


def compute_rewards_to_go(token_rewards_N: Tensor, completions_N: Tensor) -> Tensor:
    """The sum of the rewards of a token and of all after it in its completion, not discounted, [N] float32."""
    last_N = find_last_tokens(completions_N)
    sums_N = token_rewards_N.double().cumsum(0)
    lengths_C = torch.diff(torch.nonzero(last_N)[:, 0], prepend=torch.tensor([-1]))
    ends_N = sums_N[last_N].repeat_interleave(lengths_C)  # the sum up to the end of the token's completion
    return (ends_N - sums_N + token_rewards_N).float()
