"""Reading run folders: finished, running, shared, damaged and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polm.errors import StoreError
from polm.report.load import load_run


def change_run_file(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((run_dir / "run.json").read_text())
    change(content)
    (run_dir / "run.json").write_text(json.dumps(content))


def get_folder(run_dir: Path, node_id: str) -> Path:
    nodes = json.loads((run_dir / "run.json").read_text())["nodes"]
    return run_dir / next(node["artifact"] for node in nodes if node["id"] == node_id)


def test_reads_a_finished_run(small_run: Path) -> None:
    run = load_run(small_run)
    assert run.name == "synthetic"
    assert run.seeds == (0, 1)
    assert len(run.nodes) == 2 * (3 + 9 + 2 * 11)
    assert {node.status for node in run.nodes} == {"done"}
    node = next(node for node in run.nodes if node.id == "s1/c1/remit/eval_rl")
    assert node.leaf == "eval_rl"
    assert node.evaluation is not None
    assert node.evaluation.results.format == "chat"
    assert len(node.evaluation.items) == 60
    result = node.evaluation.results.benchmarks["add"]
    assert result.pass_at_k == {4: 0.5}
    assert result.pass_at_1 is not None
    assert node.manifest is not None
    assert node.manifest.threads == 1
    midtrain = next(node for node in run.nodes if node.id == "s0/c1/remit/midtrain")
    assert len(midtrain.metrics) == 40
    assert midtrain.metrics[-1]["update"] == 40
    assert midtrain.spec.inputs["annotations"] == "s0/c1/remit/annotate"
    assert run.recipe_text.startswith("name:")


def test_without_details_items_and_metrics_stay_unread(small_run: Path) -> None:
    run = load_run(small_run, with_details=False)
    assert {node.status for node in run.nodes} == {"done"}
    assert all(not node.metrics for node in run.nodes)
    evaluation = next(node.evaluation for node in run.nodes if node.evaluation is not None)
    assert evaluation.items == ()
    assert evaluation.results.benchmarks["add"].num_items == 30


def test_unfinished_nodes_are_pending_and_a_torn_last_line_is_left_out(build_run: Callable[..., Path]) -> None:
    run_dir = build_run(until="midtrain")
    folder = get_folder(run_dir, "s0/c1/remit/sft")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"update": 1, "loss": 2.0}\n{"update": 2, "lo')
    nodes = {node.id: node for node in load_run(run_dir).nodes}
    assert nodes["s0/c1/remit/midtrain"].status == "done"
    assert nodes["s0/c1/remit/sft"].status == "pending"
    assert [line["update"] for line in nodes["s0/c1/remit/sft"].metrics] == [1]
    assert nodes["s0/c1/remit/eval_rl"].manifest is None


def test_a_torn_line_in_a_finished_stage_names_file_and_line(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()
    path = get_folder(run_dir, "s0/c0/ntp/midtrain") / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2, "lo')
    with pytest.raises(StoreError, match=r"metrics\.jsonl:2: expected JSON"):
        load_run(run_dir)


def test_the_control_of_a_later_cycle_is_shared(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()

    def add_copy(content: dict[str, Any]) -> None:
        first = next(node for node in content["nodes"] if node["id"] == "s0/c0/ntp/eval_rl")
        content["nodes"].append({**first, "id": "s0/c1/ntp/eval_rl", "cycle": 1})

    change_run_file(run_dir, add_copy)
    copy = load_run(run_dir).nodes[-1]
    assert copy.status == "shared"
    assert copy.evaluation is not None
    assert len(copy.evaluation.items) == 60


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"without run\.json"):
        load_run(tmp_path)
    with pytest.raises(StoreError, match="no folder"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text('{"name": "x"}')
    with pytest.raises(StoreError, match="field required at nodes"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("not json")
    with pytest.raises(StoreError, match="expected JSON"):
        load_run(tmp_path)


@pytest.mark.parametrize("artifact", ["../outside", "/etc", "store/../../outside"])
def test_an_artifact_outside_of_the_run_is_refused(build_run: Callable[..., Path], artifact: str) -> None:
    run_dir = build_run()
    change_run_file(run_dir, lambda content: content["nodes"][0].update(artifact=artifact))
    with pytest.raises(StoreError, match="inside the run folder"):
        load_run(run_dir)


def test_a_damaged_manifest_is_named(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()
    (get_folder(run_dir, "s0/data") / "manifest.json").write_text('{"stage": "data"}')
    with pytest.raises(StoreError, match=r"manifest\.json: field required at key"):
        load_run(run_dir)


def test_half_a_surrogate_pair_and_unicode_line_ends_survive(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()
    path = get_folder(run_dir, "s0/c0/ntp/eval_rl") / "items.jsonl"
    lines = path.read_text().split("\n")
    item = {**json.loads(lines[0]), "greedy_text": "one\u2028two", "prompt": "bad \ud800 half"}
    lines[0] = json.dumps(item, ensure_ascii=False).replace("\ud800", "\\ud800")
    path.write_text("\n".join(lines), encoding="utf-8")
    node = next(node for node in load_run(run_dir).nodes if node.id == "s0/c0/ntp/eval_rl")
    assert node.evaluation is not None
    assert node.evaluation.items[0].greedy_text == "one\u2028two"
    assert node.evaluation.items[0].prompt == "bad ? half"


def test_without_recipe_file_the_recipe_of_run_json_is_shown(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()
    (run_dir / "recipe.yaml").unlink()
    assert json.loads(load_run(run_dir).recipe_text)["cycles"] == 1
