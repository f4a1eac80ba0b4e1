"""Two runs side by side, or two arms of one run: what differs in the recipes, in the scores and in the costs.

Only what is common is compared: the same point, arm, cycle and seed, and within a benchmark the same questions with
the same answers. A difference is the second side minus the first, paired over seeds and items as in the report.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

from polm.errors import StoreError
from polm.evals.statistics import Estimate
from polm.report.compare import (
    CONTROL_NAME,
    METRICS,
    Arm,
    ItemValues,
    Metric,
    Row,
    compute_arm,
    compute_common_k,
    compute_comparison,
    compute_item_values,
    compute_point,
    compute_score,
    describe_point,
    order_points,
)
from polm.report.load import Evaluation, Item, Node, Run

Place = tuple[str, Arm]
Pairs = dict[Place, dict[int, tuple[Node, Node]]]


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two: its nodes, the recipe as dotted fields, and its evaluations by place and seed."""

    label: str
    nodes: tuple[Node, ...]
    fields: Mapping[str, str]
    evaluations: Mapping[Place, Mapping[int, Node]]


@dataclass(frozen=True)
class FieldChange:
    """A field of the recipe that differs; None where a side does not have it."""

    field: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class BenchmarkMatch:
    """How far a benchmark is the same on both sides, items summed over the common seeds."""

    name: str
    num_first: int
    num_second: int
    num_common: int
    source: str


@dataclass(frozen=True)
class RunDifference:
    """Scores on the common items, and their difference: `row.score` and `row.comparison` are of the second side."""

    first: Estimate
    row: Row


@dataclass(frozen=True)
class Cost:
    """What the stages of one kind took: seconds of wall time in all, and the largest process in MB (None: unknown)."""

    num_stages: int
    seconds: float
    peak_mb: float | None


@dataclass(frozen=True, eq=False)
class Differences:
    """Everything that a comparison of two sides says. `notes` are sentences on what was left out."""

    first: str
    second: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    points: tuple[str, ...]
    k: int
    changes: tuple[FieldChange, ...]
    matches: tuple[BenchmarkMatch, ...]
    differences: tuple[RunDifference, ...]
    costs: Mapping[str, tuple[Cost | None, Cost | None]]
    notes: tuple[str, ...]


# ---- the two sides -------------------------------------------------------------------------------------------------


def build_run_side(run: Run, label: str) -> Side:
    """A whole run."""
    fields = _flatten(_read_recipe(run)) | {f"versions.{name}": str(value) for name, value in run.versions.items()}
    return Side(label, run.nodes, fields, _collect_evaluations(run.nodes, {}))


def build_arm_side(run: Run, name: str, label: str) -> Side:
    """One arm of a run, in all its cycles, under the name `label` so that it finds its partner."""
    nodes = tuple(node for node in run.nodes if node.spec.arm == name)
    if not nodes:
        known = ", ".join(dict.fromkeys(node.spec.arm for node in run.nodes if node.spec.arm)) or "none"
        raise StoreError(f"{run.directory}: the run has no arm {name!r}; its arms are: {known}")
    arms = _read_recipe(run).get("arms")
    fields = _flatten(arms.get(name) if isinstance(arms, dict) else None)
    return Side(name, nodes, fields, _collect_evaluations(nodes, {name: label}))


def _collect_evaluations(nodes: Sequence[Node], names: Mapping[str, str]) -> dict[Place, dict[int, Node]]:
    """Finished evaluations. The control's copies in later cycles are left out, as in the report."""
    found: dict[Place, dict[int, Node]] = {}
    for node in nodes:
        arm = compute_arm(node)
        is_copy = node.status == "shared" and arm.name == CONTROL_NAME and arm.cycle > 0
        if node.evaluation is not None and not is_copy:
            arm = replace(arm, name=names.get(arm.name, arm.name))
            found.setdefault((compute_point(node), arm), {})[node.spec.seed or 0] = node
    return found


def _read_recipe(run: Run) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(run.recipe_text)
    except yaml.YAMLError as error:
        raise StoreError(f"{run.directory}: the recipe of the run is not valid YAML ({error}); run it again") from error
    return recipe if isinstance(recipe, dict) else {}


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """{"sft": {"epochs": 2}} -> {"sft.epochs": "2"}; lists stay whole."""
    if isinstance(value, dict) and value:
        fields: dict[str, str] = {}
        for key, inner in value.items():
            fields |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return fields
    return {prefix: json.dumps(value, ensure_ascii=False, default=str)} if prefix else {}


# ---- what is common ------------------------------------------------------------------------------------------------


def compare_runs(first: Run, second: Run) -> Differences:
    """Second minus first. Raises StoreError when nothing is common, and says what differs."""
    if first.directory.resolve() == second.directory.resolve():
        raise StoreError(f"{first.directory} is given twice; name two runs, or --arms A B for two arms of one run")
    labels = (first.name, second.name) if first.name != second.name else (str(first.directory), str(second.directory))
    return compare_sides(build_run_side(first, labels[0]), build_run_side(second, labels[1]))


def compare_arms(run: Run, first: str, second: str) -> Differences:
    """Two arms of one run, cycle by cycle. Raises StoreError when they have no cycle in common."""
    if first == second:
        raise StoreError(f"--arms {first} {second} names one arm twice; name two")
    label = f"{second} against {first}"
    return compare_sides(build_arm_side(run, first, label), build_arm_side(run, second, label))


def compare_sides(first: Side, second: Side) -> Differences:
    pairs = _pair_evaluations(first, second)
    if not pairs:
        raise StoreError(
            f"nothing to compare: {_describe_side(first)}; {_describe_side(second)}. "
            "Two sides need a common arm, cycle and seed, evaluated at the same point. The control "
            f"{CONTROL_NAME} is of cycle 0: `polm report` compares each arm of a run with it"
        )
    other_seeds = _find_seeds_without_items(pairs)
    matches = _match_benchmarks(first, second, pairs, other_seeds)
    benchmarks = [match.name for match in matches if match.num_common]
    if not benchmarks:
        listed = "; ".join(f"{m.name}: {m.num_first} and {m.num_second} items, {m.source}" for m in matches)
        raise StoreError(f"nothing to compare: no benchmark has an item in common ({listed or 'no items were kept'})")
    pairs = {
        place: {seed: nodes for seed, nodes in by_seed.items() if seed not in other_seeds}
        for place, by_seed in pairs.items()
    }
    pairs = {place: by_seed for place, by_seed in pairs.items() if by_seed}
    sides = {
        (f"{which} {point}", arm): {seed: _get_evaluation(nodes[which]) for seed, nodes in by_seed.items()}
        for (point, arm), by_seed in pairs.items()
        for which in (0, 1)
    }
    k = compute_common_k(sides)
    differences, notes = _compute_differences(pairs, benchmarks, k)
    return Differences(
        first.label,
        second.label,
        tuple(sorted({seed for by_seed in pairs.values() for seed in by_seed})),
        tuple(sorted({arm for _, arm in pairs}, key=lambda arm: (not arm.is_control, arm.cycle, arm.name))),
        order_points([point for point, _ in pairs]),
        k,
        _diff_fields(first.fields, second.fields),
        matches,
        differences,
        _collect_costs(first, second),
        (
            *_note_missing(first, second, pairs),
            *_note_seeds(other_seeds),
            *_note_matches(matches),
            *_note_settings(pairs),
            *notes,
        ),
    )


def _pair_evaluations(first: Side, second: Side) -> Pairs:
    pairs: Pairs = {}
    for place, mine in first.evaluations.items():
        other = second.evaluations.get(place, {})
        seeds = sorted(mine.keys() & other.keys())
        if seeds:
            pairs[place] = {seed: (mine[seed], other[seed]) for seed in seeds}
    return pairs


def _find_seeds_without_items(pairs: Pairs) -> set[int]:
    """Seeds whose two sides were asked entirely different questions, unless that holds for all of them."""
    shared: dict[int, bool] = {}
    for by_seed in pairs.values():
        for seed, (a, b) in by_seed.items():
            identities = set(map(_identify, _get_evaluation(a).items))
            common = any(_identify(item) in identities for item in _get_evaluation(b).items)
            shared[seed] = shared.get(seed, True) and common
    return {seed for seed, common in shared.items() if not common} if any(shared.values()) else set()


def _note_seeds(seeds: set[int]) -> list[str]:
    if not seeds:
        return []
    return [f"Seeds left out, as their benchmarks have no item in common: {', '.join(map(str, sorted(seeds)))}."]


def _describe_side(side: Side) -> str:
    if not side.evaluations:
        return f"{side.label} has no finished evaluation"
    arms = ", ".join(dict.fromkeys(arm.label for _, arm in side.evaluations))
    seeds = ", ".join(map(str, sorted({seed for by_seed in side.evaluations.values() for seed in by_seed})))
    return f"{side.label} has {arms} with seeds {seeds}"


def _identify(item: Item) -> tuple[str, str, str, str]:
    """What makes two items one: not only the id, as other data may use it for another question."""
    return item.benchmark, str(item.id), item.prompt, str(item.answer)


def _get_evaluation(node: Node) -> Evaluation:
    assert node.evaluation is not None, node.id
    return node.evaluation


def restrict(first: Evaluation, second: Evaluation, benchmarks: Sequence[str]) -> tuple[Evaluation, Evaluation]:
    """Both with their common items of `benchmarks` only, in one order."""
    common = Counter(map(_identify, first.items)) & Counter(map(_identify, second.items))

    def keep(evaluation: Evaluation) -> Evaluation:
        room = Counter(common)
        kept = []
        for item in sorted(evaluation.items, key=_identify):
            if item.benchmark in benchmarks and room[_identify(item)] > 0:
                room[_identify(item)] -= 1
                kept.append(item)
        return replace(evaluation, items=tuple(kept))

    return keep(first), keep(second)


def _match_benchmarks(first: Side, second: Side, pairs: Pairs, without: set[int]) -> tuple[BenchmarkMatch, ...]:
    """Per benchmark the items of both and the common ones; at the place where the fewest are common."""
    sources = _compare_data(first, second)
    worst: dict[tuple[str, int], tuple[int, int, int]] = {}
    for by_seed in pairs.values():
        for seed, nodes in by_seed.items():
            if seed in without:
                continue
            mine, other = (Counter(map(_identify, _get_evaluation(node).items)) for node in nodes)
            counts = [Counter(_count_items(items)) for items in (mine, other, mine & other)]
            names = {name for node in nodes for name in _get_evaluation(node).results.benchmarks}
            for name in names | set(counts[0]) | set(counts[1]):
                found = (counts[0][name], counts[1][name], counts[2][name])
                worst[name, seed] = min(worst.get((name, seed), found), found, key=lambda c: c[2])
    matches = []
    for name in sorted({name for name, _ in worst}):
        mine_all, other_all, common_all = (sum(c[i] for (n, _), c in worst.items() if n == name) for i in range(3))
        if any(not c[2] for (n, _), c in worst.items() if n == name):
            common_all = 0  # some seed cannot be compared on it, so the average over benchmarks could not be either
        seeds = [seed for n, seed in worst if n == name]
        said = dict.fromkeys(sources(name, seed) for seed in seeds)
        matches.append(BenchmarkMatch(name, mine_all, other_all, common_all, ", ".join(said)))
    return tuple(matches)


def _count_items(items: Counter[tuple[str, str, str, str]]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for identity, count in items.items():
        counts[identity[0]] += count
    return counts


def _compare_data(first: Side, second: Side) -> Any:
    """(benchmark, seed) -> what the manifests of the data say: the same artifact, the same file, or another one."""
    data = [{node.spec.seed or 0: node for node in side.nodes if node.spec.stage == "data"} for side in (first, second)]

    def say(name: str, seed: int) -> str:
        manifests = [nodes[seed].manifest if seed in nodes else None for nodes in data]
        if not data[0] and not data[1]:
            return "the same data"  # two arms of one run
        if manifests[0] is None or manifests[1] is None:
            return "data unknown"
        if manifests[0].key == manifests[1].key:
            return "the same data"
        prints = [_find_fingerprint(manifest.files, name) for manifest in manifests if manifest is not None]
        if None in prints:
            return "other data"
        return "other data, the same benchmark file" if prints[0] == prints[1] else "another benchmark file"

    return say


def _find_fingerprint(files: Mapping[str, Any], name: str) -> str | None:
    info = files.get(f"benchmarks/{name}.jsonl")
    return str(info["sha256"]) if isinstance(info, dict) and "sha256" in info else None


# ---- the differences -----------------------------------------------------------------------------------------------


def _compute_differences(
    pairs: Pairs, benchmarks: Sequence[str], k: int
) -> tuple[tuple[RunDifference, ...], list[str]]:
    found: list[RunDifference] = []
    notes: list[str] = []
    points = order_points([point for point, _ in pairs])
    ordered = sorted(pairs, key=lambda p: (points.index(p[0]), not p[1].is_control, p[1].cycle, p[1].name))
    groups: list[tuple[str | None, list[str]]] = [(None, list(benchmarks)), *((name, [name]) for name in benchmarks)]
    for point, arm in ordered:
        by_seed = pairs[point, arm]
        kept = {seed: restrict(_get_evaluation(a), _get_evaluation(b), benchmarks) for seed, (a, b) in by_seed.items()}
        same_tokens = all(_count_tokens(a) == _count_tokens(b) for a, b in kept.values())
        if not same_tokens:
            notes.append(
                f"NLL is left out {describe_point(point)}, {arm.label}: the solutions have other numbers of tokens, "
                "and nats per token of two tokenizers cannot be compared."
            )
        for metric in METRICS.values():
            if (metric.key == "nll" and not same_tokens) or (metric.key == "pass@k" and k <= 1):
                continue
            sides = [
                {seed: compute_item_values(pair[which], metric.key, k) for seed, pair in kept.items()}
                for which in (0, 1)
            ]
            for benchmark, members in groups:
                one = _compute_difference(point, arm, benchmark, metric, sides, members)
                if one is not None:
                    found.append(one)
    num_same = sum(a.spec.key == b.spec.key != "" for by_seed in pairs.values() for a, b in by_seed.values())
    if num_same:
        total = sum(map(len, pairs.values()))
        notes.append(
            f"{num_same} of {total} pairs of evaluations have the same key (same settings, same inputs): they can "
            "differ only by machine and versions."
        )
    return tuple(found), notes


def _count_tokens(evaluation: Evaluation) -> list[int | None]:
    return [item.nll_tokens for item in evaluation.items]


def _compute_difference(
    point: str,
    arm: Arm,
    benchmark: str | None,
    metric: Metric,
    sides: Sequence[Mapping[int, ItemValues]],
    members: Sequence[str],
) -> RunDifference | None:
    """None where a side lacks this measurement on one of the benchmarks."""
    comparison, num_unpaired = compute_comparison(sides[1], sides[0], members)
    if comparison is None:
        return None
    estimates = []
    for values in sides:
        complete = {seed: v for seed, v in values.items() if all(v.get(name) for name in members)}
        scores = {
            seed: float(np.mean([np.mean(list(v[name].values())) for name in members])) for seed, v in complete.items()
        }
        estimates.append(compute_score(scores, complete, members, metric.key))
    num_seeds = len(comparison.differences_by_seed)
    return RunDifference(
        estimates[0], Row(point, arm, benchmark, metric, estimates[1], num_seeds, comparison, num_unpaired)
    )


# ---- recipes, costs, notes -----------------------------------------------------------------------------------------


def _diff_fields(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[FieldChange, ...]:
    names = [*first, *(name for name in second if name not in first)]
    return tuple(
        FieldChange(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)
    )


def _collect_costs(first: Side, second: Side) -> dict[str, tuple[Cost | None, Cost | None]]:
    kinds = dict.fromkeys(node.spec.stage for side in (first, second) for node in side.nodes)
    costs = {kind: (_sum_cost(first, kind), _sum_cost(second, kind)) for kind in kinds}
    return {kind: pair for kind, pair in costs.items() if pair != (None, None)}


def _sum_cost(side: Side, kind: str) -> Cost | None:
    """Of finished stages; an artifact that several nodes share counts once."""
    found = [node.manifest for node in side.nodes if node.spec.stage == kind and node.status == "done"]
    manifests = [manifest for manifest in found if manifest is not None]
    if not manifests:
        return None
    peaks = [manifest.peak_rss_mb for manifest in manifests if manifest.peak_rss_mb is not None]
    return Cost(len(manifests), sum(manifest.seconds or 0.0 for manifest in manifests), max(peaks, default=None))


def _note_missing(first: Side, second: Side, pairs: Pairs) -> list[str]:
    """What only one side has: whole places, and seeds at common places."""
    notes = []
    for side, other in ((first, second), (second, first)):
        lost = [f"{arm.label} {describe_point(point)}" for point, arm in side.evaluations if (point, arm) not in pairs]
        if lost:
            notes.append(f"Without a partner in {other.label}: {'; '.join(lost)}.")
        seeds = {seed for place in pairs for seed in side.evaluations[place].keys() - pairs[place].keys()}
        if seeds:
            notes.append(f"Seeds of {side.label} without a partner: {', '.join(map(str, sorted(seeds)))}.")
    return notes


def _note_matches(matches: Sequence[BenchmarkMatch]) -> list[str]:
    """What is not the same on both sides, benchmarks with the same numbers in one sentence."""
    alike: dict[tuple[int, int, int, str], list[str]] = defaultdict(list)
    for match in matches:
        if not match.num_common == match.num_first == match.num_second:
            alike[match.num_common, match.num_first, match.num_second, match.source].append(match.name)
    return [
        f"Benchmark {', '.join(names)}: {common} items in common of {first} and {second} ({source}); "
        + ("only those are compared." if common else "left out.")
        for (common, first, second, source), names in alike.items()
    ]


def _note_settings(pairs: Pairs) -> list[str]:
    """Evaluations that asked in another way. How many items they asked does not matter: common ones are compared."""
    changed: dict[str, None] = {}
    for by_seed in pairs.values():
        for a, b in by_seed.values():
            changed |= dict.fromkeys(c.field for c in _diff_fields(_flatten(a.spec.config), _flatten(b.spec.config)))
    changed.pop("num_items", None)
    if not changed:
        return []
    return [f"The evaluations were made with other settings: {', '.join(changed)}. Scores may differ for that alone."]
