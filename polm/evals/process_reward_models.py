"""What a process reward model is worth on steps that it has not seen: steps, first errors, calibration.

Suffixes: N steps of all answers, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polm.errors import DataError
from polm.evals.reward_models import compute_calibration_error
from polm.evals.statistics import compute_wilson_interval

Floats = NDArray[np.float64]
NUM_BINS = 10
THRESHOLD = 0.5  # a step is called right above it


def find_first_error(right: Floats) -> int:
    """Index of the first step that is not above 1/2; the number of steps where there is none."""
    wrong = np.flatnonzero(right <= THRESHOLD)
    return int(wrong[0]) if len(wrong) else len(right)


def compute_step_reliability(right_N: Floats, label_N: Floats, num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """Steps by the probability that they are right, from 0 to 1; `accuracy` is the mean label of a bin's steps."""
    bins_N = np.minimum((right_N * num_bins).astype(np.int64), num_bins - 1)
    return [
        {
            "low": b / num_bins,
            "high": (b + 1) / num_bins,
            "steps": int(inside_N.sum()),
            "confidence": float(right_N[inside_N].mean()),
            "accuracy": float(label_N[inside_N].mean()),
        }
        for b in range(num_bins)
        if (inside_N := bins_N == b).any()
    ]


def report_steps(rights: Sequence[Floats], labels: Sequence[Floats]) -> dict[str, Any]:
    """All numbers of held-out answers: `rights[a]` and `labels[a]` hold the probabilities and labels of one's steps.

    `first_error_accuracy` is the share of answers whose first error is found at its place, or which are found to have
    none; apart for answers with an error and without, and their harmonic mean `first_error_f1` (ProcessBench,
    arXiv 2412.06559). `majority_accuracy` is that of calling all steps by the commoner label here.
    What cannot be computed is None.
    """
    if not rights or not all(map(len, rights)) or list(map(len, rights)) != list(map(len, labels)):
        raise DataError("steps: expected a probability and a label for each step, of at least one answer")
    right_N, label_N = np.concatenate(rights), np.concatenate(labels)
    if not np.isfinite(right_N).all():
        raise DataError("steps: some probabilities are not finite; the model's weights are damaged")
    hit_N = (right_N > THRESHOLD) == (label_N > THRESHOLD)
    interval = compute_wilson_interval(int(hit_N.sum()), len(hit_N))
    firsts = [(find_first_error(r), find_first_error(y), len(y)) for r, y in zip(rights, labels, strict=True)]
    with_error = [found == true for found, true, size in firsts if true < size]
    without = [found == true for found, true, size in firsts if true == size]
    found_error, found_none = (float(np.mean(side)) if side else None for side in (with_error, without))
    f1 = None
    if found_error is not None and found_none is not None:
        f1 = 2.0 * found_error * found_none / max(found_error + found_none, 1e-12)
    table = compute_step_reliability(right_N, label_N)
    share_right = float((label_N > THRESHOLD).mean())
    return {
        "answers": len(rights),
        "steps": len(right_N),
        "accuracy": interval.mean,
        "accuracy_low95": interval.low95,
        "accuracy_high95": interval.high95,
        "majority_accuracy": max(share_right, 1.0 - share_right),
        "brier": float(np.mean((right_N - label_N) ** 2)),
        "calibration_error": compute_calibration_error(table, "steps"),
        "first_error_accuracy": float(np.mean([found == true for found, true, _ in firsts])),
        "first_error_accuracy_with_error": found_error,
        "first_error_accuracy_without_error": found_none,
        "first_error_f1": f1,
        "reliability": table,
    }
