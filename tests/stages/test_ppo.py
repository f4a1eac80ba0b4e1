"""`polm ppo`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from polm.config import validate
from polm.errors import ModelError, RecipeError
from polm.models.actor_critic import ActorCritic
from polm.models.heads import load_scalar_model
from polm.models.loading import load_model
from polm.recipe_rl import PPOSettings
from polm.rewards.base import Reward
from polm.stages.ppo import assign
from polm.stages.rollout_source import RolloutTokens


def test_a_turn(artifact: Any, check_trained: Any, read_rows: Any) -> None:
    """Eight updates: two rollouts, two passes over two minibatches each."""
    folder = artifact("ppo")
    check_trained(folder, artifact("dpo"))
    lines = read_rows(folder / "metrics.jsonl")
    for first in (lines[0], lines[4]):  # on-policy, and the values are those of the rollout
        assert first["rl/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        assert first["ppo/value_clip_fraction"] == 0.0
    assert lines[0]["ppo/value_mean"] == 0.0  # a fresh critic says 0
    assert all(line["rl/mismatch_max"] < 1e-3 for line in lines)
    assert lines[7]["ppo/value_mean"] != 0.0
    assert abs(lines[3]["rl/ratio_mean"] - 1.0) > 1e-6  # the second pass is off-policy
    for line in lines:
        assert line["grad_norm"] > 0.0
        assert line["grad_norm/critic"] > 0.0
        assert line["loss"] == pytest.approx(line["ppo/policy_loss"] + line["ppo/value_loss"], rel=1e-4, abs=1e-6)
        assert line["ppo/explained_variance"] <= 1.0
        assert line["rl/entropy"] > 0.0
    # At first there is no KL: 0.5 is missed by everything, and beta falls by 0.2 * 16 / 32.
    assert [line["rl/kl_beta"] for line in lines] == pytest.approx([0.05] * 4 + [0.05 * 0.9] * 4)


def test_the_critic_is_an_ordinary_checkpoint(artifact: Any) -> None:
    folder = artifact("ppo") / "critic"
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    critic = load_scalar_model(folder)
    assert plain.config.num_labels == 1
    start = load_model(artifact("dpo") / "model")
    trunk = dict(start.get_decoder().named_parameters())
    moved = [n for n, p in critic.get_decoder().named_parameters() if not torch.equal(p, trunk[n])]
    assert len(moved) == len(trunk)
    assert float(critic.score.weight.detach().abs().max()) > 0.0  # it began at 0


@pytest.fixture
def pair(build_tiny: Any) -> ActorCritic:
    return ActorCritic(build_tiny(), build_tiny(seed=1), kl_beta=0.1)


ROLLOUT: Any = SimpleNamespace(
    rewards=[Reward(1.0, "right"), Reward(None, "timeout"), Reward(0.5, "scored")], completions=[None] * 3
)
TOKENS = RolloutTokens(
    completions_N=torch.tensor([0, 0, 2]),
    sampler_logprobs_N=torch.tensor([-1.0, -1.0, -3.0]),
    ref_logprobs_N=torch.tensor([-1.5, -3.0, -2.0]),
    values_N=torch.tensor([0.2, 0.4, 0.6]),
)


def test_credit_by_hand(pair: ActorCritic) -> None:
    """KL of the tokens 0.5, 2 | -1, beta 0.1: token rewards -0.05, 1 - 0.2 | 0.5 + 0.1; gamma 1, lam 0.5."""
    settings = PPOSettings(updates=1, kl_beta=0.1, lam=0.5, whiten_advantages=False)
    credit = assign(settings, pair, ROLLOUT, TOKENS)
    deltas = [-0.05 + 0.4 - 0.2, 0.8 - 0.4, 0.6 - 0.6]
    expected = [deltas[0] + 0.5 * deltas[1], deltas[1], deltas[2]]
    assert credit.streams_N["advantages"].tolist() == pytest.approx(expected, abs=1e-6)
    returns = [expected[0] + 0.2, expected[1] + 0.4, expected[2] + 0.6]
    assert credit.streams_N["returns"].tolist() == pytest.approx(returns, abs=1e-6)
    assert credit.advantages_R.tolist() == pytest.approx([(expected[0] + expected[1]) / 2, 0.0, 0.0], abs=1e-6)
    assert credit.metrics["rl/kl_penalty"] == pytest.approx(0.1 * (2.5 - 1) / 2)
    assert float(pair.kl_beta) == pytest.approx(0.1)  # no target
    whitened = assign(settings.model_copy(update={"whiten_advantages": True}), pair, ROLLOUT, TOKENS)
    advantages = whitened.streams_N["advantages"]
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantages.std()) == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(whitened.streams_N["returns"], credit.streams_N["returns"])


def test_the_controller_steers_by_the_answers_kl(pair: ActorCritic) -> None:
    """KL of the two judged answers is 2.5 and -1: 0.75 on the average, 50% above 0.5, which counts as 20%."""
    settings = PPOSettings(updates=1, kl_beta=0.1, kl_target=0.5, kl_horizon=8, prompts_per_rollout=3)
    credit = assign(settings, pair, ROLLOUT, TOKENS)
    assert credit.metrics["rl/kl_beta"] == pytest.approx(0.1)
    assert float(pair.kl_beta) == pytest.approx(0.1 * (1 + 0.2 * 2 / 8))
    again = assign(settings, pair, ROLLOUT, TOKENS)
    assert again.metrics["rl/kl_beta"] == pytest.approx(0.105)
    assert "kl_beta" in dict(pair.named_buffers(recurse=False))  # so it is in a checkpoint


def test_rewards_may_be_whitened(pair: ActorCritic) -> None:
    settings = PPOSettings(updates=1, kl_beta=0.1, lam=1.0, whiten_rewards=True, whiten_advantages=False)
    credit = assign(settings, pair, ROLLOUT, TOKENS)
    rewards = np.array([-0.05, 0.8, 0.6])
    scaled = (rewards - rewards.mean()) / rewards.std(ddof=1) + rewards.mean()
    assert credit.streams_N["returns"].tolist() == pytest.approx(
        [scaled[0] + scaled[1], scaled[1], scaled[2]], rel=1e-4
    )


def test_penalty_in_the_loss_and_a_critic_given(
    artifact: Any, tmp_path: Path, read_rows: Any, other_model: Path
) -> None:
    """The critic begins as the reward model; the loss logs the KL."""
    changes = {"updates": 4, "kl_in": "loss", "kl_target": None, "whiten_rewards": False}
    settings = artifact.spec("ppo")[1].model_copy(update=changes)
    inputs = {**artifact.inputs("ppo"), "critic": str(artifact("reward_model"))}
    artifact.run("ppo", settings, inputs, tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert lines[0]["ppo/value_mean"] != 0.0
    assert lines[0]["rl/kl"] == pytest.approx(0.0, abs=1e-5)
    assert lines[3]["rl/kl"] > 1e-6
    assert all("rl/kl_beta" not in line and "rl/kl_penalty" not in line for line in lines)
    # Its own critic is gone on with as well; one with another tokenizer is refused.
    artifact.run("ppo", settings, {**inputs, "critic": str(tmp_path / "out" / "critic")}, tmp_path / "more")
    with pytest.raises(ModelError, match="do not have the same tokenizer"):
        artifact.run("ppo", settings, {**inputs, "critic": str(other_model)}, tmp_path / "no")


def test_the_critic_learns_and_the_reward_rises(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    """Even lengths of the text are right here: the policy learns to write them, and the critic to expect it."""
    changes = {"updates": 40, "prompts_per_rollout": 8, "minibatches": 1, "kl_beta": 0.0, "kl_target": None}
    calm = artifact.spec("ppo")[1].optimizer.model_copy(
        update={"learning_rate": 0.008, "embedding_learning_rate": 0.004}
    )
    settings = artifact.spec("ppo")[1].model_copy(update={**changes, "whiten_rewards": False, "optimizer": calm})
    inputs = {**artifact.inputs("ppo"), "base": str(artifact("sft"))}
    artifact.run("ppo", settings, inputs, tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    rewards = [line["rl/reward"] for line in lines]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.2
    assert np.mean([line["ppo/value_loss"] for line in lines[-10:]]) < 0.7 * lines[0]["ppo/value_loss"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts_per_rollout": 2, "minibatches": 3}, "prompts_per_rollout must be at least minibatches"),
        ({"kl_target": 6.0, "kl_in": "loss"}, "kl_target steers a KL penalty in the reward"),
        ({"kl_target": 6.0, "kl_horizon": 31}, "kl_horizon must be at least the 32 answers of a rollout"),
        ({"kl_target": 6.0, "kl_beta": 0.0}, "kl_target steers a KL penalty in the reward"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(PPOSettings, values, "the test")
