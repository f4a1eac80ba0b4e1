"""Reports of single stages: `polm report FOLDER` of what a stage wrote into its `out`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polm.config import validate
from polm.data.readers import write_jsonl
from polm.errors import StoreError
from polm.recipe import ProcessRewardModelSettings
from polm.recipe_data import DataStage
from polm.recipe_judge import ConstitutionStage, JudgeStage
from polm.report.html import SECTIONS, build_report, write_report
from polm.report.load import Run, load_report
from polm.report.losses import find_meaning, list_losses
from polm.report.made import AnswerGroup, DrawnAnswer, assign_roles
from polm.report.sections_made import section_answers
from polm.report.sections_rollouts import describe_sample
from polm.report.stage_words import describe_stage
from polm.report.tables import build_problems_table

FAST = {"first_wait_seconds": 0.005, "retries": 1, "timeout_seconds": 0.5}
SHORT = {"pair_prompt": "{question}|{answer_a}|{answer_b}", "score_prompt": "{question}|{answer}"}
KEEP = os.environ.get("KEEP_REPORTS")  # a folder: pages to look at


def report(folder: Path, name: str = "") -> tuple[Run, str]:
    """The stage as it was read, and its page."""
    run = load_report(folder)
    page = build_report(run)
    if KEEP:
        (Path(KEEP) / f"{name or run.nodes[0].spec.stage}.html").write_text(page, encoding="utf-8")
    return run, page


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def has_section(page: str, anchor: str) -> bool:
    return f'<section id="{anchor}">' in page


STAGES = (
    *("data", "tokenizer", "pretrain", "annotate", "microscope", "midtrain", "remit", "sft", "eval"),
    *("pairs", "rejection", "dpo", "online", "reward_model"),
    *("grpo", "rloo", "reinforce_pp", "remax", "ppo"),
)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_report(name: str, artifact: Any) -> None:
    """A headline, its numbers, what was left out, the lineage, settings and versions; nothing that belongs to a run."""
    folder = artifact(name)
    before = sorted(folder.rglob("*"))
    run, page = report(folder, name)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert run.is_stage
    assert describe_stage(run)[0] in page.replace("&#x27;", "'")
    for anchor in ("headline", "lineage", "recipe", "versions", "problems"):
        assert has_section(page, anchor), anchor
    assert not has_section(page, "graph")
    assert "seed None" not in page
    assert "Nothing to compare yet" not in page
    assert manifest["key"] in page
    for value in manifest["inputs"].values():
        assert value[:12] in page
    assert has_section(page, "training") == (folder / "metrics.jsonl").is_file()
    assert has_section(page, "ledger") == bool(manifest["ledger"])
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["online", "grpo", "rloo", "reinforce_pp", "remax", "ppo"])
def test_rollouts_of_every_method(name: str, artifact: Any) -> None:
    run, page = report(artifact(name))
    rows = read_rows(artifact(name) / "samples.jsonl")
    assert len(run.nodes[0].rollouts) == len(rows)
    assert has_section(page, "rollouts")
    assert ("advantage" in page[page.index('<section id="rollouts">') :]) == (name != "online")
    assert "Reward of the model&#x27;s own answers:" in page
    assert "could not be judged" not in describe_stage(run)[-1]  # all were
    for metric in ("rl/reward", "rl/length"):
        assert f"{name}: {metric}" in page


def test_reward_models_on_what_they_have_not_seen(artifact: Any) -> None:
    run, page = report(artifact("reward_model"))
    holdout = run.nodes[0].made.holdout
    assert holdout is not None
    found = json.loads((artifact("reward_model") / "holdout.json").read_text())
    assert (holdout.accuracy, holdout.pairs) == (found["accuracy"], found["pairs"])
    assert f"{100 * holdout.accuracy:.1f} % of {holdout.pairs} pairs held out" in page
    assert "Calibration on held-out pairs" in page
    claim = describe_stage(run)[0]
    low, high = found["accuracy_low95"], found["accuracy_high95"]
    verdict = "better than" if low > 0.5 else "worse than" if high < 0.5 else "not shown to differ from"
    assert f"That is {verdict} chance (50.0 %)." in claim


def test_process_reward_models(artifact: Any, step_rows: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "stepwise.jsonl", step_rows)
    settings = ProcessRewardModelSettings(
        bin_tokens=192, precision="fp32", epochs=2, holdout_share=0.3, separator=";", too_long="truncate"
    )
    inputs = {"base": str(artifact("sft")), "data": str(tmp_path / "in")}
    artifact.run("process_reward_model", settings, inputs, tmp_path / "prm")
    run, page = report(tmp_path / "prm")
    holdout = run.nodes[0].made.holdout
    assert holdout is not None
    assert f"steps of {holdout.answers} answers held out" in page
    assert "always saying the commoner label" in describe_stage(run)[0]
    assert "Calibration on held-out steps" in page
    assert "first error found, %" in page


def test_a_reward_model_without_held_out_pairs_says_so(artifact: Any, tmp_path: Path) -> None:
    _, settings, _ = artifact.spec("reward_model")
    changed = settings.model_copy(update={"holdout_share": 0.0, "epochs": 1})
    artifact.run("reward_model", changed, artifact.inputs("reward_model"), tmp_path / "rm")
    run, page = report(tmp_path / "rm", "reward_model_without")
    assert "nothing says what the reward model is worth" in describe_stage(run)[0]
    assert not has_section(page, "reward-models")


@pytest.mark.parametrize("name", ["pairs", "rejection"])
def test_which_answers_became_data(name: str, artifact: Any) -> None:
    folder = artifact(name)
    run, page = report(folder)
    groups = run.nodes[0].made.answers
    assert [group.prompt for group in groups] == [row["prompt"] for row in read_rows(folder / "answers.jsonl")]
    used = [
        (group.prompt, role, answer.text)
        for group in groups
        for answer, role in zip(group.answers, group.roles, strict=True)
        if role
    ]
    if name == "pairs":
        rows = read_rows(folder / "preferences.jsonl")
        expected = [(row["prompt"], role, row[role]) for row in rows for role in ("chosen", "rejected")]
    else:
        rows = read_rows(folder / "sft.jsonl")
        expected = [(row["messages"][0]["content"], "kept", row["messages"][1]["content"]) for row in rows]
    assert sorted(used) == sorted(expected)
    assert has_section(page, "answers")
    ledger = json.loads((folder / "manifest.json").read_text())["ledger"]
    losses = {loss.name: loss.count for loss in list_losses(run)}
    assert losses == {key: n for key, n in ledger.items() if n and find_meaning(key)}
    assert {key for key in ledger if key.startswith("dropped_") and ledger[key]} <= set(losses)


def test_of_equal_texts_the_usable_one_was_used() -> None:
    answers = [
        DrawnAnswer("x", "timeout"),
        DrawnAnswer("x", "right", cut_off=True, reward=1.0),
        DrawnAnswer("x", "right", reward=1.0),
        DrawnAnswer("y", "wrong", reward=0.0),
    ]
    assert assign_roles(answers, [("x", "chosen"), ("y", "rejected")]) == ("", "", "chosen", "rejected")
    assert assign_roles(answers, [("gone", "kept")]) == ("", "", "", "")


def write_judged(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, str]:
    rows = [{"prompt": f"q{i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(pairs)]
    write_jsonl(folder / "preferences.jsonl", rows)
    return {"data": str(folder)}


def test_what_a_judge_did_not_answer_is_seen(
    artifact: Any, chat_server: Callable[..., Any], hostile: str, tmp_path: Path
) -> None:
    """Time-outs, errors, replies without a verdict, contradictions: counted, with a sample of each, as text."""

    def reply(body: dict[str, Any], _: int) -> Any:
        text = body["messages"][0]["content"]
        if "slow" in text:
            time.sleep(1.0)
        if "broken" in text:
            return 500, {}, b"out of order"
        if "odd" in text:
            return f"who knows {hostile}"
        return "[[A]]" if "same" in text or text.split("|")[1] > text.split("|")[2] else "[[B]]"

    pairs = [("slow", "s"), ("broken", "s"), ("odd", "s"), ("same", "s"), ("fine", "e"), (f"finer{hostile}", "e")]
    pairs += [("finest", "e"), ("x", "x")]
    inputs = write_judged(tmp_path / "in", pairs)
    judging = {"verdict": "text", "endpoint": {"url": chat_server(reply).url, "model": "m", **FAST}, **SHORT}
    settings = validate(JudgeStage, {"judging": {**judging, "orders": "agree"}, "max_failed": 0.5}, "x")
    artifact.run("judge", settings, inputs, tmp_path / "out")
    run, page = report(tmp_path / "out")
    losses = {loss.name: loss.count for loss in list_losses(run)}
    assert losses == {"equal": 1, "inconsistent": 1, "timeout": 1, "error": 1, "unparsed": 1}
    assert build_problems_table(run) is not None
    assert "4 questions stayed without a verdict" in describe_stage(run)[0]
    assert "answer shown first" in describe_stage(run)[1]
    for words in ("no verdict (timeout", "no verdict (error", "no verdict (unparsed", "is better (100 %"):
        assert words in page, words
    assert "<img" not in page
    assert "\u202e" not in page


def test_votes_that_say_nothing_are_seen(artifact: Any, chat_server: Callable[..., Any], tmp_path: Path) -> None:
    replies: dict[str, int] = {}

    def reply(body: dict[str, Any], _: int) -> str:
        text = body["messages"][0]["content"]
        replies[text] = replies.get(text, 0) + 1
        return "hm" if replies[text] == 1 else "[[A]]" if text.split("|")[1] > text.split("|")[2] else "[[B]]"

    judging = {"verdict": "text", "endpoint": {"url": chat_server(reply).url, "model": "m", **FAST}, **SHORT}
    settings = validate(JudgeStage, {"judging": {**judging, "votes": 3, "temperature": 0.7}}, "x")
    artifact.run("judge", settings, write_judged(tmp_path / "in", [("b", "a"), ("c", "a")]), tmp_path / "out")
    run, page = report(tmp_path / "out", "votes")
    assert {loss.name: loss.count for loss in list_losses(run)} == {"votes_unparsed": 4}
    assert "4 of 12 votes said nothing; the others decided." in describe_stage(run)
    assert "the other votes on the question decide" in page
    assert "of 3 votes 1 unparsed" in page


def test_answers_before_and_after_their_revision(
    artifact: Any, chat_server: Callable[..., Any], hostile: str, tmp_path: Path
) -> None:
    order: dict[str, int] = {}

    def reply(body: dict[str, Any], _: int) -> Any:
        number = order.setdefault(body["messages"][0]["content"], len(order))
        is_critique = len(body["messages"]) == 3
        if is_critique:
            return (400, {}, b"too long") if number == 1 else "too short"
        return " " if number == 2 else f"better {hostile.replace(chr(0), '')}"

    endpoint = {"url": chat_server(reply).url, "model": "m", **FAST}
    values = {"num_prompts": 6, "max_new_tokens": 8, "precision": "fp32", "endpoint": endpoint, "max_failed": 0.5}
    inputs = {"base": str(artifact("sft")), "data": str(artifact("data"))}
    artifact.run("constitution", validate(ConstitutionStage, values, "x"), inputs, tmp_path / "out")
    run, page = report(tmp_path / "out")
    assert len(run.nodes[0].made.transcripts) == 6
    assert has_section(page, "revisions")
    assert "critique (error)" in page
    assert "revision (empty)" in page
    assert "after (as before)" in page
    losses = {loss.name: loss.count for loss in list_losses(run)}
    assert losses["critiques_error"] == losses["revisions_empty"] == 1
    assert "66.7 % of the answers were changed" in describe_stage(run)[0]
    assert "<img" not in page


def test_hostile_answers_stay_text(artifact: Any, hostile: str, tmp_path: Path) -> None:
    """Every file of a stage may hold what a model wrote."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    manifest = json.loads((artifact("pairs") / "manifest.json").read_text())
    manifest["ledger"][f"dropped_{hostile}"] = 3
    manifest["summary"][hostile] = hostile
    (folder / "manifest.json").write_text(json.dumps(manifest))
    answers = [{"text": hostile, "status": hostile, "reward": None, "note": hostile, "cut_off": True}]
    write_jsonl(folder / "answers.jsonl", [{"prompt": hostile, "answers": answers}])
    write_jsonl(folder / "preferences.jsonl", [{"prompt": hostile, "chosen": hostile, "rejected": "b"}])
    run, page = report(folder, "hostile")
    for bad in ("<img", "<svg onload", "\u202e", "\x00", "\x1b"):
        assert bad not in page, bad
    assert "✓ chosen" in section_answers(run)


def test_problems_of_rollouts_are_shown(artifact: Any, tmp_path: Path) -> None:
    folder = tmp_path / "rl"
    folder.mkdir()
    manifest = json.loads((artifact("grpo") / "manifest.json").read_text())
    manifest["ledger"] |= {"samples": 64, "samples_timeout": 2, "samples_error": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_bytes((artifact("grpo") / "metrics.jsonl").read_bytes())
    problem = {"update": 3, "status": "timeout", "note": "3 s", "prompt": "p", "text": "while True"}
    write_jsonl(folder / "problems.jsonl", [problem])
    run, page = report(folder, "problems")
    assert "3 answers of 64 could not be judged." in describe_stage(run)
    assert "timeout: 3 s (update 3)" in page
    assert "while True" in page


def test_failed_calls_of_a_function_are_shown(artifact: Any, tmp_path: Path) -> None:
    """In the headline, under what was left out, and with their reason. No reward is not the reward 0."""
    (tmp_path / "mine.py").write_text(
        "def reward(prompts, completions, **columns):\n"
        "    return [None if len(completions[0]) % 3 == 0 else -1.0 * len(completions[0])]\n"
    )
    place = f"{tmp_path / 'mine.py'}:reward"
    for stage, headline in (("grpo", "2 whole calls"), ("rejection", "1 whole call,")):
        settings = artifact.spec(stage)[1].model_copy(update={"reward": ("function",), "reward_function": place})
        artifact.run(stage, settings, artifact.inputs(stage), tmp_path / stage)
        run, page = report(tmp_path / stage, f"calls-{stage}")
        assert any(f"failed on {headline}" in sentence for sentence in describe_stage(run))
        losses = {loss.name: loss for loss in list_losses(run)}
        assert losses["calls_error"].count == int(headline[0])
        assert "each answer was judged on its own" in losses["calls_error"].meaning
        assert "the reward function returned 1 rewards for" in page
    rollouts, _ = report(tmp_path / "grpo")
    ledger = {loss.name: loss.count for loss in list_losses(rollouts)}
    assert ledger["unparsed_unjudged"] == ledger["samples_unparsed"] > 0
    assert f"{ledger['samples_unparsed']:.0f} answers of 32 could not be judged." in describe_stage(rollouts)
    groups = rollouts.nodes[0].rollouts
    shown = [sample for group in groups for sample in group.samples if sample.status == "unparsed"]
    assert {describe_sample(sample) for sample in shown} == {"unparsed, no reward, advantage 0"}


def test_every_count_of_a_loss_has_a_meaning(artifact: Any, tmp_path: Path) -> None:
    words = {
        "pairs_prompts_differ": "refuses",
        "preferences/dropped_prompts_differ": "so left out",
        "dropped_prompts_differ": "so left out",
        "sft/columns_ignored/error": "this column",
        "columns_ignored/messages[].name": "this column",
        "samples_inconsistent": "different answers",
        "samples_unparsed": r"a function (None)",
        "dropped_unparsed": "found no answer",
        "votes_timeout": "the other votes",
        "dropped_unmarkable": "mark",
        "sft/left_over": "never drawn",
        "holdout_dropped_empty_step": "no text",
        "prompts_without_revision": "prompts of which nothing",
        "solutions_without_scores": "no solution is shown",
    }
    for word, meaning in words.items():
        assert meaning in find_meaning(word), word
    assert not any(map(find_meaning, ("votes", "read", "kept", "samples_right", "records/sft.jsonl", "scored")))
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": pair, "rejected": other}]
    write_jsonl(tmp_path / "in" / "preferences.jsonl", rows)
    settings = validate(DataStage, {"data": {"source": "folder", "path": str(tmp_path / "in")}}, "x")
    artifact.run("data", settings, {}, tmp_path / "out")
    run, page = report(tmp_path / "out", "differ")
    assert {loss.name: loss.count for loss in list_losses(run)} == {"pairs_prompts_differ": 1}
    assert "answers are to different prompts" in page


def test_what_is_no_stage_is_refused(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="`out` of a stage that is finished"):
        load_report(tmp_path)
    (tmp_path / ".key").write_text("abc")
    with pytest.raises(StoreError, match="not finished; run its command again"):
        load_report(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json: expected JSON"):
        load_report(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_bytes((artifact("rejection") / "manifest.json").read_bytes())
    (broken / "answers.jsonl").write_text('{"prompt": "a", "answers": []}\n{"prompt"\n')
    with pytest.raises(StoreError, match=r"answers\.jsonl:2: expected JSON"):
        load_report(broken)


def test_writing_it_leaves_the_artifact_valid(artifact: Any, tmp_path: Path) -> None:
    out = write_report(artifact("pairs"), tmp_path / "page.html")
    assert out.read_text(encoding="utf-8").count("<section id=") <= len(SECTIONS)


def test_a_group_without_roles() -> None:
    assert AnswerGroup("p", []).roles == ()


def test_many_reasons_fold_away(artifact: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    manifest = json.loads((artifact("data") / "manifest.json").read_text())
    manifest["ledger"] = {f"gsm8k/dropped: reason {i}": i for i in range(12)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    _, page = report(folder, "many")
    assert "<summary>data: 11 reasons</summary>" in page
    assert "left out for the reason that the count names" in page
