"""`polm grpo`: reinforcement learning with group-relative advantages, from verifiable or other rewards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from polm.objectives.policy_gradient import build_policy_gradient
from polm.recipe import GRPOSettings
from polm.rollout.generate import Completion
from polm.signals.advantages import compute_group_advantages
from polm.stages.common import Context, Stage, StageResult
from polm.stages.rollout_source import Credit, RolloutTokens, train_on_rollouts
from polm.stages.rollouts import REWARD_INPUTS, Judged, Rollout, collect_rewards
from polm.tokens import Array


def compute_advantages(
    completions: Sequence[Completion], rewards: Sequence[Judged], num_groups: int, scale: str
) -> Array:
    """Group-relative advantages [R]. An answer without a reward is no evidence: it is left out of its group's mean and
    gets advantage 0; one that a verifier cannot parse has the reward 0, as a wrong one."""
    values_R, judged_R = collect_rewards(rewards)
    judged = judged_R.numpy()
    groups = np.array([c.prompt_index for c in completions])
    advantages = np.zeros(len(completions), dtype=np.float32)
    if judged.any():
        found = compute_group_advantages(
            values_R[judged_R],
            torch.from_numpy(groups[judged]),
            scale=scale,  # type: ignore[arg-type]
        )
        advantages[judged] = found.numpy()
    assert groups.max() < num_groups
    return advantages


def assign(settings: GRPOSettings, rollout: Rollout, tokens: RolloutTokens, _greedy: object) -> Credit:
    """Every token of an answer has the answer's advantage."""
    num_groups = len(rollout.prompts)
    advantages = compute_advantages(rollout.completions, rollout.rewards, num_groups, settings.advantage_scale)
    return Credit({"advantages": torch.from_numpy(advantages)[tokens.completions_N]}, advantages)


def run(settings: GRPOSettings, context: Context) -> StageResult:
    """Train `base` on prompts.jsonl."""
    objective = build_policy_gradient(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_beta=settings.kl_beta,
        normalize=settings.normalize,
        max_completion_tokens=settings.max_new_tokens,
        log_entropy=True,
        importance_cap=settings.importance_cap,
    )
    return train_on_rollouts(settings, context, partial(assign, settings), objective, settings.updates_per_rollout)


STAGE = Stage(
    "grpo",
    "train",
    GRPOSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=("reference", *REWARD_INPUTS),
    version=3,
    summary="reinforcement learning with verifiable rewards",
)
