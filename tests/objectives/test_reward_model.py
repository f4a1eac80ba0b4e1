"""The comparison loss by hand, its gradient by differences, and trees that are no pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from polm.errors import DataError
from polm.objectives.reward_model import build_reward_model, compute_bradley_terry, compute_centring
from polm.tokens import Needs, Scores, TokenBatch, build_completions, collate

EMPTY = torch.zeros(0)


def build_batch(marks: list[list[dict[str, float]]] | None = None) -> TokenBatch:
    """Two prompts with two answers each: segments 1 and 2 (chosen, rejected), 4 and 5 (rejected, chosen)."""
    marks = marks or [[{"sign": 1.0, "margin": 0.5}, {"sign": -1.0}], [{"sign": -1.0}, {"sign": 1.0}]]
    return collate(
        [
            build_completions([1, 2], [[3, 4, 5], [6]], marks=marks[0]),
            build_completions([1], [[2], [3, 4]], marks=marks[1]),
        ]
    )


def build_scores(batch: TokenBatch, **values: float) -> Scores:
    """Values of -9 everywhere but at the given stream places (`t6=1.5`)."""
    values_T = torch.full((batch.num_tokens,), -9.0)
    for name, value in values.items():
        values_T[int(name[1:])] = value
    return Scores(EMPTY, values_TL=values_T[:, None].requires_grad_())


def test_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    losses = compute_bradley_terry(chosen, rejected, torch.tensor([0.5, 0.0]))
    # -log sigmoid(1) and -log sigmoid(-2)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.0))])
    assert compute_centring(chosen, rejected).tolist() == pytest.approx([6.25, 0.0])


def test_the_loss_reads_the_ends_of_the_answers() -> None:
    """Stream: prompt 0 1, chosen 2 3 4, rejected 5; prompt 6, rejected 7, chosen 8 9."""
    batch = build_batch()
    scores = build_scores(batch, t4=2.0, t5=0.5, t7=1.0, t9=-1.0)
    loss = build_reward_model(center_coefficient=0.1).compute(scores, batch)
    expected = math.log1p(math.exp(-1.0)) + math.log1p(math.exp(2.0)) + 0.1 * (6.25 + 0.0)
    assert loss.total.item() == pytest.approx(expected)
    assert loss.denominator.item() == 2.0
    metrics = {name: float(m.total) / float(m.count) for name, m in loss.metrics.items()}
    assert metrics == pytest.approx(
        {"reward/accuracy": 0.5, "reward/margin": -0.25, "reward/chosen": 0.5, "reward/rejected": 0.75}
    )


def test_a_tie_is_a_half() -> None:
    batch = build_batch()
    loss = build_reward_model().compute(build_scores(batch, t4=1.0, t5=1.0, t7=0.0, t9=2.0), batch)
    accuracy = loss.metrics["reward/accuracy"]
    assert float(accuracy.total) / float(accuracy.count) == 0.75


def test_the_gradient_is_the_difference_quotient() -> None:
    batch = build_batch()
    objective = build_reward_model(center_coefficient=0.2)
    scores = build_scores(batch, t4=0.3, t5=-0.2, t7=0.4, t9=0.1)
    assert scores.values_TL is not None
    values = scores.values_TL.detach().double()

    def total(changed: torch.Tensor) -> float:
        return float(objective.compute(Scores(EMPTY, values_TL=changed), batch).total)

    (gradient,) = torch.autograd.grad(objective.compute(scores, batch).total, scores.values_TL)
    for place in range(batch.num_tokens):
        step = torch.zeros_like(values)
        step[place] = 1e-5
        slope = (total(values + step) - total(values - step)) / 2e-5
        assert float(gradient[place]) == pytest.approx(slope, abs=1e-4)
    assert int((gradient != 0).sum()) == 4


def test_it_asks_for_values_only() -> None:
    assert build_reward_model().needs == Needs(values=True)


BAD: dict[str, tuple[Any, str]] = {
    "no marks": ([[{}, {}], [{}, {}]], "reward_model: no segment carries the mark 'sign'"),
    "two chosen": (
        [[{"sign": 1.0}, {"sign": 1.0}], [{"sign": -1.0}, {"sign": 1.0}]],
        r"reward_model: tree 0 of the batch has 2 chosen completions",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_trees_that_are_no_pairs(name: str) -> None:
    marks, match = BAD[name]
    batch = build_batch(marks)
    with pytest.raises(DataError, match=match):
        build_reward_model().compute(build_scores(batch), batch)


@pytest.mark.parametrize("labels", [None, 2])
def test_a_model_of_another_kind(labels: int | None) -> None:
    batch = build_batch()
    values = None if labels is None else torch.zeros(batch.num_tokens, labels)
    with pytest.raises(DataError, match=f"expected a model with one value at each token, found {labels}"):
        build_reward_model().compute(Scores(EMPTY, values_TL=values), batch)
