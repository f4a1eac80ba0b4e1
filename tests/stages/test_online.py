"""`polm online`: fresh preferences by each method, what is counted, and that a stopped run goes on to the same bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polm.config import find_recipe, load_settings, recipe_folder
from polm.data.readers import Prompt
from polm.engine.score import score
from polm.errors import ModelError, RecipeError
from polm.models.loading import load_model, save_model
from polm.recipe_online import ONLINE_KNOBS, OnlineSettings, RejectionSettings
from polm.rewards import sources
from polm.rewards.base import Reward
from polm.rewards.verify import Verdict
from polm.rollout.generate import Completion
from polm.stages import online
from polm.stages.common import Context, Frozen, load_base, new_ledger
from polm.stages.online import (
    Match,
    build_answer_trees,
    build_pair_trees,
    find_matches,
    measure,
    merge_completions,
)
from polm.stages.rollouts import Rollout, build_sampler

SMALL: dict[str, Any] = {
    "bin_tokens": 192,
    "precision": "fp32",
    "prompts_per_rollout": 6,
    "samples": 4,
    "max_new_tokens": 8,
    "temperature": 1.5,
}


@pytest.mark.parametrize("method", sorted(ONLINE_KNOBS))
def test_a_turn(method: str, artifact: Any, check_trained: Any, read_rows: Any, tmp_path: Path) -> None:
    """At first the policy is the reference; then it moves, and the numbers of its comparisons add up."""
    settings = OnlineSettings(**SMALL, method=method, updates=3, optimizer={"learning_rate": 0.003})
    manifest = artifact.run("online", settings, artifact.inputs("online"), tmp_path / "out")
    check_trained(tmp_path / "out", artifact("sft"))
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    start = "nash/log_ratio" if method == "nash_md" else "dpo/margin"
    assert lines[0][start] == pytest.approx(0.0, abs=1e-4)
    assert abs(lines[-1][start]) > 1e-4
    assert lines[0]["grad_norm"] > 0
    if method == "dpo":
        assert lines[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-5)
        assert "online/win_rate" not in lines[0]
    else:
        assert all(0.0 <= line["online/win_rate"] <= 1.0 for line in lines)
        assert all(0.0 <= line["online/other_reward"] <= 1.0 for line in lines)
    ledger = manifest["ledger"]
    per_update = 6 if method == "dpo" else 12
    assert ledger["online_matches"] == 3 * per_update
    assert ledger["samples"] == 3 * 6 * (4 if method == "dpo" else 2)  # the policy's own
    shares = [line["online/ties"] for line in lines]
    assert ledger["online_ties"] == pytest.approx(sum(shares) * per_update)


@pytest.mark.parametrize(
    ("changes", "is_logged"),
    [
        *(({"method": method, "temperature": 1.0}, True) for method in sorted(ONLINE_KNOBS)),
        ({"method": "nash_md"}, True),
        ({"method": "dpo"}, False),  # sampled at 1.5, learned at 1
        ({"method": "xpo"}, False),
        ({"method": "dpo", "temperature": 1.0, "mixture": 0.5}, False),  # drawn by policy and reference together
    ],
)
def test_the_generators_logprobs_are_the_trainers(
    changes: dict[str, Any], is_logged: bool, artifact: Any, read_rows: Any, tmp_path: Path
) -> None:
    settings = OnlineSettings(**{**SMALL, **changes}, updates=3, optimizer={"learning_rate": 0.003})
    artifact.run("online", settings, artifact.inputs("online"), tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert all(("rl/sampler_gap" in line) == is_logged for line in lines)
    if is_logged:
        assert all(0.0 <= line["rl/sampler_gap"] <= line["rl/sampler_gap_max"] < 1e-3 for line in lines)


def test_samples_are_kept_for_people(artifact: Any, read_rows: Any) -> None:
    rows = read_rows(artifact("online") / "samples.jsonl")
    assert [row["update"] for row in rows] == [1] * 4 + [2] + [3] * 4
    for row in rows:
        assert [sample["status"] for sample in row["samples"]] == [
            "right" if len(sample["text"]) % 2 == 0 else "wrong" for sample in row["samples"]
        ]
        assert len(row["samples"]) == 4


@pytest.mark.parametrize("method", sorted(ONLINE_KNOBS))
def test_learning_raises_the_reward(method: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """An answer is right when its text has an even number of characters, and in 40 updates the policy finds out."""
    changes = {"prompts_per_rollout": 16, "max_new_tokens": 3, "optimizer": {"learning_rate": 0.01}}
    changes["samples"] = 8 if method == "nash_md" else 4  # a policy gradient needs more of them
    settings = OnlineSettings(**{**SMALL, **changes}, method=method, updates=40, beta=0.02)
    artifact.run("online", settings, artifact.inputs("online"), tmp_path / "out")
    rewards = [line["rl/reward"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15


@pytest.mark.parametrize("method", sorted(ONLINE_KNOBS))
def test_a_stopped_run_goes_on_to_the_same_bits(
    method: str, artifact: Any, hash_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "verify_many", judge_by_length)
    settings = OnlineSettings(**SMALL, method=method, updates=4, checkpoint_every=2)
    quiet = {"inputs": artifact.inputs("online"), "say": lambda _: None}

    def stop(line: Mapping[str, Any]) -> None:
        if line["update"] == 3:
            raise InterruptedError

    online.run(settings, Context(tmp_path / "whole", **quiet))
    with pytest.raises(InterruptedError):
        online.run(settings, Context(tmp_path / "parts", report=stop, **quiet))
    seen: list[int] = []
    online.run(settings, Context(tmp_path / "parts", report=lambda line: seen.append(line["update"]), **quiet))
    assert seen == [3, 4]
    assert hash_files(tmp_path / "parts") == hash_files(tmp_path / "whole")
    names = ("samples.jsonl",)
    assert [(tmp_path / "parts" / n).read_text() for n in names] == [
        (tmp_path / "whole" / n).read_text() for n in names
    ]


def judge_by_length(items: Any, *, seconds: float) -> list[Verdict]:
    del seconds
    return [Verdict("right" if len(item.completion) % 2 == 0 else "wrong", "") for item in items]


def test_ipo_md_draws_from_the_mixture(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """All answers come from the mixture: with a share of 1 they are the reference's, whatever the policy is."""
    inputs = {**artifact.inputs("online"), "reference": str(artifact("midtrain"))}
    texts: dict[str, list[str]] = {}
    for name, mixture, base in (
        ("policy", 0.0, "sft"),
        ("half", 0.5, "sft"),
        ("a", 1.0, "sft"),
        ("b", 1.0, "pretrain"),
    ):
        settings = OnlineSettings(**SMALL, loss="ipo", mixture=mixture, updates=1)
        artifact.run("online", settings, {**inputs, "base": str(artifact(base))}, tmp_path / name)
        rows = read_rows(tmp_path / name / "samples.jsonl")
        texts[name] = [sample["text"] for row in rows for sample in row["samples"]]
    assert texts["a"] == texts["b"]
    assert len({str(texts[name]) for name in ("policy", "half", "a")}) == 3


def test_a_reference_of_its_own(artifact: Any, other_model: Path, read_rows: Any, tmp_path: Path) -> None:
    settings = OnlineSettings(**SMALL, method="nash_md", updates=1)
    inputs = {**artifact.inputs("online"), "reference": str(artifact("pretrain"))}
    artifact.run("online", settings, inputs, tmp_path / "far")
    assert read_rows(tmp_path / "far" / "metrics.jsonl")[0]["nash/log_ratio"] > 0.1
    with pytest.raises(ModelError, match="do not have the same tokenizer"):
        artifact.run("online", settings, {**inputs, "reference": str(other_model)}, tmp_path / "a")


def test_updates_without_a_preference_change_nothing(
    artifact: Any, read_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All right, or none judged: no pair, no step, and it is counted."""
    before = load_model(artifact("sft") / "model").state_dict()
    for status, name in (("right", "ties"), ("timeout", "unjudged")):

        def judge(items: Any, *, seconds: float, status: str = status) -> list[Verdict]:
            del seconds
            return [Verdict(status, "") for _ in items]  # type: ignore[arg-type]

        monkeypatch.setitem(artifact.run.__globals__, "judge_by_length", judge)
        for method in ("dpo", "xpo"):
            settings = OnlineSettings(**SMALL, method=method, updates=2)
            out = tmp_path / f"{name}-{method}"
            manifest = artifact.run("online", settings, artifact.inputs("online"), out)
            lines = read_rows(out / "metrics.jsonl")
            assert [line[f"online/{name}"] for line in lines] == [1.0, 1.0]
            assert [line["grad_norm"] for line in lines] == [0.0, 0.0]
            assert manifest["ledger"][f"online_{name}"] == manifest["ledger"]["online_matches"] > 0
            after = load_model(out / "model").state_dict()
            assert all(torch.equal(p, before[n]) for n, p in after.items())


def test_the_other_side_draws_numbers_of_its_own(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """At first policy, reference and mixture are one model: with the same numbers they would say the same."""
    for method in ("xpo", "nash_md"):
        settings = OnlineSettings(**{**SMALL, "temperature": 1.0}, method=method, updates=1)
        artifact.run("online", settings, artifact.inputs("online"), tmp_path / method)
        rows = read_rows(tmp_path / method / "samples.jsonl")
        assert all([sample["own"] for sample in row["samples"]] == [1.0, 1.0, 0.0, 0.0] for row in rows)
        groups = [[s["text"] for s in row["samples"]] for row in read_rows(tmp_path / method / "samples.jsonl")]
        assert any(texts[:2] != texts[2:] for texts in groups)


# ---- who judges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(ONLINE_KNOBS))
def test_a_judge_compares(method: str, artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    """Online AI feedback: each match is judged in both orders, nothing is graded; a run asked again asks nothing."""

    def prefer_longer(body: dict[str, Any], _: int) -> str:
        _, a, b = body["messages"][0]["content"].split("|")
        return "[[C]]" if len(a) == len(b) else f"[[{'A' if len(a) > len(b) else 'B'}]]"

    server = chat_server(prefer_longer)
    judging = {"verdict": "text", "endpoint": {"url": server.url, "model": "m"}}
    judging |= {"pair_prompt": "{question}|{answer_a}|{answer_b}", "score_prompt": "{question}|{answer}"}
    changes = {"samples": 2 if method == "dpo" else 4, "method": method, "reward": "judge", "compare": "judge"}
    settings = OnlineSettings(**{**SMALL, **changes}, judging=judging, updates=1)
    manifest = artifact.run("online", settings, artifact.inputs("online"), tmp_path / "out")
    num_matches = 6 * (1 if method == "dpo" else 2)
    assert manifest["ledger"]["online_matches"] == num_matches
    asked = {body["messages"][0]["content"] for body in server.bodies}
    assert len(asked) <= 2 * num_matches
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        answers = row["samples"]
        half = len(answers) // 2
        for one, other in zip(answers[:half], answers[half:], strict=True):
            assert f"{row['prompt']}|{one['text']}|{other['text']}" in asked
            longer = (len(one["text"]) > len(other["text"])) - (len(one["text"]) < len(other["text"]))
            assert one.get("reward", 0.0) - other.get("reward", 0.0) == longer
    before = len(server.bodies)
    artifact.run("online", settings, artifact.inputs("online"), tmp_path / "again")
    assert len(server.bodies) == before  # the replies were kept beside the artifact


def test_a_judge_that_gives_no_verdict(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    server = chat_server(lambda *_: "I cannot say")
    judging = {"verdict": "text", "endpoint": {"url": server.url, "model": "m"}}
    changes = {"samples": 2, "reward": "judge", "compare": "judge"}
    settings = OnlineSettings(**{**SMALL, **changes}, judging=judging, updates=1)
    ledger = artifact.run("online", settings, artifact.inputs("online"), tmp_path / "out")["ledger"]
    assert ledger["online_unjudged"] == ledger["online_matches"] == 6
    assert "I cannot say" in (tmp_path / "out" / "problems.jsonl").read_text()


def test_a_reward_model_judges(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """Its differences are log odds to Nash-MD; also where answers become data."""
    inputs = {**artifact.inputs("online"), "reward_model": str(artifact("reward_model"))}
    settings = OnlineSettings(**SMALL, method="nash_md", reward="model", preference_temperature=1.0, updates=2)
    artifact.run("online", settings, inputs, tmp_path / "out")
    for line in read_rows(tmp_path / "out" / "metrics.jsonl"):
        assert line["online/ties"] < 1.0
        assert line["online/win_rate"] not in (0.0, 0.5, 1.0)
    best = RejectionSettings(keep="top_share", share=0.25, reward="model", max_new_tokens=24, precision="fp32")
    manifest = artifact.run("rejection", best, inputs, tmp_path / "best")
    assert manifest["ledger"]["kept"] <= 16
    assert manifest["summary"]["kept_reward"] > manifest["summary"]["sampled_reward"]
    with pytest.raises(RecipeError, match=r"`reward: model` and reward_model=FOLDER go together"):
        artifact.run("rejection", best, artifact.inputs("online"), tmp_path / "none")


# ---- what a rollout becomes ------------------------------------------------------------------------------------------


def complete(prompt: int, sample: int, num_tokens: int = 2) -> Completion:
    tokens = np.arange(5, 5 + num_tokens)
    return Completion(prompt, sample, tokens, -np.ones(num_tokens, dtype=np.float32), "stop", f"{prompt}{sample}")


def build_rollout(*groups: list[float | None]) -> Rollout:
    """Rewards by prompt; None was not judged."""
    completions = [complete(p, s) for p, group in enumerate(groups) for s in range(len(group))]
    rewards = [Reward(value, "timeout" if value is None else "scored") for group in groups for value in group]
    prompts = [Prompt(f"p{i}", "1", "exact") for i in range(len(groups))]
    return Rollout(0, prompts, [np.array([1, 2 + i]) for i in range(len(groups))], completions, rewards)


def find(method: str, *groups: list[float | None], **changes: Any) -> tuple[list[tuple[int, int, float]], list[int]]:
    num_own = len(groups[0]) if method == "dpo" else len(groups[0]) // 2
    settings = OnlineSettings(method=method, samples=len(groups[0]), **changes)
    matches, counts = find_matches(build_rollout(*groups), num_own, settings)
    return [(m.first, m.second, m.preference) for m in matches], [counts[n] for n in ("matches", "ties", "unjudged")]


def test_best_against_worst() -> None:
    groups = [0.2, 0.9, 0.1], [0.5, 0.5, 0.5], [None, 0.3, 0.4], [None, 0.3, None], [None, None, None]
    assert find("dpo", *groups) == ([(1, 2, 1.0), (8, 7, 1.0)], [5, 1, 2])


def test_one_against_one_of_the_other_side() -> None:
    groups = [0.2, 0.9, 0.3, 0.9], [None, 1.0, 0.0, 0.0]
    assert find("xpo", *groups) == ([(0, 2, 0.0), (5, 7, 1.0)], [4, 1, 1])
    # Nash-MD keeps the tie, as the preference 1/2.
    assert find("nash_md", *groups) == ([(0, 2, 0.0), (1, 3, 0.5), (5, 7, 1.0)], [4, 1, 1])
    soft, _ = find("nash_md", *groups, preference_temperature=0.1)
    assert soft[0][2] == pytest.approx(1 / (1 + math.e))
    assert [match[2] for match in soft[1:]] == [0.5, pytest.approx(1 / (1 + math.exp(-10)))]


def test_trees_of_pairs() -> None:
    """The mark `explored` is on the reference's answer, whichever side it is on."""
    rollout = build_rollout([0.2, 0.9, 0.3, 0.1])
    trees = build_pair_trees(rollout, 2, [Match(0, 2, 0.0), Match(1, 3, 1.0)])
    assert [[dict(s.marks) for s in tree[1:]] for tree in trees] == [
        [{"sign": 1.0, "explored": 1.0}, {"sign": -1.0}],
        [{"sign": 1.0}, {"sign": -1.0, "explored": 1.0}],
    ]
    assert all(tree[0].tokens.tolist() == [1, 2] for tree in trees)
    plain = build_pair_trees(rollout, 4, [Match(1, 3, 1.0)])
    assert [dict(s.marks) for s in plain[0][1:]] == [{"sign": 1.0}, {"sign": -1.0}]


def test_trees_of_answers() -> None:
    rollout = build_rollout([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    matches = [Match(0, 2, 1.0), Match(1, 3, 0.5), Match(5, 7, 1.0)]
    first, second = build_answer_trees(rollout, 2, matches)
    assert [s.marks["preference"] for s in first[1:]] == [1.0, 0.5]
    assert [s.marks["preference"] for s in second[1:]] == [1.0]
    assert second[0].tokens.tolist() == [1, 3]


def test_a_rollout_in_numbers() -> None:
    rollout = build_rollout([0.2, 0.9, 0.3, 0.9], [None, 1.0, 0.0, 0.0])
    settings = OnlineSettings(method="xpo", samples=4)
    found = measure(rollout, 2, *find_matches(rollout, 2, settings))
    assert found["online/ties"] == found["online/unjudged"] == 0.25
    assert found["online/win_rate"] == pytest.approx((0.0 + 1.0 + 0.5) / 3)  # a loss, a win, a tie
    assert found["online/other_reward"] == pytest.approx((0.3 + 0.9) / 4)
    assert found["rl/reward"] == pytest.approx((0.2 + 0.9 + 1.0) / 3)
    assert (found["count/samples"], found["count/online_matches"]) == (4, 4)


def test_sides_stand_side_by_side() -> None:
    own, others = [complete(p, s) for p in (0, 1) for s in (0, 1)], [complete(p, s) for p in (0, 1) for s in (0, 1)]
    merged = merge_completions(own, others, 2)
    assert [(c.prompt_index, c.sample_index) for c in merged] == [(p, s) for p in (0, 1) for s in range(4)]
    assert [c.text for c in merged[:4]] == ["00", "01", "00", "01"]


@pytest.mark.parametrize(("method", "is_tempered"), [("dpo", False), ("xpo", False), ("nash_md", True)])
def test_scores_are_tempered_as_the_samples_were(
    method: str, is_tempered: bool, artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nash-MD's gradient is that of the tempered policy that was sampled; a pair's loss is one of the models."""
    model = load_model(artifact("sft") / "model")
    monkeypatch.setattr(sources, "verify_many", judge_by_length)
    settings = OnlineSettings(**SMALL, method=method)
    context = Context(tmp_path, artifact.inputs("online"), say=lambda _: None)
    sampler = build_sampler(settings, context, load_base(str(artifact("sft"))), new_ledger(), 1)
    batch = online.OnlineSource(sampler, Frozen(model)).step(0, model).batches[0]
    with torch.no_grad():
        expected = score(model, batch, temperature=1.5 if is_tempered else 1.0).logprobs_N
    torch.testing.assert_close(batch.at_targets("ref_logprobs"), expected)


@pytest.fixture(scope="module")
def tiny_judge(build_tiny: Any, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that knows every letter: its preferences are nonsense, and the same each time."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    save_model(build_tiny(len(byte_tokenizer), num_layers=1, max_positions=4096), byte_tokenizer, folder)
    return folder


def test_what_a_judge_leaves_open_keeps_its_name(
    artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path
) -> None:
    """Online AI feedback: a reply without a verdict is nonsense and no error, two orders that must agree and do not are
    inconsistent; neither teaches anything."""
    replies = {0: "who knows", 1: "[[A]]"}

    def reply(body: dict[str, Any], _: int) -> str:
        _, a, b = body["messages"][0]["content"].split("|")
        longer = "[[A]]" if len(a) > len(b) else "[[B]]" if len(a) < len(b) else "[[C]]"
        return replies.get((len(a) + len(b)) % 3, longer)

    endpoint = {"url": chat_server(reply).url, "model": "m", "retries": 0}
    judging = {"verdict": "text", "pair_prompt": "{question}|{answer_a}|{answer_b}", "orders": "agree"}
    changes = {"compare": "judge", "reward": "judge", "samples": 2, "judging": {**judging, "endpoint": endpoint}}
    settings = OnlineSettings(**{**SMALL, **changes, "updates": 2})
    ledger = artifact.run("online", settings, artifact.inputs("online"), tmp_path / "out")["ledger"]
    counts = {name: ledger[f"samples_{name}"] for name in ("scored", "nonsense", "inconsistent")}
    assert sum(counts.values()) == ledger["samples"]
    assert min(counts.values()) > 0
    assert ledger["online_unjudged"] == (counts["nonsense"] + counts["inconsistent"]) / 2
    problems = read_rows(tmp_path / "out" / "problems.jsonl")
    assert {row["status"] for row in problems} == {"nonsense", "inconsistent"}


# ---- settings --------------------------------------------------------------------------------------------------------


def test_defaults_and_knobs_that_are_not_read() -> None:
    assert (OnlineSettings(method="xpo").alpha, OnlineSettings().alpha) == (1e-5, None)
    assert OnlineSettings(method="nash_md").mixture == 0.5
    with pytest.raises(
        ValueError, match=r"alpha is 0.1, and method: dpo does not read it; .* \(dpo reads loss, mixture; alpha"
    ):
        OnlineSettings(alpha=0.1)
    with pytest.raises(ValueError, match="loss is ipo, and method: nash_md does not read it"):
        OnlineSettings(method="nash_md", loss="ipo")
    for given, match in (
        ({"compare": "judge"}, "compare: judge needs reward: judge alone"),
        (
            {"compare": "judge", "reward": "judge", "samples": 4},
            "samples is 4; compare: judge with method: dpo takes 2",
        ),
        (
            {"compare": "judge", "reward": "judge", "method": "nash_md", "preference_temperature": 1.0},
            "leave preference_temperature out",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            OnlineSettings(**given)
    with pytest.raises(ValueError, match="samples is 3; method: xpo needs an even number"):
        OnlineSettings(method="xpo", samples=3)


@pytest.mark.parametrize("name", sorted(path.stem for path in (recipe_folder() / "online").glob("*.yaml")))
def test_shipped_recipes_run(name: str, artifact: Any, tiny_judge: Path, read_rows: Any, tmp_path: Path) -> None:
    """One update on the tiny model, with the file's own method and knobs."""
    words = ["updates=1", "bin_tokens=192", "prompts_per_rollout=8", "max_new_tokens=8", "precision=fp32"]
    words += ["optimizer.learning_rate=0.01", "schedule.warmup_updates=0", "checkpoint_every=0", "temperature=1.5"]
    settings = load_settings(OnlineSettings, find_recipe(f"online/{name}"), words, section="online")
    judge = {"judge": str(tiny_judge)} if settings.compare == "judge" else {}
    artifact.run("online", settings, {**artifact.inputs("online"), **judge}, tmp_path / "out")
    (line,) = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert all(math.isfinite(value) for value in line.values())
    assert line["grad_norm"] > 0


def test_there_is_a_recipe_for_each_method() -> None:
    folder = recipe_folder() / "online"
    methods = {load_settings(OnlineSettings, path).method for path in folder.glob("*.yaml")}
    assert methods == set(ONLINE_KNOBS)


@pytest.mark.parametrize("method", sorted(ONLINE_KNOBS))
def test_an_adapter_learns_online(method: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """The reference is the learner without its adapter, and in a mixture a copy of the base: the same numbers."""
    changes = {"method": method, "updates": 2, "adapter": {"kind": "lora", "rank": 2}}
    settings = OnlineSettings(**SMALL, **changes, optimizer={"learning_rate": 0.01})
    artifact.run("online", settings, artifact.inputs("online"), tmp_path / "own")
    other = {**artifact.inputs("online"), "reference": str(artifact("sft"))}
    artifact.run("online", settings, other, tmp_path / "given")
    start = "nash/log_ratio" if method == "nash_md" else "dpo/margin"
    lines = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("own", "given")]
    for own, given in zip(*lines, strict=True):
        assert own[start] == pytest.approx(given[start], abs=1e-4)
        assert own["rl/reward"] == given["rl/reward"]
    assert lines[0][0][start] == pytest.approx(0.0, abs=1e-4)
    assert lines[0][0]["grad_norm"] > 0
    assert (tmp_path / "own" / "model" / "adapter_config.json").is_file()
