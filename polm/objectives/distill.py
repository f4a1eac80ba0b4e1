"""Distillation from a frozen reference, over the reference's likeliest tokens.

Shape suffixes: N target tokens, K candidate tokens of each target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polm.errors import DataError, RecipeError
from polm.objectives.ntp import build_nll_metric
from polm.tokens import Loss, Metric, Needs, Objective, Scores, TokenBatch


def build_distill(*, alpha: float, top_k: int) -> Objective:
    """loss = mean of (1 - alpha) * CE + alpha * KL(reference || model), under the data's own weights.

    The reference's distribution is cut to its `top_k` likeliest tokens and renormalised to sum to 1 over them; the
    model's probabilities are those of its full distribution. So the KL is that of a true distribution, never below 0,
    and mass that the model gives to other tokens costs.

    alpha   share of the KL, in [0, 1]
    top_k   candidates used of each target, the likeliest first

    Reads the streams `ref_ids` (int64 [T, K], token ids, likeliest first) and `ref_topk` ([T, K], the reference's
    log-probabilities of them) with K of at least `top_k`; fewer is a DataError. Raises RecipeError for a number out of
    range. Metrics: `ntp/nll`, `distill/kl`, `distill/covered` (the reference's mass within the top k).
    """
    if not 0.0 <= alpha <= 1.0:
        raise RecipeError(f"distill: alpha is {alpha}; it must lie in [0, 1], for example 0.5")
    if top_k < 1:
        raise RecipeError(f"distill: top_k is {top_k}; it must be at least 1, for example 32")

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        assert scores.candidates_NK is not None, "distill asked the engine for candidates"
        reference_NK = batch.at_targets("ref_topk").float()
        if reference_NK.shape[1] < top_k:
            raise DataError(
                f"distill: the reference's scores hold {reference_NK.shape[1]} tokens for each position, top_k is "
                f"{top_k}; score the reference again with top_k {top_k}, or set top_k to {reference_NK.shape[1]}"
            )
        reference_NK = reference_NK[:, :top_k]
        kl_N = compute_top_k_kl(reference_NK, scores.candidates_NK.float()[:, :top_k])
        weights_N = batch.at_targets("weights")
        loss_N = (1.0 - alpha) * -scores.logprobs_N.float() + alpha * kl_N
        denominator = weights_N.sum()
        metrics = {
            "ntp/nll": build_nll_metric(scores.logprobs_N, weights_N),
            "distill/kl": Metric((weights_N * kl_N.detach()).sum(), denominator),
            "distill/covered": Metric((weights_N * reference_NK.exp().sum(1)).sum(), denominator),
        }
        return Loss((weights_N * loss_N).sum(), denominator, metrics)

    return Objective(
        name="distill",
        compute=compute,
        needs=Needs(candidates="ref_ids"),
        reads=("weights", "ref_ids", "ref_topk"),
        linear=True,
    )


def compute_top_k_kl(reference_NK: Tensor, model_NK: Tensor) -> Tensor:
    """KL(reference || model) in nats, [N], from log-probabilities; the reference's are renormalised over K."""
    log_q_NK = torch.log_softmax(reference_NK, dim=-1)
    return (log_q_NK.exp() * (log_q_NK - model_NK)).sum(-1)
