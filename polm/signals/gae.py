"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438), and the controller of the KL penalty.

Shape suffixes: N tokens of all completions in one row, those of a completion side by side and in order; C completions,
L the longest one's length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polm.signals.advantages import find_last_tokens

MAX_KL_ERROR = 0.2


def compute_gae(
    token_rewards_N: Tensor, values_N: Tensor, completions_N: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [N] float32.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t; behind the last token
    of a completion both V and A are 0, also where the completion was cut off at its longest.

    values_N   the critic's, of the text before each token
    """
    last_N = find_last_tokens(completions_N)
    ends_C = torch.nonzero(last_N)[:, 0]
    lengths_C = torch.diff(ends_C, prepend=torch.tensor([-1]))
    index_N = torch.repeat_interleave(torch.arange(len(lengths_C)), lengths_C)
    places_N = torch.arange(len(completions_N)) - (ends_C - lengths_C + 1)[index_N]
    next_values_N = torch.zeros_like(values_N, dtype=torch.float32)
    next_values_N[:-1] = values_N[1:]
    next_values_N = torch.where(last_N, torch.zeros(()), next_values_N)
    delta_N = token_rewards_N.float() + gamma * next_values_N - values_N.float()
    delta_CL = torch.zeros(len(lengths_C), int(lengths_C.max()) if len(lengths_C) else 0)
    delta_CL[index_N, places_N] = delta_N  # zeros behind the end of a completion add nothing
    advantage_C = torch.zeros(len(lengths_C))
    advantages_CL = torch.zeros_like(delta_CL)
    for place in reversed(range(delta_CL.shape[1])):
        advantage_C = delta_CL[:, place] + gamma * lam * advantage_C
        advantages_CL[:, place] = advantage_C
    advantages_N = advantages_CL[index_N, places_N]
    return advantages_N, advantages_N + values_N.float()


def compute_explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """1 - Var(return - value) / Var(return): 1 for a critic that knows, 0 for one that says the mean, below 0 for a
    worse one. 0 where the returns do not vary."""
    variance = float(returns_N.float().var(correction=0))
    if variance == 0.0:
        return 0.0
    return 1.0 - float((returns_N - values_N).float().var(correction=0)) / variance


def compute_next_beta(beta: float, kl: float, *, target: float, horizon: float, num_samples: int) -> float:
    """beta (1 + e n / horizon) with e = kl / target - 1 within [-0.2, 0.2] (Ziegler et al. 2019, arXiv 1909.08593,
    section 2.2, where n / horizon is 0.1).

    kl   of the samples, nats an answer
    """
    error = min(max(kl / target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
    return beta * (1.0 + error * num_samples / horizon)
