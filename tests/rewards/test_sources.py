"""One source of rewards or several: what a stage's settings give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polm.config import validate
from polm.data.readers import read_prompts
from polm.errors import RecipeError
from polm.recipe_rewards import RewardSettings
from polm.rewards.base import Reward, RewardItem
from polm.rewards.sources import build_rewarder, combine
from polm.rewards.verify import VerifyItem, verify_many

ANSWERS = ["#### 7", "#### 8", "seven", "so 7", "#### N0+N1", "#### N0*N1", "#### (", "#### seven"]
VERIFIERS = ["number", "number", "number", "number", "expression", "expression", "expression", "exact"]


def build_items() -> list[RewardItem]:
    fields = [{"prompt": "p", "answer": "7", "verifier": v, "numbers": (3.0, 4.0)} for v in VERIFIERS]
    return [RewardItem([], a, np.arange(1), np.arange(1), f) for a, f in zip(ANSWERS, fields, strict=True)]


def test_the_verifier_s_verdicts_are_the_rewards() -> None:
    rewards = build_rewarder(RewardSettings())(build_items())
    verdicts = verify_many([VerifyItem(v, a, "7", (3.0, 4.0)) for v, a in zip(VERIFIERS, ANSWERS, strict=True)])
    assert [r.status for r in rewards] == [v.status for v in verdicts]
    assert [r.value for r in rewards] == [float(v.is_right) for v in verdicts] == [1, 0, 0, 1, 1, 0, 0, 0]


def test_partial_reward_of_reft() -> None:
    """Right 1; a wrong answer 0.1 if it is a number; what cannot be read 0."""
    rewards = build_rewarder(RewardSettings(partial_reward=0.1))(build_items())
    assert [r.value for r in rewards] == [1, 0.1, 0, 1, 1, 0.1, 0, 0]
    assert [r.status for r in rewards] == [r.status for r in build_rewarder(RewardSettings())(build_items())]


def test_a_weighted_sum() -> None:
    items = build_items()[:4]
    lengths = lambda items: [Reward(float(len(i.completion)), "scored") for i in items]  # noqa: E731
    fails = lambda items: [Reward(None, "timeout", "slow")] + [Reward(-1.0, "scored")] * (len(items) - 1)  # noqa: E731
    settings = RewardSettings(reward=("verifier",))
    verifier = build_rewarder(settings)
    found = combine({"verifier": verifier, "function": lengths}, {"function": 0.5}, items)
    assert [r.value for r in found] == [1 + 3, 0 + 3, 0 + 2.5, 1 + 2]
    assert [r.status for r in found] == ["right", "wrong", "unparsed", "right"]
    assert found[0].parts == {"verifier": 1.0, "function": 6.0}
    found = combine({"function": lengths, "model": fails}, {"model": 2.0}, items)
    assert found[0] == Reward(None, "timeout", "model: slow", {"function": 6.0})  # half a sum is no evidence
    assert [(r.value, r.status) for r in found[1:]] == [(4.0, "scored"), (3.0, "scored"), (2.0, "scored")]


def test_none_of_a_function_leaves_the_whole_answer_out() -> None:
    """Also beside a negative reward, of which 0 would be a good one."""
    nothing = lambda items: [Reward(None, "unparsed", "None") for _ in items]  # noqa: E731
    minus = lambda items: [Reward(-1.0, "scored") for _ in items]  # noqa: E731
    found = combine({"function": nothing, "model": minus}, {}, build_items()[:1])
    assert found == [Reward(None, "unparsed", "function: None", {"model": -1.0})]


def test_a_weight_scales_a_single_source() -> None:
    rewards = build_rewarder(RewardSettings(reward_weights={"verifier": 2.0}))(build_items())
    assert [r.value for r in rewards] == [2, 0, 0, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": []}, "give at least one source, each once"),
        ({"reward": ["verifier", "verifier"]}, "give at least one source, each once"),
        ({"reward": "judgement"}, "'verifier'"),
        ({"reward_weights": {"function": 1.0}}, r"reward_weights names \['function'\], which reward \['verifier'\]"),
        ({"reward": "function"}, "reward: function and reward_function=FILE.py:NAME go together"),
        ({"reward_function": "a.py:f"}, "reward: function and reward_function=FILE.py:NAME go together"),
        ({"reward": "function", "reward_function": "a.py"}, "pattern"),
        (
            {"reward": "function", "reward_function": "a.py:f", "partial_reward": 0.1},
            "partial_reward belongs to reward: verifier",
        ),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(RewardSettings, values, "the test")


def test_one_word_is_a_list_of_one() -> None:
    assert RewardSettings.model_validate({"reward": "verifier"}) == RewardSettings()


def test_prompts_keep_their_columns_and_may_lack_answers(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "p", "level": 3}\n{"prompt": "q", "answer": "7", "verifier": "number"}\n')
    prompts = read_prompts(path, judged=False)
    assert prompts[0].fields["level"] == 3
    assert (prompts[0].answer, prompts[0].verifier) == ("", "")
    assert (prompts[1].answer, prompts[1].verifier, prompts[1].columns) == ("7", "number", {})
