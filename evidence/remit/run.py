"""Run ReMiT and its rivals over fresh seeds; write one file a seed, then result.json, the figures and the tables.

python evidence/remit/run.py bases            # bases.yaml: the bases of one cycle, all arms and controls
python evidence/remit/run.py whole            # recipe.yaml: through SFT, DPO and RL, three cycles
python evidence/remit/run.py speed            # or any other name in studies.yaml: the bases, with one thing changed
python evidence/remit/run.py bases 100 101    # some seeds only
python evidence/remit/run.py table            # only add up what is there

A seed whose file is in seeds/ is not run again, and a run that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from figures import draw_bases, draw_regimes
from tables import METRICS, write_chains, write_study_tables, write_tables

from polm.config import load_settings, validate
from polm.evals.claims import build_claim, fill_tables, write_claims
from polm.flywheel.graph import Graph, build_graph
from polm.flywheel.runner import Event, build_plan, run_graph
from polm.recipe import Recipe
from polm.report.compare import Arm, build_evaluations, compute_arm, describe_point
from polm.report.load import Evaluation, Run, load_run

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs"
RECIPES = {"bases": HERE / "bases.yaml", "whole": HERE / "recipe.yaml"}
STUDIES: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "studies.yaml").read_text())
STUDY_ARMS = ("remit", "plausible", "rho1", "distill", "shuffled")  # of bases.yaml, where a study names none
DIRECT = "####"  # how an answer without steps begins


def prune(graph: Graph, *, control: bool) -> Graph:
    """The evaluations of the bases, and all of the control where they are asked for, with what they are made from."""
    kept: set[str] = set()
    stack = [name for name in graph if name.endswith("eval_base") or (control and "/c0/ntp/eval" in name)]
    while stack:
        name = stack.pop()
        if name not in kept:
            kept.add(name)
            stack += graph[name].inputs.values()
    return {name: node for name, node in graph.items() if name in kept}


def load_recipe(kind: str) -> Recipe:
    """The recipe of `bases`, `whole`, or a study: `bases` with the study's seeds, arms and changes."""
    if kind in RECIPES:
        return load_settings(Recipe, RECIPES[kind])
    study = STUDIES[kind]
    recipe = load_settings(Recipe, RECIPES["bases"], study.get("changes", ()))
    arms = study.get("arms") or {name: recipe.arms[name].model_dump() for name in STUDY_ARMS}
    values = {**recipe.model_dump(), "name": f"evidence_remit_{kind}", "seeds": study["seeds"], "arms": arms}
    return validate(Recipe, values, f"studies.yaml, {kind}")


def shorten(graph: Graph, updates: Mapping[str, int]) -> Graph:
    """The arms named in `updates` anneal for that many; a recipe has no such knob, for its arms have equal tokens."""
    return {
        name: replace(node, settings=node.settings.model_copy(update={"updates": updates[node.arm]}))
        if node.stage == "midtrain" and node.arm in updates
        else node
        for name, node in graph.items()
    }


def run_seeds(kind: str, seeds: Sequence[int]) -> Run:
    """Bring the graph of these seeds to its end and read it."""
    recipe = load_recipe(kind).model_copy(update={"seeds": tuple(seeds)})
    graph = shorten(build_graph(recipe), STUDIES.get(kind, {}).get("updates", {}))
    # The studies share a folder, and with it what they have in common.
    folder = RUNS / ("evidence_remit_studies" if kind in STUDIES else recipe.name)
    plan = build_plan(recipe, graph if kind == "whole" else prune(graph, control=kind == "bases"), folder)

    def watch(event: Event) -> None:
        if event.kind == "done":
            print(f"[{event.done}/{event.total}] {event.node.id} {event.line['seconds']:.1f} s", flush=True)

    run_graph(plan, workers=os.cpu_count() or 1, watch=watch)
    return load_run(plan.run_dir)


def collect_seed(run: Run, seed: int) -> dict[str, Any]:
    """Every score of a seed by arm and point, the share of direct answers, the bases' scores by benchmark with the mean
    length of a solution in tokens, and what an update cost."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    benchmarks: dict[str, dict[str, dict[str, float]]] = {}
    for (point, arm), by_seed in build_evaluations(run).items():
        if seed not in by_seed:
            continue
        mean, items = by_seed[seed].results.mean, by_seed[seed].items
        values = {name: mean[name] for name in METRICS if mean.get(name) is not None}
        values["direct"] = float(np.mean([item.samples_text[0].startswith(DIRECT) for item in items]))
        scores.setdefault(arm.label, {})[point] = values
        if point == "base":
            benchmarks[arm.label] = collect_benchmarks(by_seed[seed])
    costs: dict[str, dict[str, float]] = {}
    for node in run.nodes:
        manifest, arm = node.manifest, compute_arm(node)
        if node.spec.seed == seed and node.spec.stage in ("midtrain", "annotate") and manifest and manifest.seconds:
            costs.setdefault(arm.label, {})[node.spec.stage] = manifest.seconds
    versions = dict(run.versions)
    about = {"seconds": costs, "versions": versions, "cores": os.cpu_count()}
    return {"seed": seed, "scores": scores, "benchmarks": benchmarks, **about}


def collect_benchmarks(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Scores by benchmark, with the mean length of its solutions in tokens."""
    found = {}
    for name, result in evaluation.results.benchmarks.items():
        tokens = [item.nll_tokens for item in evaluation.items if item.benchmark == name and item.nll_tokens]
        values = {"greedy": result.greedy, "pass@1": result.pass_at_1, "steps@1": result.steps_at_1, "nll": result.nll}
        found[name] = {**{k: v for k, v in values.items() if v is not None}, "tokens": float(np.mean(tokens))}
    return found


def read_seeds() -> dict[str, list[dict[str, Any]]]:
    """The files of seeds/ by kind."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (*RECIPES, *STUDIES)}
    for path in sorted((HERE / "seeds").glob("*.json")):
        found[path.name.partition("-")[0]].append(json.loads(path.read_text()))
    return found


def get_differences(rows: Sequence[Mapping[str, Any]], arm: str, control: str, point: str, metric: str) -> list[float]:
    """Arm minus control, one a seed that has both."""
    pairs = [(row["scores"].get(arm, {}).get(point, {}), row["scores"].get(control, {}).get(point, {})) for row in rows]
    scale = METRICS[metric][2] if metric in METRICS else 100.0
    return [scale * (a[metric] - b[metric]) for a, b in pairs if metric in a and metric in b]


def build_claims(rows: Sequence[Mapping[str, Any]], where: str = "") -> list[dict[str, Any]]:
    """Every arm against NTP; ReMiT and our own against the other arms of the first cycle, and each cycle against
    the one before it. `where` names a study."""
    ntp = Arm(0, "ntp").label
    labels = list(dict.fromkeys(label for row in rows for label in row["scores"]))
    pairs = [(label, ntp) for label in labels if label != ntp]
    firsts = [label for label in labels if label.endswith("cycle 1")]
    for mine in (Arm(1, "remit").label, Arm(1, "plausible").label):
        pairs += [(mine, other) for other in firsts if other != mine]
    for mine in ("remit", "plausible"):
        pairs += [(Arm(cycle, mine).label, Arm(cycle - 1, mine).label) for cycle in (2, 3)]
    claims = []
    for arm, control in pairs:
        for point in ("base", "sft", "dpo", "rl"):
            for metric, (words, unit, _, better) in METRICS.items():
                differences = get_differences(rows, arm, control, point, metric)
                if len(differences) > 1:
                    claims.append(
                        build_claim(
                            f"{where}{arm} is better than {control} {describe_point(point)}, {words}",
                            metric=f"{point}/{metric} ({unit})",
                            arm=arm,
                            control=control,
                            differences=differences,
                            better=better,  # type: ignore[arg-type]
                        )
                    )
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    """Differences to NTP as Markdown: mean ± standard error."""
    ntp = Arm(0, "ntp").label
    mine = {(c["arm"], c["metric"].split(" ")[0]): c for c in claims if c["control"] == ntp}
    columns = list(dict.fromkeys(metric for _, metric in mine))
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in mine):
        cells = []
        for column in columns:
            claim = mine.get((arm, column))
            decimals = 3 if column.endswith("nll") else 1
            cells.append(f"{claim['mean']:+.{decimals}f} ± {claim['stderr']:.{decimals}f}" if claim else "·")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    kind, *numbers = sys.argv[1:] or ["table"]
    if kind != "table":
        wanted = [int(n) for n in numbers] or list(load_recipe(kind).seeds)
        missing = [seed for seed in wanted if not (HERE / "seeds" / f"{kind}-{seed}.json").is_file()]
        width = os.cpu_count() or 1
        for start in range(0, len(missing), width):  # a few seeds at a time, so that what is done is written early
            run = run_seeds(kind, missing[start : start + width])
            for seed in missing[start : start + width]:
                path = HERE / "seeds" / f"{kind}-{seed}.json"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(collect_seed(run, seed), indent=1) + "\n")
    rows = read_seeds()
    claims = build_claims([*rows["bases"], *rows["whole"]])
    studies = {kind: build_claims(rows[kind], where=f"{kind}: ") for kind in STUDIES}
    write_claims(HERE / "result.json", [*claims, *(claim for found in studies.values() for claim in found)])
    print(write_table(claims))
    tables = write_tables(rows["bases"], rows["whole"], claims) | write_study_tables(claims, studies)
    tables["chains"] = write_chains(rows["whole"])
    fill_tables(HERE / "README.md", tables)
    for kind, found in studies.items():
        print(f"{kind}, {len(rows[kind])} seeds\n{write_table(found) if found else ''}")
    draw_bases(claims, HERE / "figure.png")
    draw_regimes(claims, studies, HERE / "regimes.png")


if __name__ == "__main__":
    main()
