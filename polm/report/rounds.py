"""Runs that have no control beside them, such as self-rewarding iterations: each evaluation against the first one.

A model is compared with what it was before, on the same seeds and items. That is before and after, not arm and
control: what the data alone would have done is in no evaluation of such a run, and the words say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from polm.report.compare import (
    CONTROL_NAME,
    METRICS,
    Arm,
    Row,
    Rows,
    build_evaluations,
    compute_common_k,
    compute_comparison,
    compute_item_values,
    compute_rows,
    describe_point,
    format_interval,
    format_number,
    start_sentence,
)
from polm.report.load import Run

Place = tuple[str, Arm]
NO_CONTROL = (
    "This is before and after, without a control: how much of a difference the same updates on other data would have "
    "made, this run cannot say."
)


@dataclass(frozen=True, eq=False)
class Rounds:
    """The evaluated places in the order of the run; `rows` are the averages over benchmarks by place and metric, with
    the paired difference to the first place."""

    places: tuple[Place, ...]
    rows: dict[tuple[Place, str], Row]
    k: int

    def list_metrics(self) -> list[str]:
        return [key for key in METRICS if any(metric == key for _, metric in self.rows)]


def name_place(place: Place) -> str:
    point, arm = place
    return f"{arm.label}, {describe_point(point)}"


def has_control(run: Run) -> bool:
    """Whether the run has, or will have, an arm that everything is compared with."""
    return any(node.spec.arm == CONTROL_NAME for node in run.nodes)


def compute_rounds(run: Run) -> Rounds | None:
    """None for a run with a control, or with fewer than two evaluations."""
    evaluations = build_evaluations(run)
    if has_control(run) or len(evaluations) < 2:
        return None
    places = tuple(evaluations)
    k = compute_common_k(evaluations)
    scores: Rows = compute_rows(run)
    rows: dict[tuple[Place, str], Row] = {}
    for metric in METRICS:
        values = {
            place: {seed: compute_item_values(one, metric, k) for seed, one in by_seed.items()}
            for place, by_seed in evaluations.items()
        }
        for place in places:
            row = scores.get(*place, None, metric)
            if row is None:
                continue
            comparison, unpaired = None, 0
            if place != places[0]:
                comparison, unpaired = compute_comparison(values[place], values[places[0]], scores.benchmarks)
            rows[place, metric] = Row(
                row.point, row.arm, None, row.metric, row.score, row.num_seeds, comparison, unpaired
            )
    return Rounds(places, rows, k)


def describe_rounds(rounds: Rounds, metric: str = "greedy") -> str:
    """The last evaluation against the first as a sentence; a null result reads as one."""
    first, last = rounds.places[0], rounds.places[-1]
    row = rounds.rows.get((last, metric))
    opening = f"{start_sentence(name_place(last))}, against {name_place(first)}"
    if row is None or row.comparison is None:
        return f"{opening}: nothing can be compared."
    mean = format_number(row.comparison.interval.mean_difference, row.metric, signed=True)
    words = {
        "better": "Better than before.",
        "worse": "Worse than before.",
        "undecided": "No difference was shown.",
    }[row.verdict]
    if row.comparison.basis == "items":
        words = "One seed, so nothing is shown."
    return (
        f"{opening}: {mean} {row.metric.difference_unit} {row.metric.title} "
        f"(95 % interval {format_interval(row)}). {words}"
    )
