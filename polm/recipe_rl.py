"""The knobs of the stages of reinforcement learning beside `grpo`: one class a stage.

They are no sections of a flywheel's recipe; a stage's own file, or the command line, gives them. What all share
(sampling, rewards, the KL penalty) is `recipe.RolloutSettings`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from polm.recipe import OptimizerSettings, RolloutSettings
from polm.recipe_adapter import MERGING_KINDS, AdapterSettings
from polm.recipe_types import Count, NotNegative, Positive, Several, Share


class ReinforceSettings(RolloutSettings):
    """Updates without a critic: a rollout serves `updates_per_rollout` of them, one minibatch of whole groups each."""

    updates_per_rollout: Count = 1
    clip_low: Share = 0.2
    clip_high: Positive = 0.2

    @model_validator(mode="after")
    def _check_parts(self) -> ReinforceSettings:
        if self.prompts_per_rollout < self.updates_per_rollout:
            raise ValueError("prompts_per_rollout must be at least updates_per_rollout: each update takes whole groups")
        return self


class RLOOSettings(ReinforceSettings):
    """The baseline of an answer is the mean reward of the other answers to its prompt; an answer is one action."""

    samples: Several = 4
    whiten_advantages: bool = Field(False, description="divide by the spread over the rollout, less the mean")


class ReinforcePPSettings(ReinforceSettings):
    """REINFORCE++: no baseline of its own but the mean over all tokens of the rollout."""

    samples: Count = 1
    baseline: Literal["none", "group"] = Field(
        "none", description="group: take the group's mean reward off first (REINFORCE++-baseline; needs samples >= 2)"
    )
    kl_in: Literal["reward", "loss"] = "reward"

    @model_validator(mode="after")
    def _check_baseline(self) -> ReinforcePPSettings:
        if self.baseline == "group" and self.samples < 2:
            raise ValueError("baseline: group needs samples of at least 2: the mean of one is all of it")
        return self


class ReMaxSettings(ReinforceSettings):
    """The baseline of an answer is the reward of the likeliest answer to its prompt, decoded greedily."""

    samples: Count = 1
    normalize: Literal["tokens", "sequences", "constant"] = "constant"


class PPOSettings(RolloutSettings):
    """PPO with a critic. A rollout is dealt to `minibatches` parts of whole groups, an update each, and gone through
    `epochs_per_rollout` times."""

    samples: Count = 1
    kl_beta: NotNegative = Field(0.05, description="weight of the KL penalty to the starting model; 0 = none")
    kl_in: Literal["reward", "loss"] = "reward"
    kl_target: Positive | None = Field(
        None, description="nats an answer: kl_beta is steered so that KL comes to it; none = kl_beta stays as it is"
    )
    kl_horizon: Positive = Field(10_000.0, description="answers in which kl_beta may change by the KL's error")
    epochs_per_rollout: Count = 4
    minibatches: Count = 1
    clip_low: Share = 0.2
    clip_high: Positive = 0.2
    gamma: Share = 1.0
    lam: Share = 0.95
    value_clip: Positive | None = Field(0.2, description="how far a value may move from the rollout's; none = freely")
    whiten_rewards: bool = Field(False, description="divide the tokens' rewards by their spread over the rollout")
    whiten_advantages: bool = True
    critic_optimizer: OptimizerSettings = OptimizerSettings()
    critic_adapter: AdapterSettings | None = Field(
        None,
        description="train this and a head on the critic's frozen trunk, in place of all its weights: lora or ia3",
        json_schema_extra={"semantic": "if given"},
    )

    @model_validator(mode="after")
    def _check_ppo(self) -> PPOSettings:
        if self.prompts_per_rollout < self.minibatches:
            raise ValueError("prompts_per_rollout must be at least minibatches: each takes whole groups")
        if self.kl_target is not None and (self.kl_in == "loss" or self.kl_beta == 0):
            raise ValueError("kl_target steers a KL penalty in the reward: it needs kl_in: reward and kl_beta above 0")
        if self.critic_adapter is not None and self.critic_adapter.kind not in MERGING_KINDS:
            raise ValueError(
                f"critic_adapter.kind is {self.critic_adapter.kind}; a critic takes {' or '.join(MERGING_KINDS)} "
                "(virtual tokens would leave it less room than the policy has)"
            )
        answers = self.prompts_per_rollout * self.samples
        if self.kl_target is not None and self.kl_horizon < answers:
            raise ValueError(f"kl_horizon must be at least the {answers} answers of a rollout, or kl_beta would jump")
        return self
