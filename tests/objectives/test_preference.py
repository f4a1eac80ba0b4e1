"""DPO by hand, and trees that are no pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from polm.errors import DataError, RecipeError
from polm.objectives.preference import Knobs, build_preference
from polm.tokens import Objective, Scores, Tree, build_completions, collate


def build_dpo(*, beta: float, label_smoothing: float) -> Objective:
    return build_preference("sigmoid", Knobs(beta=beta, label_smoothing=label_smoothing))


def build_pair(signs: Sequence[float], references: Sequence[Sequence[float]]) -> Tree:
    streams = [{"ref_logprobs": np.array(r, dtype=np.float32)} for r in references]
    completions = [list(range(len(r))) for r in references]
    return build_completions([7, 8, 9], completions, streams, [{"sign": sign} for sign in signs])


# Pair 1: chosen first, of two tokens, rejected of one. Pair 2: rejected first.
FIRST = build_pair([1, -1], [[-1.0, -2.0], [-1.5]])
SECOND = build_pair([-1, 1], [[-1.0], [-3.0, -0.5]])
FIRST_LOGPROBS = [-0.5, -1.5, -2.0]  # chosen -2 against -3: +1; rejected -2 against -1.5: -0.5
SECOND_LOGPROBS = [-0.5, -3.5, -1.0]  # rejected +0.5; chosen -4.5 against -3.5: -1
MARGINS = [1.0 + 0.5, -1.0 - 0.5]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (2.0, 0.0), (0.5, 0.2)])
def test_arithmetic_and_gradient(beta: float, smoothing: float) -> None:
    logprobs_N = torch.tensor([*FIRST_LOGPROBS, *SECOND_LOGPROBS], requires_grad=True)
    loss = build_dpo(beta=beta, label_smoothing=smoothing).compute(Scores(logprobs_N), collate([FIRST, SECOND]))
    total = sum(
        -(1 - smoothing) * math.log(sigmoid(beta * m)) - smoothing * math.log(sigmoid(-beta * m)) for m in MARGINS
    )
    assert loss.total.item() == pytest.approx(total, rel=1e-6)
    assert float(loss.denominator) == 2.0
    loss.total.backward()
    # d loss / d margin = -beta ((1 - s) sigmoid(-beta m) - s sigmoid(beta m)); minus that for a rejected token.
    pull = [-beta * ((1 - smoothing) * sigmoid(-beta * m) - smoothing * sigmoid(beta * m)) for m in MARGINS]
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([pull[0], pull[0], -pull[0], -pull[1], pull[1], pull[1]], rel=1e-6)


def test_metrics() -> None:
    logprobs_N = torch.tensor([*FIRST_LOGPROBS, *SECOND_LOGPROBS], requires_grad=True)
    loss = build_dpo(beta=0.5, label_smoothing=0.0).compute(Scores(logprobs_N), collate([FIRST, SECOND]))
    assert {name: float(metric.total) for name, metric in loss.metrics.items()} == {
        "dpo/accuracy": 1.0,
        "dpo/margin": 0.0,
        "dpo/chosen_logprob": -2.0 - 4.5,
        "dpo/rejected_logprob": -2.0 - 0.5,
        "dpo/chosen_reward": 0.0,
        "dpo/rejected_reward": 0.0,
    }
    assert all(metric.count == 2 and not metric.total.requires_grad for metric in loss.metrics.values())


def test_the_data_s_own_weights_multiply() -> None:
    streams = [
        {"ref_logprobs": np.float32([-1.0, -2.0]), "weights": np.float32([0.5, 2.0])},
        {"ref_logprobs": np.float32([-1.5, -9.0]), "weights": np.float32([1.0, 0.0])},
    ]
    tree = build_completions([7], [[1, 2], [3, 4]], streams, [{"sign": 1}, {"sign": -1}])
    scores = Scores(torch.tensor(FIRST_LOGPROBS))  # chosen: 0.5 * 0.5 + 2 * 0.5; rejected: -0.5, one token is context
    loss = build_dpo(beta=1.0, label_smoothing=0.0).compute(scores, collate([tree]))
    assert loss.total.item() == pytest.approx(-math.log(sigmoid(1.25 + 0.5)), rel=1e-6)


def test_the_split_into_micro_batches_does_not_matter() -> None:
    dpo = build_dpo(beta=0.7, label_smoothing=0.1)
    whole = dpo.compute(Scores(torch.tensor([*FIRST_LOGPROBS, *SECOND_LOGPROBS])), collate([FIRST, SECOND]))
    first = dpo.compute(Scores(torch.tensor(FIRST_LOGPROBS)), collate([FIRST]))
    second = dpo.compute(Scores(torch.tensor(SECOND_LOGPROBS)), collate([SECOND]))
    assert whole.total.item() == pytest.approx((first.total + second.total).item(), rel=1e-7)
    assert float(whole.denominator) == float(first.denominator + second.denominator)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (build_pair([1], [[-1.0]]), r"tree 1 of the batch has 0 rejected completions \(mark sign = -1\)"),
        (build_pair([-1, -1], [[-1.0], [-1.0]]), "tree 1 of the batch has 0 chosen completions"),
        (build_pair([1, 1, -1], [[-1.0], [-1.0], [-1.0]]), "tree 1 of the batch has 2 chosen completions"),
        (build_completions([1], [[2], [3]]), "tree 1 of the batch has 0 chosen completions"),
        (build_pair([1, -1], [[-1.0], []]), "the rejected completion of tree 1 of the batch has no target tokens"),
    ],
)
def test_a_tree_that_is_no_pair_is_refused(tree: Tree, message: str) -> None:
    batch = collate([FIRST, tree])
    with pytest.raises(DataError, match=message):
        build_dpo(beta=0.1, label_smoothing=0.0).compute(Scores(torch.zeros(batch.num_targets)), batch)


def test_a_batch_without_signs_is_refused() -> None:
    batch = collate([build_completions([1], [[2], [3]])])
    with pytest.raises(DataError, match="no segment carries the mark 'sign'"):
        build_dpo(beta=0.1, label_smoothing=0.0).compute(Scores(torch.zeros(2)), batch)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(RecipeError, match="beta is 0"):
        build_dpo(beta=0.0, label_smoothing=0.0)
    with pytest.raises(RecipeError, match=r"label_smoothing is 0\.5"):
        build_dpo(beta=0.1, label_smoothing=0.5)
