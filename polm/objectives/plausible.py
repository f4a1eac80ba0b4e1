"""Plausibility weights: next-token prediction with each token weighted by how plausible a frozen reference finds it.

    ratio = p_reference(token) / max over tokens of p_reference
    w     = ratio^gamma, and 0 where ratio < floor
    loss  = sum weights * w * (-log p) / number of target tokens

Our own weighting (evidence/remit); ReMiT and Rho-1 ask where the reference does better than the learner, this one where
the reference would not have written the token at all: slips and corrupted steps. It reads nothing of the learner, so
the weights are the same in every update and cost nothing but the reference's scores.

Shape suffix: N target tokens.
"""

from __future__ import annotations

from polm.errors import RecipeError
from polm.objectives.ntp import build_nll_metric
from polm.objectives.remit import Denominator
from polm.signals.token_weights import compute_plausible_weights, compute_shuffled
from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch


def build_plausible(*, gamma: float, floor: float, denominator: Denominator, shuffled: bool = False) -> Objective:
    """The objective; with gamma = 0 and floor = 0 it is next-token prediction to the bit.

    gamma         power of the ratio, at least 0; with 0 tokens are kept or dropped by `floor` alone
    floor         tokens with a smaller ratio are dropped, in [0, 1)
    denominator   "tokens": the sum of the data's weights; "weights": the sum of the data's weights times w
    shuffled      the control: the same weights, permuted among the targets of the micro-batch by its seed

    Reads the streams `ref_logprobs` and `ref_topk` ([T, K], likeliest first; only the first is used). Raises
    RecipeError for a number out of range.
    """
    if not gamma >= 0.0:
        raise RecipeError(f"plausible: gamma is {gamma}; it must be at least 0, for example 1.0")
    if not 0.0 <= floor < 1.0:
        raise RecipeError(f"plausible: floor is {floor}; it must lie in [0, 1), for example 0.05")
    if denominator not in ("tokens", "weights"):
        raise RecipeError(f"plausible: denominator is {denominator!r}; it must be 'tokens' or 'weights'")

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        weights_N = batch.at_targets("weights")
        best_N = batch.at_targets("ref_topk")[:, 0]
        plausible_N = compute_plausible_weights(batch.at_targets("ref_logprobs"), best_N, gamma=gamma, floor=floor)
        if shuffled:
            plausible_N = compute_shuffled(plausible_N, batch.seed)
        combined_N = weights_N * plausible_N
        metrics = {
            "ntp/nll": build_nll_metric(scores.logprobs_N, weights_N),
            "plausible/mean_weight": Metric(plausible_N.sum(), len(plausible_N)),
            "plausible/dropped": Metric((plausible_N == 0).float().sum(), len(plausible_N)),
            "count/tokens_left_out": Metric((plausible_N == 0).sum(), 1),
            "count/tokens_down_weighted": Metric(((plausible_N > 0) & (plausible_N < 1)).sum(), 1),
        }
        total = (combined_N * -scores.logprobs_N.float()).sum()
        return Loss(total, weights_N.sum() if denominator == "tokens" else combined_N.sum(), metrics)

    return Objective(name="plausible", compute=compute, reads=("weights", "ref_logprobs", "ref_topk"), linear=True)
