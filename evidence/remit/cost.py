"""What an update of annealing costs under each weighting, and what its reference costs beforehand.

python evidence/remit/cost.py        # on a machine that does nothing else; about eleven minutes

The arms of bases.yaml anneal in turn, round after round, from one checkpoint on the same data, one process at a time;
the ratio to NTP is taken within a round. Writes cost.json and the table of the README.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from run import HERE, RUNS, load_recipe
from tables import NAMES, write_table

from polm.evals.claims import fill_tables
from polm.flywheel.graph import Graph, Node, build_graph
from polm.flywheel.runner import Event, Plan, build_plan, run_graph
from polm.stages.common import Context
from polm.stages.table import STAGES

SEED = 3  # a tuning seed: no number of a model is reported from here
ROUNDS = 5
UPDATES = 45  # of an arm in a round; every fifth is logged, and the first ten are not counted
ARMS = ("ntp", "remit", "rho1", "plausible", "distill")  # the others compute what one of these does


def choose_annealings(graph: Graph) -> dict[str, Node]:
    """The first cycle's annealing of each arm, and NTP's."""
    found = {node.arm: node for node in graph.values() if node.stage == "midtrain"}
    return {arm: found[arm] for arm in ARMS}


def keep_ancestors(graph: Graph, nodes: Mapping[str, Node]) -> Graph:
    """What the annealings are made from."""
    kept: set[str] = set()
    stack = [source for node in nodes.values() for source in node.inputs.values()]
    while stack:
        name = stack.pop()
        if name not in kept:
            kept.add(name)
            stack += graph[name].inputs.values()
    return {name: node for name, node in graph.items() if name in kept}


def run_stage(plan: Plan, node: Node, folder: Path, **changes: Any) -> float:
    """Seconds of the whole stage, from the artifacts of the plan."""
    inputs = {role: str(plan.folder(source)) for role, source in node.inputs.items()}
    began = time.perf_counter()
    STAGES[node.stage].run(node.settings.model_copy(update=changes), Context(folder, inputs, say=lambda _: None))
    return time.perf_counter() - began


def measure_update(plan: Plan, node: Node) -> float:
    """Milliseconds of an update: the median over stretches of five."""
    with tempfile.TemporaryDirectory() as folder:
        run_stage(plan, node, Path(folder), updates=UPDATES, checkpoint_every=0, log_every=5)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return 200.0 * float(np.median(np.diff([line["seconds"] for line in lines[1:]])))


def measure_annotation(plan: Plan, node: Node) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return run_stage(plan, node, Path(folder))


def write_costs(found: Mapping[str, Mapping[str, list[float]]], updates: int) -> str:
    """A row an arm: medians over the rounds, with the least and the greatest."""
    heads = ("arm", "an update, ms", "of NTP's", "the reference beforehand, s", "with it, of NTP's in all")
    rows = []
    plain = np.array(found["ntp"]["update_ms"])
    for arm, numbers in found.items():
        own, before = np.array(numbers["update_ms"]), np.array(numbers.get("annotate_s", [0.0] * len(plain)))
        whole = (own * updates / 1000.0 + before) / (plain * updates / 1000.0)
        cells = [NAMES.get(arm, "NTP"), spread(own, 0), spread(own / plain, 2)]
        cells += [spread(before, 1) if before.any() else "–", spread(whole, 2)]
        rows.append(cells)
    return write_table(heads, rows)


def spread(numbers: np.ndarray, decimals: int) -> str:
    low, middle, high = np.min(numbers), np.median(numbers), np.max(numbers)
    return f"{middle:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def main() -> None:
    recipe = load_recipe("bases").model_copy(update={"seeds": (SEED,)})
    graph = build_graph(recipe)
    annealings = choose_annealings(graph)
    plan = build_plan(recipe, keep_ancestors(graph, annealings), RUNS / "evidence_remit_cost")

    def watch(event: Event) -> None:
        if event.kind == "done":
            print(f"[{event.done}/{event.total}] {event.node.id}", flush=True)

    run_graph(plan, workers=os.cpu_count() or 1, watch=watch)
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    for number in range(ROUNDS + 1):
        for arm, node in annealings.items():
            numbers = {"update_ms": measure_update(plan, node)}
            annotations = [graph[source] for source in node.inputs.values() if graph[source].stage == "annotate"]
            if annotations:
                numbers["annotate_s"] = sum(measure_annotation(plan, one) for one in annotations)
            if number:  # the first round only warms up
                for name, value in numbers.items():
                    found[arm].setdefault(name, []).append(value)
            print(number, arm, {name: round(value, 2) for name, value in numbers.items()}, flush=True)
    about = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "rounds": ROUNDS, "updates": recipe.midtrain.updates}
    (HERE / "cost.json").write_text(json.dumps({**about, "arms": found}, indent=1) + "\n")
    fill_tables(HERE / "README.md", {"cost": write_costs(found, int(recipe.midtrain.updates or 1))})


if __name__ == "__main__":
    main()
