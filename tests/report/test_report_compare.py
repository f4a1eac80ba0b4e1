"""Scores and differences from items, computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from polm.evals.statistics import compute_wilson_interval
from polm.report.compare import (
    CONTROL,
    METRICS,
    Arm,
    compute_rows,
    describe_row,
    describe_seeds,
    format_interval,
    format_number,
    get_lead_arm,
)
from polm.report.load import Run, load_run


def build_item(
    benchmark: str, item_id: str, greedy: int, samples: list[int], nll: float, tokens: int
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "id": item_id,
        "greedy_correct": greedy,
        "samples_correct": samples,
        "nll": nll,
        "nll_tokens": tokens,
    }


@pytest.fixture
def write_evals(tmp_path: Path) -> Callable[[dict[str, list[dict[str, Any]]]], Run]:
    """Write a run of nothing but evaluations: node id -> items."""

    def write(evaluations: dict[str, list[dict[str, Any]]]) -> Run:
        nodes = []
        for index, (node_id, items) in enumerate(evaluations.items()):
            seed, cycle, arm, _ = node_id.split("/")
            place = {"seed": int(seed[1:]), "cycle": int(cycle[1:]), "arm": arm}
            nodes.append({"id": node_id, "stage": "eval", "artifact": f"store/eval-{index}", **place})
            folder = tmp_path / "store" / f"eval-{index}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"key": str(index), "stage": "eval"}))
            (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
            names = {item["benchmark"]: {"num_items": 1, "greedy": 0.25, "pass@k": {"2": 0.5}} for item in items}
            results = {"format": "plain", "benchmarks": names or {"a": {"num_items": 4, "greedy": 0.25}}}
            (folder / "results.json").write_text(json.dumps(results))
        (tmp_path / "run.json").write_text(json.dumps({"name": "x", "nodes": nodes}))
        return load_run(tmp_path)

    return write


REMIT = Arm(1, "remit")


def test_scores_and_differences_by_hand(write_evals: Callable[..., Run]) -> None:
    control = [
        build_item("a", "1", 0, [0, 0, 0, 1], 4.0, 2),
        build_item("a", "2", 1, [1, 1, 1, 1], 2.0, 4),
        build_item("b", "1", 1, [0, 0, 0, 0], 3.0, 3),
    ]
    arm = [
        build_item("a", "1", 1, [1, 1, 0, 0], 1.0, 2),
        build_item("a", "2", 1, [1, 1, 1, 1], 2.0, 4),
        build_item("b", "1", 0, [0, 0, 1, 1], 6.0, 3),
    ]
    rows = compute_rows(write_evals({"s0/c0/ntp/eval_base": control, "s0/c1/remit/eval_base": arm}))
    assert rows.k == 2

    def get(arm: Arm, benchmark: str | None, metric: str) -> float:
        row = rows.get("base", arm, benchmark, metric)
        assert row is not None
        return row.score.mean

    assert get(CONTROL, "a", "greedy") == 0.5
    assert get(CONTROL, None, "greedy") == 0.75  # benchmarks count equally: (0.5 + 1) / 2
    assert get(REMIT, "a", "pass@1") == 0.75  # (0.5 + 1) / 2
    assert get(REMIT, "a", "pass@k") == pytest.approx((5 / 6 + 1) / 2)  # 1 - C(2,2)/C(4,2) = 5/6
    assert get(CONTROL, "a", "nll") == pytest.approx(6.0 / 6)  # nats over tokens, not the mean of ratios 2 and 0.5
    row = rows.get("base", REMIT, "a", "nll")
    assert row is not None
    assert row.comparison is not None
    assert row.comparison.interval.mean_difference == pytest.approx(3.0 / 6 - 6.0 / 6)
    average = rows.get("base", REMIT, None, "greedy")
    assert average is not None
    assert average.comparison is not None
    assert average.comparison.interval.mean_difference == pytest.approx((0.5 - 1.0) / 2)
    assert average.comparison.basis == "items"


def test_items_are_paired_by_id_and_the_rest_is_counted(write_evals: Callable[..., Run]) -> None:
    control = [build_item("a", str(i), i % 2, [], 1.0, 1) for i in range(4)]
    arm = [build_item("a", str(i), 1, [], 1.0, 1) for i in (3, 2, 1, 7)]  # another order, one stranger
    rows = compute_rows(write_evals({"s0/c0/ntp/eval_base": control, "s0/c1/remit/eval_base": arm}))
    row = rows.get("base", REMIT, "a", "greedy")
    assert row is not None
    assert row.comparison is not None
    assert row.comparison.num_items == 3
    assert row.num_unpaired == 2
    assert row.comparison.interval.mean_difference == pytest.approx(1 / 3)  # items 1, 2, 3 of the control: 1, 0, 1
    assert rows.get("base", REMIT, "a", "pass@1") is None  # nothing was sampled


def test_a_repeated_id_loses_no_item(write_evals: Callable[..., Run]) -> None:
    items = [build_item("a", "same", value, [], 1.0, 1) for value in (1, 1, 0, 0)]
    row = compute_rows(write_evals({"s0/c0/ntp/eval_base": items})).get("base", CONTROL, "a", "greedy")
    assert row is not None
    assert row.score.mean == 0.5


def test_seeds_give_a_t_interval_and_only_they_decide(write_evals: Callable[..., Run]) -> None:
    evaluations = {}
    for seed, num_right in enumerate((6, 7, 8)):  # of 10; the control has 3 each time: +0.3, +0.4, +0.5
        evaluations[f"s{seed}/c0/ntp/eval_rl"] = [build_item("a", str(i), int(i < 3), [], 1.0, 1) for i in range(10)]
        arm = [build_item("a", str(i), int(i < num_right), [], 1.0, 1) for i in range(10)]
        evaluations[f"s{seed}/c1/remit/eval_rl"] = arm
    row = compute_rows(write_evals(evaluations)).get("rl", REMIT, None, "greedy")
    assert row is not None
    assert row.comparison is not None
    assert row.comparison.differences_by_seed == pytest.approx((0.3, 0.4, 0.5))
    margin = 4.302653 * 0.1 / math.sqrt(3)
    assert row.comparison.interval.low95 == pytest.approx(0.4 - margin, abs=1e-6)
    assert row.verdict == "better"
    assert "The arm is better than the control." in describe_row(row)
    assert format_interval(row) == "+15.2 to +64.8"


def test_one_seed_decides_nothing_however_large_the_difference(write_evals: Callable[..., Run]) -> None:
    control = [build_item("a", str(i), 0, [], 2.0, 1) for i in range(20)]
    arm = [build_item("a", str(i), int(i > 0), [], 1.0, 1) for i in range(20)]
    rows = compute_rows(write_evals({"s0/c0/ntp/eval_base": control, "s0/c1/remit/eval_base": arm}))
    row = rows.get("base", REMIT, None, "greedy")
    assert row is not None
    assert row.comparison is not None
    assert row.comparison.interval.excludes_zero
    assert row.verdict == "undecided"
    text = describe_row(row)
    assert "one seed proves nothing about training noise" in text
    assert "better" not in text


def test_a_null_result_reads_as_one(write_evals: Callable[..., Run]) -> None:
    items = [build_item("a", str(i), i % 2, [], 1.0, 1) for i in range(20)]
    evaluations = {f"s{s}/c{c}/{arm}/eval_base": items for s in (0, 1) for c, arm in ((0, "ntp"), (1, "remit"))}
    row = compute_rows(write_evals(evaluations)).get("base", REMIT, None, "greedy")
    assert row is not None
    assert describe_row(row) == (
        "Base model, after mid-training, greedy on average over benchmarks: remit · cycle 1 against ntp: 0.0 points "
        "(95 % interval 0.0 to 0.0; t interval over 2 seeds). No difference was shown: the interval includes zero."
    )


def greedy_of(seeds: Sequence[Mapping[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of the control, one a seed: of each benchmark the verdicts on its items ("01": wrong, right)."""
    return {
        f"s{seed}/c0/ntp/eval_base": [
            build_item(name, str(i), int(one), [], 1.0, 1)
            for name, verdicts in found.items()
            for i, one in enumerate(verdicts)
        ]
        for seed, found in enumerate(seeds)
    }


def test_equal_differences_decide_nothing(write_evals: Callable[..., Run]) -> None:
    """Two seeds that both gain one of five items: the numbers stand, no verdict follows."""
    control, arm = greedy_of([{"a": "10000"}] * 2), greedy_of([{"a": "11000"}] * 2)
    evaluations = control | {place.replace("c0/ntp", "c1/remit"): items for place, items in arm.items()}
    row = compute_rows(write_evals(evaluations)).get("base", REMIT, None, "greedy")
    assert row is not None
    assert row.comparison is not None
    assert row.comparison.interval.low95 == pytest.approx(0.2)
    assert row.verdict == "undecided"
    assert describe_row(row).endswith(
        "+20.0 points (95 % interval +20.0 to +20.0; t interval over 2 seeds). "
        "No difference was shown: equal differences say nothing about their spread."
    )


@pytest.mark.parametrize(
    ("seeds", "num_right", "num_items"),
    [
        ([{"a": "0" * 12, "b": "0" * 12}], 0, 24),  # one seed, all equal
        ([{"a": "1" * 12, "b": "0" * 12}], 12, 24),  # all equal within each benchmark
        ([{"a": "1" * 10, "b": "1" * 990}], 40, 40),  # the ten weigh as much as the 990
        ([{"a": "0001"}, {"a": "0010"}], 2, 8),  # equal seeds
        ([{"a": "00", "b": "00"}] * 3, 0, 12),
    ],
)
def test_scores_without_a_spread_get_an_interval_over_their_items(
    write_evals: Callable[..., Run], seeds: list[dict[str, str]], num_right: int, num_items: int
) -> None:
    row = compute_rows(write_evals(greedy_of(seeds))).get("base", CONTROL, None, "greedy")
    assert row is not None
    expected = compute_wilson_interval(num_right, num_items)
    assert row.num_seeds == len(seeds)
    assert row.score.mean == pytest.approx(expected.mean)
    assert (row.score.low95, row.score.high95) == pytest.approx((expected.low95, expected.high95))


def test_equal_seeds_of_several_benchmarks_are_resampled(write_evals: Callable[..., Run]) -> None:
    row = compute_rows(write_evals(greedy_of([{"a": "0011", "b": "01"}] * 2))).get("base", CONTROL, None, "greedy")
    assert row is not None
    assert row.score.mean == 0.5
    assert 0 < row.score.low95 < 0.4 < 0.6 < row.score.high95 < 1


def test_equal_likelihoods_have_no_interval(write_evals: Callable[..., Run]) -> None:
    row = compute_rows(write_evals(greedy_of([{"a": "01"}] * 2))).get("base", CONTROL, None, "nll")
    assert row is not None
    assert row.score.mean == 1.0
    assert math.isnan(row.score.low95)


def test_bounds_of_an_accuracy_are_possible_ones(write_evals: Callable[..., Run]) -> None:
    """Seeds at 2 % and 8 %: the t interval would be -33.1 to 43.1 %. Differences keep theirs."""
    control = greedy_of([{"a": "1" + "0" * 49}, {"a": "1" * 4 + "0" * 46}])
    arm = greedy_of([{"a": "1" * 49 + "0"}, {"a": "1" * 46 + "0" * 4}])
    evaluations = control | {place.replace("c0/ntp", "c1/remit"): items for place, items in arm.items()}
    rows = compute_rows(write_evals(evaluations))
    low, high = rows.get("base", CONTROL, None, "greedy"), rows.get("base", REMIT, None, "greedy")
    assert low is not None
    assert high is not None
    assert high.comparison is not None
    assert (low.score.low95, low.score.high95) == pytest.approx((0.0, 0.4312), abs=1e-4)
    assert (high.score.low95, high.score.high95) == pytest.approx((0.5688, 1.0), abs=1e-4)
    assert high.comparison.interval.high95 > 1


def test_seeds_in_words() -> None:
    assert [describe_seeds(counts) for counts in ([1], [3, 3], [2, 1, 3])] == ["1 seed", "3 seeds", "1 to 3 seeds"]


def test_lower_nll_is_better(write_evals: Callable[..., Run]) -> None:
    evaluations = {}
    for seed in (0, 1, 2):
        for place, nll in (("c0/ntp", 2.0 + 0.01 * seed), ("c1/remit", 1.0)):
            items = [build_item("a", str(i), 0, [], nll, 1) for i in range(3)]
            evaluations[f"s{seed}/{place}/eval_base"] = items
    row = compute_rows(write_evals(evaluations)).get("base", REMIT, None, "nll")
    assert row is not None
    assert row.verdict == "better"


def test_without_items_the_recorded_scores_stand_and_nothing_is_compared(write_evals: Callable[..., Run]) -> None:
    rows = compute_rows(write_evals({"s0/c0/ntp/eval_base": [], "s0/c1/remit/eval_base": []}))
    row = rows.get("base", REMIT, "a", "greedy")
    assert row is not None
    assert row.score.mean == 0.25
    assert row.comparison is None


def test_order_of_points_and_arms_and_the_lead(small_run: Path) -> None:
    rows = compute_rows(load_run(small_run))
    assert rows.points == ("base", "sft", "dpo", "rl")
    assert [arm.label for arm in rows.arms] == ["ntp · cycle 0", "remit · cycle 1", "rho1 · cycle 1"]
    assert get_lead_arm(rows) == REMIT
    assert rows.k == 4


def test_copies_of_the_control_are_not_shown_twice(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()
    content = json.loads((run_dir / "run.json").read_text())
    copies = [
        {**node, "id": node["id"].replace("/c0/", "/c1/"), "cycle": 1}
        for node in content["nodes"]
        if node["arm"] == "ntp"
    ]
    content["nodes"] += copies
    (run_dir / "run.json").write_text(json.dumps(content))
    rows = compute_rows(load_run(run_dir))
    assert Arm(1, "ntp") not in rows.arms


def test_numbers_are_printed_with_sign_and_without_a_signed_zero() -> None:
    greedy = METRICS["greedy"]
    assert format_number(0.1234, greedy) == "12.3"
    assert format_number(-0.0234, greedy, signed=True) == "\u22122.3"
    assert format_number(0.0234, greedy, signed=True) == "+2.3"
    assert format_number(-0.0001, greedy, signed=True) == "0.0"
    assert format_number(math.nan, greedy) == "–"
    assert format_number(-0.0126, METRICS["nll"], signed=True) == "\u22120.013"
