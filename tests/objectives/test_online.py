"""XPO and Nash-MD by hand, and their gradients against differences and against the methods' definitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from polm.errors import DataError, RecipeError
from polm.objectives.online import build_nash_md, build_xpo
from polm.objectives.preference import Knobs, build_preference
from polm.tokens import Scores, TokenBatch, Tree, build_completions, collate


def build_pair(chosen: list[float], rejected: list[float], explored: int) -> Tree:
    """A pair by its reference's log-probabilities; `explored` is the place of the reference's own answer."""
    streams = [{"ref_logprobs": np.array(r, dtype=np.float32)} for r in (chosen, rejected)]
    marks = [{"sign": 1.0}, {"sign": -1.0}]
    marks[explored]["explored"] = 1.0
    return build_completions([1, 2], [[3] * len(chosen), [4] * len(rejected)], streams, marks)


BATCH = collate([build_pair([-1.0, -1.0], [-2.0], explored=1), build_pair([-0.5], [-3.0, -1.0], explored=0)])
LOGPROBS = (-0.5, -1.0, -2.5, -1.0, -2.0, -1.0)  # targets: c c r | c r r


def test_xpo_by_hand() -> None:
    """Pair 1: c = -1.5 + 2 = 0.5, r = -2.5 + 2 = -0.5; pair 2: c = -1 + 0.5 = -0.5, r = -3 + 4 = 1.
    The reference wrote the rejected answer of pair 1 (log p = -2.5) and the chosen one of pair 2 (-1)."""
    objective = build_xpo("sigmoid", Knobs(beta=0.2), alpha=0.1)
    loss = objective.compute(Scores(torch.tensor(LOGPROBS)), BATCH)
    dpo = math.log(1 + math.exp(-0.2 * 1.0)) + math.log(1 + math.exp(0.2 * 1.5))
    assert float(loss.total) == pytest.approx(dpo + 0.1 * (-2.5 - 1.0), rel=1e-6)
    assert float(loss.denominator) == 2.0
    metric = loss.metrics["xpo/reference_logprob"]
    assert float(metric.total) / float(metric.count) == pytest.approx(-1.75)
    assert float(loss.metrics["dpo/margin"].total) == pytest.approx(0.2 * (1.0 - 1.5), rel=1e-5)
    ipo = build_xpo("ipo", Knobs(beta=0.2), alpha=0.1).compute(Scores(torch.tensor(LOGPROBS)), BATCH)
    assert float(ipo.total) == pytest.approx((1.0 - 2.5) ** 2 + (-1.5 - 2.5) ** 2 - 0.35, rel=1e-5)


def test_xpo_without_optimism_is_online_dpo() -> None:
    plain = build_preference("sigmoid", Knobs()).compute(Scores(torch.tensor(LOGPROBS)), BATCH)
    found = build_xpo("sigmoid", Knobs(), alpha=0.0).compute(Scores(torch.tensor(LOGPROBS)), BATCH)
    assert float(found.total) == float(plain.total)


def differentiate(objective: object, batch: TokenBatch, logprobs: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(autograd's gradient, central differences in double precision)."""
    given = torch.tensor(logprobs, requires_grad=True)
    objective.compute(Scores(given), batch).total.backward()  # type: ignore[attr-defined]
    step, out = 1e-2, []
    for place in range(len(logprobs)):
        ends = []
        for sign in (1.0, -1.0):
            moved = torch.tensor(logprobs)
            moved[place] += sign * step
            ends.append(float(objective.compute(Scores(moved), batch).total))  # type: ignore[attr-defined]
        out.append((ends[0] - ends[1]) / (2 * step))
    assert given.grad is not None
    return given.grad, torch.tensor(out)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_gradient_of_xpo(loss: str) -> None:
    found, expected = differentiate(build_xpo(loss, Knobs(beta=0.3), alpha=0.2), BATCH, LOGPROBS)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    plain, _ = differentiate(build_preference(loss, Knobs(beta=0.3)), BATCH, LOGPROBS)
    torch.testing.assert_close(found - plain, torch.tensor([0, 0, 0.2, 0.2, 0, 0]))  # alpha on the reference's answers


def test_a_pair_needs_an_answer_of_the_reference() -> None:
    tree = build_pair([-1.0], [-1.0], explored=0)
    bare = build_completions([1], [[3], [4]], [dict(s.streams) for s in tree[1:]], [{"sign": 1.0}, {"sign": -1.0}])
    with pytest.raises(DataError, match=r"0 answers of the reference .* in a batch of 1 pairs"):
        build_xpo("sigmoid", Knobs(), 0.1).compute(Scores(torch.tensor([-1.0, -1.0])), collate([bare]))
    with pytest.raises(DataError, match=r"1 answers of the reference .* in a batch of 2 pairs"):
        build_xpo("sigmoid", Knobs(), 0.1).compute(Scores(-torch.ones(4)), collate([bare, tree]))
    with pytest.raises(RecipeError, match=r"alpha is -0.1"):
        build_xpo("sigmoid", Knobs(), -0.1)


# ---- Nash-MD -------------------------------------------------------------------------------------------------------


def build_answers(preferences: list[float], reference: list[list[float]]) -> Tree:
    streams = [{"ref_logprobs": np.array(r, dtype=np.float32)} for r in reference]
    return build_completions([1], [[3] * len(r) for r in reference], streams, [{"preference": p} for p in preferences])


def test_nash_md_by_hand() -> None:
    """Answers with log p = -1.5, -2 and log p_ref = -2, -1.8: log ratios 0.5 and -0.2; P = 1 and 0.3, beta 0.1.
    Brackets: 1 - 0.5 - 0.05 = 0.45 and 0.3 - 0.5 + 0.02 = -0.18."""
    batch = collate([build_answers([1.0, 0.3], [[-1.0, -1.0], [-1.8]])])
    logprobs_N = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    loss = build_nash_md(0.1).compute(Scores(logprobs_N), batch)
    assert float(loss.total.detach()) == pytest.approx(0.45 * 1.5 - 0.18 * 2.0, rel=1e-5)
    assert float(loss.denominator) == 2.0
    measured = {name: float(m.total) / float(m.count) for name, m in loss.metrics.items()}
    assert measured == {
        "nash/preference": pytest.approx(0.65),
        "nash/log_ratio": pytest.approx(0.15, rel=1e-5),
    }
    loss.total.backward()
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([-0.45, -0.45, 0.18], rel=1e-5)  # the bracket passes no gradient


def test_the_gradient_of_nash_md_is_that_of_its_aim() -> None:
    """Over all answers of two tokens from a vocabulary of three, each counted by its probability, our gradient is that
    of -E[P(y)] + beta KL(p || p_ref): the regularised preference of the paper, P against a fixed opponent."""
    beta = 0.3
    generator = torch.Generator().manual_seed(1)
    first_V = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    second_VV = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_first, ref_second = (
        torch.randn(3, generator=generator).double(),
        torch.randn(3, 3, generator=generator).double(),
    )
    preferences = torch.rand(9, generator=generator, dtype=torch.float64)

    def score_answers(first: Tensor, second: Tensor) -> Tensor:
        rows = [torch.log_softmax(first, -1), *torch.log_softmax(second, -1)]
        return torch.stack([torch.stack([rows[0][a], rows[1 + a][b]]) for a, b in product(range(3), repeat=2)])

    logprobs_AT, reference_AT = score_answers(first_V, second_VV), score_answers(ref_first, ref_second)
    aim = -(logprobs_AT.sum(1).exp() * preferences).sum()
    aim = aim + beta * (logprobs_AT.sum(1).exp() * (logprobs_AT - reference_AT).sum(1)).sum()
    expected = torch.autograd.grad(aim, (first_V, second_VV))

    logprobs_AT = score_answers(first_V, second_VV)
    total = torch.zeros((), dtype=torch.float64)
    for i, share in enumerate(logprobs_AT.detach().sum(1).exp()):
        batch = collate([build_answers([float(preferences[i])], [reference_AT[i].tolist()])])
        total = total + share * build_nash_md(beta).compute(Scores(logprobs_AT[i]), batch).total
    found = torch.autograd.grad(total, (first_V, second_VV))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_nash_md_needs_its_marks() -> None:
    with pytest.raises(DataError, match="mark 'preference'"):
        build_nash_md(0.1).compute(Scores(-torch.ones(1)), collate([build_completions([1], [[2]])]))
    with pytest.raises(RecipeError, match="beta is -1"):
        build_nash_md(-1.0)
