"""Plausibility weights by hand: the ratio to the reference's best token, its power, the floor, and the control."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polm.errors import RecipeError
from polm.objectives.ntp import build_ntp
from polm.objectives.plausible import build_plausible
from polm.signals.token_weights import compute_plausible_weights
from polm.tokens import Loss, Objective, Scores, Segment, TokenBatch, collate

LOGPROBS = [-3.0, -1.0, -2.0, -4.0]
# The reference: its own best token, a tenth of its best, a hundredth, and half of a best that is unsure itself.
BEST = [0.9, 0.5, 0.9, 0.02]
RATIO = [1.0, 0.1, 0.01, 0.5]
WEIGHTS = [1.0, 1.0, 0.5, 2.0]


def build_batch() -> TokenBatch:
    reference = np.log(np.array(BEST) * np.array(RATIO)).astype(np.float32)
    streams: dict[str, np.ndarray[Any, Any]] = {
        "weights": np.array([0.0, *WEIGHTS], dtype=np.float32),
        "ref_logprobs": np.array([0.0, *reference], dtype=np.float32),
        "ref_topk": np.log(np.array([[1.0], *[[b] for b in BEST]])).astype(np.float32),
    }
    return collate([(Segment(np.arange(5), streams=streams),)])


def run(objective: Objective, batch: TokenBatch) -> tuple[Loss, list[float]]:
    logprobs_N = torch.tensor(LOGPROBS, requires_grad=True)
    loss = objective.compute(Scores(logprobs_N), batch)
    loss.total.backward()
    assert logprobs_N.grad is not None
    return loss, logprobs_N.grad.tolist()


@pytest.mark.parametrize(
    ("gamma", "floor", "expected"),
    [
        (1.0, 0.0, [1.0, 0.1, 0.01, 0.5]),
        (2.0, 0.0, [1.0, 0.01, 0.0001, 0.25]),
        (0.0, 0.05, [1.0, 1.0, 0.0, 1.0]),
        (1.0, 0.2, [1.0, 0.0, 0.0, 0.5]),
    ],
)
def test_arithmetic_and_gradient(gamma: float, floor: float, expected: list[float]) -> None:
    loss, grad = run(build_plausible(gamma=gamma, floor=floor, denominator="tokens"), build_batch())
    combined = [w * e for w, e in zip(WEIGHTS, expected, strict=True)]
    assert loss.total.item() == pytest.approx(-sum(c * lp for c, lp in zip(combined, LOGPROBS, strict=True)), rel=1e-6)
    assert grad == pytest.approx([-c for c in combined], rel=1e-5)
    assert float(loss.denominator) == sum(WEIGHTS)
    by_weights, _ = run(build_plausible(gamma=gamma, floor=floor, denominator="weights"), build_batch())
    assert float(by_weights.denominator) == pytest.approx(sum(combined), rel=1e-6)
    assert float(loss.metrics["count/tokens_left_out"].total) == sum(e == 0 for e in expected)
    assert float(loss.metrics["count/tokens_down_weighted"].total) == sum(0 < e < 1 for e in expected)


def test_gamma_and_floor_of_0_are_next_token_prediction_to_the_bit() -> None:
    ours, our_grad = run(build_plausible(gamma=0.0, floor=0.0, denominator="tokens"), build_batch())
    plain, plain_grad = run(build_ntp(), build_batch())
    assert ours.total.item() == plain.total.item()
    assert our_grad == plain_grad
    assert float(ours.denominator) == float(plain.denominator)


def test_an_unsure_reference_damps_nothing() -> None:
    flat_N = torch.full((6,), math.log(1 / 150))
    assert compute_plausible_weights(flat_N, flat_N, gamma=3.0, floor=0.9).tolist() == [1.0] * 6
    # Two passes may differ in the last bit: a target is never more plausible than the best token.
    assert float(compute_plausible_weights(torch.tensor([-0.1]), torch.tensor([-0.1001]), gamma=1.0, floor=0.0)) == 1.0


def test_the_control_has_the_same_weights_on_other_tokens() -> None:
    plain, grad = run(build_plausible(gamma=1.0, floor=0.0, denominator="tokens"), build_batch())
    shuffled, other = run(build_plausible(gamma=1.0, floor=0.0, denominator="tokens", shuffled=True), build_batch())
    weights = sorted(-g / w for g, w in zip(grad, WEIGHTS, strict=True))
    assert sorted(-g / w for g, w in zip(other, WEIGHTS, strict=True)) == pytest.approx(weights)
    assert other != grad
    for name in ("plausible/mean_weight", "count/tokens_left_out"):
        assert float(shuffled.metrics[name].total) == pytest.approx(float(plain.metrics[name].total))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": -0.5}, r"gamma is -0\.5; it must be at least 0"),
        ({"floor": 1.0}, r"floor is 1\.0; it must lie in \[0, 1\)"),
        ({"denominator": "all"}, "denominator is 'all'"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_plausible(**{"gamma": 1.0, "floor": 0.0, "denominator": "tokens", **changes})
