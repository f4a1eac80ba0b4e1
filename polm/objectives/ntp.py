"""Next-token prediction: pre-training, mid-training and supervised fine-tuning.

Shape suffix: N target tokens.
"""

from __future__ import annotations

from torch import Tensor

from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch


def build_ntp() -> Objective:
    """loss = sum weights * (-log p) / sum weights, in nats a token; with unit weights the mean cross-entropy."""
    return Objective(name="ntp", compute=compute_ntp, linear=True)


def compute_ntp(scores: Scores, batch: TokenBatch) -> Loss:
    """The sums of next-token prediction; metric `ntp/nll`."""
    weights_N = batch.at_targets("weights")
    total = (weights_N * -scores.logprobs_N.float()).sum()
    return Loss(total, weights_N.sum(), {"ntp/nll": build_nll_metric(scores.logprobs_N, weights_N)})


def build_nll_metric(logprobs_N: Tensor, weights_N: Tensor) -> Metric:
    """Mean negative log-likelihood under the data's own weights: the curve in which all arms are compared."""
    return Metric((weights_N * -logprobs_N.detach().float()).sum(), weights_N.sum())
