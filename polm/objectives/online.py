"""Preference optimisation on answers that were sampled just now: what XPO and Nash-MD add to `preference`.

Online DPO (arXiv 2402.04792) needs nothing here: it is a loss of `preference` on fresh pairs.

Shape suffixes: N target tokens, S segments, A answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polm.errors import DataError, RecipeError
from polm.objectives.preference import Knobs, build_preference
from polm.signals.token_weights import compute_segment_sum
from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch


def build_xpo(loss: str, knobs: Knobs, alpha: float) -> Objective:
    """XPO (arXiv 2405.21046, algorithm 1): the loss of a pair + alpha * log p(answer that the reference wrote).

    A pair is one answer of the policy and one of the reference; the mark `explored` (1) is on the reference's. The
    term lowers the likelihood of what the reference would write anyway, so that the policy explores. The loss is a mean
    over pairs. Metrics: those of the loss, and `xpo/reference_logprob` (nats per answer of the reference).
    Raises RecipeError for a negative alpha, DataError for a pair without an answer of the reference.
    """
    if not alpha >= 0.0:
        raise RecipeError(f"xpo: alpha is {alpha}; it must not be negative (0 = plain online DPO on these pairs)")
    pairs = build_preference(loss, knobs)

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        plain = pairs.compute(scores, batch)
        explored_A = find_marked(batch, "explored")
        if len(explored_A) != int(plain.denominator):
            raise DataError(
                f"xpo: {len(explored_A)} answers of the reference (mark 'explored') in a batch of "
                f"{int(plain.denominator)} pairs; each pair needs one"
            )
        logprobs_A = compute_answer_sums(scores.logprobs_N, batch)[explored_A]
        metric = Metric(logprobs_A.detach().sum(), len(logprobs_A))
        return Loss(
            plain.total + alpha * logprobs_A.sum(),
            plain.denominator,
            {**plain.metrics, "xpo/reference_logprob": metric},
        )

    return Objective(name="xpo", compute=compute, needs=pairs.needs, reads=pairs.reads)


def build_nash_md(beta: float) -> Objective:
    """Nash-MD-PG (arXiv 2312.00886, section 7): the policy gradient of being preferred to the mixture policy.

    loss of an answer = -(P - 1/2 - beta * log(p / p_ref)) * log p(answer), the bracket without a gradient; beta is the
    paper's tau. P, the mark `preference`, is how probable it is that the answer is better than one of the mixture
    p^(1 - c) p_ref^c, which is sampled for it; the baseline 1/2 is the preference over oneself. log p sums over the
    answer's tokens. The loss is a mean over answers; its value says nothing, its gradient is the method's.

    Metrics: `nash/preference` (mean P), `nash/log_ratio` (mean log p / p_ref: an estimate of KL(p || p_ref), nats per
    answer). Raises RecipeError for a negative beta, DataError for a batch without such answers.
    """
    if not beta >= 0.0:
        raise RecipeError(f"nash_md: beta is {beta}; it must not be negative")

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        if "preference" not in batch.marks:
            raise DataError("nash_md: no segment carries the mark 'preference'; mark each of the policy's answers")
        preference_S = batch.marks["preference"]
        answers_A = torch.nonzero(~torch.isnan(preference_S))[:, 0]
        logprobs_A = compute_answer_sums(scores.logprobs_N, batch)[answers_A]
        reference_A = compute_answer_sums(batch.at_targets("ref_logprobs"), batch)[answers_A]
        preference_A, log_ratio_A = preference_S[answers_A], logprobs_A.detach() - reference_A
        total = -((preference_A - 0.5 - beta * log_ratio_A) * logprobs_A).sum()
        count = len(answers_A)
        metrics = {
            "nash/preference": Metric(preference_A.sum(), count),
            "nash/log_ratio": Metric(log_ratio_A.sum(), count),
        }
        return Loss(total, total.new_full((), float(count)), metrics)

    return Objective(name="nash_md", compute=compute, reads=("weights", "ref_logprobs"))


def compute_answer_sums(logprobs_N: Tensor, batch: TokenBatch) -> Tensor:
    """The weighted sum of log-probabilities over each segment's targets, [S]."""
    weights_N = batch.at_targets("weights")
    return compute_segment_sum(weights_N * logprobs_N.float(), batch.target_segments_N, batch.num_segments)


def find_marked(batch: TokenBatch, name: str) -> Tensor:
    """Indices of the segments whose mark `name` is 1, int64 [A]; none where no segment has the mark."""
    marked_S = batch.marks.get(name)
    if marked_S is None:
        return batch.starts_S.new_zeros(0)
    return torch.nonzero(marked_S == 1.0)[:, 0]
