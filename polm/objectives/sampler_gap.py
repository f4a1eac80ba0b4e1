"""How far the log-probabilities of the loss are from those with which the generator drew the same tokens.

Shape suffix: N target tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch


@torch.no_grad()
def compute_sampler_gap(logprobs_N: Tensor, batch: TokenBatch) -> dict[str, Metric]:
    """`rl/sampler_gap`: the mean of |log p - log p_sampler| over target tokens. `rl/sampler_gap_max`: the largest of a
    micro-batch, averaged over the update's.

    p_sampler is the stream `sampler_logprobs`, NaN at tokens that another model drew. Empty where there is none to
    compare with.
    """
    if "sampler_logprobs" not in batch.streams:
        return {}
    sampler_N = batch.at_targets("sampler_logprobs").float()
    own_N = torch.isfinite(sampler_N)
    if not own_N.any():
        return {}
    weights_N = batch.at_targets("weights")[own_N]
    gap_N = (logprobs_N.float()[own_N] - sampler_N[own_N]).abs()
    mean = Metric((weights_N * gap_N).sum(), weights_N.sum())
    return {"rl/sampler_gap": mean, "rl/sampler_gap_max": Metric(gap_N.max(), 1.0)}


def log_sampler_gap(objective: Objective) -> Objective:
    """The objective with the metrics of `compute_sampler_gap` beside its own."""

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        loss = objective.compute(scores, batch)
        return Loss(loss.total, loss.denominator, {**loss.metrics, **compute_sampler_gap(scores.logprobs_N, batch)})

    return replace(objective, compute=compute)
