"""The clipped policy gradient of PPO, GRPO, DAPO and Dr. GRPO; they differ in advantages and in what they divide by.

A completion is a segment with at least one target token.

With level "sequence" the ratio is that of the whole completion, the product of its tokens' (RLOO, arXiv 2402.14740,
treats a completion as one action): its loss is that of one action where `normalize` is "sequences".

With `importance_cap` C the clipped part of the loss (not the KL) is multiplied by min(p_old / p_sampler, C), without a
gradient: what the generator drew with other probabilities than the trainer's is weighted back (truncated importance
sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"). p_old is the
trainer's before the first update on the samples, so with one update a rollout the loss's own scores serve.

Shape suffixes: N target tokens, S segments.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polm.errors import RecipeError
from polm.objectives.sampler_gap import compute_sampler_gap
from polm.signals.kl import compute_kl_k3
from polm.signals.token_weights import compute_segment_sum
from polm.tokens import Loss, Metric, Needs, Objective, Scores, TokenBatch

Normalize = Literal["tokens", "sequences", "constant"]
Level = Literal["token", "sequence"]


def build_policy_gradient(
    *,
    clip_low: float,
    clip_high: float,
    kl_beta: float,
    normalize: Normalize,
    max_completion_tokens: int,
    unbiased_kl: bool = True,
    log_entropy: bool = False,
    level: Level = "token",
    importance_cap: float | None = None,
) -> Objective:
    """loss of a token = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_beta * kl.

    ratio = p / p_old (PPO, arXiv 1707.06347, equation 7). kl is the estimate k3 of KL(learner || reference); with
    `unbiased_kl` it is k3 * ratio, whose gradient is that of the divergence itself, ratio * log(p / p_ref) (arXiv
    2512.02556; TRL's default). Without, it is the bare k3 of the GRPO paper, whose gradient on-policy is another one,
    1 - p_ref / p. The tokens' losses, times the data's weights, are summed and divided as `normalize` says:
      "tokens"     by the number of target tokens (DAPO, arXiv 2503.14476, section 3.3)
      "sequences"  the mean within each completion, then the mean over completions (GRPO, arXiv 2402.03300, equation 3)
      "constant"   by the number of completions times `max_completion_tokens` (Dr. GRPO, arXiv 2503.20783)

    Reads the stream `advantages`; `old_logprobs` where there is one (without it the learner's own, detached: exactly
    on-policy, the ratio is 1); `sampler_logprobs` for `importance_cap`, and for metrics; `ref_logprobs` when
    kl_beta > 0. Raises RecipeError for a number out of range.

    Metrics (means over target tokens): `rl/ratio_mean`, `rl/clip_low_fraction` (ratio below, advantage negative),
    `rl/clip_high_fraction` (ratio above, advantage positive), `rl/approx_kl` (k3 of KL(old || learner)), `rl/kl` (the
    kl of the loss), `rl/entropy` (with `log_entropy`), `rl/sampler_gap` (|log p - log p_sampler|), and
    `rl/sampler_gap_max`: the largest gap of a micro-batch, averaged over the update's micro-batches. The same between
    the trainer before the first update (p_old) and the generator: `rl/mismatch_mean`, `rl/mismatch_max`, and
    `rl/mismatch_kl`, k3 of KL(sampler || old). With `importance_cap` also `rl/importance_mean` and
    `rl/importance_capped_fraction`.
    """
    _check(clip_low, clip_high, kl_beta, normalize, max_completion_tokens, importance_cap)
    extra = ("ref_logprobs",) * (kl_beta > 0.0) + ("sampler_logprobs",) * (importance_cap is not None)

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        loss_N, per_token = compute_clipped(scores, batch, clip_low=clip_low, clip_high=clip_high, level=level)
        if importance_cap is not None:
            loss_N = _correct_mismatch(loss_N, per_token, scores, batch, level, importance_cap)
        if kl_beta > 0.0:
            kl_N = compute_kl_k3(scores.logprobs_N.float(), batch.at_targets("ref_logprobs").float())
            if unbiased_kl:
                kl_N = per_token["rl/ratio_mean"] * kl_N
            loss_N = loss_N + kl_beta * kl_N
            per_token["rl/kl"] = kl_N
        if log_entropy:
            assert scores.entropy_N is not None, "the policy gradient asked the engine for the entropy"
            per_token["rl/entropy"] = scores.entropy_N
        total, denominator = compute_normalized(loss_N, batch, normalize, max_completion_tokens)
        return Loss(total, denominator, _build_metrics(per_token, scores, batch))

    return Objective(
        name="policy_gradient",
        compute=compute,
        needs=Needs(entropy=log_entropy),
        reads=("weights", "advantages", *extra),
    )


def _check(
    clip_low: float,
    clip_high: float,
    kl_beta: float,
    normalize: str,
    max_completion_tokens: int,
    importance_cap: float | None,
) -> None:
    if importance_cap is not None and importance_cap <= 0.0:
        raise RecipeError(f"policy gradient: importance_cap is {importance_cap}; it must be above 0, or left out")
    if not 0.0 <= clip_low <= 1.0 or clip_high < 0.0:
        raise RecipeError(f"policy gradient: clip_low is {clip_low} (in [0, 1]), clip_high is {clip_high} (at least 0)")
    if kl_beta < 0.0:
        raise RecipeError(f"policy gradient: kl_beta is {kl_beta}; it must be 0 (no reference) or above")
    if normalize not in ("tokens", "sequences", "constant"):
        raise RecipeError(
            f"policy gradient: normalize is {normalize!r}; it must be 'tokens', 'sequences' or 'constant'"
        )
    if max_completion_tokens < 1:
        raise RecipeError(f"policy gradient: max_completion_tokens is {max_completion_tokens}; it must be at least 1")


def _read_old_logprobs(scores: Scores, batch: TokenBatch) -> Tensor:
    """log p of the trainer before the first update on these samples, [N], without a gradient."""
    if "old_logprobs" in batch.streams:
        return batch.at_targets("old_logprobs").float()
    return scores.logprobs_N.float().detach()


def _spread_over_level(values_N: Tensor, batch: TokenBatch, level: Level) -> Tensor:
    """The values as they are, or at each token the sum over its completion, [N]."""
    if level == "token":
        return values_N
    segments_N = batch.target_segments_N
    return compute_segment_sum(values_N, segments_N, batch.num_segments)[segments_N]


def _correct_mismatch(
    loss_N: Tensor, per_token: dict[str, Tensor], scores: Scores, batch: TokenBatch, level: Level, cap: float
) -> Tensor:
    """The loss times min(p_old / p_sampler, cap), [N]; notes in `per_token` how much that was."""
    gap_N = _read_old_logprobs(scores, batch) - batch.at_targets("sampler_logprobs").float()
    weight_N = torch.exp(_spread_over_level(gap_N, batch, level))
    per_token["rl/importance_capped_fraction"] = weight_N > cap
    per_token["rl/importance_mean"] = weight_N.clamp(max=cap)
    return loss_N * weight_N.clamp(max=cap)


def compute_clipped(
    scores: Scores, batch: TokenBatch, *, clip_low: float, clip_high: float, level: Level = "token"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss of each target, [N], and what there is to log of it, each [N]; `rl/ratio_mean` is the ratio."""
    logprobs_N = scores.logprobs_N.float()
    advantages_N = batch.at_targets("advantages").float()
    old_N = _read_old_logprobs(scores, batch)
    ratio_N = torch.exp(_spread_over_level(logprobs_N - old_N, batch, level))
    clipped_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    per_token = {
        "rl/ratio_mean": ratio_N,
        "rl/clip_low_fraction": (ratio_N < 1.0 - clip_low) & (advantages_N < 0),
        "rl/clip_high_fraction": (ratio_N > 1.0 + clip_high) & (advantages_N > 0),
        "rl/approx_kl": compute_kl_k3(old_N, logprobs_N.detach()),
    }
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N), per_token


def compute_normalized(
    loss_N: Tensor, batch: TokenBatch, normalize: Normalize, max_completion_tokens: int
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' losses and the denominator that belongs to it, both scalars."""
    weights_N = batch.at_targets("weights")
    if normalize == "tokens":
        return (weights_N * loss_N).sum(), weights_N.sum()
    segments_N = batch.target_segments_N
    num_targets_S = torch.bincount(segments_N, minlength=batch.num_segments)
    num_completions = (num_targets_S > 0).sum().float()
    if normalize == "constant":
        return (weights_N * loss_N).sum(), num_completions * max_completion_tokens
    completion_weight_N = compute_segment_sum(weights_N, segments_N, batch.num_segments)[segments_N]
    return (weights_N / completion_weight_N * loss_N).sum(), num_completions


@torch.no_grad()
def _build_metrics(per_token: dict[str, Tensor], scores: Scores, batch: TokenBatch) -> dict[str, Metric]:
    """Means over the target tokens, and the distance from the sampler's own log-probabilities where they are known."""
    weights_N = batch.at_targets("weights")
    metrics: dict[str, Metric] = {}
    if "sampler_logprobs" in batch.streams:
        sampler_N = batch.at_targets("sampler_logprobs").float()
        old_N = _read_old_logprobs(scores, batch)
        mismatch_N, kl_N = (old_N - sampler_N).abs(), compute_kl_k3(sampler_N, old_N)
        per_token = {**per_token, "rl/mismatch_mean": mismatch_N, "rl/mismatch_kl": kl_N}
        metrics |= compute_sampler_gap(scores.logprobs_N, batch)
        if len(mismatch_N):
            metrics["rl/mismatch_max"] = Metric(mismatch_N.max(), 1.0)
    for name, value_N in per_token.items():
        metrics[name] = Metric((weights_N * value_N.float()).sum(), weights_N.sum())
    return metrics
