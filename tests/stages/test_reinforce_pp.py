"""`polm reinforce_pp`."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polm.config import validate
from polm.errors import RecipeError
from polm.recipe_rl import ReinforcePPSettings
from polm.rewards.base import Reward
from polm.stages.reinforce_pp import assign
from polm.stages.rollout_source import RolloutTokens

REWARDS = [Reward(1.0, "right"), Reward(0.0, "wrong"), Reward(3.0, "scored"), Reward(None, "error")]
TOKENS = RolloutTokens(
    completions_N=torch.tensor([0, 0, 1, 2]),
    sampler_logprobs_N=torch.tensor([-1.0, -1.0, -3.0, -1.0]),
    ref_logprobs_N=torch.tensor([-1.5, -2.0, -3.0, -0.5]),
)


def test_a_turn(artifact: Any, check_trained: Any, read_rows: Any) -> None:
    folder = artifact("reinforce_pp")
    check_trained(folder, artifact("dpo"))
    for line in read_rows(folder / "metrics.jsonl"):
        assert line["rl/ratio_mean"] == 1.0  # one update a rollout
        assert line["rl/importance_mean"] == pytest.approx(1.0, abs=1e-3)  # the generator agrees with the trainer
        assert line["rl/importance_capped_fraction"] == 0.0
        assert line["rl/sampler_gap_max"] < 1e-3
        assert "rl/kl_penalty" in line


def whiten(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) + 1e-8)
    return [(v - mean) / spread for v in values]


def test_advantages_by_hand() -> None:
    """KL of the tokens 0.5, 1 | 0 | -0.5, beta 0.2: what is to come of each is taken off its reward."""
    rollout: Any = SimpleNamespace(rewards=REWARDS, groups_R=np.array([0, 0, 1, 1]), completions=[None] * 4)
    credit = assign(ReinforcePPSettings(updates=1, kl_beta=0.2), rollout, TOKENS, None)
    expected = whiten([1 - 0.2 * 1.5, 1 - 0.2 * 1.0, 0.0, 3 + 0.2 * 0.5])
    assert credit.streams_N["advantages"].tolist() == pytest.approx(expected, rel=1e-5)
    assert credit.advantages_R.tolist() == pytest.approx(
        [(expected[0] + expected[1]) / 2, expected[2], expected[3], 0.0], rel=1e-5
    )
    # In the loss the KL is no part of the reward.
    in_loss = assign(ReinforcePPSettings(updates=1, kl_beta=0.2, kl_in="loss"), rollout, TOKENS, None)
    assert in_loss.streams_N["advantages"].tolist() == pytest.approx(whiten([1.0, 1.0, 0.0, 3.0]), rel=1e-5)


def test_the_group_s_mean_as_the_baseline() -> None:
    """Group 0 has rewards 1 and 0; in group 1 only one was judged, and its mean is itself."""
    rollout: Any = SimpleNamespace(rewards=REWARDS, groups_R=np.array([0, 0, 1, 1]), completions=[None] * 4)
    credit = assign(ReinforcePPSettings(updates=1, samples=2, baseline="group"), rollout, TOKENS, None)
    assert credit.streams_N["advantages"].tolist() == pytest.approx(whiten([0.5, 0.5, -0.5, 0.0]), rel=1e-5)
    with pytest.raises(RecipeError, match="baseline: group needs samples of at least 2"):
        validate(ReinforcePPSettings, {"baseline": "group", "samples": 1}, "the test")


def test_the_penalty_in_the_loss(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    settings = artifact.spec("reinforce_pp")[1].model_copy(update={"kl_in": "loss", "updates": 2})
    artifact.run("reinforce_pp", settings, artifact.inputs("reinforce_pp"), tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert lines[0]["rl/kl"] == pytest.approx(0.0, abs=1e-5)
    assert lines[1]["rl/kl"] > 1e-6
    assert "rl/kl_penalty" not in lines[0]
