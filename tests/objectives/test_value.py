"""The critic's loss by hand: clipped and not, with its gradient, beside the policy's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from polm.errors import RecipeError
from polm.objectives.policy_gradient import build_policy_gradient
from polm.objectives.value import add_value_loss, compute_value_loss
from polm.tokens import Scores, build_completions, collate

VALUES = [0.5, 1.0, -1.0, 0.3, 0.0]
OLD = [0.4, 0.2, 0.0, 0.3, 0.5]
RETURNS = [1.0, 1.5, -2.0, 0.0, 0.2]
# Clipped to within 0.2 of the old value: 0.5, 0.4, -0.2, 0.3, 0.3; the farther from the return counts.
LOSSES = [0.5**2 / 2, 1.1**2 / 2, 1.8**2 / 2, 0.3**2 / 2, 0.2**2 / 2]
GRADIENTS = [-0.5, 0.0, 0.0, 0.3, -0.2]


def test_arithmetic_and_gradient() -> None:
    values = torch.tensor(VALUES, requires_grad=True)
    loss, is_clipped = compute_value_loss(values, torch.tensor(OLD), torch.tensor(RETURNS), 0.2)
    assert loss.tolist() == pytest.approx(LOSSES, rel=1e-5)
    # The last: 0.0 is 0.2 off, and so is 0.3 by 0.1: the plain one is larger.
    assert is_clipped.tolist() == [False, True, True, False, False]
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx(GRADIENTS, rel=1e-5)


def test_without_a_clip_it_is_half_the_square() -> None:
    loss, is_clipped = compute_value_loss(torch.tensor(VALUES), torch.tensor(OLD), torch.tensor(RETURNS), None)
    expected = [(v - r) ** 2 / 2 for v, r in zip(VALUES, RETURNS, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert not bool(is_clipped.any())


def test_beside_the_policy() -> None:
    """The policy's objective is what it was, and each model has the gradient of its own loss."""
    setting: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.0, "normalize": "tokens"}
    policy = build_policy_gradient(**setting, max_completion_tokens=9)
    cuts = [slice(0, 3), slice(3, 5)]
    streams = [
        {
            "advantages": np.array([1.0, -2.0, 0.5, 1.0, 1.0], dtype=np.float32)[cut],
            "returns": np.array(RETURNS, dtype=np.float32)[cut],
            "old_values": np.array(OLD, dtype=np.float32)[cut],
        }
        for cut in cuts
    ]
    batch = collate([build_completions([7, 8], [[1, 2, 3], [4, 5]], streams)])
    # The text before a completion's first token ends with the prompt: both read the value at its last token.
    assert batch.target_predictors_N.tolist() == [1, 2, 3, 1, 5]
    values_T1 = torch.tensor([9.0, 0.5, 1.0, -1.0, 9.0, 0.0, 9.0])[:, None].requires_grad_()
    logprobs_N = torch.tensor([-1.0, -2.0, -0.5, -1.0, -3.0], requires_grad=True)
    objective = add_value_loss(policy, 0.2)
    loss = objective.compute(Scores(logprobs_N, values_TL=values_T1), batch)
    loss.total.backward()
    values = [0.5, 1.0, -1.0, 0.5, 0.0]
    losses = compute_value_loss(torch.tensor(values), torch.tensor(OLD), torch.tensor(RETURNS), 0.2)[0]
    alone = policy.compute(Scores(logprobs_N.detach()), batch)
    assert loss.total.item() == pytest.approx(alone.total.item() + losses.sum().item(), rel=1e-5)
    assert float(loss.denominator) == float(alone.denominator) == 5.0
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == [-1.0, 2.0, -0.5, -1.0, -1.0]
    assert values_T1.grad is not None
    # Token 1, the prompt's end, is read twice: 0.5 - 1 and 0.5 - 0.
    assert values_T1.grad[:, 0].tolist() == pytest.approx([0.0, -0.5 + 0.5, 0.0, 0.0, 0.0, -0.2, 0.0], abs=1e-6)
    assert float(loss.metrics["ppo/value_loss"].total) == pytest.approx(losses.sum().item(), rel=1e-5)
    assert float(loss.metrics["ppo/policy_loss"].total) == alone.total.item()


def test_what_it_asks_for_and_refuses() -> None:
    setting: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.0, "normalize": "tokens"}
    policy = build_policy_gradient(**setting, max_completion_tokens=9, log_entropy=True)
    objective = add_value_loss(policy, None)
    assert objective.needs == dataclasses.replace(policy.needs, values=True)
    assert {"returns", "old_values"} <= set(objective.reads)
    with pytest.raises(RecipeError, match="the clip is 0; it must be above 0"):
        add_value_loss(policy, 0)
