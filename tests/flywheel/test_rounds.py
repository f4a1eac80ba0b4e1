"""Self-rewarding iterations: the graph, its recipe, and a run of it that is killed and goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polm.apps.show import print_plan
from polm.config import find_recipe, recipe_folder, validate
from polm.data.readers import read_preferences, write_jsonl
from polm.errors import RecipeError
from polm.flywheel.kinds import build_any_graph, find_kind, load_recipe
from polm.flywheel.runner import Plan, build_plan
from polm.flywheel.store import execute, read_manifest
from polm.models.loading import save_model
from polm.recipe import Recipe
from polm.recipe_judge import RUBRICS
from polm.recipe_rounds import SelfRewardingRecipe
from polm.report.html import build_report
from polm.report.load import load_run
from polm.report.sections_judges import COLUMNS, build_judges_table, build_row
from polm.stages.common import Context

LENGTH: dict[str, Any] = {"bin_tokens": 512, "precision": "fp32", "optimizer": {"learning_rate": 0.003}}
RECIPE: dict[str, Any] = {
    "kind": "self_rewarding",
    "name": "rounds",
    "iterations": 2,
    "judge": {
        **{"num_prompts": 6, "samples": 4, "max_new_tokens": 8, "precision": "fp32"},
        "judging": {"verdict": "logprobs", "score_prompt": "{question}|{answer}|"},
    },
    "dpo": {**LENGTH, "updates": 3, "checkpoint_every": 1},
    "eval": {"samples": 0, "max_new_tokens": 4, "precision": "fp32"},
}


def build(**changes: Any) -> SelfRewardingRecipe:
    return validate(SelfRewardingRecipe, {**RECIPE, "base": "MODEL", "data": {"source": "demo"}, **changes}, "x")


def test_the_chain() -> None:
    """Each iteration's model answers, judges itself and is trained; other prompts each time."""
    recipe = build(iterations=3, seeds=[0, 1], sft={"updates": 1})
    graph = build_any_graph(recipe)
    assert len(graph) == 2 * (1 + 2 + 3 * 3)
    assert graph["s0/c0/self/sft"].external == {"base": "MODEL"}
    assert dict(graph["s0/c1/self/judge"].inputs) == {
        "data": "s0/data",
        "base": "s0/c0/self/sft",
        "judge": "s0/c0/self/sft",
    }
    assert dict(graph["s1/c3/self/judge"].inputs)["judge"] == "s1/c2/self/dpo"
    assert dict(graph["s1/c3/self/dpo"].inputs) == {"data": "s1/c3/self/judge", "base": "s1/c2/self/dpo"}
    assert dict(graph["s0/c2/self/eval_dpo"].inputs) == {"data": "s0/data", "model": "s0/c2/self/dpo"}
    seeds = [node.settings.seed for node in graph.values() if node.stage == "judge"]  # type: ignore[attr-defined]
    assert len(set(seeds)) == 6
    assert graph["s0/data"].settings.needs == ("prompts.jsonl", "sft.jsonl", "benchmarks")  # type: ignore[attr-defined]
    places = list(graph)
    for node in graph.values():
        assert all(places.index(source) < places.index(node.id) for source in node.inputs.values())


def test_without_sft_and_eval() -> None:
    graph = build_any_graph(build(iterations=1, eval=None))
    assert list(graph) == ["s0/data", "s0/c1/self/judge", "s0/c1/self/dpo"]
    assert dict(graph["s0/c1/self/judge"].external) == {"base": "MODEL", "judge": "MODEL"}
    assert list(build_any_graph(build(iterations=1)))[1] == "s0/c0/self/eval_start"


def test_what_the_model_asks_itself() -> None:
    """Unless the recipe says otherwise: additive points, written, three votes."""
    judging = build(judge={"num_prompts": 5}).judge.judging
    assert (judging.verdict, judging.votes, judging.scale) == ("text", 3, (0, 5))
    assert judging.score_prompt == RUBRICS["additive"]["text"]
    assert SelfRewardingRecipe.model_fields["judge"].get_default(call_default_factory=True).judging == judging
    assert build(judge={"judging": {"votes": 1}}).judge.judging.temperature == 0.7
    graded = build(judge={"judging": {"verdict": "logprobs"}}).judge
    assert (graded.judging.votes, graded.judging.scale, graded.by, graded.mode) == (1, (0, 5), "scores", "sample")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": {"mode": "relabel"}}, "judge.mode must be sample"),
        ({"judge": {"judging": {"endpoint": {"url": "http://x/v1", "model": "m"}}}}, "the model itself is the judge"),
        ({"judge": {"judging": {"scale": [1, 5]}}}, r"rubric: additive has five points, so its scale is \[0, 5\]"),
        ({"seeds": [0, 0]}, "give at least one, each once"),
        ({"base": ""}, "base: found ''"),
        ({"iteration": 2}, "unknown key 'iteration'; did you mean 'iterations'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(**changes)


def test_kinds(tmp_path: Path) -> None:
    assert find_kind({}, "x") is Recipe
    (tmp_path / "r.yaml").write_text("kind: flywheels\nname: x\n")
    with pytest.raises(RecipeError, match=r"r.yaml: kind: found 'flywheels'; there is self_rewarding"):
        load_recipe(tmp_path / "r.yaml")
    shipped = load_recipe(find_recipe("self_rewarding"), ["base=M", "data.path=F"])
    assert isinstance(shipped, SelfRewardingRecipe)
    graph = build_any_graph(shipped)
    assert len(graph) == 1 + 2 * shipped.iterations
    print_plan(Console(quiet=True), build_plan(shipped, graph, tmp_path), 1)
    kinds = {path.stem for path in recipe_folder().glob("*.yaml") if "\nkind: " in path.read_text()}
    assert kinds == {"self_rewarding"}


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(build_tiny: Any, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that knows letters, and a folder of prompts with a benchmark."""
    folder = tmp_path_factory.mktemp("given")
    save_model(build_tiny(len(byte_tokenizer), max_positions=256), byte_tokenizer, folder / "model")
    write_jsonl(folder / "data" / "prompts.jsonl", [{"prompt": f"say {letter}"} for letter in "abcdefghij"])
    item = {"id": "1", "prompt": "say a", "answer": "a", "solution": "#### a", "verifier": "exact"}
    write_jsonl(folder / "data" / "benchmarks" / "say.jsonl", [item])
    return {**RECIPE, "base": str(folder / "model"), "data": {"source": "folder", "path": str(folder / "data")}}


def plan_of(given: dict[str, Any], run_dir: Path) -> Plan:
    recipe = validate(SelfRewardingRecipe, given, "the test")
    return build_plan(recipe, build_any_graph(recipe), run_dir)


@pytest.fixture(scope="module")
def alone(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Stage after stage in this process, undisturbed."""
    plan = plan_of(given, tmp_path_factory.mktemp("alone"))
    for node_id in plan.graph:
        work = plan.work(node_id)
        execute(work, Context(work.folder, work.inputs, say=lambda _: None))
    return plan


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in path.read_text(encoding="utf-8").splitlines()]


def test_two_iterations(alone: Plan) -> None:
    prompts = []
    for iteration in (1, 2):
        folder = alone.folder(f"s0/c{iteration}/self/judge")
        manifest = read_manifest(folder)
        pairs = read_preferences(folder / "preferences.jsonl")
        assert manifest["summary"]["pairs"] == len(pairs) >= 4
        grades = {
            (row["prompt"][0]["content"], row["answer"]): row["grade"] for row in read_rows(folder / "verdicts.jsonl")
        }
        for pair in pairs:
            asked = pair.prompt[0]["content"]
            mine = [grade for (prompt, _), grade in grades.items() if prompt == asked]
            assert (grades[asked, pair.chosen], grades[asked, pair.rejected]) == (max(mine), min(mine))
        prompts.append([row["prompt"][0]["content"] for row in read_rows(folder / "samples.jsonl")])
        trained = read_manifest(alone.folder(f"s0/c{iteration}/self/dpo"))
        assert trained["summary"]["updates"] == 3
    assert prompts[0] != prompts[1]
    assert len(prompts[0]) == len(prompts[1]) == 6
    # The second iteration's judge is the first one's model: it answers otherwise.
    replies = {len(list(alone.folder(f"s0/c{i}/self/judge").parent.glob(".replies/*/*.json"))) for i in (1, 2)}
    graded = sum(read_manifest(alone.folder(f"s0/c{i}/self/judge"))["ledger"]["graded"] for i in (1, 2))
    assert replies == {graded}


def wait_for_lock(path: Path) -> None:
    """A forked worker holds its parent's lock until it has died too."""
    deadline = time.monotonic() + 30
    while path.is_file() and time.monotonic() < deadline:
        with path.open() as handle, contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(
    given: dict[str, Any], alone: Plan, hash_files: Any, start_child: Any, tmp_path: Path
) -> None:
    """Killed by the clock, again and again, each time a little later."""
    order = {"run": given, "run_dir": str(tmp_path / "run"), "report": str(tmp_path / "report.json"), "fork": True}
    plan = plan_of(given, tmp_path / "run")
    killed = 0
    for attempt in range(20):
        child = start_child(**order)
        child.join(0.3 * 1.4**attempt)
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        wait_for_lock(tmp_path / "run" / ".lock")
        killed += 1
    assert killed >= 2
    assert json.loads((tmp_path / "report.json").read_text())["error"] == ""
    for node_id in plan.graph:
        assert hash_files(plan.folder(node_id)) == hash_files(alone.folder(node_id)), node_id
        for name in ("preferences.jsonl", "feedback.jsonl", "verdicts.jsonl", "results.json"):
            here, there = plan.folder(node_id) / name, alone.folder(node_id) / name
            assert here.is_file() == there.is_file()
            assert not here.is_file() or here.read_text() == there.read_text(), (node_id, name)
    check_the_report(tmp_path / "run")


def check_the_report(run_dir: Path) -> None:
    """The tables know judges: labels, grades, what has no verdict."""
    run = load_run(run_dir)
    nodes = {node.id: node for node in run.nodes}
    row = dict(zip((name for name, _ in COLUMNS), build_row(nodes["s0/c1/self/judge"]), strict=True))
    assert row["labels"].isdigit()
    assert row["no verdict, %"] == "0.0"
    assert float(row["mean grade"]) > 0
    assert row["first place, %"] == row["agreement, %"] == "–"
    table = build_judges_table(run)
    assert table is not None
    assert table.row_count == 2
    page = build_report(run)
    assert 'id="judges"' in page
    assert "s0/c2/self/judge" in page
