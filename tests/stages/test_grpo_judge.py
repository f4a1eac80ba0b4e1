"""`polm grpo reward=judge`: direct RLAIF."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from polm.config import find_recipe, load_settings, validate
from polm.data.readers import write_jsonl
from polm.errors import RecipeError, UserError
from polm.models.loading import load_model
from polm.recipe import GRPOSettings
from polm.stages.table import STAGES

SMALL: dict[str, Any] = {
    **{"bin_tokens": 192, "precision": "fp32", "prompts_per_rollout": 4, "samples": 4, "max_new_tokens": 8},
    **{"optimizer": {"kind": "muon", "learning_rate": 0.02, "embedding_learning_rate": 0.01}, "updates": 3},
}


def build(server: Any, **changes: Any) -> GRPOSettings:
    endpoint = {"url": server.url, "model": "m", "retries": 0, "first_wait_seconds": 0.0}
    judging = {"verdict": "text", "score_prompt": "{question}|{answer}", "endpoint": endpoint, "grade_range": "signed"}
    return validate(GRPOSettings, {**SMALL, "reward": "judge", "judging": judging, **changes}, "x")


@pytest.fixture
def prompts(artifact: Any, tmp_path: Path) -> Path:
    """Questions without answers: nothing but the judge says what is good."""
    rows = [json.loads(line) for line in (artifact("data") / "prompts.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "in" / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    return tmp_path / "in"


def grade(text: str) -> int:
    return 1 + len(text) % 5


def reply(body: dict[str, Any], _: int) -> str:
    return f"[[{grade(body['messages'][0]['content'].partition('|')[2])}]]"


def test_grades_are_the_reward(artifact: Any, chat_server: Any, prompts: Path, read_rows: Any, tmp_path: Path) -> None:
    inputs = {"base": str(artifact("sft")), "data": str(prompts)}
    server = chat_server(reply)
    artifact.run("grpo", build(server), inputs, tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert all(-1 <= line["rl/reward"] <= 1 and line["rl/unjudged"] == 0 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        for sample in row["samples"]:
            assert sample.get("reward", 0.0) == (grade(sample["text"]) - 3) / 2
            assert (sample["status"], sample["note"]) == ("scored", f"{grade(sample['text'])} of 5")
        best, worst = (f(row["samples"], key=lambda s: grade(s["text"])) for f in (max, min))
        assert best["advantage"] >= worst["advantage"]


def test_a_judge_that_fails_says_nothing_about_an_answer(
    artifact: Any, chat_server: Any, prompts: Path, read_rows: Any, tmp_path: Path
) -> None:
    def flaky(body: dict[str, Any], number: int) -> Any:
        text = body["messages"][0]["content"].partition("|")[2]
        return (500, {}, b"down") if len(text) % 5 == 0 else "hm" if len(text) % 5 == 1 else reply(body, number)

    inputs = {"base": str(artifact("sft")), "data": str(prompts)}
    artifact.run("grpo", build(chat_server(flaky)), inputs, tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    statuses: dict[str, int] = {}
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        for sample in row["samples"]:
            statuses[sample["status"]] = statuses.get(sample["status"], 0) + 1
            if sample["status"] != "scored":
                assert sample["advantage"] == 0
                assert "reward" not in sample
    assert {"scored", "error", "nonsense"} <= set(statuses)
    assert sum(line["rl/unjudged"] for line in lines) > 0
    problems = read_rows(tmp_path / "out" / "problems.jsonl")
    assert {problem["note"] for problem in problems} == {"status 500: down", "no verdict in: hm"}


def test_a_killed_run_asks_nothing_twice(
    artifact: Any, chat_server: Any, prompts: Path, hash_files: Any, tmp_path: Path
) -> None:
    """A judge that changes its mind: what it said before the kill still holds."""
    inputs = {"base": str(artifact("sft")), "data": str(prompts)}
    steady = chat_server(reply)
    artifact.run("grpo", build(steady, checkpoint_every=1), inputs, tmp_path / "whole" / "out")

    fickle = chat_server(lambda body, number: (401, {}, b"out") if number >= 30 else reply(body, number))
    settings = build(fickle, checkpoint_every=1)
    with pytest.raises(UserError, match="refuses the model"):
        artifact.run("grpo", settings, inputs, tmp_path / "cut" / "out")
    kept = len(list((tmp_path / "cut" / ".replies").rglob("*.json")))
    assert 20 <= kept <= 30
    again = chat_server(reply)
    manifest = artifact.run("grpo", build(again, checkpoint_every=1), inputs, tmp_path / "cut" / "out")
    assert len(again.bodies) + kept == len(steady.bodies)
    assert hash_files(tmp_path / "cut" / "out") == hash_files(tmp_path / "whole" / "out")
    assert manifest["summary"]["updates"] == 3


def test_a_local_judge_grades_by_expected_value(
    artifact: Any, build_tiny: Any, byte_tokenizer: Any, prompts: Path, read_rows: Any, tmp_path: Path
) -> None:
    from polm.models.loading import save_model

    save_model(build_tiny(len(byte_tokenizer), max_positions=512), byte_tokenizer, tmp_path / "judge")
    judging = {"score_prompt": "{question}|{answer}", "scale": [1, 10], "grade_range": "signed"}
    settings = validate(GRPOSettings, {**SMALL, "reward": "judge", "judging": judging, "updates": 2}, "x")
    inputs = {"base": str(artifact("sft")), "data": str(prompts), "judge": str(tmp_path / "judge")}
    artifact.run("grpo", settings, inputs, tmp_path / "out")
    rewards = [s["reward"] for row in read_rows(tmp_path / "out" / "samples.jsonl") for s in row["samples"]]
    assert len({round(reward, 3) for reward in rewards}) > 4  # expected values, not whole grades
    assert all(-1 < reward < 1 for reward in rewards)
    assert not (tmp_path / ".replies").exists()


@pytest.mark.parametrize("stage", ["rloo", "reinforce_pp", "remax", "ppo"])
def test_every_stage_of_rl_takes_a_judge(
    stage: str, artifact: Any, chat_server: Any, prompts: Path, read_rows: Any, tmp_path: Path
) -> None:
    spec = STAGES[stage]
    assert "judge" in spec.optional_inputs
    server = chat_server(reply)
    judging = {"verdict": "text", "score_prompt": "{question}|{answer}"}
    judging |= {"endpoint": {"url": server.url, "model": "m", "retries": 0}}
    settings = validate(spec.settings, {**SMALL, "updates": 1, "reward": "judge", "judging": judging}, "x")
    inputs = {"base": str(artifact("sft")), "data": str(prompts)}
    ledger = artifact.run(stage, settings, inputs, tmp_path / "out")["ledger"]
    (line,) = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert 0 <= line["rl/reward"] <= 1
    assert ledger["samples_scored"] == ledger["samples"] == 16
    greedy = 4 if stage == "remax" else 0  # its baselines are judged too; equal answers are asked about once
    assert 4 < len(server.bodies) == len(list((tmp_path / ".replies").rglob("*.json"))) <= 16 + greedy


def test_with_a_verifier_beside_it(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    settings = build(chat_server(reply), reward=["verifier", "judge"], reward_weights={"judge": 0.5}, updates=1)
    inputs = {"base": str(artifact("sft")), "data": str(artifact("data"))}
    artifact.run("grpo", settings, inputs, tmp_path / "out")
    (line,) = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert line["rl/reward"] == pytest.approx(line["reward/verifier"] + 0.5 * line["reward/judge"], abs=1e-6)


def test_the_shipped_recipe_runs(
    artifact: Any, build_tiny: Any, byte_tokenizer: Any, prompts: Path, tmp_path: Path
) -> None:
    from polm.models.loading import save_model

    save_model(build_tiny(len(byte_tokenizer), max_positions=2048), byte_tokenizer, tmp_path / "judge")
    words = ["updates=2", "prompts_per_rollout=2", "samples=2", "max_new_tokens=8", "bin_tokens=192", "precision=fp32"]
    words += ["optimizer.learning_rate=0.01", "checkpoint_every=0"]
    settings = load_settings(GRPOSettings, find_recipe("grpo/judge"), words, section="grpo")
    inputs = {"base": str(artifact("sft")), "data": str(prompts), "judge": str(tmp_path / "judge")}
    manifest = artifact.run("grpo", settings, inputs, tmp_path / "out")
    assert math.isfinite(manifest["summary"]["last/rl/reward"])
    before = load_model(artifact("sft") / "model").state_dict()
    after = load_model(tmp_path / "out" / "model").state_dict()
    assert any(not (p == before[name]).all() for name, p in after.items())


def test_mistakes(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="judging belongs to reward: judge"):
        validate(GRPOSettings, {"judging": {}}, "x")
    assert validate(GRPOSettings, {"reward": "judge"}, "x").judging is not None
    assert GRPOSettings().judging is None
    inputs = {"base": str(artifact("sft")), "data": str(artifact("data"))}
    with pytest.raises(RecipeError, match="give judge=MODEL"):
        artifact.run("grpo", validate(GRPOSettings, {**SMALL, "reward": "judge"}, "x"), inputs, tmp_path / "out")
    with pytest.raises(UserError, match=r"judge=.* is given, and reward \['verifier'\] has no judge"):
        artifact.run("grpo", GRPOSettings(**SMALL), {**inputs, "judge": str(artifact("sft"))}, tmp_path / "out")
