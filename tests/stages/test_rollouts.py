"""What all stages share that learn from their own samples: rewards of other kinds, counts, what is kept for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polm.data.readers import Prompt
from polm.errors import DataError, RecipeError
from polm.flywheel.store import compute_key
from polm.rewards.base import Reward
from polm.rewards.reward_model import load_reward_model
from polm.rollout.generate import Completion
from polm.stages import rollouts
from polm.stages.grpo import compute_advantages
from polm.stages.rollout_source import collect_tokens, spread_streams
from polm.stages.rollouts import build_rollout_trees, describe_sample, judge_completions, summarise
from polm.stages.table import STAGES
from polm.tokens import collate

FUNCTION = """
def reward(prompts, completions, level, **columns):
    if SCALE is None:
        raise ValueError("nothing works")
    return [None if len(c) % 5 == 0 else float("nan") if len(c) % 7 == 0 else level[i] + SCALE * len(c)
            for i, c in enumerate(completions)]
"""


@pytest.fixture
def function_settings(artifact: Any, tmp_path: Path) -> Any:
    """Settings and inputs of two updates of GRPO with a function as the reward; prompts have a column of their own."""

    def build(scale: Any, **changes: Any) -> tuple[Any, dict[str, str]]:
        (tmp_path / "mine.py").write_text(f"SCALE = {scale}\n{FUNCTION}")
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        rows = [json.loads(raw) for raw in (artifact("data") / "prompts.jsonl").read_text().splitlines()]
        rows = [{"prompt": row["prompt"], "level": n} for n, row in enumerate(rows)]
        (data / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = artifact.spec("grpo")[1].model_dump()
        given = {"updates": 2, "updates_per_rollout": 1, "kl_beta": 0.0, "reward": "function"}
        given |= {"reward_function": f"{tmp_path / 'mine.py'}:reward", **changes}
        return type(artifact.spec("grpo")[1])(**{**settings, **given}), {**artifact.inputs("grpo"), "data": str(data)}

    return build


def test_a_function_as_the_reward(artifact: Any, function_settings: Any, tmp_path: Path, read_rows: Any) -> None:
    settings, inputs = function_settings(0.01)
    manifest = artifact.run("grpo", settings, inputs, tmp_path / "out")
    ledger = manifest["ledger"]
    assert ledger["samples"] == sum(ledger.get(f"samples_{s}", 0) for s in ("scored", "unparsed", "error")) == 32
    assert "samples_wrong" not in ledger
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    levels = {row["prompt"]: row["level"] for row in read_rows(Path(inputs["data"]) / "prompts.jsonl")}
    for line, row in zip(lines, read_rows(tmp_path / "out" / "samples.jsonl")[::4], strict=True):
        assert line["update"] == row["update"]
        for sample in row["samples"]:
            length = len(sample["text"])
            if length % 5 == 0:  # neither right nor wrong: no reward, no advantage
                assert (sample["status"], sample["judged"]) == ("unparsed", False)
                assert sample["note"] == "the reward function returned None"
                assert sample["advantage"] == 0.0
                assert "reward" not in sample
            elif length % 7 == 0:
                assert (sample["status"], sample["note"]) == ("error", "the reward function returned nan")
                assert sample["advantage"] == 0.0
                assert "reward" not in sample
            else:
                assert sample["reward"] == pytest.approx(levels[row["prompt"]] + 0.01 * length)
    unjudged = ledger.get("samples_error", 0) + ledger["samples_unparsed"]
    assert unjudged == sum(16 * line["rl/unjudged"] for line in lines)
    assert ledger["unparsed_unjudged"] == ledger["samples_unparsed"] > 0
    assert len(read_rows(tmp_path / "out" / "problems.jsonl")) == unjudged
    assert ledger["samples_scored"] > 0
    assert not any(name.startswith("calls") for name in ledger)


MEAN = """
def reward(prompts, completions, **columns):
    return [sum(map(len, completions)) / len(completions)]
"""


@pytest.mark.parametrize(("stage", "calls"), [("grpo", 1), ("remax", 2)])
def test_whole_calls_that_fail_are_named_and_counted(
    stage: str, calls: int, artifact: Any, function_settings: Any, tmp_path: Path, read_rows: Any
) -> None:
    """A function that returns one number for all answers: each answer alone has a reward, and nobody would know. ReMax
    has its greedy answers judged too."""
    settings, inputs = function_settings(0.01)
    (tmp_path / "mine.py").write_text(MEAN)
    if stage == "remax":
        changes = {"updates": 2, "reward": ("function",), "reward_function": settings.reward_function}
        settings = artifact.spec("remax")[1].model_copy(update=changes)
    ledger = artifact.run(stage, settings, inputs, tmp_path / "out")["ledger"]
    assert ledger["samples_scored"] == ledger["samples"] == 32
    assert ledger["calls_error"] == 2 * calls
    problems = read_rows(tmp_path / "out" / "problems.jsonl")
    assert [row["update"] for row in problems] == [1] * calls + [2] * calls
    assert problems[0] == {
        **{"update": 1, "status": "error", "prompt": "", "text": ""},
        "note": "a call for 16 answers failed, and each was judged on its own: the reward function returned 1 rewards "
        "for 16 completions",
    }


MISBEHAVES = """
def reward(prompts, completions, **columns):
    modes = [(len(c) + c.count("e")) % 5 for c in completions]
    while 1 in modes:
        pass
    if 2 in modes:
        raise RuntimeError("no reward")
    return [float("nan") if mode == 3 else 1.0 for mode in modes][: None if 4 not in modes else -1]
"""


def test_a_function_that_hangs_raises_or_miscounts(
    artifact: Any, function_settings: Any, tmp_path: Path, read_rows: Any
) -> None:
    """Each sample is judged on its own in the end, and counted by what happened: none is wrong, none right."""
    settings, inputs = function_settings(0.01, updates=1, batch_limit=1.0, time_limit=0.5)
    (tmp_path / "mine.py").write_text(MISBEHAVES)
    ledger = artifact.run("grpo", settings, inputs, tmp_path / "out")["ledger"]
    rows = read_rows(tmp_path / "out" / "samples.jsonl")
    expected = {0: "scored", 1: "timeout", 2: "error", 3: "error", 4: "error"}
    for sample in (sample for row in rows for sample in row["samples"]):
        mode = (len(sample["text"]) + sample["text"].count("e")) % 5
        assert sample["status"] == expected[mode]
        assert sample.get("reward", 1.0) == 1.0
        if mode:
            assert sample["advantage"] == 0.0
    statuses = {name: number for name, number in ledger.items() if name.startswith("samples_")}
    assert set(statuses) == {"samples_scored", "samples_timeout", "samples_error"}
    assert sum(statuses.values()) == ledger["samples"] == 16
    (call, *problems) = read_rows(tmp_path / "out" / "problems.jsonl")
    assert call["note"].startswith("a call for 16 answers failed, and each was judged on its own: ")
    assert ledger[f"calls_{call['status']}"] == 1
    notes = {row["note"] for row in problems}
    assert notes <= {
        "the reward function took longer than 0.5 s",
        "RuntimeError: no reward",
        "the reward function returned nan",
        "the reward function returned 0 rewards for 1 completions",
    }
    assert len(notes) > 1


def test_a_function_that_never_works_stops_the_run(artifact: Any, function_settings: Any, tmp_path: Path) -> None:
    settings, inputs = function_settings("None")
    with pytest.raises(DataError, match=r"every sample of a rollout timed out or failed .*ValueError: nothing works"):
        artifact.run("grpo", settings, inputs, tmp_path / "out")


def test_the_verifier_and_a_function_together(
    artifact: Any, function_settings: Any, tmp_path: Path, read_rows: Any
) -> None:
    """Prompts need answers then, and each source has its curve."""
    settings, inputs = function_settings(
        0.01, reward=("verifier", "function"), reward_weights={"function": 0.1}, updates=1
    )
    with pytest.raises(DataError, match="answer"):
        artifact.run("grpo", settings, inputs, tmp_path / "no-answers")
    rows = [{**json.loads(raw), "level": 1.0} for raw in (artifact("data") / "prompts.jsonl").read_text().splitlines()]
    Path(inputs["data"], "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifact.run("grpo", settings, inputs, tmp_path / "out")
    line = read_rows(tmp_path / "out" / "metrics.jsonl")[0]
    assert 0.0 < line["reward/verifier"] <= 1.0  # even numbers of characters are right here
    assert 0.0 < line["reward/function"] < 2.0
    assert line["rl/right"] > 0.0


@pytest.mark.parametrize("stage", ["reinforce_pp", "remax"])
def test_the_reward_rises(stage: str, artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    """Even lengths of the text are right here: twenty-five updates learn to write them."""
    changes = {"updates": 25, "kl_beta": 0.0, "prompts_per_rollout": 16}
    settings = artifact.spec(stage)[1].model_copy(update=changes)
    inputs = {**artifact.inputs(stage), "base": str(artifact("sft"))}
    artifact.run(stage, settings, inputs, tmp_path / "out")
    rewards = [line["rl/reward"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


def test_the_function_s_text_is_a_part_of_the_key(function_settings: Any) -> None:
    keys = [compute_key(STAGES["grpo"], function_settings(scale)[0], {}) for scale in ("0.01", "0.01", "0.02")]
    assert keys[0] == keys[1] != keys[2]


def test_a_reward_model_as_the_reward(
    artifact: Any, tmp_path: Path, read_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewards in samples.jsonl are the model's scores of the tokens that the policy wrote."""
    inputs = {**artifact.inputs("rloo"), "reward_model": str(artifact("reward_model"))}
    changes = {"updates": 1, "updates_per_rollout": 1, "reward": ("model",)}
    settings = artifact.spec("rloo")[1].model_copy(update=changes)
    seen: list[tuple[Any, Any]] = []

    def load(*given: Any, **more: Any) -> Any:
        judge = load_reward_model(*given, **more)
        assert judge.same_tokens
        return lambda items: seen.append((items, judge(items))) or seen[-1][1]

    monkeypatch.setattr(rollouts, "load_reward_model", load)
    manifest = artifact.run("rloo", settings, inputs, tmp_path / "out")
    assert manifest["ledger"]["samples_scored"] == manifest["ledger"]["samples"] == 16
    [(items, rewards)] = seen
    shown = [sample["reward"] for row in read_rows(tmp_path / "out" / "samples.jsonl") for sample in row["samples"]]
    assert shown == pytest.approx([reward.value for reward in rewards], abs=1e-4)
    assert len(set(shown)) > 8
    assert all(0 < len(item.completion_tokens) <= 8 for item in items)
    without = {role: value for role, value in inputs.items() if role != "reward_model"}
    with pytest.raises(RecipeError, match=r"reward is model and the input reward_model is not given"):
        artifact.run("rloo", settings, without, tmp_path / "a")
    with pytest.raises(RecipeError, match=r"reward is verifier and the input reward_model is /"):
        artifact.run("rloo", artifact.spec("rloo")[1], inputs, tmp_path / "b")


# ---- in numbers ----------------------------------------------------------------------------------------------------


def complete(prompt: int, tokens: list[int]) -> Completion:
    return Completion(prompt, 0, np.array(tokens), -np.arange(1, len(tokens) + 1, dtype=np.float32), "stop", "x")


SAMPLES = [complete(0, [4, 5]), complete(0, [6]), complete(1, [7, 8, 9]), complete(1, [8]), complete(1, [9])]
REWARDS = [
    Reward(0.5, "scored", parts={"a": 0.5}),
    Reward(None, "timeout", "slow"),
    Reward(-2.0, "scored", parts={"a": -1.0, "b": 2.0}),
    Reward(0.0, "unparsed"),
    Reward(1.5, "scored"),
]


def test_a_rollout_with_scores_in_numbers() -> None:
    """The mean is over what was judged: a missing reward is not zero."""
    found = summarise(SAMPLES, REWARDS)
    assert found["rl/reward"] == pytest.approx((0.5 - 2.0 + 0.0 + 1.5) / 4)
    assert (found["rl/unparsed"], found["rl/unjudged"], found["rl/right"]) == (1 / 5, 1 / 5, 0.0)
    assert (found["reward/a"], found["reward/b"]) == (-0.25, 2.0)
    assert found["rl/equal_groups"] == 0.5  # group 0 has a single judged sample
    assert found["count/samples_timeout"] == 1
    assert "count/unparsed_unjudged" not in found


def test_none_of_a_function_is_no_reward() -> None:
    """Among negative rewards 0 would be the best one."""
    rewards = [Reward(-1.0, "scored"), Reward(None, "unparsed", "None"), *(Reward(-2.0, "scored") for _ in range(3))]
    found = summarise(SAMPLES, rewards)
    assert found["rl/reward"] == -7 / 4
    assert (found["rl/unparsed"], found["rl/unjudged"], found["count/unparsed_unjudged"]) == (1 / 5, 1 / 5, 1)
    assert compute_advantages(SAMPLES, rewards, 2, "none").tolist() == [0.0, 0.0, 0.0, 0.0, 0.0]
    shown = describe_sample(SAMPLES[1], rewards[1], {})
    assert shown == {"text": "x", "status": "unparsed", "note": "None", "judged": False}


def test_tokens_of_a_rollout_there_and_back() -> None:
    trees = build_rollout_trees([np.array([1, 2]), np.array([3])], SAMPLES, REWARDS)
    packed = [[collate(trees[:1])], [], [collate(trees[1:])]]
    tokens = collect_tokens(packed)
    assert tokens.completions_N.tolist() == [0, 0, 2, 2, 2, 3, 4]
    assert tokens.sampler_logprobs_N.tolist() == [-1, -2, -1, -2, -3, -1, -1]
    assert tokens.ref_logprobs_N is None
    spread = spread_streams(packed, {"mine": torch.arange(7.0) + 1})
    assert [[b.streams["mine"].tolist() for b in part] for part in spread] == [
        [[0, 0, 1, 2]],
        [],
        [[0, 3, 4, 5, 6, 7]],
    ]


def test_what_is_shown_of_a_sample() -> None:
    assert describe_sample(SAMPLES[0], Reward(1.0, "right"), {"advantage": 0.25}) == {
        "text": "x",
        "status": "right",
        "advantage": 0.25,
    }
    assert describe_sample(SAMPLES[0], REWARDS[0], {}) == {"text": "x", "status": "scored", "reward": 0.5}
    assert describe_sample(SAMPLES[0], REWARDS[1], {}) == {"text": "x", "status": "timeout", "note": "slow"}


def test_what_a_rewarder_is_told() -> None:
    seen: list[Any] = []

    def rewarder(items: Any) -> list[Reward]:
        seen.extend(items)
        return REWARDS

    prompts = [Prompt("p", "1", "exact", columns={"level": 2}), Prompt("q", "2", "exact")]
    encoded = [np.array([1, 2]), np.array([3])]
    assert judge_completions(rewarder, prompts, encoded, SAMPLES) == REWARDS
    assert [item.fields["prompt"] for item in seen] == ["p", "p", "q", "q", "q"]
    assert seen[0].fields["level"] == 2
    assert seen[2].messages == [{"role": "user", "content": "q"}]
    assert seen[2].prompt_tokens.tolist() == [3]
    assert seen[2].completion_tokens.tolist() == [7, 8, 9]
