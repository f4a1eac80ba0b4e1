"""What a reward model is worth on comparisons that it has not seen: accuracy, calibration, and what length explains.

Suffixes: P pairs, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polm.errors import DataError
from polm.evals.statistics import compute_wilson_interval

Floats = NDArray[np.float64]
NUM_BINS = 10


@dataclass(frozen=True)
class Judged:
    """Pairs with the rewards of their answers [P], and the answers' lengths in tokens [P]."""

    chosen_P: Floats
    rejected_P: Floats
    chosen_length_P: Floats
    rejected_length_P: Floats

    def __post_init__(self) -> None:
        sizes = {len(values) for values in vars(self).values()}
        if len(sizes) != 1 or sizes == {0}:
            raise DataError(f"judged pairs: expected lists of one length of at least 1, found lengths {sorted(sizes)}")
        for name, values in vars(self).items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"judged pairs: {name} holds numbers that are not finite; the model's weights are damaged"
                )

    @property
    def margin_P(self) -> Floats:
        return self.chosen_P - self.rejected_P


def build_judged(
    chosen: ArrayLike, rejected: ArrayLike, chosen_lengths: ArrayLike, rejected_lengths: ArrayLike
) -> Judged:
    """`Judged` from any lists of numbers."""
    return Judged(*(np.asarray(v, dtype=np.float64) for v in (chosen, rejected, chosen_lengths, rejected_lengths)))


def compute_ranked(margin_P: Floats) -> Floats:
    """1 for each pair with a margin above 0, 0 below, and 1/2 for a tie, [P]."""
    return np.asarray((np.sign(margin_P) + 1.0) / 2.0, dtype=np.float64)


def compute_sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -values)), dtype=np.float64)


def compute_brier(margin_P: Floats) -> float:
    """Mean of (1 - sigmoid(margin))^2 (Brier 1950): 0 is perfect, 1/4 is always saying one half."""
    return float(np.mean((1.0 - compute_sigmoid(margin_P)) ** 2))


def compute_reliability(margin_P: Floats, num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """The reliability table: pairs by how sure the model is of the answer that it prefers, from 1/2 to 1.

    A bin has `low`, `high`, `pairs`, `confidence` (mean of sigmoid(|margin|)) and `accuracy`; empty bins are left out.
    """
    confidence_P = compute_sigmoid(np.abs(margin_P))
    bins_P = np.minimum(((confidence_P - 0.5) * 2.0 * num_bins).astype(np.int64), num_bins - 1)
    ranked_P = compute_ranked(margin_P)
    table = []
    for b in range(num_bins):
        inside_P = bins_P == b
        if inside_P.any():
            table.append(
                {
                    "low": 0.5 + 0.5 * b / num_bins,
                    "high": 0.5 + 0.5 * (b + 1) / num_bins,
                    "pairs": int(inside_P.sum()),
                    "confidence": float(confidence_P[inside_P].mean()),
                    "accuracy": float(ranked_P[inside_P].mean()),
                }
            )
    return table


def compute_calibration_error(table: list[dict[str, float]], count: str = "pairs") -> float:
    """Expected calibration error of a reliability table (Guo et al. 2017, arXiv 1706.04599, equation 3).

    `count` names the column with the sizes of the bins.
    """
    total = sum(row[count] for row in table)
    return sum(row[count] / total * abs(row["accuracy"] - row["confidence"]) for row in table)


def choose_length_direction(chosen_length_P: Floats, rejected_length_P: Floats) -> int:
    """+1 if people chose the longer answer more often, -1 if the shorter; 0 where neither. Read training pairs only."""
    return int(np.sign(np.sign(chosen_length_P - rejected_length_P).sum()))


def compute_length_accuracy(judged: Judged, direction: int) -> float:
    """Accuracy of preferring the longer (+1) or the shorter (-1) answer; equal lengths count a half."""
    return float(compute_ranked(direction * (judged.chosen_length_P - judged.rejected_length_P)).mean())


def compute_correlation(a: Floats, b: Floats) -> float | None:
    """Pearson's correlation; None where one side does not vary."""
    if len(a) < 2 or np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def report_pairs(judged: Judged, direction: int) -> dict[str, Any]:
    """All numbers of held-out pairs, and the reliability table under `reliability`.

    `accuracy_low95`, `accuracy_high95` is Wilson's interval over the pairs, with ties rounded down. What cannot be
    computed is None. `direction` is the length rule's, from the training pairs.
    """
    margin_P = judged.margin_P
    ranked_P = compute_ranked(margin_P)
    interval = compute_wilson_interval(math.floor(ranked_P.sum()), len(ranked_P))
    table = compute_reliability(margin_P)
    rewards = np.concatenate([judged.chosen_P, judged.rejected_P])
    lengths = np.concatenate([judged.chosen_length_P, judged.rejected_length_P])
    return {
        "pairs": len(margin_P),
        "accuracy": float(ranked_P.mean()),
        "accuracy_low95": interval.low95,
        "accuracy_high95": interval.high95,
        "brier": compute_brier(margin_P),
        "calibration_error": compute_calibration_error(table),
        "mean_margin": float(margin_P.mean()),
        "mean_reward": float(rewards.mean()),
        "length_correlation": compute_correlation(rewards, lengths),
        "margin_length_correlation": compute_correlation(margin_P, judged.chosen_length_P - judged.rejected_length_P),
        "length_accuracy": compute_length_accuracy(judged, direction),
        "length_direction": direction,
        "reliability": table,
    }


def flatten_report(report: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The numbers of a report as flat names for a stage's summary; the table and what is None stay out."""
    return {f"{prefix}/{name}": value for name, value in report.items() if isinstance(value, (int, float))}
