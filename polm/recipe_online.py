"""Knobs of the stages that learn from fresh, judged answers: rejection sampling and online preference optimisation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from polm.config import fill_defaults, require_readers
from polm.recipe import AnswerSettings, SamplingSettings
from polm.recipe_types import Count, NotNegative, Number, Positive, Several, Share, UpToOne

KEEP_KNOBS: dict[str, dict[str, Any]] = {"best": {"per_prompt": 1}, "top_share": {"share": 0.1}}


class RejectionSettings(AnswerSettings):
    """A model's own best answers as SFT data. Wrong, cut-off, empty, repeated and unjudged answers are never kept."""

    num_prompts: Number = Field(0, description="0 = all")
    keep: Literal["best", "top_share"] = Field(
        "best", description="the best answers to each prompt, or the best of all answers to all prompts"
    )
    per_prompt: Count | None = Field(None, description="best: at most so many answers a prompt")
    share: UpToOne | None = Field(None, description="top_share: answers kept, as a share of those that were judged")
    min_reward: float | None = Field(None, description="answers of a lower reward are dropped")

    @model_validator(mode="before")
    @classmethod
    def _fill_knobs(cls, values: Any) -> Any:
        return fill_defaults(values, "keep", "best", KEEP_KNOBS)

    @model_validator(mode="after")
    def _check_knobs(self) -> RejectionSettings:
        require_readers(self, "keep", KEEP_KNOBS)
        return self


ONLINE_KNOBS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "sigmoid", "mixture": 0.0},
    "xpo": {"loss": "sigmoid", "alpha": 1e-5},
    "nash_md": {"mixture": 0.5, "preference_temperature": 0.0},
}


class OnlineSettings(SamplingSettings):
    """Online preference optimisation: each update has a rollout of its own. A knob that is left out has the default of
    the method (ONLINE_KNOBS); one that the method does not read is refused."""

    samples: Several = Field(
        2, description="answers to each prompt; of xpo and nash_md half of them are the reference's or the mixture's"
    )
    method: Literal["dpo", "xpo", "nash_md"] = "dpo"
    compare: Literal["rewards", "judge"] = Field(
        "rewards", description="judge: the judge of reward: judge compares two answers in both orders, and grades none"
    )
    beta: Positive = Field(0.1, description="pull towards the reference (the tau of nash_md)")
    loss: Literal["sigmoid", "ipo"] | None = Field(None, description="dpo, xpo: loss of a pair")
    alpha: NotNegative | None = Field(None, description="xpo: weight of the likelihood of the reference's answers")
    mixture: Share | None = Field(
        None,
        description="the reference's share in the mixture that writes the rivals (nash_md), or all answers (dpo)",
    )
    preference_temperature: NotNegative | None = Field(
        None, description="nash_md: preference = sigmoid(difference of rewards / this); 0 = the higher reward wins"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_knobs(cls, values: Any) -> Any:
        return fill_defaults(values, "method", "dpo", ONLINE_KNOBS)

    @model_validator(mode="after")
    def _check_knobs(self) -> OnlineSettings:
        require_readers(self, "method", ONLINE_KNOBS)
        if self.method != "dpo" and self.samples % 2:
            raise ValueError(f"samples is {self.samples}; method: {self.method} needs an even number, half a side")
        if self.compare == "judge":
            if self.reward != ("judge",) or self.reward_weights:
                raise ValueError("compare: judge needs reward: judge alone, without weights")
            if self.method == "dpo" and self.samples != 2:
                raise ValueError(
                    f"samples is {self.samples}; compare: judge with method: dpo takes 2, which it compares"
                )
            if self.preference_temperature:
                raise ValueError("compare: judge gives preferences itself; leave preference_temperature out")
        return self
