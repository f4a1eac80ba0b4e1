"""Accuracy, calibration and length of held-out pairs, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from polm.errors import DataError
from polm.evals.reward_models import (
    build_judged,
    choose_length_direction,
    compute_brier,
    compute_calibration_error,
    compute_correlation,
    compute_length_accuracy,
    compute_reliability,
    compute_sigmoid,
    flatten_report,
    report_pairs,
)

LOGIT = math.log(3.0)  # sigmoid: 3/4


def test_brier_by_hand() -> None:
    assert compute_brier(np.array([LOGIT, -LOGIT])) == pytest.approx((1 / 16 + 9 / 16) / 2)
    assert compute_brier(np.zeros(3)) == 0.25


def test_sigmoid_does_not_overflow() -> None:
    assert compute_sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_reliability_by_hand() -> None:
    """Four pairs held to be sure by 3/4, three of them ranked rightly, and a tie."""
    table = compute_reliability(np.array([LOGIT, LOGIT, LOGIT, -LOGIT, 0.0]), num_bins=5)
    assert [(round(row["low"], 2), row["pairs"], row["accuracy"]) for row in table] == [(0.5, 1, 0.5), (0.7, 4, 0.75)]
    assert table[1]["confidence"] == pytest.approx(0.75)
    assert compute_calibration_error(table) == pytest.approx(0.0)
    table = compute_reliability(np.array([LOGIT, -LOGIT]), num_bins=5)
    assert compute_calibration_error(table) == pytest.approx(0.25)


def test_a_sure_model_is_in_the_last_bin() -> None:
    table = compute_reliability(np.array([100.0, -100.0]))
    assert [(row["high"], row["pairs"]) for row in table] == [(1.0, 2)]
    assert compute_calibration_error(table) == pytest.approx(0.5)


def test_the_rule_of_length() -> None:
    chosen, rejected = np.array([5.0, 3.0, 9.0, 2.0]), np.array([1.0, 7.0, 4.0, 2.0])
    assert choose_length_direction(chosen, rejected) == 1
    assert choose_length_direction(rejected, chosen) == -1
    assert choose_length_direction(chosen[:2], rejected[:2]) == 0
    judged = build_judged([0.0] * 4, [0.0] * 4, chosen, rejected)
    assert compute_length_accuracy(judged, 1) == pytest.approx(2.5 / 4)
    assert compute_length_accuracy(judged, -1) == pytest.approx(1.5 / 4)
    assert compute_length_accuracy(judged, 0) == 0.5


def test_correlation_of_what_does_not_vary() -> None:
    assert compute_correlation(np.array([1.0, 2.0]), np.array([3.0, 3.0])) is None
    assert compute_correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx(1.0)


def test_a_report() -> None:
    judged = build_judged([2.0, 0.0, 1.0, 3.0], [1.0, 1.0, 1.0, 0.0], [4, 4, 4, 4], [2, 2, 2, 2])
    report = report_pairs(judged, 1)
    assert report["accuracy"] == pytest.approx(2.5 / 4)
    assert report["accuracy_low95"] < 0.5 < report["accuracy_high95"]
    assert report["mean_margin"] == pytest.approx(0.75)
    assert report["length_accuracy"] == 1.0
    assert report["margin_length_correlation"] is None  # all pairs differ by two tokens
    assert sum(row["pairs"] for row in report["reliability"]) == report["pairs"] == 4
    json.dumps(report, allow_nan=False)
    flat = flatten_report(report, "holdout")
    assert flat["holdout/accuracy"] == report["accuracy"]
    assert not {"holdout/reliability", "holdout/margin_length_correlation"} & set(flat)


@pytest.mark.parametrize(
    ("chosen", "rejected", "match"),
    [([], [], "at least 1"), ([1.0], [1.0, 2.0], r"found lengths \[1, 2\]"), ([math.nan], [0.0], "not finite")],
)
def test_what_cannot_be_judged(chosen: list[float], rejected: list[float], match: str) -> None:
    with pytest.raises(DataError, match=match):
        build_judged(chosen, rejected, [1] * len(chosen), [1] * len(chosen))
