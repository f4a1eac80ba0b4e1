"""DFT by hand, and its gradient: that of minus the probability."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polm.objectives.dft import build_dft
from polm.objectives.ntp import build_ntp
from polm.tokens import Scores, Segment, Tree, build_document, collate

WEIGHTED: Tree = (Segment(np.array([4, 5, 6, 7]), streams={"weights": np.array([0, 0.5, 0, 2.0], dtype=np.float32)}),)


def test_by_hand() -> None:
    """p = 1/2 and 1/4 at weights 0.5 and 2: 0.5 · ½ ln 2 + 2 · ¼ ln 4 = 1.25 ln 2, over 2.5 weights."""
    logprobs_N = torch.tensor([0.5, 0.25]).log().requires_grad_()
    loss = build_dft().compute(Scores(logprobs_N), collate([WEIGHTED]))
    assert loss.total.item() == pytest.approx(1.25 * math.log(2.0), rel=1e-6)
    assert float(loss.denominator) == 2.5
    measured = {name: float(m.total) / float(m.count) for name, m in loss.metrics.items()}
    assert measured == {
        "ntp/nll": pytest.approx((0.5 * math.log(2) + 2 * math.log(4)) / 2.5, rel=1e-6),
        "dft/probability": pytest.approx((0.5 * 0.5 + 2 * 0.25) / 2.5, rel=1e-6),
    }
    loss.total.backward()
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([-0.5 * 0.5, -2.0 * 0.25])  # -w p: the weight passes no gradient


def test_the_gradient_is_that_of_minus_the_probability() -> None:
    """By differences, on logits in double precision: the loss's own slope would have a term more."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    picked_N = torch.tensor([1, 4, 0])
    batch = collate([build_document([1, 2, 3, 4])])

    def compute_probability(logits: torch.Tensor) -> torch.Tensor:
        return -torch.softmax(logits, -1).gather(1, picked_N[:, None]).sum()

    logprobs_N = torch.log_softmax(logits_NV, -1).gather(1, picked_N[:, None])[:, 0]
    build_dft().compute(Scores(logprobs_N), batch).total.backward()
    assert logits_NV.grad is not None
    step = 1e-6
    for place in np.ndindex(3, 5):
        ends = []
        for sign in (1.0, -1.0):
            moved = logits_NV.detach().clone()
            moved[place] += sign * step
            ends.append(float(compute_probability(moved)))
        assert float(logits_NV.grad[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


def test_a_certain_learner_has_the_plain_gradient() -> None:
    """At p = 1 the weight is 1."""
    batch = collate([build_document([1, 2])])
    grads = []
    for objective in (build_dft(), build_ntp()):
        logprobs_N = torch.zeros(1, requires_grad=True)
        objective.compute(Scores(logprobs_N), batch).total.backward()
        assert logprobs_N.grad is not None
        grads.append(logprobs_N.grad.tolist())
    assert grads[0] == grads[1] == [-1.0]
