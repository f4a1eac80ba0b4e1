"""Rho-1 by hand: which tokens are kept, and the mean over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polm.errors import RecipeError
from polm.objectives.rho1 import build_rho1
from polm.tokens import Loss, Objective, Scores, Segment, TokenBatch, Tree, collate

LOGPROBS = [-3.0, -1.0, -2.0, -4.0, -1.0]
REFERENCE = [-1.0, -1.5, -1.0, -1.0, -0.5]  # excess: 2, -0.5, 1 | 3, 0.5
FROZEN = [-1.0, -3.0, -1.0, -1.0, -2.0]  # excess: 0, 1.5, 0 | 0, 1.5
WEIGHTS = [1.0, 1.0, 0.5, 2.0, 1.0]


def build_tree(start: int, stop: int) -> Tree:
    def stream(values: list[float]) -> np.ndarray[Any, Any]:
        return np.array([0.0, *values[start:stop]], dtype=np.float32)

    streams = {"weights": stream(WEIGHTS), "ref_logprobs": stream(REFERENCE), "base_logprobs": stream(FROZEN)}
    return (Segment(np.arange(stop - start + 1), streams=streams),)


def both() -> TokenBatch:
    return collate([build_tree(0, 3), build_tree(3, 5)])


def run(objective: Objective, batch: TokenBatch, logprobs: list[float]) -> tuple[Loss, list[float]]:
    logprobs_N = torch.tensor(logprobs, requires_grad=True)
    loss = objective.compute(Scores(logprobs_N), batch)
    loss.total.backward()
    assert logprobs_N.grad is not None
    return loss, logprobs_N.grad.tolist()


@pytest.mark.parametrize(
    ("keep", "base", "scope", "kept"),
    [
        (0.6, "live", "batch", [1, 0, 1, 1, 0]),  # 3 of 5: excess 3, 2, 1
        (0.41, "live", "batch", [1, 0, 1, 1, 0]),  # ceil(2.05) = 3
        (0.4, "live", "batch", [1, 0, 0, 1, 0]),
        (0.01, "live", "batch", [0, 0, 0, 1, 0]),
        (0.5, "live", "sequence", [1, 0, 1, 1, 0]),  # ceil(1.5) = 2 of 3, 1 of 2
        (0.3, "live", "sequence", [1, 0, 0, 1, 0]),
        (0.6, "frozen", "batch", [1, 1, 0, 0, 1]),  # 1.5, 1.5, then the first of the three zeros
        (0.6, "frozen", "sequence", [1, 1, 0, 1, 1]),  # ceil(1.8) = 2 of 3, ceil(1.2) = 2 of 2
        (1.0, "live", "batch", [1, 1, 1, 1, 1]),
        (1.0, "live", "sequence", [1, 1, 1, 1, 1]),
    ],
)
def test_arithmetic_and_gradient(keep: float, base: Any, scope: Any, kept: list[int]) -> None:
    loss, grad = run(build_rho1(keep=keep, base=base, scope=scope), both(), LOGPROBS)
    combined = [k * w for k, w in zip(kept, WEIGHTS, strict=True)]
    assert loss.total.item() == sum(c * -lp for c, lp in zip(combined, LOGPROBS, strict=True))
    assert float(loss.denominator) == sum(combined)
    assert grad == [-c for c in combined]
    assert float(loss.metrics["rho1/kept_fraction"].total) == sum(kept)
    assert loss.metrics["rho1/kept_fraction"].count == 5


def test_metrics() -> None:
    metrics = run(build_rho1(keep=0.4, base="live", scope="batch"), both(), LOGPROBS)[0].metrics
    assert float(metrics["rho1/mean_excess"].total) == 6.0
    assert float(metrics["rho1/kept_excess"].total) == 5.0
    assert float(metrics["rho1/kept_excess"].count) == 2
    # The curve in which all arms are compared is that of all tokens: 3 + 1 + 1 + 8 + 1 over 5.5.
    assert float(metrics["ntp/nll"].total) == 14.0
    assert float(metrics["ntp/nll"].count) == 5.5
    assert all(not metric.total.requires_grad for metric in metrics.values())


def test_by_sequence_the_split_into_micro_batches_does_not_matter() -> None:
    objective = build_rho1(keep=0.5, base="live", scope="sequence")
    whole, grad = run(objective, both(), LOGPROBS)
    first, first_grad = run(objective, collate([build_tree(0, 3)]), LOGPROBS[:3])
    second, second_grad = run(objective, collate([build_tree(3, 5)]), LOGPROBS[3:])
    assert whole.total.item() == (first.total + second.total).item()
    assert float(whole.denominator) == float(first.denominator + second.denominator)
    assert grad == first_grad + second_grad


def test_numbers_out_of_range_are_refused() -> None:
    for keep in (0.0, 1.01):
        with pytest.raises(RecipeError, match=r"keep is .*; it must lie in \(0, 1\]"):
            build_rho1(keep=keep, base="live", scope="batch")
    with pytest.raises(RecipeError, match="base is 'cold'"):
        build_rho1(keep=0.5, base="cold", scope="batch")  # type: ignore[arg-type]
