"""The step loss by hand, its gradient by differences, soft labels, and what does not fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polm.data.steps import build_step_tree
from polm.errors import DataError
from polm.objectives.process_reward_model import build_process_reward_model, compute_step_loss
from polm.tokens import Needs, Scores, TokenBatch, collate

EMPTY = torch.zeros(0)


def build_batch() -> TokenBatch:
    """Prompt 0 1, answer 2..6 with steps that end at 3 (right) and 6 (wrong); prompt 7, answer 8 9 (a half)."""
    prompt = np.array([1, 2])
    first = build_step_tree(prompt, np.array([3, 9, 4, 5, 9]), np.array([1, 4]), [1.0, 0.0])
    second = build_step_tree(prompt[:1], np.array([6, 9]), np.array([1]), [0.5])
    return collate([first, second])


def test_by_hand() -> None:
    values = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [2.0, 2.0]])  # right: 3/4, 3/4, 1/2
    losses = compute_step_loss(values, torch.tensor([1.0, 0.0, 0.25]))
    assert losses.tolist() == pytest.approx([-math.log(0.75), -math.log(0.25), math.log(2.0)])


def test_the_loss_reads_the_ends_of_the_steps() -> None:
    batch = build_batch()
    assert batch.targets_N.tolist() == [3, 6, 9]
    values = torch.randn(batch.num_tokens, 2, generator=torch.Generator().manual_seed(0))
    values[3], values[6], values[9] = (
        torch.tensor([0.0, math.log(3.0)]),
        torch.tensor([0.0, math.log(3.0)]),
        torch.tensor([1.0, 0.0]),
    )
    loss = build_process_reward_model().compute(Scores(EMPTY, values_TL=values), batch)
    right = 1.0 / (1.0 + math.e)
    half = -0.5 * math.log(right) - 0.5 * math.log(1.0 - right)
    assert loss.total.item() == pytest.approx(-math.log(0.75) - math.log(0.25) + half, rel=1e-5)
    assert loss.denominator.item() == 3.0
    metrics = {name: float(m.total) / float(m.count) for name, m in loss.metrics.items()}
    assert metrics["steps/accuracy"] == pytest.approx(
        2 / 3
    )  # right, wrong; a label of 1/2 is not above it, nor is 0.27
    assert metrics["steps/right"] == pytest.approx((0.75 + 0.75 + right) / 3)
    assert metrics["steps/label"] == pytest.approx(0.5)


def test_the_gradient_is_the_difference_quotient() -> None:
    batch = build_batch()
    objective = build_process_reward_model()
    values = torch.randn(batch.num_tokens, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values.requires_grad_()
    (gradient,) = torch.autograd.grad(objective.compute(Scores(EMPTY, values_TL=values), batch).total, values)
    for place in range(batch.num_tokens):
        for label in range(2):
            step = torch.zeros_like(values)
            step[place, label] = 1e-2
            ends = [objective.compute(Scores(EMPTY, values_TL=values.detach() + s), batch).total for s in (step, -step)]
            assert float(gradient[place, label]) == pytest.approx(float(ends[0] - ends[1]) / 2e-2, abs=2e-4)
    assert int((gradient != 0).sum()) == 6


def test_it_asks_for_values_only() -> None:
    objective = build_process_reward_model()
    assert objective.needs == Needs(values=True)
    assert objective.reads == ("weights", "labels")


@pytest.mark.parametrize("labels", [None, 1])
def test_a_model_of_another_kind(labels: int | None) -> None:
    batch = build_batch()
    values = None if labels is None else torch.zeros(batch.num_tokens, labels)
    with pytest.raises(DataError, match=f"expected a model with two values at each token, found {labels}"):
        build_process_reward_model().compute(Scores(EMPTY, values_TL=values), batch)
