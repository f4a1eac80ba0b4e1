"""`polm judge`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from polm.config import find_recipe, load_settings, recipe_folder, validate
from polm.data.readers import read_feedback, read_preferences, read_prompt_messages, write_jsonl
from polm.errors import DataError, RecipeError, StoreError, UserError
from polm.evals.statistics import compute_wilson_interval
from polm.models.loading import save_model
from polm.recipe import ModelShape, OptimizerSettings, SFTSettings
from polm.recipe_judge import JudgeSettings, JudgeStage
from polm.stages import judge

FAST = {"first_wait_seconds": 0.005, "retries": 1, "timeout_seconds": 20.0}
SHORT = {"pair_prompt": "{question}|{answer_a}|{answer_b}", "score_prompt": "{question}|{answer}"}


def judged_by(server: Any, **changes: Any) -> dict[str, Any]:
    return {"verdict": "text", "endpoint": {"url": server.url, "model": "m", **FAST}, **SHORT, **changes}


def write_pairs(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [{"prompt": f"q{i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(pairs)]
    write_jsonl(folder / "preferences.jsonl", rows)
    return folder


def prefer_longer(body: dict[str, Any], _: int) -> str:
    _, a, b = body["messages"][0]["content"].split("|")
    return "[[C]]" if len(a) == len(b) else f"[[{'A' if len(a) > len(b) else 'B'}]]"


def grade_length(body: dict[str, Any], _: int) -> str:
    return f"[[{min(5, max(1, len(body['messages'][0]['content'].split('|')[-1])))}]]"


def test_relabelling_pairs(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    """A judge that likes length, on pairs of which two of three are labelled so."""
    data = write_pairs(tmp_path / "in", [("long", "s"), ("longer", "s"), ("s", "long"), ("ab", "cd"), ("x", "x")])
    server = chat_server(prefer_longer)
    settings = JudgeStage(judging=judged_by(server))
    manifest = artifact.run("judge", settings, {"data": str(data)}, tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "preferences.jsonl")
    assert [(row["chosen"], row["rejected"], row["probability"]) for row in rows] == [
        ("long", "s", 1.0),
        ("longer", "s", 1.0),
        ("long", "s", 1.0),
    ]
    assert [pair.prompt[0]["content"] for pair in read_preferences(tmp_path / "out" / "preferences.jsonl")] == [
        "q0",
        "q1",
        "q2",
    ]
    summary, ledger = manifest["summary"], manifest["ledger"]
    assert ledger == {"pairs": 5, "equal": 1, "preferred": 3, "tied": 1}
    expected = compute_wilson_interval(2, 3)
    assert (summary["agreement"], summary["agreement/of"]) == (pytest.approx(2 / 3), 3)
    assert (summary["agreement/low95"], summary["agreement/high95"]) == (expected.low95, expected.high95)
    assert (summary["first_position"], summary["first_position/of"]) == (0.5, 6)
    assert (summary["inconsistent"], summary["inconsistent/of"]) == (0.0, 4)
    verdicts = read_rows(tmp_path / "out" / "verdicts.jsonl")
    assert [row["status"] for row in verdicts] == ["ranked"] * 4
    assert verdicts[0]["said"] == ["[[A]]", "[[B]]"]
    assert len(server.bodies) == 8
    assert not [name for name in manifest["files"] if "replies" in name]


def test_what_has_no_verdict_is_counted(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    def reply(body: dict[str, Any], number: int) -> Any:
        text = body["messages"][0]["content"]
        if "slow" in text:
            time.sleep(2.5)
        if "broken" in text:
            return 500, {}, b"out of order"
        return "who knows" if "odd" in text else "[[A]]" if "same" in text else prefer_longer(body, number)

    pairs = [
        ("slow", "s"),
        ("broken", "s"),
        ("odd", "s"),
        ("same", "s"),
        ("fine", "s"),
        ("finer", "s"),
        ("finest", "s"),
    ]
    data = write_pairs(tmp_path / "in", pairs)
    impatient = {"url": chat_server(reply).url, "model": "m", **FAST, "timeout_seconds": 1.5}
    judging = {"verdict": "text", "endpoint": impatient, **SHORT}
    settings = JudgeStage(judging={**judging, "orders": "agree"}, max_failed=0.3)
    manifest = artifact.run("judge", settings, {"data": str(data)}, tmp_path / "out")
    assert manifest["ledger"] == {
        **{"pairs": 7, "equal": 0, "preferred": 3, "inconsistent": 1},
        **{"timeout": 1, "error": 1, "unparsed": 1},
    }
    # Likewise where only the mean of both counts: a judge that takes the first place is undecided.
    mean = JudgeStage(judging=judging, max_failed=0.3)
    ledger = artifact.run("judge", mean, {"data": str(data)}, tmp_path / "mean")["ledger"]
    assert (ledger["tied"], ledger["preferred"]) == (1, 3)


def test_too_many_failures_are_no_labels(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    """And the same command goes on where it stopped."""
    data = write_pairs(tmp_path / "in", [(f"long{i}", "s") for i in range(6)])
    healthy = False

    def reply(body: dict[str, Any], number: int) -> Any:
        is_down = not healthy and "long0" not in str(body)
        return (503, {}, b"restarting") if is_down else prefer_longer(body, number)

    server = chat_server(reply)
    settings = JudgeStage(judging=judged_by(server))
    with pytest.raises(
        UserError, match=r"5 of 6 questions have no reply \(status 503: restarting\); max_failed is 0.1"
    ):
        artifact.run("judge", settings, {"data": str(data)}, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    healthy = True
    before = len(server.bodies)
    manifest = artifact.run("judge", settings, {"data": str(data)}, tmp_path / "out")
    assert manifest["ledger"]["preferred"] == 6
    assert len(server.bodies) == before + 10
    # Other settings that ask the same questions: nothing is asked.
    artifact.run("judge", settings.model_copy(update={"margin": 0.4}), {"data": str(data)}, tmp_path / "again")
    assert len(server.bodies) == before + 10


def test_lost_votes_are_counted(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    """One vote of three on each question holds no verdict; too many without a reply stop the stage, though every
    question has a verdict."""
    data = write_pairs(tmp_path / "in", [(f"long{i}", "s") for i in range(3)])
    seen: dict[str, int] = {}

    def reply(body: dict[str, Any], number: int) -> Any:
        text = body["messages"][0]["content"]
        seen[text] = seen.get(text, 0) + 1
        return lost if seen[text] == 1 else prefer_longer(body, number)

    lost: Any = "hm"
    judging = judged_by(chat_server(reply), votes=3, temperature=0.7)
    settings = JudgeStage(judging=judging)
    ledger = artifact.run("judge", settings, {"data": str(data)}, tmp_path / "out")["ledger"]
    assert ledger == {"pairs": 3, "equal": 0, "preferred": 3, "votes": 18, "votes_unparsed": 6}
    row = read_rows(tmp_path / "out" / "verdicts.jsonl")[0]
    assert (row["status"], row["note"]) == ("ranked", "of 3 votes 1 unparsed; of 3 votes 1 unparsed")
    seen.clear()
    lost = 400, {}, b"too long"
    with pytest.raises(
        UserError, match=r"6 of 18 votes have no reply \(6 of 18 votes, the first: status 400: too long"
    ):
        artifact.run("judge", settings, {"data": str(data)}, tmp_path / "other" / "out")
    more = settings.model_copy(update={"max_failed": 0.5})
    seen.clear()
    ledger = artifact.run("judge", more, {"data": str(data)}, tmp_path / "third" / "out")["ledger"]
    assert ledger == {"pairs": 3, "equal": 0, "preferred": 3, "votes": 18, "votes_error": 6}


@pytest.mark.parametrize("votes", [{}, {"votes": 3, "temperature": 0.7}])
def test_lost_grades_are_counted(votes: dict[str, Any], artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    """Grades, of given answers and of pairs."""
    replies = iter(range(100))
    server = chat_server(lambda body, n: "hm" if votes and next(replies) % 3 == 0 else grade_length(body, n))
    judging = judged_by(server, **votes)
    judging["endpoint"]["concurrency"] = 1
    rows = [{"prompt": "q", "completion": text, "label": True} for text in ("a", "abc", "abcd")]
    write_jsonl(tmp_path / "in" / "feedback.jsonl", rows)
    settings = JudgeStage(judging=judging)
    ledger = artifact.run("judge", settings, {"data": str(tmp_path / "in")}, tmp_path / "out")["ledger"]
    lost = {"votes": 9, "votes_unparsed": 3} if votes else {}
    assert ledger == {"answers": 3, "graded": 3, **lost}
    data = write_pairs(tmp_path / "pairs", [("long", "s")])
    by_scores = settings.model_copy(update={"by": "scores"})
    ledger = artifact.run("judge", by_scores, {"data": str(data)}, tmp_path / "other" / "out")["ledger"]
    lost = {"votes": 6, "votes_unparsed": 2} if votes else {}
    assert ledger == {"pairs": 1, "equal": 0, "preferred": 1, **lost}


def test_pairs_whose_prompts_differ(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    """Named with file and line, or left out and counted in dpo's words."""
    talk = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]  # noqa: E731
    rows = [{"prompt": "q", "chosen": a, "rejected": "s"} for a in ("long", "longer")]
    rows.insert(1, {"chosen": talk("3 + 3", "6"), "rejected": talk("2 + 2", "5")})  # type: ignore[dict-item]
    write_jsonl(tmp_path / "in" / "preferences.jsonl", rows)
    settings, inputs = JudgeStage(judging=judged_by(chat_server(prefer_longer))), {"data": str(tmp_path / "in")}
    with pytest.raises(DataError, match=r"preferences.jsonl:2: chosen must end in .* set bad_records: drop"):
        artifact.run("judge", settings, inputs, tmp_path / "refused")
    dropping = settings.model_copy(update={"bad_records": "drop"})
    ledger = artifact.run("judge", dropping, inputs, tmp_path / "out")["ledger"]
    dropped = {"read": 3, "dropped": 1, "dropped_prompts_differ": 1}
    assert ledger == {**dropped, "pairs": 2, "equal": 0, "preferred": 2}
    assert len(read_rows(tmp_path / "out" / "preferences.jsonl")) == 2


def test_no_preference_at_all_says_why(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "in", [("long", "s")])
    settings = JudgeStage(judging=judged_by(chat_server(lambda *_: "hm")))
    with pytest.raises(DataError, match=r"preferred no answer \(pairs 1, unparsed 1\); look at verdicts.jsonl"):
        artifact.run("judge", settings, {"data": str(data)}, tmp_path / "out")


def test_relabelling_answers(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    labels = [("a", False), ("abcd", True), ("abcde", False), ("abc", True)]
    rows = [{"prompt": "q", "completion": text, "label": label} for text, label in labels]
    write_jsonl(tmp_path / "in" / "feedback.jsonl", rows)
    settings = JudgeStage(judging=judged_by(chat_server(grade_length)))
    manifest = artifact.run("judge", settings, {"data": str(tmp_path / "in")}, tmp_path / "out")
    found = read_feedback(tmp_path / "out" / "feedback.jsonl")
    assert [(f.completion, f.label) for f in found] == [("a", False), ("abcd", True), ("abcde", True), ("abc", False)]
    assert [row["grade"] for row in read_rows(tmp_path / "out" / "feedback.jsonl")] == [0.0, 0.75, 1.0, 0.5]
    assert (manifest["summary"]["agreement"], manifest["summary"]["grade"]) == (0.5, 3.25)
    assert manifest["ledger"] == {"answers": 4, "graded": 4}


def test_pairs_by_scores(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "in", [("long", "s"), ("s", "lo"), ("abcdef", "abcdefgh")])
    settings = JudgeStage(judging=judged_by(chat_server(grade_length)), by="scores")
    manifest = artifact.run("judge", settings, {"data": str(data)}, tmp_path / "out")
    assert manifest["ledger"] == {"pairs": 3, "equal": 0, "preferred": 2, "tied": 1}
    assert manifest["summary"]["agreement"] == 0.5
    assert "first_position" not in manifest["summary"]


SAMPLE: dict[str, Any] = {"mode": "sample", "num_prompts": 8, "samples": 4, "max_new_tokens": 8, "precision": "fp32"}


def test_sampled_pairs(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    inputs = {"data": str(artifact("data")), "base": str(artifact("sft"))}
    settings = JudgeStage(judging=judged_by(chat_server(prefer_longer)), pairs_per_prompt=2, **SAMPLE)
    manifest = artifact.run("judge", settings, inputs, tmp_path / "out")
    samples = {row["prompt"][0]["content"]: row["answers"] for row in read_rows(tmp_path / "out" / "samples.jsonl")}
    prompts = [messages[0]["content"] for messages in read_prompt_messages(artifact("data") / "prompts.jsonl")]
    assert set(samples) <= set(prompts)
    pairs = read_preferences(tmp_path / "out" / "preferences.jsonl")
    assert len(pairs) == manifest["summary"]["pairs"] > 3
    for pair in pairs:
        mine = samples[pair.prompt[0]["content"]]
        assert {pair.chosen, pair.rejected} <= set(mine)
        assert len(pair.chosen) > len(pair.rejected)
    ledger = manifest["ledger"]
    assert (ledger["prompts"], ledger["samples"]) == (8, 32)
    assert ledger["pairs"] == ledger["preferred"] + ledger.get("tied", 0)
    # The same samples and questions another time.
    again = artifact.run("judge", settings, inputs, tmp_path / "again")
    assert (tmp_path / "again" / "preferences.jsonl").read_text() == (
        tmp_path / "out" / "preferences.jsonl"
    ).read_text()
    assert again["ledger"] == ledger


def test_sampled_and_graded(artifact: Any, chat_server: Any, read_rows: Any, tmp_path: Path) -> None:
    """The best over the worst, and every answer as feedback."""
    inputs = {"data": str(artifact("data")), "base": str(artifact("sft"))}
    grade = lambda text: 1 + len(text) % 5  # noqa: E731
    server = chat_server(lambda body, _: f"[[{grade(body['messages'][0]['content'].split('|')[-1])}]]")
    settings = JudgeStage(judging=judged_by(server, scale=(1, 5)), by="scores", **SAMPLE)
    manifest = artifact.run("judge", settings, inputs, tmp_path / "out")
    samples = {row["prompt"][0]["content"]: row["answers"] for row in read_rows(tmp_path / "out" / "samples.jsonl")}
    for pair in read_preferences(tmp_path / "out" / "preferences.jsonl"):
        grades = [grade(text) for text in samples[pair.prompt[0]["content"]] if text.strip()]
        assert (grade(pair.chosen), grade(pair.rejected)) == (max(grades), min(grades))
    feedback = read_feedback(tmp_path / "out" / "feedback.jsonl")
    assert len(feedback) == manifest["ledger"]["graded"] == manifest["summary"]["answers"]
    assert all(f.label == (grade(f.completion) > 3) for f in feedback)
    ledger = manifest["ledger"]
    assert ledger["samples"] == ledger["graded"] + ledger["answers_empty"] + ledger["answers_equal"]


def test_a_killed_stage_keeps_its_samples(artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    """The server dies under it: the next run neither samples again nor asks again what was answered."""
    inputs = {"data": str(artifact("data")), "base": str(artifact("sft"))}
    down = True

    def reply(body: dict[str, Any], number: int) -> Any:
        return (401, {}, b"who are you") if down and number >= 4 else prefer_longer(body, number)

    server = chat_server(reply)
    settings = JudgeStage(judging=judged_by(server), **SAMPLE)
    with pytest.raises(UserError, match="refuses the model"):
        artifact.run("judge", settings, inputs, tmp_path / "out")
    marker = (tmp_path / "out" / "samples.jsonl").stat().st_mtime_ns
    kept = len(list((tmp_path / ".replies").rglob("*.json")))
    assert kept == 4
    down = False
    before = len(server.bodies)
    manifest = artifact.run("judge", settings, inputs, tmp_path / "out")
    assert (tmp_path / "out" / "samples.jsonl").stat().st_mtime_ns == marker
    assert len(server.bodies) - before == 2 * manifest["ledger"]["pairs"] - kept
    assert manifest["summary"]["pairs"] == manifest["ledger"]["preferred"]


def test_samples_may_hold_any_character(
    artifact: Any, chat_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that goes on cuts samples.jsonl at \\n alone; a line that is torn is said with its cure."""
    texts = ["short\u2028", "the longer one\x85\u2029"]
    monkeypatch.setattr(
        judge, "answer_messages", lambda _s, _c, _b, prompts, **_: [(messages, texts) for messages in prompts]
    )
    inputs = {"data": str(artifact("data")), "base": str(artifact("sft"))}
    down = JudgeStage(judging=judged_by(chat_server(lambda *_: (401, {}, b"no"))), **SAMPLE)
    with pytest.raises(UserError, match="refuses the model"):
        artifact.run("judge", down, inputs, tmp_path / "out")
    file = tmp_path / "out" / "samples.jsonl"
    content = file.read_bytes()
    # The same settings but for where the judge is, which no key depends on.
    up = JudgeStage(judging=judged_by(chat_server(prefer_longer)), **SAMPLE)
    file.write_bytes(content[:-9])
    with pytest.raises(StoreError, match=r"samples\.jsonl:\d+: not valid JSON.*remove it and run the same command"):
        artifact.run("judge", up, inputs, tmp_path / "out")
    file.write_bytes(content)
    artifact.run("judge", up, inputs, tmp_path / "out")
    assert {pair.chosen for pair in read_preferences(tmp_path / "out" / "preferences.jsonl")} == {texts[1]}


# ---- a local judge -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_judge(artifact: Any, build_tiny: Any, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned in seconds which of two letters is the better one, and to say so."""
    folder = tmp_path_factory.mktemp("judge")
    shape = ModelShape(hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2, intermediate_size=64)
    model = build_tiny(len(byte_tokenizer), **{**shape.model_dump(), "max_positions": 96}, spread=1.0)
    save_model(model, byte_tokenizer, folder / "base" / "model")
    rows = []
    for question in "qrst":
        for a, b in (("g", "b"), ("b", "g")):
            asked = f"{question}|{a}|{b}"
            rows.append({"prompt": asked, "completion": f"[[{'A' if a == 'g' else 'B'}]]"})
        rows += [{"prompt": f"{question}|{x}", "completion": f"[[{5 if x == 'g' else 1}]]"} for x in "gb"]
    write_jsonl(folder / "data" / "sft.jsonl", rows)
    settings = SFTSettings(
        updates=150,
        bin_tokens=512,
        precision="fp32",
        optimizer=OptimizerSettings(kind="adamw", learning_rate=0.01, beta2=0.98),
    )
    inputs = {"base": str(folder / "base"), "data": str(folder / "data")}
    artifact.run("sft", settings, inputs, folder / "judge")
    return folder / "judge"


def letters(folder: Path) -> Path:
    write_jsonl(folder / "preferences.jsonl", [{"prompt": q, "chosen": "g", "rejected": "b"} for q in "qrst"])
    return folder


def test_a_local_judge_that_writes(artifact: Any, local_judge: Path, tmp_path: Path) -> None:
    settings = JudgeStage(judging=JudgeSettings(verdict="text", max_new_tokens=8, **SHORT), precision="fp32")
    inputs = {"data": str(letters(tmp_path / "in")), "judge": str(local_judge)}
    manifest = artifact.run("judge", settings, inputs, tmp_path / "out")
    assert manifest["ledger"] == {"pairs": 4, "equal": 0, "preferred": 4}
    summary = manifest["summary"]
    assert (summary["agreement"], summary["inconsistent"], summary["first_position"]) == (1.0, 0.0, 0.5)
    graded = settings.model_copy(update={"by": "scores"})
    assert artifact.run("judge", graded, inputs, tmp_path / "graded")["summary"]["agreement"] == 1.0


def test_a_local_judge_by_likelihood(artifact: Any, local_judge: Path, read_rows: Any, tmp_path: Path) -> None:
    """It never saw the bare letter as a reply; of the two it still holds the right one likelier."""
    judging = JudgeSettings(**SHORT)
    settings = JudgeStage(judging=judging, precision="fp32")
    inputs = {"data": str(letters(tmp_path / "in")), "judge": str(local_judge)}
    manifest = artifact.run("judge", settings, inputs, tmp_path / "out")
    assert manifest["summary"]["verdict_mass"] < 0.5  # and says that it meant to reply something else
    rows = read_rows(tmp_path / "out" / "verdicts.jsonl")
    assert all(0 <= p <= 1 for row in rows for p in row["first"])
    assert manifest["ledger"]["preferred"] + manifest["ledger"].get("tied", 0) == 4


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({}, (), r"give judge=MODEL \(a local model\) or the setting endpoint \(a server\), not both: neither"),
        ({"judging": {"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}}}, ("judge",), "beside endpoint"),
        ({"mode": "sample"}, ("judge",), "mode: sample needs base=MODEL"),
        ({}, ("judge", "base"), "mode: relabel samples no answers; found base="),
    ],
)
def test_mistakes(artifact: Any, tmp_path: Path, changes: dict[str, Any], inputs: Any, message: str) -> None:
    data = write_pairs(tmp_path / "in", [("a", "b")])
    given = {"data": str(data), **{role: str(artifact("sft")) for role in inputs}}
    with pytest.raises(RecipeError, match=message):
        artifact.run("judge", validate(JudgeStage, changes, "x"), given, tmp_path / "out")


def test_prompts_must_end_with_the_user(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "fine"}, {"prompt": messages}])
    with pytest.raises(DataError, match=r"prompts.jsonl:2: a prompt must end with the user's message"):
        read_prompt_messages(tmp_path / "prompts.jsonl")
    write_jsonl(tmp_path / "prompts.jsonl", [{"question": "fine"}])
    with pytest.raises(DataError, match=r"prompts.jsonl:1: no column prompt"):
        read_prompt_messages(tmp_path / "prompts.jsonl")


def test_the_key_is_nowhere_in_the_artifact(
    artifact: Any, chat_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-value")
    data = write_pairs(tmp_path / "in", [("long", "s"), ("odd", "s")])

    def reply(body: dict[str, Any], number: int) -> Any:
        return (400, {}, b"your key sk-secret-value") if "odd" in str(body) else prefer_longer(body, number)

    server = chat_server(reply)
    judging = judged_by(server)
    judging["endpoint"]["api_key_env"] = "MY_KEY"
    artifact.run("judge", JudgeStage(judging=judging, max_failed=0.5), {"data": str(data)}, tmp_path / "out")
    assert server.headers[0]["Authorization"] == "Bearer sk-secret-value"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-secret-value" not in path.read_bytes(), path
    assert "MY_KEY" not in json.dumps(json.loads((tmp_path / "out" / "manifest.json").read_text())["config"])


# ---- shipped recipes -----------------------------------------------------------------------------------------------

SHIPPED = sorted(path.stem for path in (recipe_folder() / "judge").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run(name: str, artifact: Any, chat_server: Any, tmp_path: Path) -> None:
    """With their own templates, on a server in place of theirs or of the local judge."""
    server = chat_server(lambda body, _: answer_anything(body))
    words = [f"judging.endpoint={{url: '{server.url}', model: m, retries: 0}}", "precision=fp32"]
    words += ["num_prompts=6", "max_new_tokens=8"]
    settings = load_settings(JudgeStage, find_recipe(f"judge/{name}"), words, section="judge")
    inputs = {"data": str(artifact("data")), "base": str(artifact("sft"))}
    if settings.mode == "relabel":
        inputs = {"data": str(artifact("pairs"))}
    manifest = artifact.run("judge", settings, inputs, tmp_path / "out")
    assert manifest["summary"]["pairs"] > 0
    assert read_preferences(tmp_path / "out" / "preferences.jsonl")


def answer_anything(body: dict[str, Any]) -> Any:
    """A judge with a taste for lengths, whatever template it is asked with."""
    text = body["messages"][0]["content"]
    sides = [side for _, side in re.findall(r"<(answer_?[ab]?)>\n(.*?)\n</\1>", text, flags=re.DOTALL)]
    choice = str(1 + len(sides[0]) % 5) if len(sides) == 1 else "A" if len(sides[0]) > len(sides[1]) else "B"
    tokens = [{"token": choice, "logprob": -0.1}]
    message = {"role": "assistant", "content": f"[[{choice}]]"}
    return {"choices": [{"message": message, "logprobs": {"content": [{"token": choice, "top_logprobs": tokens}]}}]}
