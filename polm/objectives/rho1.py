"""Rho-1, selective language modelling: next-token prediction on the tokens of largest excess loss (arXiv 2404.07965).

Shape suffix: N target tokens.
"""

from __future__ import annotations

from polm.errors import RecipeError
from polm.objectives.ntp import build_nll_metric
from polm.objectives.remit import Base, build_reads, check_base, compute_delta
from polm.signals.token_weights import Scope, compute_rho1_selection
from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch


def build_rho1(*, keep: float, base: Base, scope: Scope) -> Objective:
    """loss = mean of -log p over the kept tokens (section 2.2), under the data's own weights.

    excess = CE_base - CE_reference = log p_reference - log p_base; the ceil(keep * n) targets of largest excess are
    kept, the earlier one where two are equal.

    keep    share of the targets that is kept, in (0, 1]
    base    "live" (the learner, as in the paper) or "frozen" (the stream `base_logprobs`)
    scope   "batch": the best of the whole micro-batch, so that the split into micro-batches matters there;
            "sequence": the best of each segment, where it does not

    Reads the streams `ref_logprobs` and, when frozen, `base_logprobs`. Raises RecipeError for a number out of range.
    """
    if not 0.0 < keep <= 1.0:
        raise RecipeError(f"rho1: keep is {keep}; it must lie in (0, 1], for example 0.6")
    check_base("rho1", base)

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        weights_N = batch.at_targets("weights")
        excess_N = compute_delta(scores, batch, base)
        selected_N = compute_rho1_selection(
            excess_N, batch.target_segments_N, batch.num_segments, keep=keep, scope=scope
        ).float()
        kept_N = weights_N * selected_N
        metrics = {
            "ntp/nll": build_nll_metric(scores.logprobs_N, weights_N),
            "rho1/kept_fraction": Metric(selected_N.sum(), len(selected_N)),
            "rho1/kept_excess": Metric((selected_N * excess_N).sum(), selected_N.sum()),
            "count/tokens_left_out": Metric((selected_N == 0).sum(), 1),
            "rho1/mean_excess": Metric(excess_N.sum(), len(excess_N)),
        }
        return Loss((kept_N * -scores.logprobs_N.float()).sum(), kept_N.sum(), metrics)

    return Objective(name="rho1", compute=compute, reads=build_reads(base), linear=base == "frozen")
