"""Dynamic fine-tuning (DFT): the likelihood of each target, weighted by the learner's own probability of it.

Shape suffix: N target tokens.
"""

from __future__ import annotations

from polm.objectives.ntp import build_nll_metric
from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch


def build_dft() -> Objective:
    """loss = sum weights * p * (-log p) / sum weights, p without a gradient (arXiv 2508.05629).

    The gradient is that of -p: a token that the learner finds unlikely pulls little, where under plain likelihood it
    pulls the more. Metrics: `ntp/nll`, and `dft/probability`, the mean of p over the targets.
    """
    return Objective(name="dft", compute=compute_dft)


def compute_dft(scores: Scores, batch: TokenBatch) -> Loss:
    """The sums of DFT."""
    weights_N = batch.at_targets("weights")
    logprobs_N = scores.logprobs_N.float()
    probability_N = logprobs_N.detach().exp()
    total = (weights_N * probability_N * -logprobs_N).sum()
    metrics = {
        "ntp/nll": build_nll_metric(scores.logprobs_N, weights_N),
        "dft/probability": Metric((weights_N * probability_N).sum(), weights_N.sum()),
    }
    return Loss(total, weights_N.sum(), metrics)
