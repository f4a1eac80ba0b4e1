"""`polm remax`: REINFORCE whose baseline is the reward of the greedy answer (ReMax, arXiv 2310.10505)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from polm.objectives.policy_gradient import build_policy_gradient
from polm.recipe_rl import ReMaxSettings
from polm.signals.advantages import compute_rewards_to_go
from polm.stages.common import Context, Stage, StageResult
from polm.stages.rollout_source import (
    Credit,
    RolloutTokens,
    average_by_completion,
    build_token_rewards,
    train_on_rollouts,
)
from polm.stages.rollouts import REWARD_INPUTS, Rollout, collect_rewards


def assign(settings: ReMaxSettings, rollout: Rollout, tokens: RolloutTokens, decode: Callable[[], Rollout]) -> Credit:
    """The advantage of a token: the answer's reward minus the greedy answer's, minus kl_beta times the KL of this token
    and of all after it. Where the greedy answer could not be judged there is no baseline, and no advantage either."""
    greedy = decode()
    baselines_G, judged_G = collect_rewards(greedy.rewards)
    rewards_R, _ = collect_rewards(rollout.rewards)
    groups_R = torch.from_numpy(rollout.groups_R)
    token_rewards_N, metrics = build_token_rewards(rewards_R - baselines_G[groups_R], tokens, settings.kl_beta)
    advantages_N = compute_rewards_to_go(token_rewards_N, tokens.completions_N)
    advantages_N = torch.where(judged_G[groups_R][tokens.completions_N], advantages_N, torch.zeros(()))
    metrics |= {
        "rl/greedy_reward": float(baselines_G.sum() / judged_G.sum().clamp(min=1)),
        "count/greedy_samples": len(greedy.rewards),
        "count/greedy_samples_unjudged": int((~judged_G).sum()),
    }
    return Credit({"advantages": advantages_N}, average_by_completion(advantages_N, tokens, rollout), metrics)


def run(settings: ReMaxSettings, context: Context) -> StageResult:
    """Train `base` on prompts.jsonl."""
    objective = build_policy_gradient(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_beta=0.0,  # it is in the reward
        normalize=settings.normalize,
        max_completion_tokens=settings.max_new_tokens,
        log_entropy=True,
        importance_cap=settings.importance_cap,
    )
    return train_on_rollouts(settings, context, partial(assign, settings), objective, settings.updates_per_rollout)


STAGE = Stage(
    "remax",
    "train",
    ReMaxSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference", *REWARD_INPUTS),
    version=2,
    summary="reinforcement learning with the greedy answer as the baseline",
)
