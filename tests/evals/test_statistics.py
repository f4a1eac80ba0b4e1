"""Hand-computed numbers for every statistic; the bootstrap against its exact and its asymptotic distribution."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from polm.errors import DataError
from polm.evals import statistics
from polm.evals.statistics import (
    compute_mean_stderr,
    compute_paired_bootstrap,
    compute_pass_at_k,
    compute_seed_comparison,
    compute_stratified_bootstrap,
    compute_t_interval,
    compute_t_probability,
    compute_t_quantile,
    compute_wilson_interval,
)


@pytest.mark.parametrize(
    ("num_degrees", "confidence", "expected"),
    [  # printed tables of Student's t, two-sided
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (9, 0.95, 2.262),
        (10, 0.95, 2.228),
        (30, 0.95, 2.042),
        (120, 0.95, 1.980),
        (1, 0.99, 63.657),
        (9, 0.90, 1.833),
    ],
)
def test_t_quantile_matches_printed_tables(num_degrees: int, confidence: float, expected: float) -> None:
    assert compute_t_quantile(num_degrees, confidence) == pytest.approx(expected, abs=5e-4)


def test_t_probability_in_closed_forms() -> None:
    assert compute_t_probability(1.0, 1) == pytest.approx(0.5, abs=1e-15)  # Cauchy: 2/pi * atan(1)
    assert compute_t_probability(2.0, 2) == pytest.approx(2 / math.sqrt(6), abs=1e-15)  # t / sqrt(2 + t^2)
    assert compute_t_probability(0.0, 7) == 0.0
    assert compute_t_quantile(100_000) == pytest.approx(statistics.NORMAL_95, abs=1e-4)


def test_t_interval_by_hand() -> None:
    interval = compute_t_interval([1.0, 2.0, 3.0])  # deviation 1, stderr 1/sqrt(3), t(2) = 4.302653
    assert interval.mean_difference == 2.0
    assert interval.high95 - 2.0 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert 2.0 - interval.low95 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert not interval.excludes_zero  # 2 - 2.484 < 0
    assert compute_t_interval([2.0, 2.1, 1.9]).excludes_zero


def test_one_seed_has_no_t_interval() -> None:
    interval = compute_t_interval([0.4])
    assert interval.mean_difference == 0.4
    assert math.isnan(interval.low95)
    assert math.isnan(interval.high95)
    assert not interval.excludes_zero


@pytest.mark.parametrize(
    "differences",
    [[0.2, 0.2], [-0.2] * 5, [0.8 - 0.6, 0.6 - 0.4], [0.0, 0.0], [0.1 + 0.2, 0.3, 0.3], [1e-17, 1.1e-17] * 3],
)
def test_equal_differences_decide_nothing(differences: list[float]) -> None:
    """They say nothing about their spread, also where rounding tells them apart; the numbers stay."""
    interval = compute_t_interval(differences)
    assert interval.mean_difference == pytest.approx(differences[0], abs=1e-15)
    assert interval.high95 - interval.low95 < 1e-14
    assert not interval.has_width
    assert not interval.excludes_zero


def test_small_differences_that_differ_may_decide() -> None:
    interval = compute_t_interval([2e-6, 2.1e-6, 1.9e-6])
    assert interval.has_width
    assert interval.excludes_zero


def test_mean_stderr_by_hand() -> None:
    summary = compute_mean_stderr([1.0, 3.0])  # deviation sqrt(2), over sqrt(2)
    assert (summary.mean, summary.n, summary.note) == (2.0, 2, "")
    assert summary.stderr == pytest.approx(1.0)
    single = compute_mean_stderr([5.0])
    assert single.mean == 5.0
    assert math.isnan(single.stderr)
    assert "no standard error" in single.note


def test_pass_at_k_against_every_draw() -> None:
    # 3 right of 5: count the pairs with at least one right, 9 of 10.
    assert compute_pass_at_k(5, 3, 2) == pytest.approx(0.9)
    for num_samples, num_correct, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if num_correct > num_samples or k > num_samples:
            continue
        draws = list(itertools.combinations(range(num_samples), k))
        hits = sum(any(index < num_correct for index in draw) for draw in draws)
        assert compute_pass_at_k(num_samples, num_correct, k) == pytest.approx(hits / len(draws))
    assert compute_pass_at_k(2000, 1, 1000) == pytest.approx(0.5)  # far beyond what floats of factorials could do


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int) -> None:
    with pytest.raises(DataError):
        compute_pass_at_k(n, c, k)


def test_wilson_by_hand() -> None:
    estimate = compute_wilson_interval(5, 10)  # centre 0.5, half-width z/sqrt(n + z^2)/2
    z = statistics.NORMAL_95
    margin = z / (2 * math.sqrt(10 + z * z))
    assert estimate.mean == 0.5
    assert estimate.low95 == pytest.approx(0.5 - margin)
    assert estimate.high95 == pytest.approx(0.5 + margin)
    nothing = compute_wilson_interval(0, 10)
    assert nothing.low95 == 0.0
    assert nothing.high95 == pytest.approx(z * z / (10 + z * z))
    assert compute_wilson_interval(10, 10).high95 <= 1.0
    with pytest.raises(DataError):
        compute_wilson_interval(3, 0)


def test_bootstrap_of_two_items_has_its_exact_quantiles() -> None:
    # Differences 0 and 1: resampled means 0, 0.5, 1 with chances 1/4, 1/2, 1/4, so the 2.5 % points are 0 and 1.
    interval = compute_paired_bootstrap([1.0, 1.0], [1.0, 0.0])
    assert interval == statistics.Interval(0.5, 0.0, 1.0)


def test_bootstrap_matches_the_normal_interval_for_many_items() -> None:
    rng = np.random.default_rng(1)
    a_N, b_N = rng.normal(0.3, 1.0, 2_000), rng.normal(0.0, 1.0, 2_000)
    difference_N = a_N - b_N
    margin = 1.96 * difference_N.std(ddof=1) / math.sqrt(2_000)
    interval = compute_paired_bootstrap(a_N, b_N, num_resamples=4_000)
    assert interval.mean_difference == pytest.approx(difference_N.mean())
    assert interval.low95 == pytest.approx(difference_N.mean() - margin, abs=0.1 * margin)
    assert interval.high95 == pytest.approx(difference_N.mean() + margin, abs=0.1 * margin)


def test_counting_distinct_values_gives_the_same_interval_as_drawing_items(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    a_N, b_N = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    by_counts = compute_paired_bootstrap(a_N, b_N)
    monkeypatch.setattr(statistics, "_MAX_DISTINCT", 0)
    by_items = compute_paired_bootstrap(a_N, b_N)
    assert by_counts.mean_difference == by_items.mean_difference
    assert by_counts.low95 == pytest.approx(by_items.low95, abs=0.005)
    assert by_counts.high95 == pytest.approx(by_items.high95, abs=0.005)


def test_bootstrap_pairs_items_and_is_reproducible() -> None:
    rng = np.random.default_rng(3)
    b_N = rng.normal(0.0, 10.0, 200)
    a_N = b_N + 0.5 + rng.normal(0.0, 0.01, 200)  # paired noise 0.01; unpaired it would be 10
    interval = compute_paired_bootstrap(a_N, b_N, num_resamples=500, seed=7)
    assert interval.excludes_zero
    assert interval.high95 - interval.low95 < 0.01
    assert interval == compute_paired_bootstrap(a_N, b_N, num_resamples=500, seed=7)
    assert interval != compute_paired_bootstrap(a_N, b_N, num_resamples=500, seed=8)


def test_block_size_changes_neither_result_nor_bound_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    a_N, b_N = rng.normal(size=501), rng.normal(size=501)
    whole = compute_paired_bootstrap(a_N, b_N, num_resamples=1_000)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 5_000)
    tracemalloc.start()
    blocks = compute_paired_bootstrap(a_N, b_N, num_resamples=1_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert blocks == whole
    assert peak < 500_000  # all indices at once would be 501 * 1000 * 8 bytes = 4 MB


def test_identical_sides_give_exactly_zero() -> None:
    assert compute_paired_bootstrap([0, 1, 1], [0, 1, 1]) == statistics.Interval(0.0, 0.0, 0.0)
    assert not compute_paired_bootstrap([0, 1, 1], [0, 1, 1]).excludes_zero


def test_one_item_has_no_interval() -> None:
    interval = compute_paired_bootstrap([1.0], [0.0])
    assert interval.mean_difference == 1.0
    assert math.isnan(interval.low95)


def test_benchmarks_count_equally_whatever_their_size() -> None:
    interval = compute_stratified_bootstrap([[1.0] * 10, [0.0] * 1000])
    assert interval == statistics.Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [([1.0, 2.0], [1.0], "same items"), ([], [], "at least one"), ([math.nan, 1.0], [0.0, 1.0], "not finite")],
)
def test_bootstrap_refuses_bad_pairs(a: list[float], b: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        compute_paired_bootstrap(a, b)


def test_comparison_over_seeds_by_hand() -> None:
    # Seed 0: benchmarks +1 and 0 -> +0.5. Seed 1: 0 and +0.5 -> +0.25. Mean 0.375, deviation 0.25/sqrt(2).
    arm = [[[1, 1], [0, 1, 0]], [[0, 1], [1, 1]]]
    control = [[[0, 0], [0, 1, 0]], [[0, 1], [0, 1]]]
    comparison = compute_seed_comparison(arm, control)
    assert comparison.differences_by_seed == (0.5, 0.25)
    assert comparison.basis == "seeds"
    assert comparison.num_items == 9
    assert comparison.interval.mean_difference == 0.375
    assert comparison.interval.high95 == pytest.approx(0.375 + 12.7062 * 0.125, abs=1e-4)
    assert comparison.label == "t interval over 2 seeds"


def test_comparison_with_one_seed_is_labelled() -> None:
    rng = np.random.default_rng(5)
    a_N, b_N = rng.integers(0, 2, 100), rng.integers(0, 2, 100)
    comparison = compute_seed_comparison([[a_N]], [[b_N]])
    assert comparison.basis == "items"
    assert comparison.label == "items only: one seed proves nothing about training noise"
    assert comparison.interval == compute_paired_bootstrap(a_N, b_N)


def test_comparison_refuses_unequal_seeds() -> None:
    with pytest.raises(DataError, match="same seeds"):
        compute_seed_comparison([[[1.0]]], [])
