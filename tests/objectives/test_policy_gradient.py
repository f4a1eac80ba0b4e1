"""The clipped policy gradient by hand: ratios, clipping, the penalty, and the three denominators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polm.errors import RecipeError
from polm.objectives.policy_gradient import build_policy_gradient
from polm.tokens import Loss, Objective, Scores, TokenBatch, Tree, build_completions, collate

SETTING: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.3,
    "kl_beta": 0.0,
    "normalize": "tokens",
    "max_completion_tokens": 10,
}
# Completion 1 of three tokens, advantage 2; completion 2 of two tokens, advantage -1.
LOGPROBS = [-1.0, -2.0, -0.5, -1.0, -3.0]
ADVANTAGES = [2.0, 2.0, 2.0, -1.0, -1.0]
RATIOS = [1.1, 1.5, 0.5, 0.5, 1.6]
OLD = [lp - math.log(r) for lp, r in zip(LOGPROBS, RATIOS, strict=True)]
REFERENCE = [-1.5, -2.0, -0.25, -2.0, -1.25]
# min(ratio A, clip(ratio) A): 2.2 | 1.3 * 2, clipped | 0.5 * 2 | -0.8, clipped | -1.6
SURROGATE = [2.2, 2.6, 1.0, -0.8, -1.6]
SURROGATE_GRAD = [2.2, 0.0, 1.0, 0.0, -1.6]  # d/d logp of ratio A is ratio A; 0 where clipped
LENGTHS = [3, 2]


def build_tree(names: tuple[str, ...], completions: tuple[int, ...] = (0, 1)) -> Tree:
    values = {"advantages": ADVANTAGES, "old_logprobs": OLD, "ref_logprobs": REFERENCE, "sampler_logprobs": REFERENCE}
    cuts = [slice(0, 3), slice(3, 5)]
    streams = [{name: np.array(values[name][cuts[i]], dtype=np.float32) for name in names} for i in completions]
    return build_completions([7, 8], [list(range(LENGTHS[i])) for i in completions], streams)


def run(objective: Objective, batch: TokenBatch, logprobs: list[float]) -> tuple[Loss, list[float]]:
    logprobs_N = torch.tensor(logprobs, requires_grad=True)
    entropy_N = torch.arange(len(logprobs)).float() if objective.needs.entropy else None
    loss = objective.compute(Scores(logprobs_N, entropy_N=entropy_N), batch)
    loss.total.backward()
    assert logprobs_N.grad is not None
    return loss, logprobs_N.grad.tolist()


@pytest.mark.parametrize(("kl_beta", "unbiased"), [(0.0, True), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("normalize", ["tokens", "sequences", "constant"])
def test_arithmetic_and_gradient(normalize: str, kl_beta: float, unbiased: bool) -> None:
    setting = {**SETTING, "normalize": normalize, "kl_beta": kl_beta, "unbiased_kl": unbiased}
    objective = build_policy_gradient(**setting)
    batch = collate([build_tree(("advantages", "old_logprobs", "ref_logprobs"))])
    loss, grad = run(objective, batch, LOGPROBS)
    log_ratios = [r - lp for r, lp in zip(REFERENCE, LOGPROBS, strict=True)]
    kl = [math.exp(d) - d - 1 for d in log_ratios]
    kl_grad = [1 - math.exp(d) for d in log_ratios]
    if unbiased:
        kl = [ratio * k for ratio, k in zip(RATIOS, kl, strict=True)]
        kl_grad = [ratio * -d for ratio, d in zip(RATIOS, log_ratios, strict=True)]
    losses = [-s + kl_beta * k for s, k in zip(SURROGATE, kl, strict=True)]
    grads = [-s + kl_beta * k for s, k in zip(SURROGATE_GRAD, kl_grad, strict=True)]
    shares = [1 / 3] * 3 + [1 / 2] * 2 if normalize == "sequences" else [1.0] * 5
    assert loss.total.item() == pytest.approx(sum(s * x for s, x in zip(shares, losses, strict=True)), rel=1e-5)
    assert float(loss.denominator) == {"tokens": 5.0, "sequences": 2.0, "constant": 20.0}[normalize]
    assert grad == pytest.approx([s * g for s, g in zip(shares, grads, strict=True)], rel=1e-5)


def test_without_old_logprobs_it_is_exactly_on_policy() -> None:
    loss, grad = run(build_policy_gradient(**SETTING), collate([build_tree(("advantages",))]), LOGPROBS)
    assert loss.total.item() == -sum(ADVANTAGES)
    assert grad == [-a for a in ADVANTAGES]
    assert float(loss.metrics["rl/ratio_mean"].total) == 5.0
    assert float(loss.metrics["rl/approx_kl"].total) == 0.0


def test_the_data_s_own_weights_multiply() -> None:
    tree = build_completions(
        [7],
        [[1, 2, 3], [4]],
        [
            {
                "advantages": np.float32([1, 1, 1]),
                "weights": np.float32([1, 0, 3]),
            },  # the middle one is a tool's answer
            {"advantages": np.float32([2]), "weights": np.float32([0.5])},
        ],
    )
    by_mode = {
        normalize: run(build_policy_gradient(**{**SETTING, "normalize": normalize}), collate([tree]), [-1.0] * 3)
        for normalize in ("tokens", "sequences", "constant")
    }
    expected = {
        "tokens": (-(1 + 3 + 0.5 * 2), 4.5, [-1, -3, -1]),
        "sequences": (-(1 + 2), 2.0, [-0.25, -0.75, -2]),
        "constant": (-(1 + 3 + 0.5 * 2), 20.0, [-1, -3, -1]),
    }
    for normalize, (total, denominator, grad) in expected.items():
        loss, found = by_mode[normalize]
        assert (loss.total.item(), float(loss.denominator), found) == (total, denominator, grad), normalize


def test_metrics() -> None:
    names = ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs")
    objective = build_policy_gradient(**{**SETTING, "kl_beta": 0.1}, log_entropy=True)
    loss, _ = run(objective, collate([build_tree(names)]), LOGPROBS)
    assert all(not metric.total.requires_grad for metric in loss.metrics.values())
    totals = {name: float(metric.total) for name, metric in loss.metrics.items()}
    assert totals["rl/ratio_mean"] == pytest.approx(sum(RATIOS), rel=1e-6)
    assert totals["rl/clip_high_fraction"] == 1  # ratio 1.5 with advantage 2; not 1.6 with advantage -1
    assert totals["rl/clip_low_fraction"] == 1  # ratio 0.5 with advantage -1; not 0.5 with advantage 2
    assert totals["rl/approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in RATIOS), rel=1e-5)
    gaps = [r - lp for r, lp in zip(REFERENCE, LOGPROBS, strict=True)]
    kl = sum(ratio * (math.exp(d) - d - 1) for ratio, d in zip(RATIOS, gaps, strict=True))
    assert totals["rl/kl"] == pytest.approx(kl, rel=1e-5)
    assert totals["rl/entropy"] == 10.0
    assert totals["rl/sampler_gap"] == pytest.approx(0.5 + 0 + 0.25 + 1 + 1.75)
    assert totals["rl/sampler_gap_max"] == 1.75
    assert loss.metrics["rl/sampler_gap_max"].count == 1.0
    assert all(float(m.count) == 5 for name, m in loss.metrics.items() if not name.endswith("_max"))


def test_the_unbiased_penalty_has_the_gradient_of_the_divergence() -> None:
    """All tokens of a vocabulary of three, each weighted by its probability: the expectation over samples."""
    logits_V = torch.tensor([0.2, -0.5, 1.0], requires_grad=True)
    log_q_V = torch.log_softmax(torch.tensor([1.0, 0.0, -1.0]), 0)
    p_V = torch.softmax(logits_V.detach(), 0)
    streams = [
        {"weights": p_V[[i]].numpy(), "ref_logprobs": log_q_V[[i]].numpy(), "advantages": np.float32([0])}
        for i in range(3)
    ]
    batch = collate([build_completions([0], [[0], [1], [2]], streams)])
    grads = {}
    for unbiased in (True, False):
        objective = build_policy_gradient(**{**SETTING, "kl_beta": 1.0, "unbiased_kl": unbiased})
        total = objective.compute(Scores(torch.log_softmax(logits_V, 0)), batch).total
        (grads[unbiased],) = torch.autograd.grad(total, logits_V)
    log_p_V = torch.log_softmax(logits_V, 0)
    (expected,) = torch.autograd.grad((log_p_V.exp() * (log_p_V - log_q_V)).sum(), logits_V)
    assert grads[True].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert (grads[False] - expected).abs().max() > 0.1


def test_the_sampler_is_only_logged() -> None:
    without, grad = run(build_policy_gradient(**SETTING), collate([build_tree(("advantages",))]), LOGPROBS)
    with_sampler = collate([build_tree(("advantages", "sampler_logprobs"))])
    logged, logged_grad = run(build_policy_gradient(**SETTING), with_sampler, LOGPROBS)
    assert torch.equal(without.total, logged.total)
    assert grad == logged_grad
    assert "rl/sampler_gap" not in without.metrics


@pytest.mark.parametrize("normalize", ["tokens", "sequences", "constant"])
def test_the_split_into_micro_batches_does_not_matter(normalize: str) -> None:
    objective = build_policy_gradient(**{**SETTING, "normalize": normalize, "kl_beta": 0.3})
    names = ("advantages", "old_logprobs", "ref_logprobs")
    whole, grad = run(objective, collate([build_tree(names)]), LOGPROBS)
    first, first_grad = run(objective, collate([build_tree(names, (0,))]), LOGPROBS[:3])
    second, second_grad = run(objective, collate([build_tree(names, (1,))]), LOGPROBS[3:])
    assert whole.total.item() == pytest.approx((first.total + second.total).item(), abs=1e-6)
    assert float(whole.denominator) == float(first.denominator + second.denominator)
    assert grad == first_grad + second_grad


def test_what_it_asks_for() -> None:
    assert build_policy_gradient(**SETTING).reads == ("weights", "advantages")
    assert not build_policy_gradient(**SETTING).needs.entropy
    assert "ref_logprobs" in build_policy_gradient(**{**SETTING, "kl_beta": 0.1}).reads
    assert build_policy_gradient(**SETTING, log_entropy=True).needs.entropy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": 1.5}, r"clip_low is 1\.5"),
        ({"clip_high": -0.1}, r"clip_high is -0\.1"),
        ({"kl_beta": -1.0}, "kl_beta is -1"),
        ({"normalize": "groups"}, "normalize is 'groups'"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_policy_gradient(**{**SETTING, **change})
