"""`polm remax`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polm.recipe_rl import ReMaxSettings
from polm.rewards.base import Reward
from polm.stages.remax import assign
from polm.stages.rollout_source import RolloutTokens


def test_a_turn(artifact: Any, check_trained: Any, read_rows: Any, read_manifest: Any) -> None:
    folder = artifact("remax")
    check_trained(folder, artifact("dpo"))
    lines = read_rows(folder / "metrics.jsonl")
    assert all(0.0 <= line["rl/greedy_reward"] <= 1.0 for line in lines)
    assert all(line["rl/sampler_gap_max"] < 1e-3 for line in lines)
    ledger = read_manifest(folder)["ledger"]
    assert (ledger["samples"], ledger["greedy_samples"], ledger["greedy_samples_unjudged"]) == (32, 8, 0)
    # Within a group one number is taken off: the difference of two advantages is that of the rewards.
    for row in read_rows(folder / "samples.jsonl"):
        offsets = {round(s["advantage"] - (s["status"] == "right"), 3) for s in row["samples"]}
        assert len(offsets) == 1
        assert offsets <= {0.0, -1.0}


def test_advantages_by_hand() -> None:
    """Greedy rewards 1, none, 0; KL of the tokens 0.5, 1 | 0 | 0 | -0.5."""
    rewards = [Reward(v, "scored") for v in (1.0, 0.0, 2.0, 0.5)]
    rollout: Any = SimpleNamespace(rewards=rewards, groups_R=np.array([0, 0, 1, 2]), completions=[None] * 4)
    greedy: Any = SimpleNamespace(rewards=[Reward(1.0, "right"), Reward(None, "timeout"), Reward(0.0, "wrong")])
    tokens = RolloutTokens(
        completions_N=torch.tensor([0, 0, 1, 2, 3]),
        sampler_logprobs_N=torch.tensor([-1.0, -1.0, -3.0, -1.0, -1.0]),
        ref_logprobs_N=torch.tensor([-1.5, -2.0, -3.0, -1.0, -0.5]),
    )
    credit = assign(ReMaxSettings(updates=1, kl_beta=0.2), rollout, tokens, lambda: greedy)
    # Without a baseline (group 1) there is no advantage.
    expected = [0 - 0.3, 0 - 0.2, -1.0, 0.0, 0.5 + 0.1]
    assert credit.streams_N["advantages"].tolist() == pytest.approx(expected, rel=1e-5)
    assert credit.advantages_R.tolist() == pytest.approx([-0.25, -1.0, 0.0, 0.6], rel=1e-5)
    assert credit.metrics["rl/greedy_reward"] == 0.5
    assert (credit.metrics["count/greedy_samples"], credit.metrics["count/greedy_samples_unjudged"]) == (3, 1)
