"""The critic's loss, alone and beside the policy's.

Shape suffixes: N target tokens, T tokens of the stream, L labels of the critic (one).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polm.errors import RecipeError
from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch


def compute_value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """(loss [N], whether it was clipped [N]): max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / 2.

    The clipping is that of PPO's implementations (Huang et al. 2022, "The 37 implementation details of PPO", detail 9);
    None = none. A clipped value passes on no gradient.
    """
    plain_N = (values_N - returns_N) ** 2
    if clip is None:
        return 0.5 * plain_N, torch.zeros_like(plain_N, dtype=torch.bool)
    near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    clipped_N = (near_N - returns_N) ** 2
    return 0.5 * torch.maximum(plain_N, clipped_N), clipped_N > plain_N


def add_value_loss(policy: Objective, clip: float | None) -> Objective:
    """The policy's objective with the critic's loss on top: the mean over target tokens, as `policy` must have it too.

    No parameter is in both, so the sum has the gradients of each. Reads the streams `returns` and `old_values` and, of
    an `ActorCritic`, the value of the text before each target.

    Metrics: those of the policy, `ppo/policy_loss`, `ppo/value_loss`, `ppo/value_clip_fraction`, `ppo/value_mean`.
    Raises RecipeError for a clip that is not above 0.
    """
    if clip is not None and clip <= 0.0:
        raise RecipeError(f"value loss: the clip is {clip}; it must be above 0, or left out")

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        assert scores.values_TL is not None, "the value loss asked the engine for values"
        loss = policy.compute(scores, batch)
        weights_N = batch.at_targets("weights")
        values_N = scores.values_TL[batch.target_predictors_N, 0]
        value_loss_N, is_clipped_N = compute_value_loss(
            values_N, batch.at_targets("old_values"), batch.at_targets("returns"), clip
        )
        total = (weights_N * value_loss_N).sum()
        per_token = {
            "ppo/value_loss": value_loss_N,
            "ppo/value_clip_fraction": is_clipped_N.float(),
            "ppo/value_mean": values_N,
        }
        metrics = {
            **loss.metrics,
            "ppo/policy_loss": Metric(loss.total.detach(), loss.denominator.detach()),
            **{
                name: Metric((weights_N * value_N).sum().detach(), weights_N.sum())
                for name, value_N in per_token.items()
            },
        }
        return Loss(loss.total + total, loss.denominator, metrics)

    return Objective(
        name="ppo",
        compute=compute,
        needs=replace(policy.needs, values=True),
        reads=(*policy.reads, "returns", "old_values"),
    )
