"""A whole graph: killed at any time and run again, one owner at a time, nobody left behind, and failures that end."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import yaml

from polm.config import validate
from polm.errors import DataError, StoreError, UserError
from polm.flywheel import runner
from polm.flywheel.graph import build_graph
from polm.flywheel.runner import Event, Plan, build_plan, last_line, progress_file, run_graph
from polm.flywheel.store import execute, is_finished, read_manifest
from polm.recipe import Recipe
from polm.stages.common import Context

LENGTH = {"bin_tokens": 192, "precision": "fp32"}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0, 1],
    "cycles": 1,
    # Two arms that agree are one artifact.
    "arms": {
        "remit": {"changes": {"weighting": "remit", "eps": 0.8}},
        "twin": {"changes": {"weighting": "remit", "eps": 0.8}},
    },
    "data": {
        "source": "demo",
        "num_pretrain_docs": 120,
        "num_midtrain_docs": 30,
        "num_sft": 16,
        "num_prompts": 8,
        "num_items": 1,
    },
    "tokenizer": {"kind": "word", "vocab_size": 200},
    "pretrain": {
        **LENGTH,
        "updates": 40,
        "checkpoint_every": 4,
        "model": {
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "max_positions": 192,
        },
    },
    "midtrain": {**LENGTH, "updates": 6, "checkpoint_every": 2},
    "sft": {**LENGTH, "updates": 4},
    "pairs": None,
    "dpo": None,
    "grpo": {**LENGTH, "updates": 2, "prompts_per_rollout": 2, "samples": 2, "max_new_tokens": 4},
    "eval": {"samples": 0, "max_new_tokens": 4, "precision": "fp32", "num_items": 1, "benchmarks": ["add"]},
}


def plan_of(run_dir: Path, **changes: Any) -> Plan:
    recipe = validate(Recipe, {**RECIPE, **changes}, "the test")
    return build_plan(recipe, build_graph(recipe), run_dir)


def order_of(tmp_path: Path, fork: bool = True, **changes: Any) -> dict[str, Any]:
    return {
        "run": {**RECIPE, **changes},
        "run_dir": str(tmp_path / "run"),
        "report": str(tmp_path / "report.json"),
        "fork": fork,
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, hash_files: Any) -> dict[str, dict[str, str]]:
    """What each node's folder holds when stage after stage runs in this process, undisturbed."""
    plan = plan_of(tmp_path_factory.mktemp("alone"))
    for node_id in plan.graph:
        work = plan.work(node_id)
        execute(work, Context(work.folder, work.inputs, say=lambda _: None))
    return content(plan, hash_files)


def content(plan: Plan, hash_files: Any) -> dict[str, dict[str, str]]:
    found = {}
    for node_id in plan.graph:
        folder = plan.folder(node_id)
        found[node_id] = hash_files(folder)
        for name in ("items.jsonl", "results.json", "pretrain.jsonl", "sft.jsonl"):
            if (folder / name).is_file():
                found[node_id][name] = (folder / name).read_text()
    return found


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process is there and not just waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def count_finished(run_dir: Path) -> int:
    return len(list((run_dir / "store").glob("*/manifest.json")))


linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at processes through /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("fork", [True, pytest.param(False, id="as polm run starts them")])
def test_a_killed_run_goes_on_to_the_same_bits(
    alone: Any, hash_files: Any, start_child: Any, tmp_path: Path, fork: bool
) -> None:
    plan = plan_of(tmp_path / "run")
    order = order_of(tmp_path, fork)
    store, owner = tmp_path / "run" / "store", tmp_path / "run" / ".lock"
    moments: list[Callable[[int], object]] = [
        # Within pretraining, with a checkpoint; then a few stages further each time.
        lambda _: list(store.glob("pretrain-*/checkpoint-*")),
        lambda before: count_finished(tmp_path / "run") >= before + 3,
        lambda before: count_finished(tmp_path / "run") >= before + 7,
        lambda before: count_finished(tmp_path / "run") >= before + 8,
    ]
    for moment in moments if fork else moments[:1]:
        before = count_finished(tmp_path / "run")
        child = start_child(**order)
        wait_for(lambda c=child: owner.is_file() and owner.read_text() == str(c.pid))
        wait_for(lambda m=moment, b=before, c=child: m(b) or c.exitcode is not None)
        workers = children_of(child.pid)
        assert child.exitcode is None
        with pytest.raises(StoreError, match=re.escape(f"run is in use by process {child.pid};")):
            run_graph(plan, workers=1, watch=lambda _: None)
        child.kill()
        child.join()
        assert len(workers) >= 2
        wait_for(lambda w=workers: not any(map(is_alive, w)), 20)
    last = start_child(**order)
    last.join(240)
    assert last.exitcode == 0
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["error"] == ""
    assert content(plan, hash_files) == alone
    done = [node for kind, node in told["events"] if kind in ("done", "skipped")]
    assert sorted(done) == sorted(plan.graph)
    assert any(kind == "skipped" for kind, _ in told["events"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, alone: Any) -> Plan:
    """A run that is done."""
    del alone  # the order of making is that of reading
    tmp_path = tmp_path_factory.mktemp("finished")
    plan = plan_of(tmp_path / "run")
    for node_id in plan.graph:
        work = plan.work(node_id)
        execute(work, Context(work.folder, work.inputs, say=lambda _: None))
    return plan


def test_a_finished_run_is_skipped_and_described(finished: Plan) -> None:
    events: list[Event] = []
    run_graph(finished, watch=events.append)
    assert [event.kind for event in events] == ["skipped"] * len(finished.graph)
    assert [event.done for event in events] == list(range(1, len(finished.graph) + 1))
    run = json.loads((finished.run_dir / "run.json").read_text())
    assert run["name"] == "tiny"
    assert {"polm", "torch", "transformers", "python"} <= run["versions"].keys()
    assert [node["id"] for node in run["nodes"]] == list(finished.graph)
    for node in run["nodes"]:
        folder = finished.run_dir / node["artifact"]
        assert read_manifest(folder)["key"] == node["key"]
        assert (finished.run_dir / node["id"]).resolve() == folder.resolve()  # a readable link
        assert read_manifest(folder)["config"] == node["config"]
    again = validate(Recipe, yaml.safe_load((finished.run_dir / "recipe.yaml").read_text()), "the written recipe")
    assert again == finished.recipe
    assert not (finished.run_dir / "run.json").read_text().count(str(finished.run_dir))  # it can be moved


def test_arms_that_agree_are_made_once(finished: Plan) -> None:
    folders = {node_id: finished.folder(node_id) for node_id in finished.graph}
    for seed in (0, 1):
        for leaf in ("annotate", "midtrain", "sft", "grpo", "eval_rl"):
            assert folders[f"s{seed}/c1/remit/{leaf}"] == folders[f"s{seed}/c1/twin/{leaf}"]
    made = {p.name for p in (finished.run_dir / "store").iterdir() if p.is_dir()}
    assert made == {folder.name for folder in folders.values()}
    # 3 roots, 6 of the control, 7 of the arm, for each of two seeds.
    assert len(made) == 2 * (3 + 6 + 8)


def test_seeds_differ_in_everything_they_make(finished: Plan, hash_files: Any) -> None:
    for leaf in ("pretrain", "c0/ntp/midtrain", "c0/ntp/sft", "c1/remit/grpo"):
        one, other = (hash_files(finished.folder(f"s{seed}/{leaf}")) for seed in (0, 1))
        assert one["model/model.safetensors"] != other["model/model.safetensors"]


def test_one_worker_and_many_make_the_same(alone: Any, hash_files: Any, start_child: Any, tmp_path: Path) -> None:
    """Through the pool, with two arms that wait for one artifact."""
    child = start_child(**order_of(tmp_path))
    child.join(240)
    assert child.exitcode == 0
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["error"] == ""
    plan = plan_of(tmp_path / "run")
    assert content(plan, hash_files) == alone
    kinds = [kind for kind, _ in told["events"]]
    assert kinds.count("started") == kinds.count("done") == len(plan.graph)
    # A stage starts after its inputs are done.
    done: set[str] = set()
    for kind, node in told["events"]:
        if kind == "started":
            assert done.issuperset(plan.graph[node].inputs.values())
        elif kind == "done":
            done.add(node)


@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_a_damaged_artifact_stops_the_run(finished: Plan, kind: str) -> None:
    file = finished.folder("s0/c0/ntp/sft") / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if kind == "cut":
        file.write_bytes(whole[:-7])
    try:
        with pytest.raises(
            StoreError, match=r"store/sft-.* does not match its manifest: model/model.safetensors .*Remove"
        ):
            run_graph(finished, watch=lambda _: None)
    finally:
        file.write_bytes(whole)
    run_graph(finished, watch=lambda _: None)


LONG_SFT = {**LENGTH, "updates": 200_000}


@linux
def test_a_failure_ends_the_run_at_once(start_child: Any, tmp_path: Path) -> None:
    """One stage fails on its settings while another has hours to go: the run tells it and leaves nobody behind."""
    order = order_of(tmp_path, seeds=[0], sft=LONG_SFT, eval={**RECIPE["eval"], "benchmarks": ["nonsense"]})
    child = start_child(**order)
    seen: set[int] = set()
    began = time.monotonic()
    while child.exitcode is None and time.monotonic() - began < 120:
        if is_alive(child.pid):
            seen.update(children_of(child.pid))
        time.sleep(0.02)
    assert child.exitcode == 0, "the run went on after the failure"
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["error"].startswith("DataError: s0/c0/ntp/eval_base: no benchmark 'nonsense'")
    assert told["seconds_after_failure"] < 5
    assert told["alive"] == []
    assert len(seen) >= 2
    wait_for(lambda: not any(map(is_alive, seen)), 20)
    assert not is_finished(plan_of(tmp_path / "run", seeds=[0], sft=LONG_SFT).folder("s0/c0/ntp/sft"))


@linux
def test_ctrl_c_ends_the_run_at_once(start_child: Any, tmp_path: Path) -> None:
    child = start_child(**order_of(tmp_path, seeds=[0], sft=LONG_SFT))
    store = tmp_path / "run" / "store"
    wait_for(lambda: list(store.glob("sft-*/metrics.jsonl")))
    workers = children_of(child.pid)
    os.kill(child.pid, signal.SIGINT)
    child.join(30)
    assert child.exitcode == 0
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["error"].startswith("KeyboardInterrupt")
    assert told["alive"] == []
    wait_for(lambda: not any(map(is_alive, workers)), 20)


@linux
def test_a_killed_worker_is_told(start_child: Any, tmp_path: Path) -> None:
    """As the system does it when memory runs out."""
    child = start_child(**order_of(tmp_path, seeds=[0], sft=LONG_SFT))
    wait_for(lambda: list((tmp_path / "run" / "store").glob("sft-*/metrics.jsonl")))
    for worker in children_of(child.pid):
        os.kill(worker, signal.SIGKILL)
    child.join(30)
    told = json.loads((tmp_path / "report.json").read_text())
    found = re.search(
        r"StoreError: a worker process died \(killed, perhaps for memory\) while these ran: (.*);", told["error"]
    )
    assert found
    assert "s0/c0/ntp/sft" in found[1].partition(";")[0].split(", ")
    assert "run the same command again" in told["error"]
    assert not any(kind == "failed" for kind, _ in told["events"])


class Pool:
    """In place of the pool: each order gets the next of these futures; without one the pool is found broken."""

    def __init__(self, *futures: Future[None]):
        self.futures = list(futures)

    def __call__(self, *_: Any, **__: Any) -> Pool:
        return self

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, *_: Any) -> Future[None]:
        if not self.futures:
            raise BrokenProcessPool("a process died")
        return self.futures.pop(0)

    def shutdown(self, **_: Any) -> None:
        pass


def answer(error: Exception | None) -> Future[None]:
    future: Future[None] = Future()
    if error is not None:
        future.set_exception(error)
    return future


DEAD = BrokenProcessPool("a process died")
HANGS = None


@pytest.mark.parametrize(
    ("errors", "message", "failed"),
    [
        # The pool ends one future after another: the second may not have been reached yet.
        ([DEAD, HANGS], "a worker process died .* while these ran: s0/data, s1/data; run", []),
        ([HANGS, DEAD], "a worker process died .* while these ran: s0/data, s1/data; run", []),
        ([DEAD, DEAD], "a worker process died .* while these ran: s0/data, s1/data; run", []),
        ([HANGS], "a worker process died .* while these ran: s0/data; run", []),  # noticed as the second is started
        ([], "a worker process died .* while these ran: none; run", []),
        # A failure that says what it is goes first.
        ([DEAD, DataError("no such file")], "^s1/data: no such file", ["s1/data"]),
    ],
)
def test_a_dead_worker_is_blamed_on_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[Exception | None], message: str, failed: list[str]
) -> None:
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool(*map(answer, errors)))
    events: list[Event] = []
    with pytest.raises(UserError, match=message):
        run_graph(plan_of(tmp_path / "run"), workers=2, watch=events.append)
    assert [event.node.id for event in events if event.kind == "failed"] == failed


def test_progress_of_a_killed_worker_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone before the next worker has started, which takes seconds."""
    plan = plan_of(tmp_path / "run")
    stale = progress_file(plan.folder("s0/data"))
    stale.parent.mkdir(parents=True)
    stale.write_text('{"update": 7, "num_updates": 9}\n')
    pool = Pool(answer(HANGS), answer(HANGS))
    monkeypatch.setattr(runner, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    events: list[Event] = []

    def watch(event: Event) -> None:
        events.append(event)
        if event.kind == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_graph(plan, workers=2, watch=watch)
    assert [(event.kind, event.node.id, dict(event.line)) for event in events] == [
        ("started", "s0/data", {}),
        ("started", "s1/data", {}),
        ("progress", "s0/data", {}),
    ]
    assert not stale.exists()


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_line(path) == {}
    path.write_text("")
    assert last_line(path) == {}
    path.write_text('{"update": 1}\n{"update": 2}\n{"upd')
    assert last_line(path) == {"update": 2}
    path.write_text("".join(json.dumps({"update": i, "x": "y" * 100}) + "\n" for i in range(500)))
    assert last_line(path)["update"] == 499
