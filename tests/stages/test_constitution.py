"""`polm constitution`, and preferences by principles."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from polm.config import find_recipe, load_settings, validate
from polm.data.readers import read_conversations, read_preferences, write_jsonl
from polm.errors import DataError, RecipeError, UserError
from polm.recipe import SFTSettings
from polm.recipe_judge import ConstitutionStage, JudgeStage
from polm.rewards.constitution import load_constitution
from polm.stages import constitution

FAST = {"first_wait_seconds": 0.005, "retries": 1, "timeout_seconds": 20.0}
SMALL: dict[str, Any] = {"num_prompts": 8, "max_new_tokens": 8, "max_critique_tokens": 6, "precision": "fp32"}


def build(server: Any, **changes: Any) -> ConstitutionStage:
    return validate(ConstitutionStage, {**SMALL, "endpoint": {"url": server.url, "model": "m", **FAST}, **changes}, "x")


def is_critique(body: dict[str, Any]) -> bool:
    return len(body["messages"]) == 3


def critic(body: dict[str, Any], _: int) -> str:
    """Revises an answer to what it was and one word more."""
    return "too short" if is_critique(body) else body["messages"][1]["content"].strip() + " more"


def inputs_of(artifact: Any, **more: str) -> dict[str, str]:
    return {"base": str(artifact("sft")), "data": str(artifact("data")), **more}


def test_answers_are_criticised_and_revised(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    server = chat_server(critic)
    manifest = artifact.run("constitution", build(server, rounds=2), inputs_of(artifact), tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "transcript.jsonl")
    found = read_conversations(tmp_path / "out" / "sft.jsonl")
    assert len(rows) == len(found) == 8
    for row, conversation in zip(rows, found, strict=True):
        assert row["final"] == f"{row['answer'].strip()} more more"
        assert [entry["critique"] for entry in row["rounds"]] == ["too short"] * 2
        assert [entry["revision_outcome"] for entry in row["rounds"]] == ["accepted"] * 2
        assert conversation.messages == [*row["prompt"], {"role": "assistant", "content": row["final"]}]
    ledger = manifest["ledger"]
    assert ledger == {
        **{"prompts": 8, "prompts_too_long": 0, "answers_empty": 0},
        **{"critiques_written": 16, "revisions_accepted": 16},
    }
    summary = manifest["summary"]
    drawn = Counter(entry["principle"] for row in rows for entry in row["rounds"])
    assert sum(drawn.values()) == 16
    assert {name.partition("/")[2]: n for name, n in summary.items() if "/" in name and n} == dict(drawn)
    assert (summary["conversations"], summary["revised_share"]) == (8, 1.0)
    check_what_was_asked(server, rows)


def check_what_was_asked(server: Any, rows: list[dict[str, Any]]) -> None:
    """A critique by a principle, then a revision by the same one, in the conversation of the answer."""
    principles = {p.name: p for p in load_constitution(None).principles}
    asked = {json.dumps(body["messages"]) for body in server.bodies}
    for row in rows:
        answer = row["answer"]
        for entry in row["rounds"]:
            principle = principles[entry["principle"]]
            talk = [*row["prompt"], {"role": "assistant", "content": answer}]
            talk.append({"role": "user", "content": principle.critique})
            assert json.dumps(talk) in asked
            talk.append({"role": "assistant", "content": entry["critique"]})
            words = f"{principle.revision}\n\nReply with the rewritten answer and nothing else."
            talk.append({"role": "user", "content": words})
            assert json.dumps(talk) in asked
            answer = entry["revision"]
    assert len(server.bodies) == 4 * len(rows)


def test_what_is_no_revision_is_counted(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    """One record of each kind, told apart by its place."""
    order: dict[str, int] = {}

    def reply(body: dict[str, Any], _: int) -> Any:
        kind = order.setdefault(body["messages"][0]["content"], len(order))
        answer = body["messages"][1]["content"]
        if is_critique(body):
            return {0: " ", 1: (400, {}, b"too long")}.get(kind, "bad")
        if kind == 2:
            return "\n"
        if kind == 3:
            message = {"content": "words without end"}
            return {"choices": [{"message": message, "finish_reason": "length"}]}
        if kind == 4:
            return f" {answer}\n"
        if kind == 5:
            time.sleep(2.5)
        return "fine<|eos|>" if kind == 6 else "better"

    server = chat_server(reply)
    settings = build(server, max_failed=0.3)
    change = {"concurrency": 1, "timeout_seconds": 1.5}
    settings = settings.model_copy(update={"endpoint": settings.endpoint.model_copy(update=change)})  # type: ignore[union-attr]
    ledger = artifact.run("constitution", settings, inputs_of(artifact), tmp_path / "out")["ledger"]
    assert {name: n for name, n in ledger.items() if name.startswith(("crit", "rev")) and n} == {
        **{"critiques_empty": 1, "critiques_error": 1, "critiques_written": 6},
        **{"revisions_empty": 1, "revisions_over_length": 1, "revisions_unchanged": 1, "revisions_timeout": 1},
        **{"revisions_control_tokens": 1, "revisions_accepted": 1},
    }
    assert ledger["prompts_without_revision"] == 6
    rows = read_rows(tmp_path / "out" / "transcript.jsonl")
    assert rows[1]["rounds"][0]["note"] == "status 400: too long"
    assert [row["final"] == row["answer"] for row in rows] == [True] * 7 + [False]
    kept = [c.messages[-1]["content"] for c in read_conversations(tmp_path / "out" / "sft.jsonl")]
    assert kept == [rows[4]["answer"].strip(), "better"]


def test_every_revision_can_be_kept(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    settings = build(chat_server(critic), rounds=3, keep="all", num_prompts=2)
    artifact.run("constitution", settings, inputs_of(artifact), tmp_path / "out")
    texts = [c.messages[-1]["content"] for c in read_conversations(tmp_path / "out" / "sft.jsonl")]
    assert [text.count(" more") for text in texts] == [1, 2, 3, 1, 2, 3]


def test_revising_without_a_critique(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    server = chat_server(lambda body, _: "better" if is_critique(body) else "worse")
    settings = build(server, critique=False)
    ledger = artifact.run("constitution", settings, inputs_of(artifact), tmp_path / "out")["ledger"]
    assert ledger["revisions_accepted"] == 8
    assert not any(name.startswith("critiques") for name in ledger)
    assert len(server.bodies) == 8


def test_the_model_is_its_own_critic(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """And what comes of it trains."""
    settings = validate(ConstitutionStage, {**SMALL, "critic_temperature": 1.0}, "x")
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nprinciples:\n  - {name: a, critique: add, revision: sort, compare: d}\n"
    )
    inputs = inputs_of(artifact, constitution=str(tmp_path / "mine.yaml"))
    # A model of a few thousand parameters does not end its turn in so few tokens.
    longer = settings.model_copy(update={"max_new_tokens": 60})
    manifest = artifact.run("constitution", longer, inputs, tmp_path / "out")
    ledger = manifest["ledger"]
    assert ledger["critiques_written"] + ledger.get("critiques_empty", 0) == 8
    assert manifest["summary"]["constitution"] == "mine"
    rows = read_rows(tmp_path / "out" / "transcript.jsonl")
    assert {entry["principle"] for row in rows for entry in row["rounds"]} == {"a"}
    again = artifact.run("constitution", longer, inputs, tmp_path / "again" / "out")
    assert again["ledger"] == ledger
    assert (tmp_path / "again" / "out" / "sft.jsonl").read_bytes() == (tmp_path / "out" / "sft.jsonl").read_bytes()
    sft = SFTSettings(updates=1, bin_tokens=192, precision="fp32")
    trained = artifact.run("sft", sft, {"base": inputs["base"], "data": str(tmp_path / "out")}, tmp_path / "sft")
    assert trained["ledger"]["read"] == manifest["summary"]["conversations"] >= 1


def test_another_model_as_the_critic(artifact: Any, tmp_path: Path) -> None:
    settings = validate(ConstitutionStage, {**SMALL, "max_new_tokens": 60, "critic_temperature": 1.0}, "x")
    inputs = inputs_of(artifact, critic=str(artifact("grpo")))
    manifest = artifact.run("constitution", settings, inputs, tmp_path / "out")
    assert manifest["ledger"]["critiques_written"] > 0
    assert "critic" in manifest["inputs"]


def test_a_killed_stage_goes_on(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    artifact.run("constitution", build(chat_server(critic)), inputs_of(artifact), tmp_path / "whole" / "out")
    dying = chat_server(lambda body, number: (401, {}, b"no") if number >= 11 else critic(body, number))
    with pytest.raises(UserError, match="refuses the model"):
        artifact.run("constitution", build(dying), inputs_of(artifact), tmp_path / "cut" / "out")
    kept = len(list((tmp_path / "cut" / ".replies").rglob("*.json")))
    assert kept == 11
    again = chat_server(critic)
    artifact.run("constitution", build(again), inputs_of(artifact), tmp_path / "cut" / "out")
    assert len(again.bodies) == 16 - kept
    for name in ("sft.jsonl", "transcript.jsonl", "answers.jsonl"):
        assert (tmp_path / "cut" / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()


def test_answers_may_hold_any_character(
    artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """answers.jsonl is cut at \\n alone."""
    text = "a\x85b\u2028c\u2029d"
    monkeypatch.setattr(
        constitution, "answer_messages", lambda _s, _c, _b, prompts, **_: [(messages, [text]) for messages in prompts]
    )
    artifact.run("constitution", build(chat_server(critic)), inputs_of(artifact), tmp_path / "out")
    assert [row["answer"] for row in read_rows(tmp_path / "out" / "transcript.jsonl")] == [text] * 8


def test_failures(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    down = chat_server(lambda *_: (503, {}, b"down"))
    with pytest.raises(UserError, match="8 of 8 requests have no reply"):
        artifact.run("constitution", build(down), inputs_of(artifact), tmp_path / "down")
    silent = chat_server(lambda body, _: "bad" if is_critique(body) else "")
    with pytest.raises(DataError, match=r"no answer was revised .*revisions_empty 8"):
        artifact.run("constitution", build(silent), inputs_of(artifact), tmp_path / "silent")
    inputs = inputs_of(artifact, critic=str(artifact("sft")))
    with pytest.raises(RecipeError, match="or endpoint, not both"):
        artifact.run("constitution", build(silent), inputs, tmp_path / "both")
    with pytest.raises(RecipeError, match=r"revision_prompt must have the place \{request\}"):
        validate(ConstitutionStage, {"revision_prompt": "again"}, "x")


# ---- preferences by principles -------------------------------------------------------------------------------------


def test_each_pair_has_a_principle(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{i}", "chosen": f"long{i}", "rejected": "s"} for i in range(12)]
    write_jsonl(tmp_path / "in" / "preferences.jsonl", pairs)
    template = "{criterion}|{question}|{answer_a}|{answer_b}"

    def reply(body: dict[str, Any], _: int) -> str:
        _, _, a, b = body["messages"][0]["content"].split("|")
        return "[[A]]" if len(a) > len(b) else "[[B]]"

    server = chat_server(reply)
    judging = {"verdict": "text", "pair_prompt": template, "endpoint": {"url": server.url, "model": "m", **FAST}}
    settings = validate(JudgeStage, {"judging": judging, "principles": True}, "x")
    artifact.run("judge", settings, {"data": str(tmp_path / "in")}, tmp_path / "out")
    compares = {principle.compare for principle in load_constitution(None).principles}
    rows = read_rows(tmp_path / "out" / "verdicts.jsonl")
    drawn = [row["principle"] for row in rows]
    assert set(drawn) <= compares
    assert len(set(drawn)) > 3
    for row in rows:  # the same principle in both orders
        asked = [b["messages"][0]["content"].split("|") for b in server.bodies if row["prompt"][0]["content"] in str(b)]
        mine = [a for a in asked if a[1] == row["prompt"][0]["content"]]
        assert [a[0] for a in mine] == [row["principle"]] * 2
    other = settings.model_copy(update={"seed": 1})
    artifact.run("judge", other, {"data": str(tmp_path / "in")}, tmp_path / "other")
    assert [row["principle"] for row in read_rows(tmp_path / "other" / "verdicts.jsonl")] != drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"principles": True, "by": "scores"}, "principles compare two answers"),
        ({"principles": True, "judging": {"pair_prompt": "{question}{answer_a}{answer_b}"}}, r"a place \{criterion\}"),
    ],
)
def test_mistakes_about_principles(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(JudgeStage, changes, "x")


def test_a_constitution_that_nobody_reads(artifact: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "preferences.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    (tmp_path / "mine.yaml").write_text("name: x\n")
    inputs = {"data": str(tmp_path / "in"), "judge": str(artifact("sft")), "constitution": str(tmp_path / "mine.yaml")}
    with pytest.raises(RecipeError, match="is read with principles=true only"):
        artifact.run("judge", JudgeStage(), inputs, tmp_path / "out")


# ---- the whole way -------------------------------------------------------------------------------------------------


def test_sl_cai_and_rl_cai_by_their_recipes(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    """Answers, revisions, SFT; samples of the new model, preferences by principles, DPO."""
    server = chat_server(critic)
    words = [f"endpoint={{url: '{server.url}', model: m, retries: 0}}", "num_prompts=8", "precision=fp32"]
    words += ["max_new_tokens=8", "max_critique_tokens=6"]
    settings = load_settings(ConstitutionStage, find_recipe("constitution/sl_cai"), words, section="constitution")
    artifact.run("constitution", settings, inputs_of(artifact), tmp_path / "sl")
    sft = SFTSettings(updates=2, bin_tokens=192, precision="fp32")
    artifact.run("sft", sft, {"base": str(artifact("sft")), "data": str(tmp_path / "sl")}, tmp_path / "sft")

    def prefer(body: dict[str, Any], _: int) -> Any:
        a, b = (body["messages"][0]["content"].split(f"<answer_{x}>\n")[1].split("\n</")[0] for x in "ab")
        letter = "A" if len(a) > len(b) else "B"
        tokens = [{"token": letter, "logprob": -0.1}, {"token": "AB"[letter == "A"], "logprob": -2.0}]
        content = [{"token": letter, "top_logprobs": tokens}]
        return {"choices": [{"message": {"content": letter}, "logprobs": {"content": content}}]}

    judge = chat_server(prefer)
    words = [f"judging.endpoint={{url: '{judge.url}', model: m, retries: 0}}", "num_prompts=8", "precision=fp32"]
    settings_judge = load_settings(
        JudgeStage, find_recipe("judge/rl_cai"), [*words, "max_new_tokens=8"], section="judge"
    )
    inputs = {"base": str(tmp_path / "sft"), "data": str(artifact("data"))}
    manifest = artifact.run("judge", settings_judge, inputs, tmp_path / "rl")
    assert manifest["summary"]["pairs"] == len(read_preferences(tmp_path / "rl" / "preferences.jsonl")) > 2
    dpo = artifact.spec("dpo")[1].model_copy(update={"epochs": None, "updates": 2})
    trained = artifact.run("dpo", dpo, {"base": str(tmp_path / "sft"), "data": str(tmp_path / "rl")}, tmp_path / "dpo")
    assert trained["summary"]["updates"] == 2
