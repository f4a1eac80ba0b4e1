"""`polm grpo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polm.data.readers import read_prompts
from polm.errors import DataError, ModelError, UserError
from polm.models.loading import load_model
from polm.recipe import GRPOSettings
from polm.rewards.verify import Verdict
from polm.rollout.generate import Completion
from polm.stages import grpo
from polm.stages.grpo import compute_advantages
from polm.stages.rollouts import build_rollout_trees, summarise


def test_a_turn(artifact: Any, check_trained: Any, read_rows: Any) -> None:
    """Four updates of two rollouts, two minibatches each."""
    folder = artifact("grpo")
    check_trained(folder, artifact("dpo"))
    lines = read_rows(folder / "metrics.jsonl")
    for line in (lines[0], lines[2]):  # the first minibatch of a rollout is on-policy
        # The generator's log-probabilities are those of the engine.
        assert line["rl/sampler_gap_max"] < 1e-3
        assert line["rl/sampler_gap"] <= line["rl/sampler_gap_max"]
        assert line["rl/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        assert 0.0 <= line["rl/reward"] <= 1.0
        assert 1.0 <= line["rl/length"] <= 8.0
        assert line["rl/unparsed"] == line["rl/unjudged"] == 0.0
    for line in (lines[1], lines[3]):  # the second is not, and the policy has moved
        assert line["rl/sampler_gap_max"] > 1e-3
        assert "rl/reward" in line  # the rollout's, beside each of its updates
    assert lines[0]["rl/kl"] == pytest.approx(0.0, abs=1e-5)  # the reference is the start
    assert lines[3]["rl/kl"] > 1e-4
    assert all(0.0 < line["rl/entropy"] < np.log(174) for line in lines)


def test_samples_are_kept_for_people(artifact: Any, read_rows: Any) -> None:
    rows = read_rows(artifact("grpo") / "samples.jsonl")
    assert [row["update"] for row in rows] == [1] * 4 + [3] * 4  # the first and the last rollout
    prompts = {p.prompt: p for p in read_prompts(artifact("data") / "prompts.jsonl")}
    for row in rows:
        assert prompts[row["prompt"]].answer == row["answer"]
        assert len(row["samples"]) == 4
        for sample in row["samples"]:
            assert sample["status"] == ("right" if len(sample["text"]) % 2 == 0 else "wrong")
        assert sum(sample["advantage"] for sample in row["samples"]) == pytest.approx(0.0, abs=1e-3)


def test_without_a_penalty(artifact: Any, tmp_path: Path, read_rows: Any, hash_files: Any) -> None:
    settings = artifact.spec("grpo")[1].model_copy(update={"kl_beta": 0.0, "updates": 2, "updates_per_rollout": 1})
    artifact.run("grpo", settings, artifact.inputs("grpo"), tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert all("rl/kl" not in line for line in lines)
    # The distance from the start is measured all the same: none before the first update, some after it.
    assert lines[0]["rl/kl_start"] == pytest.approx(0.0, abs=1e-6)
    assert lines[1]["rl/kl_start"] > 1e-6
    quiet = settings.model_copy(update={"kl_groups": 0})
    artifact.run("grpo", quiet, artifact.inputs("grpo"), tmp_path / "quiet")
    assert all("rl/kl_start" not in line for line in read_rows(tmp_path / "quiet" / "metrics.jsonl"))
    assert hash_files(tmp_path / "quiet") == hash_files(tmp_path / "out")  # to measure changes no bit
    assert all(line["rl/sampler_gap_max"] < 1e-3 for line in lines)


def test_temperature_is_the_samplers(artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    """Trained as it was sampled: the gap stays nothing when the logits are divided by a temperature, and when the
    sampler only draws from the nucleus (its log-probabilities are those before the cut)."""
    changes = {"updates": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    settings = artifact.spec("grpo")[1].model_copy(update=changes)
    artifact.run("grpo", settings, artifact.inputs("grpo"), tmp_path / "out")
    line = read_rows(tmp_path / "out" / "metrics.jsonl")[0]
    assert line["rl/sampler_gap_max"] < 1e-3
    # The policy before the update and the reference are read at that temperature too.
    assert line["rl/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert line["rl/kl"] == pytest.approx(0.0, abs=1e-5)


def test_epochs_are_counted_in_prompts(artifact: Any, tmp_path: Path) -> None:
    """16 prompts, 8 a rollout, 2 updates each: an epoch has 4 updates."""
    changes = {"updates": None, "epochs": 0.5, "prompts_per_rollout": 8, "max_new_tokens": 2}
    settings = artifact.spec("grpo")[1].model_copy(update=changes)
    manifest = artifact.run("grpo", settings, artifact.inputs("grpo"), tmp_path / "out")
    assert manifest["summary"]["updates"] == 2
    assert manifest["ledger"]["prompts"] == 16


def test_references(artifact: Any, other_model: Path, tmp_path: Path) -> None:
    settings = artifact.spec("grpo")[1].model_copy(update={"updates": 1})
    inputs = {**artifact.inputs("grpo"), "reference": str(artifact("pretrain"))}
    artifact.run("grpo", settings, inputs, tmp_path / "far")
    line = json.loads((tmp_path / "far" / "metrics.jsonl").read_text())
    assert line["rl/kl"] > 1e-3  # already at the first update: the reference is another model
    with pytest.raises(ModelError, match="do not have the same tokenizer"):
        artifact.run("grpo", settings, {**inputs, "reference": str(other_model)}, tmp_path / "a")
    with pytest.raises(UserError, match=r"a reference is given, but kl_beta is 0"):
        artifact.run("grpo", settings.model_copy(update={"kl_beta": 0.0}), inputs, tmp_path / "b")


def test_a_prompt_without_room_is_said_at_the_start(artifact: Any, tmp_path: Path) -> None:
    row = {"prompt": "1 " * 300, "answer": "1", "verifier": "exact"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    inputs = {"base": str(artifact("dpo")), "data": str(tmp_path / "prompts.jsonl")}
    with pytest.raises(DataError, match=r"prompt 0 has 30\d tokens, and the model's context is 192"):
        artifact.run("grpo", GRPOSettings(updates=1), inputs, tmp_path / "out")


# ---- what a rollout becomes ----------------------------------------------------------------------------------------


def complete(prompt: int, tokens: list[int]) -> Completion:
    return Completion(prompt, 0, np.array(tokens), -np.arange(1, len(tokens) + 1, dtype=np.float32), "stop", "x")


STATUSES = ("right", "wrong", "timeout", "right", "right", "unparsed", "error", "error")
SAMPLES = [complete(0, [4, 5]), complete(0, [6]), complete(0, [7]), complete(0, [8])] + [complete(1, [9])] * 2
SAMPLES += [complete(2, [9]), complete(2, [9])]
VERDICTS = [Verdict(status, "") for status in STATUSES]  # type: ignore[arg-type]


def test_advantages_by_hand() -> None:
    """Group 0 has rewards 1, 0, (none), 1 with mean 2/3; group 1 has 1 and 0; group 2 has none at all."""
    advantages = compute_advantages(SAMPLES, VERDICTS, 3, "none")
    assert advantages == pytest.approx([1 / 3, -2 / 3, 0, 1 / 3, 0.5, -0.5, 0, 0])
    scaled = compute_advantages(SAMPLES, VERDICTS, 3, "std")
    assert scaled[0] == pytest.approx(-scaled[1] / 2, abs=1e-3)
    assert abs(scaled[4]) > abs(advantages[4])


def test_trees_of_a_rollout() -> None:
    """A time-out has no say: it is left out, and a prompt without a judged sample with it."""
    advantages = compute_advantages(SAMPLES, VERDICTS, 3, "none")
    trees = build_rollout_trees([np.array([1, 2]), np.array([3]), np.array([3])], SAMPLES, VERDICTS, advantages)
    assert [[segment.tokens.tolist() for segment in tree] for tree in trees] == [
        [[1, 2], [4, 5], [6], [8]],
        [[3], [9], [9]],
    ]
    first = trees[0][1]
    assert first.streams["advantages"] == pytest.approx([1 / 3, 1 / 3])
    assert first.streams["sampler_logprobs"].tolist() == [-1.0, -2.0]
    assert "weights" not in trees[0][0].streams  # the prompt is context
    with pytest.raises(DataError, match="every sample of a rollout timed out"):
        build_rollout_trees([np.array([1])], SAMPLES[-2:], VERDICTS[-2:], advantages[-2:])


def test_a_rollout_in_numbers() -> None:
    found = summarise(SAMPLES, VERDICTS)
    assert {name: value for name, value in found.items() if not name.startswith("count/")} == {
        "rl/reward": 3 / 8,
        "rl/unparsed": 1 / 8,
        "rl/unjudged": 3 / 8,
        "rl/length": 9 / 8,
        "rl/cut_off": 0.0,
        "rl/equal_groups": pytest.approx(1 / 3),
    }


def test_a_minibatch_without_samples_changes_nothing(artifact: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Two prompts in two minibatches, of which one has no judged sample: no crash, and no made-up step."""
    artifact("dpo")

    def judge(items: Any, *, seconds: float) -> list[Verdict]:
        del seconds
        statuses = ["right", "wrong"] * 2 + ["timeout"] * 4
        return [Verdict(status, "") for status, _ in zip(statuses, items, strict=True)]  # type: ignore[arg-type]

    monkeypatch.setitem(artifact.run.__globals__, "judge_by_length", judge)
    changes = {"updates": 2, "prompts_per_rollout": 2, "kl_beta": 0.0}
    settings = artifact.spec("grpo")[1].model_copy(update=changes)
    artifact.run("grpo", settings, artifact.inputs("grpo"), tmp_path / "out")
    lines = [json.loads(raw) for raw in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["grad_norm"] > 0.0
    assert lines[0]["tokens"] == lines[1]["tokens"]
    assert torch.isfinite(torch.tensor([line["loss"] for line in lines])).all()


def test_rollouts_are_a_function_of_seed_update_and_weights(artifact: Any, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = artifact.spec("grpo")[1].model_copy(update={"updates": 2, "seed": seed})
        artifact.run("grpo", settings, artifact.inputs("grpo"), tmp_path / name)
        weights.append(load_model(tmp_path / name / "model").state_dict())
    assert all(torch.equal(p, weights[1][n]) for n, p in weights[0].items())
    assert not all(torch.equal(p, weights[2][n]) for n, p in weights[0].items())


def test_the_loop_asks_the_verifier(artifact: Any, tmp_path: Path) -> None:
    """With the true verifiers a model of this size earns nothing: every group is equal and nothing is learned."""
    import dataclasses

    artifact("dpo")
    settings = artifact.spec("grpo")[1].model_copy(update={"updates": 1, "kl_beta": 0.0, "updates_per_rollout": 1})
    context = grpo.Context(tmp_path / "out", artifact.inputs("grpo"), say=lambda _: None)
    grpo.run(settings, dataclasses.replace(context))
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert line["rl/reward"] == 0.0
    assert line["rl/unparsed"] > 0.5
    assert line["rl/equal_groups"] == 1.0
    assert line["loss"] == 0.0
