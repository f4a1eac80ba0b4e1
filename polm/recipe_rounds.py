"""The knobs of recipes that go round: a model that trains on its own grades, again and again."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from polm.config import Settings
from polm.recipe import DPOSettings, EvalSettings, SFTSettings
from polm.recipe_data import DataSettings
from polm.recipe_judge import JudgeStage
from polm.recipe_types import NOT_SEMANTIC, Count, Number, Seed

# What a self-rewarding model is asked unless the recipe says otherwise (Yuan et al. 2024, arXiv 2401.10020: grades of
# written judgements, averaged; the best answer over the worst).
SELF_JUDGE: dict[str, Any] = {
    "mode": "sample",
    "by": "scores",
    "judging": {"verdict": "text", "rubric": "additive", "votes": 3, "temperature": 0.7},
}


def default_judge() -> JudgeStage:
    return JudgeStage.model_validate(SELF_JUDGE)


class SelfRewardingRecipe(Settings):
    """Iterations of: the model answers, grades its own answers, and is trained by DPO on the best over the worst."""

    kind: Literal["self_rewarding"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seeds: tuple[Seed, ...] = (0,)
    iterations: Count = 3
    base: str = Field(min_length=1, description="a model that follows instructions and can judge: path or hub id")
    data: DataSettings = Field(description="prompts.jsonl; sft.jsonl with sft, benchmarks with eval")
    sft: SFTSettings | None = Field(
        None, description="before the first iteration: on answers, and on judgements for a model that cannot judge yet"
    )
    judge: JudgeStage = Field(default_factory=default_judge, description="num_prompts is that of each iteration")
    dpo: DPOSettings = DPOSettings()
    eval: EvalSettings | None = Field(None, description="benchmarks before the first and after each iteration")
    workers: Number = Field(0, description="stages run at once; 0 = one a core", json_schema_extra=NOT_SEMANTIC)

    @model_validator(mode="before")
    @classmethod
    def _fill_judge(cls, values: Any) -> Any:
        """SELF_JUDGE below what the recipe says."""
        if not isinstance(values, dict) or not isinstance(values.get("judge"), dict):
            return values
        given = values["judge"]
        judging = given.get("judging", {})
        if isinstance(judging, dict):
            defaults = {**SELF_JUDGE["judging"]}
            if judging.get("verdict") == "logprobs":  # which samples nothing
                defaults = {"rubric": defaults["rubric"]}
            given = {**given, "judging": {**defaults, **judging}}
        return {**values, "judge": {**SELF_JUDGE, **given}}

    @model_validator(mode="after")
    def _check(self) -> SelfRewardingRecipe:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: give at least one, each once")
        if self.judge.mode != "sample":
            raise ValueError("judge.mode must be sample: a self-rewarding model judges its own answers")
        if self.judge.judging.endpoint is not None:
            raise ValueError("judge.judging.endpoint: the model itself is the judge; for a server use polm judge")
        return self
