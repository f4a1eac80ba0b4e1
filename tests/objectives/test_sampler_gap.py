"""The distance between the generator's log-probabilities and the loss's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polm.objectives.ntp import build_ntp
from polm.objectives.sampler_gap import compute_sampler_gap, log_sampler_gap
from polm.tokens import Scores, TokenBatch, build_completions, collate


def build_batch(first: list[float], second: list[float], weights: list[float]) -> TokenBatch:
    streams = [
        {"sampler_logprobs": np.array(first, dtype=np.float32)},
        {
            "sampler_logprobs": np.array(second, dtype=np.float32),
            "weights": np.array(weights, dtype=np.float32),
        },
    ]
    return collate([build_completions([1], [[2, 3], [4, 5]], streams)])


def test_by_hand() -> None:
    """|-1 + 1.5| = 0.5, |-2 + 2| = 0, |-3 + 2| = 1 at half the weight; the last one was drawn by another model."""
    batch = build_batch([-1.5, -2.0], [-2.0, float("nan")], [0.5, 1.0])
    found = compute_sampler_gap(torch.tensor([-1.0, -2.0, -3.0, -4.0]), batch)
    assert float(found["rl/sampler_gap"].total) == pytest.approx(1.0)
    assert float(found["rl/sampler_gap"].count) == pytest.approx(2.5)
    assert float(found["rl/sampler_gap_max"].total) == 1.0


def test_nothing_to_compare_with() -> None:
    nan = float("nan")
    assert compute_sampler_gap(torch.zeros(4), build_batch([nan, nan], [nan, nan], [1.0, 1.0])) == {}
    assert compute_sampler_gap(torch.zeros(2), collate([build_completions([1], [[2, 3]])])) == {}


def test_the_loss_is_left_alone() -> None:
    batch = build_batch([-1.5, -2.0], [-2.0, -4.0], [1.0, 1.0])
    scores = Scores(torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True))
    plain, logged = (objective.compute(scores, batch) for objective in (build_ntp(), log_sampler_gap(build_ntp())))
    assert torch.equal(plain.total, logged.total)
    assert logged.metrics.keys() - plain.metrics.keys() == {"rl/sampler_gap", "rl/sampler_gap_max"}
    assert log_sampler_gap(build_ntp()).needs == build_ntp().needs
