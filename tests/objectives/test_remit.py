"""ReMiT by hand: centring, the sigmoid, the bounds, the control, and next-token prediction at eps = 0."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polm.errors import RecipeError
from polm.objectives.ntp import build_ntp
from polm.objectives.remit import build_remit
from polm.tokens import Loss, Objective, Scores, Segment, TokenBatch, Tree, collate

SETTING: dict[str, Any] = {
    "eps": 0.3,
    "temperature": 0.5,
    "centring": "sequence",
    "base": "live",
    "denominator": "tokens",
    "shuffled": False,
}
# Two documents of 3 and 2 targets.
LOGPROBS = [-1.5, -1.0, -1.0, -1.0, -1.0]
REFERENCE = [-1.0, -2.0, -0.75, -3.0, -1.0]
FROZEN = [-1.0, -1.0, -1.0, -2.0, -2.0]
WEIGHTS = [1.0, 1.0, 0.5, 1.0, 2.0]


def build_tree(start: int, stop: int) -> Tree:
    """The document whose targets are numbers `start` to `stop` of the lists above."""

    def stream(values: list[float]) -> np.ndarray[Any, Any]:
        return np.array([0.0, *values[start:stop]], dtype=np.float32)

    streams = {"weights": stream(WEIGHTS), "ref_logprobs": stream(REFERENCE), "base_logprobs": stream(FROZEN)}
    return (Segment(np.arange(stop - start + 1), streams=streams),)


def both(seed: int = 0) -> TokenBatch:
    return collate([build_tree(0, 3), build_tree(3, 5)], seed=seed)


def run(objective: Objective, batch: TokenBatch, logprobs: list[float]) -> tuple[Loss, list[float]]:
    """The loss and its gradient with respect to the log-probabilities."""
    logprobs_N = torch.tensor(logprobs, requires_grad=True)
    loss = objective.compute(Scores(logprobs_N), batch)
    loss.total.backward()
    assert logprobs_N.grad is not None
    return loss, logprobs_N.grad.tolist()


def weight(centred: float, eps: float = 0.3, temperature: float = 0.5) -> float:
    return min(max(2.0 / (1.0 + math.exp(-centred / temperature)), 1.0 - eps), 1.0 + eps)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# delta with the live base: 0.5, -1, 0.25 | -2, 0. The means: -0.25/3 | -1.
DELTA = [0.5, -1.0, 0.25, -2.0, 0.0]
SEQUENCE = [0.5 + 0.25 / 3, -1.0 + 0.25 / 3, 0.25 + 0.25 / 3, -1.0, 1.0]
BATCH = [d + 2.25 / 5 for d in DELTA]
# delta with the frozen base: 0, -1, 0.25 | -1, 1. The means: -0.25 | 0.
FROZEN_SEQUENCE = [0.25, -0.75, 0.5, -1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "centred"),
    [
        ({}, SEQUENCE),
        ({"eps": 1.0}, SEQUENCE),
        ({"eps": 0.1, "temperature": 4.0}, SEQUENCE),
        ({"centring": "batch"}, BATCH),
        ({"centring": "none"}, DELTA),
        ({"base": "frozen"}, FROZEN_SEQUENCE),
    ],
)
def test_arithmetic_and_gradient(change: dict[str, Any], centred: list[float]) -> None:
    setting = {**SETTING, **change}
    expected = [weight(c, setting["eps"], setting["temperature"]) for c in centred]
    loss, grad = run(build_remit(**setting), both(), LOGPROBS)
    total = sum(d * w * -lp for d, w, lp in zip(WEIGHTS, expected, LOGPROBS, strict=True))
    assert loss.total.item() == pytest.approx(total, rel=1e-6)
    assert float(loss.denominator) == sum(WEIGHTS)
    # No gradient flows through the weight, though it depends on the live log-probabilities.
    assert grad == pytest.approx([-d * w for d, w in zip(WEIGHTS, expected, strict=True)], rel=1e-6)


def test_one_weight_in_numbers() -> None:
    # delta 1 above the mean at temperature 1: 2 / (1 + 1/e) = 1.4621..., cut at 1.2.
    tree = (
        Segment(
            np.arange(3),
            streams={"weights": np.float32([0, 1, 1]), "ref_logprobs": np.float32([0, -1, -3])},
        ),
    )
    grads = [
        run(build_remit(**{**SETTING, "eps": eps, "temperature": 1.0}), collate([tree]), [-2.0, -2.0])[1]
        for eps in (1.0, 0.2)
    ]
    assert grads[0] == pytest.approx([-1.4621172, -0.5378828], rel=1e-6)
    assert grads[1] == pytest.approx([-1.2, -0.8], rel=1e-6)


def test_the_denominator_may_be_the_sum_of_weights() -> None:
    loss, _ = run(build_remit(**{**SETTING, "denominator": "weights"}), both(), LOGPROBS)
    expected = sum(d * weight(c) for d, c in zip(WEIGHTS, SEQUENCE, strict=True))
    assert float(loss.denominator) == pytest.approx(expected, rel=1e-6)
    assert not loss.denominator.requires_grad


def test_metrics() -> None:
    loss, _ = run(build_remit(**{**SETTING, "temperature": 2.0}), both(), LOGPROBS)
    weights = [weight(c, temperature=2.0) for c in SEQUENCE]  # 1.14, 0.78, 1.08, 0.76, 1.24: none at the bounds
    values = {name: (metric.total, float(metric.count)) for name, metric in loss.metrics.items()}
    assert all(not total.requires_grad for total, _ in values.values())
    total, count = values["remit/weight_histogram"]
    histogram = [0] * 20
    for w in weights:
        histogram[int(w * 10)] += 1
    assert total.tolist() == histogram
    assert count == 5
    assert float(values["remit/mean_weight"][0]) == pytest.approx(sum(weights), rel=1e-6)
    assert float(values["remit/mean_abs_delta"][0]) == pytest.approx(3.75)
    assert float(values["remit/clip_fraction"][0]) == 0
    nll = sum(d * -lp for d, lp in zip(WEIGHTS, LOGPROBS, strict=True))
    assert float(values["ntp/nll"][0]) == pytest.approx(nll)
    assert values["ntp/nll"][1] == sum(WEIGHTS)
    # At temperature 0.5 the raw weights are 1.53, 0.28, 1.32, 0.24, 1.76: all outside [0.7, 1.3].
    clipped = run(build_remit(**SETTING), both(), LOGPROBS)[0].metrics
    assert float(clipped["remit/clip_fraction"].total) == 5
    assert clipped["remit/weight_histogram"].total.tolist() == [0] * 7 + [2] + [0] * 5 + [3] + [0] * 6


def test_the_split_into_micro_batches_does_not_matter() -> None:
    for denominator in ("tokens", "weights"):
        objective = build_remit(**{**SETTING, "denominator": denominator})
        whole, grad = run(objective, both(), LOGPROBS)
        first, first_grad = run(objective, collate([build_tree(0, 3)]), LOGPROBS[:3])
        second, second_grad = run(objective, collate([build_tree(3, 5)]), LOGPROBS[3:])
        assert whole.total.item() == pytest.approx((first.total + second.total).item(), rel=1e-7)
        assert float(whole.denominator) == pytest.approx(float(first.denominator + second.denominator), rel=1e-7)
        assert grad == first_grad + second_grad


def test_eps_zero_is_next_token_prediction_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    trees = []
    for length in (200, 1, 31, 170):
        streams = {
            "weights": rng.random(length).astype(np.float32),
            "ref_logprobs": -rng.exponential(2.0, length).astype(np.float32),
        }
        trees.append((Segment(np.arange(length), streams=streams),))
    batch = collate(trees)
    logprobs = (-rng.exponential(2.0, batch.num_targets)).tolist()
    plain, plain_grad = run(build_ntp(), batch, logprobs)
    for change in ({}, {"denominator": "weights"}, {"shuffled": True}, {"centring": "batch"}):
        loss, grad = run(build_remit(**{**SETTING, **change, "eps": 0.0}), batch, logprobs)
        assert torch.equal(loss.total, plain.total)
        assert torch.equal(loss.denominator, plain.denominator)
        assert grad == plain_grad


def test_equal_models_give_weight_one() -> None:
    loss, grad = run(build_remit(**{**SETTING, "eps": 1.0}), both(), REFERENCE)
    assert grad == [-d for d in WEIGHTS]
    assert float(loss.metrics["remit/mean_abs_delta"].total) == 0.0


def test_the_shuffled_control_has_the_same_weights_elsewhere() -> None:
    rng = np.random.default_rng(1)
    ones = np.ones(60, dtype=np.float32)
    tree = (Segment(np.arange(60), streams={"weights": ones, "ref_logprobs": -rng.random(60).astype(np.float32)}),)
    logprobs = (-rng.random(59)).tolist()
    setting = {**SETTING, "eps": 1.0}
    _, straight = run(build_remit(**setting), collate([tree], seed=7), logprobs)
    shuffled = build_remit(**{**setting, "shuffled": True})
    grads = [run(shuffled, collate([tree], seed=seed), logprobs)[1] for seed in (7, 7, 8)]
    assert sorted(grads[0]) == sorted(straight)
    assert grads[0] != straight
    assert grads[0] == grads[1]
    assert grads[0] != grads[2]
    assert sorted(grads[2]) == sorted(straight)


def test_what_it_reads() -> None:
    assert build_remit(**SETTING).reads == ("weights", "ref_logprobs")
    assert build_remit(**{**SETTING, "base": "frozen"}).reads == ("weights", "ref_logprobs", "base_logprobs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 1.5}, r"eps is 1\.5; it must lie in \[0, 1\]"),
        ({"eps": -0.1}, "eps"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"base": "cold"}, "base is 'cold'"),
        ({"denominator": "all"}, "denominator is 'all'"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_remit(**{**SETTING, **change})
