"""From the evaluations of a run to scores, and to differences between each arm and the control.

The control is cycle 0, arm "ntp": plain next-token prediction, which is the same artifact in every cycle. A difference
is paired twice: the same seed (same data, same pre-annealing checkpoint) and, within it, the same items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from polm.evals.statistics import (
    Comparison,
    Estimate,
    compute_pass_at_k,
    compute_seed_comparison,
    compute_stratified_bootstrap,
    compute_t_interval,
    compute_wilson_interval,
)
from polm.report.load import BenchmarkResult, Evaluation, Item, Node, Run

CONTROL_NAME = "ntp"
NUM_RESAMPLES = 4_000

# Where in the pipeline a model was evaluated, in order, with the words for it. Other points follow in run order.
POINTS = {
    "start": "before training",
    "base": "base model, after mid-training",
    "sft": "after SFT",
    "dpo": "after preference optimisation",
    "rl": "after RL",
    "eval": "the given model",
}

ItemValues = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Arm:
    """One way of mid-training in one cycle; `cycle` -1 stands for nodes that belong to no cycle."""

    cycle: int
    name: str

    @property
    def label(self) -> str:
        return f"{self.name} · cycle {self.cycle}" if self.cycle >= 0 else self.name

    @property
    def is_control(self) -> bool:
        return self.cycle == 0 and self.name == CONTROL_NAME


CONTROL = Arm(0, CONTROL_NAME)


@dataclass(frozen=True)
class Metric:
    """How a score is named and read. `scale` turns the stored number into the shown one (percent)."""

    key: str
    title: str
    unit: str
    difference_unit: str
    scale: float
    num_decimals: int
    higher_is_better: bool


def _build_accuracy(key: str, title: str) -> Metric:
    return Metric(key, title, "%", "points", 100.0, 1, True)


METRICS = {
    "greedy": _build_accuracy("greedy", "greedy"),
    "pass@1": _build_accuracy("pass@1", "sampled, pass@1"),
    "steps@1": _build_accuracy("steps@1", "sampled, form of the answer fixed"),
    "pass@k": _build_accuracy("pass@k", "sampled, pass@k"),
    "nll": Metric("nll", "NLL of the solution", "nats/token", "nats/token", 1.0, 3, False),
}


@dataclass(frozen=True)
class Row:
    """One score: a point in the pipeline, an arm, a benchmark (None: plain average over benchmarks) and a metric.

    `comparison` is None for the control and where control or items are missing. `num_unpaired` counts the items that
    only one of the two sides has; they are in the score and not in the comparison.
    """

    point: str
    arm: Arm
    benchmark: str | None
    metric: Metric
    score: Estimate
    num_seeds: int
    comparison: Comparison | None
    num_unpaired: int

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "undecided"; never decided by one seed, which cannot show the noise of training."""
        if self.comparison is None or self.comparison.basis == "items" or not self.comparison.interval.excludes_zero:
            return "undecided"
        return "better" if (self.comparison.interval.low95 > 0) == self.metric.higher_is_better else "worse"


@dataclass(frozen=True, eq=False)
class Rows:
    """All scores of a run in the order in which they are shown, and the k of pass@k (0: none was measured)."""

    rows: tuple[Row, ...]
    points: tuple[str, ...]
    arms: tuple[Arm, ...]
    benchmarks: tuple[str, ...]
    k: int

    def get(self, point: str, arm: Arm, benchmark: str | None, metric: str) -> Row | None:
        return _index(self).get((point, arm, benchmark, metric))


@lru_cache(maxsize=4)
def _index(rows: Rows) -> Mapping[tuple[str, Arm, str | None, str], Row]:
    return {(row.point, row.arm, row.benchmark, row.metric.key): row for row in rows.rows}


def compute_point(node: Node) -> str:
    """Where in the pipeline an evaluation node stands: "eval_sft" -> "sft"."""
    return node.leaf.removeprefix("eval_")


def compute_arm(node: Node) -> Arm:
    """The arm of a node; nodes that all arms share (data, pre-training) are the arm "shared"."""
    if not node.spec.arm:
        return Arm(-1, "shared")
    return Arm(node.spec.cycle if node.spec.cycle is not None else -1, node.spec.arm)


def describe_point(point: str) -> str:
    return POINTS.get(point, f"at {point}")


def describe_seeds(counts: Collection[int]) -> str:
    """How many seeds there are behind each of several numbers: "3 seeds", or "1 to 3 seeds" where they differ."""
    low, high = min(counts), max(counts)
    return f"{high} seed{'s' * (high > 1)}" if low == high else f"{low} to {high} seeds"


def start_sentence(text: str) -> str:
    """`text` with a capital first letter and the rest as it is, abbreviations included."""
    return text[:1].upper() + text[1:]


def build_evaluations(run: Run) -> dict[tuple[str, Arm], dict[int, Evaluation]]:
    """Finished evaluations by point and arm, then by seed. The control's copies in later cycles are left out."""
    found: dict[tuple[str, Arm], dict[int, Evaluation]] = {}
    for node in run.nodes:
        arm = compute_arm(node)
        is_copy = node.status == "shared" and arm.name == CONTROL_NAME and arm.cycle > 0
        if node.evaluation is not None and not is_copy:
            found.setdefault((compute_point(node), arm), {})[node.spec.seed or 0] = node.evaluation
    return found


def _compute_value(item: Item, metric: str, k: int) -> float | None:
    """One item's score; for "nll" the sum over its solution, which `compute_item_values` then divides."""
    if metric == "greedy":
        return item.greedy_correct
    if metric == "nll":
        return item.nll if item.nll_tokens else None
    if metric == "steps@1":
        return sum(item.steps_correct) / len(item.steps_correct) if item.steps_correct else None
    if not item.samples_correct:
        return None
    if metric == "pass@1":
        return sum(item.samples_correct) / len(item.samples_correct)
    num_samples = len(item.samples_correct)
    return compute_pass_at_k(num_samples, round(sum(item.samples_correct)), k) if 1 <= k <= num_samples else None


def compute_item_values(evaluation: Evaluation, metric: str, k: int) -> ItemValues:
    """Score of every item by benchmark and id; their plain mean over a benchmark is the benchmark's score.

    For "nll" each item's sum of nats is scaled by items / tokens of the benchmark, so that the mean over items is nats
    per token. Items without a finite value are left out. A repeated id gets a number, so no item is lost.
    """
    values: ItemValues = {}
    num_tokens: Counter[str] = Counter()
    seen: Counter[tuple[str, str]] = Counter()
    for item in evaluation.items:
        value = _compute_value(item, metric, k)
        seen[item.benchmark, str(item.id)] += 1
        if value is None or not math.isfinite(value):
            continue
        key = f"{item.id} ({seen[item.benchmark, str(item.id)]})"
        values.setdefault(item.benchmark, {})[key] = value
        num_tokens[item.benchmark] += item.nll_tokens or 0
    if metric == "nll":
        for benchmark, by_id in values.items():
            scale = len(by_id) / num_tokens[benchmark]
            values[benchmark] = {key: value * scale for key, value in by_id.items()}
    return values


def _get_recorded_score(result: BenchmarkResult, metric: str, k: int) -> float | None:
    """The score that results.json gives, for an evaluation without items."""
    recorded = {
        "greedy": result.greedy,
        "pass@1": result.pass_at_1,
        "steps@1": result.steps_at_1,
        "pass@k": result.pass_at_k.get(k),
        "nll": result.nll,
    }[metric]
    return recorded if recorded is not None and math.isfinite(recorded) else None


def _compute_seed_score(
    evaluation: Evaluation, values: ItemValues, benchmarks: Sequence[str], metric: str, k: int
) -> float | None:
    """Plain average over `benchmarks`, from the items where there are any; None if a benchmark has no score."""
    scores = []
    for benchmark in benchmarks:
        by_id = values.get(benchmark)
        if by_id:
            scores.append(float(np.mean(list(by_id.values()))))
            continue
        result = evaluation.results.benchmarks.get(benchmark)
        recorded = None if result is None or evaluation.items else _get_recorded_score(result, metric, k)
        if recorded is None:
            return None
        scores.append(recorded)
    return float(np.mean(scores)) if scores else None


def compute_score(
    scores: Mapping[int, float], values: Mapping[int, ItemValues], benchmarks: Sequence[str], metric: str
) -> Estimate:
    """Mean over seeds with a t interval; for one seed the interval over items.

    Seeds that are all equal show no spread: they get the interval over the items of all of them. That is a bootstrap,
    or Wilson's where items are right or wrong and there is one benchmark, or all items of each are equal. No bound of
    an accuracy lies outside of 0..1.
    """
    over_seeds = compute_t_interval(list(scores.values()))
    score, low, high = over_seeds.mean_difference, over_seeds.low95, over_seeds.high95
    if len(scores) > 1 and over_seeds.has_width:
        return Estimate(score, low, high) if metric == "nll" else Estimate(score, max(0.0, low), min(1.0, high))
    strata = [[v for seed in scores for v in values[seed].get(name, {}).values()] for name in benchmarks]
    if metric == "nll" or not all(strata):
        return Estimate(score, math.nan, math.nan)
    is_right_or_wrong = set().union(*strata) <= {0.0, 1.0}
    if len(strata) > 1 or not is_right_or_wrong:
        over_items = compute_stratified_bootstrap(strata, num_resamples=NUM_RESAMPLES)
        if over_items.has_width:
            return Estimate(score, over_items.low95, over_items.high95)
    if not is_right_or_wrong:
        return Estimate(score, math.nan, math.nan)
    # Benchmarks weigh alike, so a small one leaves the average as uncertain as if all of them had fewer items.
    num_items = round(len(strata) ** 2 / sum(1 / len(items) for items in strata))
    wilson = compute_wilson_interval(round(score * num_items), num_items)
    return Estimate(score, wilson.low95, wilson.high95)


def compute_comparison(
    arm: Mapping[int, ItemValues], control: Mapping[int, ItemValues], benchmarks: Sequence[str]
) -> tuple[Comparison | None, int]:
    """Paired comparison over the seeds that both have, and the number of items without a partner."""
    num_unpaired = 0
    pairs: list[tuple[list[list[float]], list[list[float]]]] = []
    for seed in sorted(arm.keys() & control.keys()):
        left_strata, right_strata = [], []
        for benchmark in benchmarks:
            left, right = arm[seed].get(benchmark, {}), control[seed].get(benchmark, {})
            common = [key for key in left if key in right]
            num_unpaired += len(left) + len(right) - 2 * len(common)
            left_strata.append([left[key] for key in common])
            right_strata.append([right[key] for key in common])
        if left_strata and all(left_strata):
            pairs.append((left_strata, right_strata))
    if not pairs:
        return None, num_unpaired
    lefts, rights = [left for left, _ in pairs], [right for _, right in pairs]
    return compute_seed_comparison(lefts, rights, num_resamples=NUM_RESAMPLES), num_unpaired


def compute_common_k(evaluations: Mapping[tuple[str, Arm], Mapping[int, Evaluation]]) -> int:
    """The largest k that every evaluation measured; 0 if there is none."""
    common: set[int] | None = None
    for by_seed in evaluations.values():
        for evaluation in by_seed.values():
            for result in evaluation.results.benchmarks.values():
                ks = set(result.pass_at_k)
                common = ks if common is None else common & ks
    return max(common or {0})


def order_points(points: Sequence[str]) -> tuple[str, ...]:
    known = [point for point in POINTS if point in points]
    return (*known, *dict.fromkeys(point for point in points if point not in POINTS))


@lru_cache(maxsize=2)
def compute_rows(run: Run) -> Rows:
    """Every score of the run with its interval and its paired difference to the control."""
    evaluations = build_evaluations(run)
    k = compute_common_k(evaluations)
    points = order_points([point for point, _ in evaluations])
    # The control first, then by cycle, and within a cycle as the run lists them (sorting keeps that order).
    arms = tuple(sorted(dict.fromkeys(arm for _, arm in evaluations), key=lambda arm: (not arm.is_control, arm.cycle)))
    names = dict.fromkeys(
        name
        for by_seed in evaluations.values()
        for evaluation in by_seed.values()
        for name in evaluation.results.benchmarks
    )
    groups: list[tuple[str | None, list[str]]] = [(None, list(names)), *((name, [name]) for name in names)]
    rows: list[Row] = []
    for metric in METRICS.values():
        values = {
            place: {seed: compute_item_values(one, metric.key, k) for seed, one in by_seed.items()}
            for place, by_seed in evaluations.items()
        }
        for point, arm in ((point, arm) for point in points for arm in arms if (point, arm) in evaluations):
            for benchmark, members in groups:
                place = (point, arm)
                found = {
                    seed: _compute_seed_score(one, values[place][seed], members, metric.key, k)
                    for seed, one in evaluations[place].items()
                }
                scores = {seed: score for seed, score in found.items() if score is not None}
                if not scores:
                    continue
                comparison, num_unpaired = None, 0
                if not arm.is_control and (point, CONTROL) in values:
                    comparison, num_unpaired = compute_comparison(values[place], values[point, CONTROL], members)
                score = compute_score(scores, values[place], members, metric.key)
                rows.append(Row(point, arm, benchmark, metric, score, len(scores), comparison, num_unpaired))
    return Rows(tuple(rows), points, arms, tuple(names), k)


def format_number(value: float, metric: Metric, *, signed: bool = False) -> str:
    """A score in the metric's shown unit, with a real minus sign; "–" for nan."""
    if not math.isfinite(value):
        return "–"
    text = f"{value * metric.scale:{'+' if signed else ''}.{metric.num_decimals}f}"
    # A difference that rounds to nothing has no sign to speak of.
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\u2212")


def format_percent(share: float) -> str:
    """A share from 0 to 1 in percent, with one decimal."""
    return f"{100 * share:.1f}".replace("-", "\u2212")


def _format_bound(bound: float, metric: Metric) -> str:
    """A bound keeps its sign even where it rounds to zero: on which side of zero it lies is the whole point."""
    text = format_number(abs(bound), metric)
    return text if bound == 0 else f"{'+' if bound > 0 else chr(0x2212)}{text}"


def format_interval(row: Row) -> str:
    """ "−0.4 to +2.1", or "no interval" where none can be given; empty without a comparison."""
    if row.comparison is None:
        return ""
    interval = row.comparison.interval
    if not math.isfinite(interval.low95):
        return "no interval"
    return f"{_format_bound(interval.low95, row.metric)} to {_format_bound(interval.high95, row.metric)}"


def describe_row(row: Row) -> str:
    """One comparison as a sentence or two; a null result reads as one, and one seed is called one seed."""
    where = "on average over benchmarks" if row.benchmark is None else f"on {row.benchmark}"
    opening = f"{start_sentence(describe_point(row.point))}, {row.metric.title} {where}: {row.arm.label}"
    if row.comparison is None:
        score = format_number(row.score.mean, row.metric)
        return f"{opening} scores {score} {row.metric.unit}; there is no control to compare it with."
    comparison = row.comparison
    mean = format_number(comparison.interval.mean_difference, row.metric, signed=True)
    text = (
        f"{opening} against {CONTROL_NAME}: {mean} {row.metric.difference_unit} "
        f"(95 % interval {format_interval(row)}; {comparison.label}). "
    )
    if not math.isfinite(comparison.interval.low95):
        return text + "No interval can be given, so nothing follows from it."
    interval = comparison.interval
    if comparison.basis == "items" and interval.excludes_zero:
        return text + "Among these items the two models differ, but another seed may turn the sign."
    if not interval.has_width and interval.mean_difference:
        return text + "No difference was shown: equal differences say nothing about their spread."
    if row.verdict == "undecided":
        return text + "No difference was shown: the interval includes zero."
    return text + f"The arm is {row.verdict} than the control."


def get_lead_arm(rows: Rows) -> Arm | None:
    """The arm that the headline is about: ReMiT in the last cycle that was compared, else the first arm there."""
    compared = [row.arm for row in rows.rows if row.comparison is not None and row.arm.cycle >= 0]
    if not compared:
        return None
    last = [arm for arm in compared if arm.cycle == max(arm.cycle for arm in compared)]
    return next((arm for arm in last if arm.name == "remit"), last[0])
