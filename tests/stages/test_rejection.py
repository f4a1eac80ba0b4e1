"""`polm rejection`: what is kept of a model's answers, what is counted, and that a killed stage goes on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polm.config import find_recipe, load_settings, recipe_folder
from polm.data.readers import read_conversations, read_prompts
from polm.errors import DataError
from polm.recipe import SFTSettings
from polm.recipe_online import RejectionSettings
from polm.rewards import sources
from polm.rewards.base import Reward
from polm.rewards.selection import Answer
from polm.rewards.verify import Verdict, verify_many
from polm.stages import answers, rejection
from polm.stages.common import Context
from polm.stages.rejection import choose
from polm.stages.table import STAGES

REASONS = ("unjudged", "wrong", "unparsed", "cut_off", "empty", "duplicate", "below_min_reward", "not_best")


def check_ledger(ledger: dict[str, int]) -> None:
    """Every sample is kept or has one reason not to be."""
    assert {name.removeprefix("dropped_") for name in ledger if name.startswith("dropped_")} <= set(REASONS)
    dropped = sum(value for name, value in ledger.items() if name.startswith("dropped_"))
    assert ledger["samples"] == ledger["kept"] + dropped


def test_the_best_answers_become_data(artifact: Any, read_manifest: Any, read_rows: Any) -> None:
    """In the tests an even number of characters is right; 16 prompts with 4 answers each."""
    folder = artifact("rejection")
    chats = [c.messages for c in read_conversations(folder / "sft.jsonl")]
    prompts = {p.prompt for p in read_prompts(artifact("data") / "prompts.jsonl")}
    groups = {row["prompt"]: row["answers"] for row in read_rows(folder / "answers.jsonl")}
    assert set(groups) == prompts
    assert not (folder / "answers").exists()
    for question, answer in chats:
        fit = [a for a in groups[question["content"]] if a["status"] == "right" and not a["cut_off"]]
        assert answer["content"] == next(a["text"] for a in fit if a["text"].strip())
    assert len({question["content"] for question, _ in chats}) == len(chats) >= 2  # one a prompt
    manifest = read_manifest(folder)
    ledger, summary = manifest["ledger"], manifest["summary"]
    check_ledger(ledger)
    assert (ledger["prompts"], ledger["samples"]) == (16, 64)
    assert ledger["kept"] == summary["kept"] == len(chats) == 16 - ledger["prompts_without"]
    statuses = Counter(a["status"] for group in groups.values() for a in group)
    assert ledger["dropped_wrong"] == ledger["wrong"] == statuses["wrong"]
    assert {name: ledger[name] for name in statuses} == statuses
    assert summary["sampled_reward"] == statuses["right"] / 64
    assert summary["kept_reward"] == 1.0


def test_sft_reads_it(artifact: Any, tmp_path: Path) -> None:
    """RAFT's second half: the model learns from what it wrote itself."""
    inputs = {"base": str(artifact("sft")), "data": str(artifact("rejection"))}
    settings = SFTSettings(bin_tokens=192, updates=2, precision="fp32", optimizer={"learning_rate": 0.003})
    manifest = artifact.run("sft", settings, inputs, tmp_path / "out")
    assert manifest["ledger"]["read"] == len(read_conversations(artifact("rejection") / "sft.jsonl"))


def answer(prompt: int, text: str, value: float) -> Answer:
    return Answer(prompt, text, False, Reward(value, "scored"))


SCORED = [answer(0, "a", 0.9), answer(0, "b", 0.8), answer(0, "b", 0.8), answer(1, "c", 0.1), answer(1, "d", 0.7)]


@pytest.mark.parametrize(
    ("given", "expected", "dropped"),
    [
        ({}, "ad", {"duplicate": 1, "not_best": 2}),
        ({"per_prompt": 2}, "abdc", {"duplicate": 1}),
        ({"per_prompt": 2, "min_reward": 0.75}, "ab", {"duplicate": 1, "below_min_reward": 2}),
        ({"keep": "top_share", "share": 0.4}, "ab", {"duplicate": 1, "not_best": 2}),  # 2 of 5 judged
        ({"keep": "top_share", "share": 0.41}, "abd", {"duplicate": 1, "not_best": 1}),
        ({"keep": "top_share", "share": 1.0}, "abcd", {"duplicate": 1}),
    ],
)
def test_ways_to_choose(given: dict[str, Any], expected: str, dropped: dict[str, int]) -> None:
    counted: Counter[str] = Counter()
    kept = choose(RejectionSettings(**given), SCORED, counted)
    assert "".join(a.text for a in kept) == expected
    assert counted == dropped


def test_knobs_of_the_other_way_are_refused() -> None:
    assert RejectionSettings(keep="top_share").share == 0.1
    with pytest.raises(
        ValueError, match=r"share is 0.5, and keep: best does not read it; leave it out \(best reads per"
    ):
        RejectionSettings(share=0.5)


def test_nothing_kept_says_why(artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true verifier: a model of this size is never right."""
    artifact("sft")
    monkeypatch.setitem(artifact.run.__globals__, "judge_by_length", verify_many)
    match = r"no answer is kept: of 64 samples to 16 prompts all were dropped .*; raise samples"
    with pytest.raises(DataError, match=match):
        artifact.run("rejection", artifact.spec("rejection")[1], artifact.inputs("rejection"), tmp_path / "out")


def read_files(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("sft.jsonl", "answers.jsonl")}


def test_a_killed_stage_goes_on(artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four parts of four prompts; after a kill in the third only two are drawn anew, and the files are the same."""
    monkeypatch.setattr(answers, "PART_ANSWERS", 16)
    settings = artifact.spec("rejection")[1]
    quiet = {"inputs": artifact.inputs("rejection"), "say": lambda _: None}
    calls: list[int] = []

    def judge(items: Any, *, seconds: float) -> list[Verdict]:
        del seconds
        calls.append(len(items))
        if len(calls) == 7:  # four of the whole run, then the third of the killed one
            raise InterruptedError
        return [Verdict("right" if len(item.completion) % 2 == 0 else "wrong", "") for item in items]

    monkeypatch.setattr(sources, "verify_many", judge)
    rejection.run(settings, Context(tmp_path / "whole", **quiet))
    with pytest.raises(InterruptedError):
        rejection.run(settings, Context(tmp_path / "parts", **quiet))
    assert sorted(p.name for p in (tmp_path / "parts" / "answers").iterdir()) == ["00000000.jsonl", "00000004.jsonl"]
    done: list[tuple[int, int]] = []
    report = Context(tmp_path / "parts", report=lambda x: done.append((x["update"], x["num_updates"])), **quiet)
    rejection.run(settings, report)
    assert calls == [16] * 9  # 4, 3 and 2
    assert read_files(tmp_path / "parts") == read_files(tmp_path / "whole")
    assert done[-1] == (64, 64)
    assert min(done)[0] > 32  # progress goes on from the parts that were there


def test_an_answer_may_hold_any_character(
    artifact: Any, read_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are cut at \\n alone."""
    said = {"text": "a\x85b\u2028c\u2029d", "finish": "stop"}
    draw = answers.sample_answers
    monkeypatch.setattr(answers, "sample_answers", lambda *a, **k: [replace(c, **said) for c in draw(*a, **k)])
    monkeypatch.setattr(sources, "verify_many", lambda items, **_: [Verdict("right", "") for _ in items])
    inputs, settings = artifact.inputs("rejection"), artifact.spec("rejection")[1]
    rejection.run(settings, Context(tmp_path, inputs, say=lambda _: None))
    found = [answer["text"] for row in read_rows(tmp_path / "answers.jsonl") for answer in row["answers"]]
    assert found == [said["text"]] * 64


def test_what_was_not_judged_is_counted_by_status(
    artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer found, a time-out and an error are told apart, and none of them is called wrong."""
    names = ("right", "wrong", "unparsed", "timeout", "error")

    def judge(items: Any, *, seconds: float) -> list[Verdict]:
        del seconds
        return [Verdict(names[i % 5], "") for i in range(len(items))]  # type: ignore[arg-type]

    artifact("sft")
    monkeypatch.setitem(artifact.run.__globals__, "judge_by_length", judge)
    settings, inputs = artifact.spec("rejection")[1], artifact.inputs("rejection")
    ledger = artifact.run("rejection", settings, inputs, tmp_path / "out")["ledger"]
    check_ledger(ledger)
    counts = {"right": 13, "wrong": 13, "unparsed": 13, "timeout": 13, "error": 12}
    assert {name: ledger[name] for name in names} == counts
    assert (ledger["dropped_wrong"], ledger["dropped_unparsed"], ledger["dropped_unjudged"]) == (13, 13, 25)


MEAN = """
def reward(prompts, completions, **columns):
    return [sum(map(len, completions)) / len(completions)]
"""


@pytest.mark.parametrize("stage", ["rejection", "pairs"])
def test_whole_calls_that_fail_are_named_and_counted(
    stage: str, artifact: Any, tmp_path: Path, read_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is a call; those of the parts that a killed stage left are counted too."""
    monkeypatch.setattr(answers, "PART_ANSWERS", 16)
    (tmp_path / "mine.py").write_text(MEAN)
    changes = {"reward": ("function",), "reward_function": f"{tmp_path / 'mine.py'}:reward", "num_prompts": 16}
    settings = artifact.spec(stage)[1].model_copy(update=changes)
    quiet = {"inputs": artifact.inputs(stage), "say": lambda _: None}
    sample, calls = answers.sample_answers, iter(range(10))

    def draw(*given: Any, **more: Any) -> Any:
        if next(calls) == 2:
            raise InterruptedError
        return sample(*given, **more)

    monkeypatch.setattr(answers, "sample_answers", draw)
    with pytest.raises(InterruptedError):
        STAGES[stage].run(settings, Context(tmp_path / "out", **quiet))
    ledger = STAGES[stage].run(settings, Context(tmp_path / "out", **quiet)).ledger
    assert ledger["calls_error"] == 4
    assert ledger["scored"] == ledger["samples"] == 64
    problems = read_rows(tmp_path / "out" / "problems.jsonl")
    assert [row["status"] for row in problems] == ["error"] * 4
    assert "the reward function returned 1 rewards for 16 completions" in problems[0]["note"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (recipe_folder() / "rejection").glob("*.yaml")))
def test_shipped_recipes_run(name: str, artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["num_prompts=0", "max_new_tokens=24", "precision=fp32", "samples=4", "temperature=1.5"]
    settings = load_settings(RejectionSettings, find_recipe(f"rejection/{name}"), words, section="rejection")
    if settings.reward_function is not None:  # the recipe names a file that its user writes
        file = tmp_path / Path(settings.reward_function.partition(":")[0]).name
        file.write_text("def reward(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n")
        monkeypatch.chdir(tmp_path)
    manifest = artifact.run("rejection", settings, artifact.inputs("rejection"), tmp_path / "out")
    check_ledger(manifest["ledger"])
    rows = [json.loads(raw) for raw in (tmp_path / "out" / "sft.jsonl").read_text().splitlines()]
    assert len(rows) == manifest["ledger"]["kept"] > 0
