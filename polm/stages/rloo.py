"""`polm rloo`: REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

from __future__ import annotations

from functools import partial

import torch

from polm.objectives.policy_gradient import build_policy_gradient
from polm.recipe_rl import RLOOSettings
from polm.signals.advantages import compute_completion_sum, compute_leave_one_out_advantages, whiten
from polm.signals.kl import compute_kl_k1
from polm.stages.common import Context, Stage, StageResult
from polm.stages.rollout_source import Credit, RolloutTokens, describe_kl, train_on_rollouts
from polm.stages.rollouts import REWARD_INPUTS, Rollout, collect_rewards


def assign(settings: RLOOSettings, rollout: Rollout, tokens: RolloutTokens, _greedy: object) -> Credit:
    """reward - kl_beta * (sum of log p - log p_ref over the answer) is what an answer earns; unjudged ones get 0."""
    rewards_R, judged_R = collect_rewards(rollout.rewards)
    metrics = {}
    if tokens.ref_logprobs_N is not None:
        kl_N = compute_kl_k1(tokens.policy_logprobs_N, tokens.ref_logprobs_N)
        kl_R = compute_completion_sum(kl_N, tokens.completions_N, len(rewards_R))
        rewards_R = rewards_R - settings.kl_beta * kl_R
        metrics = describe_kl(tokens, kl_R[judged_R], settings.kl_beta)
    advantages_R = torch.zeros(len(rewards_R))
    groups_R = torch.from_numpy(rollout.groups_R)
    found = compute_leave_one_out_advantages(rewards_R[judged_R], groups_R[judged_R])
    advantages_R[judged_R] = whiten(found) if settings.whiten_advantages else found
    return Credit({"advantages": advantages_R[tokens.completions_N]}, advantages_R.numpy(), metrics)


def run(settings: RLOOSettings, context: Context) -> StageResult:
    """Train `base` on prompts.jsonl."""
    objective = build_policy_gradient(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_beta=0.0,  # it is in the reward
        normalize="sequences",
        max_completion_tokens=settings.max_new_tokens,
        log_entropy=True,
        level="sequence",
        importance_cap=settings.importance_cap,
    )
    return train_on_rollouts(settings, context, partial(assign, settings), objective, settings.updates_per_rollout)


STAGE = Stage(
    "rloo",
    "train",
    RLOOSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference", *REWARD_INPUTS),
    version=2,
    summary="reinforcement learning with a leave-one-out baseline",
)
