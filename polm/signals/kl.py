"""Estimators of the KL divergence from sampled tokens.

Shape suffix: N target tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_kl_k3(logprobs_N: Tensor, other_logprobs_N: Tensor) -> Tensor:
    """KL(p || q) in nats, one estimate a token, for tokens sampled from p: q/p - 1 - log(q/p), [N], never negative.

    logprobs_N        log p of the sampled tokens
    other_logprobs_N  log q of the same tokens

    The estimator k3 of J. Schulman, "Approximating KL divergence" (2020). Differentiable in both.
    """
    log_ratio_N = other_logprobs_N - logprobs_N
    return torch.expm1(log_ratio_N) - log_ratio_N


def compute_kl_k1(logprobs_N: Tensor, other_logprobs_N: Tensor) -> Tensor:
    """KL(p || q) in nats, one estimate a token, for tokens sampled from p: log p - log q, [N], of either sign.

    The estimator k1 of the same note, which is what a KL penalty in the reward is made of: its mean is the divergence.
    """
    return logprobs_N - other_logprobs_N
