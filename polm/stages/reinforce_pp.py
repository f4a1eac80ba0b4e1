"""`polm reinforce_pp`: REINFORCE++ (arXiv 2501.03262), clipped, with advantages normalised over the whole rollout."""

from __future__ import annotations

from functools import partial

import torch

from polm.objectives.policy_gradient import build_policy_gradient
from polm.recipe_rl import ReinforcePPSettings
from polm.signals.advantages import compute_group_advantages, compute_rewards_to_go, whiten
from polm.stages.common import Context, Stage, StageResult
from polm.stages.rollout_source import (
    Credit,
    RolloutTokens,
    average_by_completion,
    build_token_rewards,
    train_on_rollouts,
)
from polm.stages.rollouts import REWARD_INPUTS, Rollout, collect_rewards


def assign(settings: ReinforcePPSettings, rollout: Rollout, tokens: RolloutTokens, _greedy: object) -> Credit:
    """The advantage of a token: the answer's reward (less its group's mean with `baseline: group`) minus kl_beta times
    the KL of this token and of all after it; then whitened over all tokens of the rollout."""
    rewards_R, judged_R = collect_rewards(rollout.rewards)
    if settings.baseline == "group":
        groups_R = torch.from_numpy(rollout.groups_R)
        rewards_R[judged_R] = compute_group_advantages(rewards_R[judged_R], groups_R[judged_R], "none")
    beta = settings.kl_beta if settings.kl_in == "reward" else 0.0
    token_rewards_N, metrics = build_token_rewards(rewards_R, tokens, beta)
    advantages_N = whiten(compute_rewards_to_go(token_rewards_N, tokens.completions_N))
    return Credit({"advantages": advantages_N}, average_by_completion(advantages_N, tokens, rollout), metrics)


def run(settings: ReinforcePPSettings, context: Context) -> StageResult:
    """Train `base` on prompts.jsonl."""
    objective = build_policy_gradient(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_beta=settings.kl_beta if settings.kl_in == "loss" else 0.0,
        normalize="tokens",
        max_completion_tokens=settings.max_new_tokens,
        log_entropy=True,
        importance_cap=settings.importance_cap,
    )
    return train_on_rollouts(settings, context, partial(assign, settings), objective, settings.updates_per_rollout)


STAGE = Stage(
    "reinforce_pp",
    "train",
    ReinforcePPSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference", *REWARD_INPUTS),
    version=2,
    summary="reinforcement learning by REINFORCE++",
)
