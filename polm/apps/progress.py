"""What is known of a graph while it runs: the state of every node, and how long the rest will take.

Pure bookkeeping on the runner's events; what it looks like stands in `polm.apps.live`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from polm.flywheel.graph import Graph, Node
from polm.flywheel.runner import Event

Status = Literal["pending", "running", "done", "reused", "failed", "stopped"]
FINISHED: tuple[Status, ...] = ("done", "reused")


@dataclass(frozen=True)
class NodeState:
    """One node: `seconds` is its cost once finished, `began` the clock when it started, `line` its last progress.

    "reused" was there before this run or is the artifact of an earlier node; "stopped" was under way at the run's end.
    """

    status: Status = "pending"
    seconds: float | None = None
    began: float = 0.0
    line: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """How much of a running node is done, 0 to 1; None until it says so."""
        done, total = self.line.get("update"), self.line.get("num_updates")
        if not isinstance(done, int | float) or not isinstance(total, int | float) or total <= 0:
            return None
        return min(1.0, max(0.0, done / total))


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until the whole graph is done; None while some kinds of stages have never been seen to finish."""

    seconds: float | None
    unknown: tuple[str, ...] = ()


def leaf_of(node: Node) -> str:
    """ "midtrain", "eval_rl": the last part of a node's id."""
    return node.id.rsplit("/", 1)[-1]


class Board:
    """The state of every node of `graph`, kept up by `apply`. `folders` tells which nodes are one artifact."""

    def __init__(self, name: str, graph: Graph, folders: Mapping[str, Path], workers: int):
        self.name, self.graph, self.workers = name, graph, workers
        self.states = dict.fromkeys(graph, NodeState())
        first: dict[Path, str] = {}
        self.twin_of = {node_id: first.setdefault(folders[node_id], node_id) for node_id in graph}
        self.last_done: tuple[Node, Mapping[str, Any]] | None = None

    def apply(self, event: Event, now: float) -> None:
        """Take in one event; `now` is a clock in seconds, the same for all events."""
        node_id, state = event.node.id, self.states[event.node.id]
        if event.kind == "started":
            state = NodeState("running", began=now)
        elif event.kind == "progress" and event.line:
            state = replace(state, line=event.line)
        elif event.kind in ("done", "skipped"):
            twin = self.twin_of[node_id]
            is_copy = twin != node_id and self.states[twin].status in FINISHED
            reused = event.kind == "skipped" or is_copy
            state = NodeState("reused" if reused else "done", None if is_copy else event.line.get("seconds"))
            if not reused:
                self.last_done = (event.node, event.line)
        elif event.kind == "failed":
            state = replace(state, status="failed")
        self.states[node_id] = state

    def stop(self) -> None:
        """The run is over: what was under way stands still."""
        for node_id, state in self.states.items():
            if state.status == "running":
                self.states[node_id] = replace(state, status="stopped")

    def count(self, *statuses: Status) -> int:
        return sum(state.status in statuses for state in self.states.values())


def compute_durations(board: Board) -> dict[str, float]:
    """Expected seconds of every unfinished node, by its finished kin: the same leaf in the same arm, else the same leaf
    in any arm, else the same stage. A node without finished kin is left out; a copy of an earlier one takes no time."""
    sums: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for node_id, state in board.states.items():
        if state.status in FINISHED and state.seconds is not None:
            for kind in _kinds_of(board.graph[node_id]):
                sums[kind].append(state.seconds)
    durations = {}
    for node_id, state in board.states.items():
        if state.status in FINISHED:
            continue
        if board.twin_of[node_id] != node_id:
            durations[node_id] = 0.0
            continue
        found = next((sums[kind] for kind in _kinds_of(board.graph[node_id]) if kind in sums), None)
        if found:
            durations[node_id] = sum(found) / len(found)
    return durations


def _kinds_of(node: Node) -> tuple[tuple[str, ...], ...]:
    """From the nearest kin to the farthest. Stages of different length share a name only in evaluations."""
    return ("leaf in arm", leaf_of(node), node.arm or ""), ("leaf", leaf_of(node)), ("stage", node.stage)


def compute_node_left(state: NodeState, duration: float | None, now: float) -> float | None:
    """Seconds until a running node is done: what it says itself, else its kin's time, else its pace so far."""
    said = state.line.get("eta_seconds")
    if isinstance(said, int | float):
        return float(said)
    elapsed = now - state.began
    if duration is not None:
        return max(0.0, duration - elapsed)
    return elapsed / state.share * (1 - state.share) if state.share else None


def compute_time_left(board: Board, now: float) -> TimeLeft:
    """How long the rest takes with the workers that there are, each stage after its inputs.

    Plays the rest of the run through with the durations of finished kin. As long as one stage has none, nothing is
    promised, and those kinds are named.
    """
    durations = compute_durations(board)
    unknown: dict[str, None] = {}
    left: dict[str, float] = {}
    for node_id, state in board.states.items():
        if state.status in FINISHED:
            continue
        duration = durations.get(node_id)
        if state.status == "running":
            duration = compute_node_left(state, duration, now)
        if duration is None:
            unknown[leaf_of(board.graph[node_id])] = None
        else:
            left[node_id] = duration
    if unknown:
        return TimeLeft(None, tuple(unknown))
    return TimeLeft(_play_through(board, left))


def _play_through(board: Board, left: Mapping[str, float]) -> float:
    """Seconds until the last of the nodes in `left` is done, first come first served in the order of the graph."""
    order = {node_id: place for place, node_id in enumerate(board.graph)}
    followers: dict[str, list[str]] = defaultdict(list)
    waits: dict[str, int] = {}
    for node_id in left:
        sources = set(board.graph[node_id].inputs.values()) | {board.twin_of[node_id]}
        sources = {source for source in sources if source in left and source != node_id}
        waits[node_id] = len(sources)
        for source in sources:
            followers[source].append(node_id)
    ends = [(left[n], order[n], n) for n in left if board.states[n].status == "running"]
    ready = [(order[n], n) for n in left if not waits[n] and board.states[n].status != "running"]
    heapq.heapify(ends)
    heapq.heapify(ready)
    clock = 0.0
    while ends or ready:
        while ready and len(ends) < board.workers:
            place, node_id = heapq.heappop(ready)
            heapq.heappush(ends, (clock + left[node_id], place, node_id))
        clock, _, node_id = heapq.heappop(ends)
        for follower in followers[node_id]:
            waits[follower] -= 1
            if not waits[follower]:
                heapq.heappush(ready, (order[follower], follower))
    return clock
