"""Steps and first errors, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from polm.errors import DataError
from polm.evals.process_reward_models import compute_step_reliability, find_first_error, report_steps


def arrays(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


def test_the_first_error() -> None:
    assert find_first_error(np.array([0.9, 0.5, 0.1])) == 1
    assert find_first_error(np.array([0.9, 0.8])) == 2


def test_a_report_by_hand() -> None:
    labels = arrays([1, 0, 0], [1, 1], [0, 1], [1, 1, 1])
    rights = arrays([0.9, 0.2, 0.8], [0.6, 0.9], [0.7, 0.9], [0.9, 0.9, 0.4])
    report = report_steps(rights, labels)
    assert (report["answers"], report["steps"]) == (4, 10)
    assert report["accuracy"] == pytest.approx(0.7)  # wrong: the third of the first, the first of the third, the last
    assert report["majority_accuracy"] == pytest.approx(0.7)
    # First errors at 1, none, 0, none; found at 1, none, none, 2.
    assert report["first_error_accuracy"] == pytest.approx(0.5)
    assert report["first_error_accuracy_with_error"] == pytest.approx(0.5)
    assert report["first_error_accuracy_without_error"] == pytest.approx(0.5)
    assert report["first_error_f1"] == pytest.approx(0.5)
    squares = [0.1, 0.2, 0.8, 0.4, 0.1, 0.7, 0.1, 0.1, 0.1, 0.6]
    assert report["brier"] == pytest.approx(float(np.mean(np.square(squares))))
    assert sum(row["steps"] for row in report["reliability"]) == 10
    json.dumps(report, allow_nan=False)


def test_answers_without_an_error_only() -> None:
    report = report_steps(arrays([0.9]), arrays([1]))
    assert report["first_error_accuracy_with_error"] is None
    assert report["first_error_f1"] is None


def test_nothing_found() -> None:
    assert report_steps(arrays([0.9], [0.1]), arrays([0], [1]))["first_error_f1"] == 0.0


def test_reliability_takes_both_ends() -> None:
    table = compute_step_reliability(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    assert [(row["low"], row["accuracy"]) for row in table] == [(0.0, 0.0), (0.9, 1.0)]


@pytest.mark.parametrize(
    ("rights", "labels"),
    [([], []), ([[0.5]], [[1, 0]]), ([[]], [[]]), ([[0.5], [0.5]], [[1]]), ([[float("nan")]], [[1]])],
)
def test_what_cannot_be_judged(rights: list[list[float]], labels: list[list[float]]) -> None:
    with pytest.raises(DataError, match="steps: "):
        report_steps(arrays(*rights), arrays(*labels))
