"""`polm rloo`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polm.recipe_rl import RLOOSettings
from polm.rewards.base import Reward
from polm.stages.rloo import assign
from polm.stages.rollout_source import RolloutTokens


def test_a_turn(artifact: Any, check_trained: Any, read_rows: Any) -> None:
    """Four updates of two rollouts, two minibatches each."""
    folder = artifact("rloo")
    check_trained(folder, artifact("dpo"))
    lines = read_rows(folder / "metrics.jsonl")
    for line in (lines[0], lines[2]):  # the first minibatch of a rollout is on-policy
        assert line["rl/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        assert line["rl/mismatch_max"] < 1e-3
    for line in lines:
        assert line["rl/kl"] >= 0.0
        assert line["rl/entropy"] > 0.0
        assert 0.0 <= line["rl/reward"] <= 1.0
    assert lines[0]["rl/kl_penalty"] == pytest.approx(0.0, abs=1e-5)  # the reference is the start
    assert lines[3]["rl/kl"] > 1e-6
    for row in read_rows(folder / "samples.jsonl"):
        assert sum(sample["advantage"] for sample in row["samples"]) == pytest.approx(0.0, abs=1e-3)


def test_advantages_by_hand() -> None:
    """Group 0: rewards 1, none, 0 with sums of log p - log p_ref of 0.5, -, -1; group 1: 1 and 1, KL 0 and 2."""
    rewards = [
        Reward(1.0, "right"),
        Reward(None, "timeout"),
        Reward(0.0, "wrong"),
        Reward(1.0, "right"),
        Reward(1.0, "right"),
    ]
    rollout: Any = SimpleNamespace(rewards=rewards, groups_R=np.array([0, 0, 0, 1, 1]))
    tokens = RolloutTokens(
        completions_N=torch.tensor([0, 0, 2, 3, 4]),
        sampler_logprobs_N=torch.tensor([-1.0, -1.0, -3.0, -1.0, -1.0]),
        ref_logprobs_N=torch.tensor([-1.25, -1.25, -2.0, -1.0, -3.0]),
    )
    credit = assign(RLOOSettings(updates=1, kl_beta=0.1), rollout, tokens, None)
    first, second = 1 - 0.05, 0 + 0.1  # rewards less the penalty
    expected = [first - second, 0.0, second - first, 0.2, -0.2]
    assert credit.advantages_R.tolist() == pytest.approx(expected)
    assert credit.streams_N["advantages"].tolist() == pytest.approx([expected[i] for i in (0, 0, 2, 3, 4)])
    assert credit.metrics["rl/kl_penalty"] == pytest.approx(0.1 * (0.5 - 1 + 0 + 2) / 4)
    plain = assign(
        RLOOSettings(updates=1), rollout, RolloutTokens(tokens.completions_N, tokens.sampler_logprobs_N), None
    )
    assert plain.advantages_R.tolist() == [1.0, 0.0, -1.0, 0.0, 0.0]
    assert plain.metrics == {}


def test_the_reward_rises(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    """Even lengths of the text are right here: twenty updates learn to write them."""
    settings = artifact.spec("rloo")[1].model_copy(
        update={"updates": 20, "updates_per_rollout": 1, "kl_beta": 0.0, "prompts_per_rollout": 16}
    )
    inputs = {**artifact.inputs("rloo"), "base": str(artifact("sft"))}
    artifact.run("rloo", settings, inputs, tmp_path / "out")
    rewards = [line["rl/reward"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
