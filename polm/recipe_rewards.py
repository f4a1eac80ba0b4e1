"""The knobs of rewards, which every stage has that judges what a model wrote."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from polm.config import Settings
from polm.recipe_judge import JudgeSettings
from polm.recipe_types import Positive, Share

RewardName = Literal["verifier", "function", "model", "judge"]


def _as_tuple(value: Any) -> Any:
    """One word stands for a list of one."""
    return (value,) if isinstance(value, str) else value


class RewardSettings(Settings):
    """Where rewards come from: one source, or several whose rewards are added up with weights."""

    reward: Annotated[tuple[RewardName, ...], BeforeValidator(_as_tuple)] = Field(
        ("verifier",),
        description="verifier (each prompt's own), function (of yours), model (a reward model), judge (the grades of a "
        "language model: direct RLAIF); one or several",
    )
    reward_weights: dict[RewardName, float] = Field(
        default_factory=dict, description="weight of each source; 1 where none is given"
    )
    reward_function: str | None = Field(
        None,
        pattern=r"^.+\.py:[A-Za-z_]\w*$",
        description="FILE.py:NAME, called as NAME(prompts, completions, **columns)",
    )
    partial_reward: Share = Field(0.0, description="verifier: reward of a wrong answer that is a number; ReFT has 0.1")
    time_limit: Positive = Field(3.0, description="seconds that the reward of one answer may take")
    batch_limit: Positive = Field(
        60.0, description="function: seconds for all answers of a rollout; after that they are judged one by one"
    )
    judging: JudgeSettings | None = Field(None, description="judge: how the model is asked that grades the answers")

    @model_validator(mode="before")
    @classmethod
    def _fill_judging(cls, values: Any) -> Any:
        """The judge's defaults, so that a resolved recipe says how it was asked."""
        named = _as_tuple(values.get("reward")) if isinstance(values, dict) else None
        if not isinstance(named, list | tuple) or "judge" not in named:
            return values
        return {**values, "judging": {} if values.get("judging") is None else values["judging"]}

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        if not self.reward or len(set(self.reward)) != len(self.reward):
            raise ValueError(f"reward {list(self.reward)}: give at least one source, each once")
        unknown = sorted(set(self.reward_weights) - set(self.reward))
        if unknown:
            raise ValueError(f"reward_weights names {unknown}, which reward {list(self.reward)} does not have")
        if ("function" in self.reward) != (self.reward_function is not None):
            raise ValueError("reward: function and reward_function=FILE.py:NAME go together: give both, or neither")
        if self.judging is not None and "judge" not in self.reward:
            raise ValueError("judging belongs to reward: judge; leave it out")
        if self.partial_reward and "verifier" not in self.reward:
            raise ValueError("partial_reward belongs to reward: verifier; leave it out")
        return self
