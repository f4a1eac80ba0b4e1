"""ReMiT: next-token prediction with each token weighted by a frozen, RL-tuned reference (arXiv 2602.03075).

    delta  = log p_reference - log p_base          of the target token
    centred = delta - mean of delta over the sequence
    w      = clip(2 sigmoid(centred / temperature), 1 - eps, 1 + eps)      (no gradient through w)
    loss   = sum weights * w * (-log p) / number of target tokens

Shape suffix: N target tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polm.errors import RecipeError
from polm.objectives.ntp import build_nll_metric
from polm.signals.token_weights import Centring, compute_remit_weights, compute_shuffled
from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch

Base = Literal["live", "frozen"]
Denominator = Literal["tokens", "weights"]
NUM_BINS = 20  # of the histogram of weights over [0, 2]


def build_remit(
    *, eps: float, temperature: float, centring: Centring, base: Base, denominator: Denominator, shuffled: bool
) -> Objective:
    """The ReMiT objective; with eps = 0 it is next-token prediction to the bit.

    eps           largest distance of a weight from 1, in [0, 1]
    temperature   of the sigmoid, in nats, above 0
    centring      "sequence": the mean over the targets of the token's segment; "batch": over the targets of the
                  micro-batch, so that there the split into micro-batches matters; "none"
    base          whose log-probabilities the reference's are compared with: "live" (the learner's own) or "frozen"
                  (the stream `base_logprobs`)
    denominator   "tokens": the sum of the data's weights; "weights": the sum of the data's weights times w
    shuffled      the control: the same weights, permuted among the targets of the micro-batch by its seed

    Reads the streams `ref_logprobs` and, when frozen, `base_logprobs`. Raises RecipeError for a number out of range.
    """
    if not 0.0 <= eps <= 1.0:
        raise RecipeError(f"remit: eps is {eps}; it must lie in [0, 1], for example 0.2")
    if not temperature > 0.0:
        raise RecipeError(f"remit: temperature is {temperature}; it must be above 0, for example 1.0")
    check_base("remit", base)
    if denominator not in ("tokens", "weights"):
        raise RecipeError(f"remit: denominator is {denominator!r}; it must be 'tokens' or 'weights'")

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        weights_N = batch.at_targets("weights")
        delta_N = compute_delta(scores, batch, base)
        remit_N, clipped_N = compute_remit_weights(
            delta_N,
            batch.target_segments_N,
            batch.num_segments,
            eps=eps,
            temperature=temperature,
            centring=centring,
        )
        if shuffled:
            remit_N = compute_shuffled(remit_N, batch.seed)
        combined_N = weights_N * remit_N
        total = (combined_N * -scores.logprobs_N.float()).sum()
        metrics = {
            "ntp/nll": build_nll_metric(scores.logprobs_N, weights_N),
            "remit/clip_fraction": Metric(clipped_N.float().sum(), len(clipped_N)),
            "remit/weight_histogram": Metric(compute_weight_histogram(remit_N), len(remit_N)),
            "remit/mean_abs_delta": Metric(delta_N.abs().sum(), len(delta_N)),
            "remit/mean_weight": Metric(remit_N.sum(), len(remit_N)),
            "count/tokens_down_weighted": Metric((remit_N < 1).sum(), 1),
            "count/tokens_up_weighted": Metric((remit_N > 1).sum(), 1),
        }
        return Loss(total, weights_N.sum() if denominator == "tokens" else combined_N.sum(), metrics)

    return Objective(name="remit", compute=compute, reads=build_reads(base), linear=base == "frozen")


def check_base(objective: str, base: str) -> None:
    """Raise RecipeError unless `base` is one of the two that there are."""
    if base not in ("live", "frozen"):
        raise RecipeError(f"{objective}: base is {base!r}; it must be 'live' or 'frozen'")


def build_reads(base: Base) -> tuple[str, ...]:
    """The streams that an objective with a reference and a base reads."""
    return ("weights", "ref_logprobs", "base_logprobs") if base == "frozen" else ("weights", "ref_logprobs")


def compute_delta(scores: Scores, batch: TokenBatch, base: Base) -> Tensor:
    """log p_reference - log p_base of each target, detached, [N] float32: the excess loss of the base."""
    base_N = scores.logprobs_N.detach() if base == "live" else batch.at_targets("base_logprobs")
    return batch.at_targets("ref_logprobs").float() - base_N.float()


def compute_weight_histogram(weights_N: Tensor) -> Tensor:
    """Number of weights in each of 20 equal bins over [0, 2], [20] float32; 2 itself belongs to the last bin."""
    bins_N = (weights_N * (NUM_BINS / 2)).long().clamp(0, NUM_BINS - 1)
    # No bincount, for which a GPU is asked for the largest bin.
    return weights_N.new_zeros(NUM_BINS, dtype=torch.float32).scatter_add_(0, bins_N, torch.ones_like(bins_N).float())
