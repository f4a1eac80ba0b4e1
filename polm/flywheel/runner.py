"""Run a graph over the store: what is done is skipped, what was killed goes on, ready stages run side by side.

Each worker is a process of its own that runs one stage after another. The parent only watches: it reads what the
workers last reported and writes `run.json`.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polm.config import semantic_values, validate
from polm.cores import count_cores
from polm.errors import StoreError, UserError
from polm.flywheel.graph import Graph, Node
from polm.flywheel.kinds import AnyRecipe
from polm.flywheel.store import (
    KEY_LENGTH,
    Work,
    check_artifact,
    collect_versions,
    compute_key,
    execute,
    external_key,
    is_finished,
    lock,
    read_manifest,
)
from polm.stages.common import Context
from polm.stages.table import STAGES

POLL_SECONDS = 0.5
REPORT_SECONDS = 0.5  # between two progress lines that a worker leaves for the parent


@dataclass(frozen=True)
class Event:
    """Something to show: a node `started`, made `progress`, is `done`, was `skipped` or has `failed`.

    `line` is the last line of progress, or the manifest of a node that is done or was skipped.
    """

    kind: str
    node: Node
    done: int
    total: int
    line: Mapping[str, Any]


Watch = Callable[[Event], None]


@dataclass(frozen=True)
class Plan:
    """A graph with the key and the folder of each node."""

    run_dir: Path
    recipe: AnyRecipe
    graph: Graph
    keys: Mapping[str, str]

    def folder(self, node_id: str) -> Path:
        node = self.graph[node_id]
        return self.run_dir / "store" / f"{node.stage}-{self.keys[node_id][:KEY_LENGTH]}"

    def work(self, node_id: str) -> Work:
        node = self.graph[node_id]
        inputs = {role: str(self.folder(source)) for role, source in node.inputs.items()} | dict(node.external)
        return Work(node.spec, node.settings, inputs, self.input_keys(node), self.folder(node_id))

    def input_keys(self, node: Node) -> dict[str, str]:
        keys = {role: self.keys[source] for role, source in node.inputs.items()}
        return keys | {role: external_key(source) for role, source in node.external.items()}


def build_plan(recipe: AnyRecipe, graph: Graph, run_dir: Path) -> Plan:
    """Compute every node's key, inputs first."""
    plan = Plan(run_dir, recipe, graph, {})
    keys: dict[str, str] = {}
    for node in graph.values():
        plan = Plan(run_dir, recipe, graph, keys)
        keys[node.id] = compute_key(node.spec, node.settings, plan.input_keys(node))
    return plan


def run_graph(plan: Plan, *, workers: int = 0, watch: Watch) -> None:
    """Bring every node to its end. The first failure stops the run at once; what was under way goes on next time."""
    with lock(plan.run_dir / ".lock", f"the run {plan.run_dir}"):
        write_run_files(plan)
        pending = dict(plan.graph)
        finished: set[str] = set()
        for node_id, node in list(pending.items()):
            if is_finished(plan.folder(node_id)):
                manifest = check_artifact(plan.folder(node_id), plan.keys[node_id])
                finished.add(node_id)
                del pending[node_id]
                watch(Event("skipped", node, len(finished), len(plan.graph), manifest))
        if pending:
            _run_pending(plan, pending, finished, workers or count_cores(), watch)
        write_run_files(plan)


def _run_pending(plan: Plan, pending: dict[str, Node], finished: set[str], workers: int, watch: Watch) -> None:
    running: dict[Future[None], Node] = {}
    busy_folders: set[Path] = set()
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)) as pool,
        _hold_interrupts() as interrupted,
    ):
        try:
            while pending or running:
                for node_id, node in list(pending.items()):
                    folder = plan.folder(node_id)
                    # Two nodes may be one artifact (arms that agree): the second one waits and then finds it there.
                    ready = finished.issuperset(node.inputs.values()) and folder not in busy_folders
                    if ready and len(running) < workers:
                        work = plan.work(node_id)
                        progress_file(folder).unlink(missing_ok=True)  # of a worker that was killed
                        args = (node.stage, node.settings.model_dump(mode="json"), dict(work.inputs))
                        future = pool.submit(run_node, *args, dict(work.input_keys), str(work.folder))
                        running[future] = node
                        busy_folders.add(folder)
                        del pending[node_id]
                        watch(Event("started", node, len(finished), len(plan.graph), {}))
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                if interrupted():
                    raise KeyboardInterrupt
                # First what has an answer of its own: a dead worker takes all futures that have none with it.
                for future in sorted(done, key=_is_broken):
                    node = running[future]
                    if _is_broken(future):
                        raise BrokenProcessPool
                    del running[future]
                    busy_folders.discard(plan.folder(node.id))
                    if future.exception() is not None:
                        watch(Event("failed", node, len(finished), len(plan.graph), {}))
                    _raise_failure(future, node, plan)
                    finished.add(node.id)
                    manifest = read_manifest(plan.folder(node.id))
                    watch(Event("done", node, len(finished), len(plan.graph), manifest))
                for node in running.values():
                    line = last_line(progress_file(plan.folder(node.id)))
                    watch(Event("progress", node, len(finished), len(plan.graph), line))
        except BaseException as error:
            dead = _describe_dead_worker(running) if isinstance(error, BrokenProcessPool) else None
            _stop_workers(pool)  # first: a pool that is shut down forgets its processes and waits for them
            pool.shutdown(cancel_futures=True)
            if dead is not None:
                raise dead from None
            raise


@contextmanager
def _hold_interrupts() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C and say so when asked, instead of raising anywhere: raised while a lock of the pool is held, it would
    leave the pool waiting for ever. Outside the main thread Ctrl-C never arrives, and nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: seen.set())
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _is_broken(future: Future[None]) -> bool:
    """Whether a worker died before this had a result."""
    return future.done() and isinstance(future.exception(), BrokenProcessPool)


def _describe_dead_worker(running: Mapping[Future[None], Node]) -> StoreError:
    """The pool does not say whose worker it was and ends the others too: all that ran are named, and none is blamed."""
    names = ", ".join(node.id for future, node in running.items() if not future.done() or _is_broken(future))
    return StoreError(
        f"a worker process died (killed, perhaps for memory) while these ran: {names or 'none'}; run the same command "
        "again, each goes on from its last checkpoint; with workers=1 fewer stages share the memory"
    )


def _raise_failure(future: Future[None], node: Node, plan: Plan) -> None:
    try:
        future.result()
    except UserError as error:
        log = plan.folder(node.id) / "log.txt"
        raise type(error)(f"{node.id}: {error}" + (f"\n(log: {log})" if log.is_file() else "")) from error


def _stop_workers(pool: ProcessPoolExecutor) -> None:
    """Kill what still runs: checkpoints make that safe, and nobody waits for a stage that is not wanted."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()


def _start_worker(parent: int) -> None:
    """Workers die with their parent, so that a killed run leaves nobody writing; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent was gone before the call
            os._exit(1)


def run_node(
    stage: str, settings: dict[str, Any], inputs: dict[str, str], input_keys: dict[str, str], folder: str
) -> None:
    """In a worker: run one stage, its words going to `log.txt` and its last progress beside the folder."""
    spec = STAGES[stage]
    workdir = Path(folder)
    log = workdir / "log.txt"

    def say(text: str) -> None:
        with log.open("a", encoding="utf-8") as handle:
            handle.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    work = Work(spec, validate(spec.settings, settings, "the run"), inputs, input_keys, workdir)
    progress = progress_file(workdir)
    try:
        execute(work, Context(workdir, inputs, report=_leave_progress(progress), say=say))
    finally:
        progress.unlink(missing_ok=True)


def progress_file(folder: Path) -> Path:
    """Where a worker leaves its last progress line: beside the artifact, which it is no part of."""
    return folder.with_name(f".{folder.name}.progress")


def _leave_progress(path: Path) -> Callable[[Mapping[str, Any]], None]:
    """A `Context.report` that keeps the latest line in a file, written now and then: samplers report every token."""
    last = -REPORT_SECONDS

    def report(line: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            _replace(path, json.dumps(line) + "\n")

    return report


def last_line(path: Path) -> dict[str, Any]:
    """The last complete line of a JSONL file; empty where there is none yet."""
    try:
        with path.open("rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - 8192))
            lines = handle.read().decode(errors="replace").split("\n")
    except OSError:
        return {}
    for raw in reversed(lines):
        try:
            value = json.loads(raw)
        except ValueError:
            continue  # a line that is just being written
        if isinstance(value, dict):
            return value
    return {}


def write_run_files(plan: Plan) -> None:
    """recipe.yaml, run.json and readable links by node id."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    recipe = plan.recipe.model_dump(mode="json")
    _replace(plan.run_dir / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    nodes = [
        {
            "id": node.id,
            "stage": node.stage,
            "key": plan.keys[node.id],
            "artifact": str(plan.folder(node.id).relative_to(plan.run_dir)),
            "inputs": dict(node.inputs) | dict(node.external),
            "seed": node.seed,
            "cycle": node.cycle,
            "arm": node.arm,
            "config": semantic_values(node.settings),
        }
        for node in plan.graph.values()
    ]
    content = {"name": plan.recipe.name, "recipe": recipe, "versions": collect_versions(), "nodes": nodes}
    _replace(plan.run_dir / "run.json", json.dumps(content, indent=1))
    for node in plan.graph.values():
        link = plan.run_dir / node.id
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(plan.folder(node.id), link.parent)
        if link.is_symlink() and str(link.readlink()) == target:
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
