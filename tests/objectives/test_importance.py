"""The clipped policy gradient over whole completions, and the correction for a generator that is not the trainer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polm.errors import RecipeError
from polm.objectives.policy_gradient import build_policy_gradient
from polm.tokens import Loss, Scores, TokenBatch, build_completions, collate

SETTING: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.3,
    "kl_beta": 0.0,
    "normalize": "sequences",
    "max_completion_tokens": 10,
}
# Two completions, of three tokens and of two.
LOGPROBS = [-1.0, -2.0, -0.5, -1.0, -3.0]
CUTS = (slice(0, 3), slice(3, 5))


def build_batch(advantages: tuple[float, float], **streams: list[float]) -> TokenBatch:
    own = [
        {
            "advantages": np.full(len(LOGPROBS[cut]), advantages[i], dtype=np.float32),
            **{name: np.array(values[cut], dtype=np.float32) for name, values in streams.items()},
        }
        for i, cut in enumerate(CUTS)
    ]
    return collate([build_completions([7, 8], [[1, 2, 3], [4, 5]], own)])


def run(batch: TokenBatch, **changes: Any) -> tuple[Loss, list[float]]:
    logprobs_N = torch.tensor(LOGPROBS, requires_grad=True)
    loss = build_policy_gradient(**{**SETTING, **changes}).compute(Scores(logprobs_N), batch)
    loss.total.backward()
    assert logprobs_N.grad is not None
    return loss, logprobs_N.grad.tolist()


def test_a_completion_is_one_action() -> None:
    """Log ratios of the tokens 0.2, -0.1, 0.05 and -0.3, 0.2: of the completions 0.15 and -0.1."""
    steps = [0.2, -0.1, 0.05, -0.3, 0.2]
    old = [lp - step for lp, step in zip(LOGPROBS, steps, strict=True)]
    first, second = math.exp(0.15), math.exp(-0.1)
    loss, grad = run(build_batch((2.0, -1.0), old_logprobs=old), level="sequence")
    assert loss.total.item() == pytest.approx(-2 * first + second, rel=1e-5)
    assert float(loss.denominator) == 2.0
    assert grad == pytest.approx([-2 * first] * 3 + [second] * 2, rel=1e-5)  # d ratio / d logp is the ratio


def test_a_completion_is_clipped_as_one() -> None:
    """Its tokens' ratios are all within the bounds, their product is not."""
    old = [lp - 0.15 for lp in LOGPROBS]
    loss, grad = run(build_batch((2.0, -1.0), old_logprobs=old), level="sequence")
    # ratio exp(0.45) > 1.3 and the advantage is positive: clipped; exp(0.3) > 1.3 with a negative one is not.
    assert loss.total.item() == pytest.approx(-2 * 1.3 + math.exp(0.3), rel=1e-5)
    assert grad == pytest.approx([0.0] * 3 + [math.exp(0.3)] * 2, rel=1e-5)
    assert loss.metrics["rl/clip_high_fraction"].total.item() == 3


def test_on_policy_it_is_reinforce() -> None:
    """d loss / d logp of every token is the advantage, over the number of completions."""
    loss, grad = run(build_batch((2.0, -1.0)), level="sequence")
    assert loss.total.item() == -1.0
    assert grad == [-2.0] * 3 + [1.0] * 2


SAMPLER = [-1.5, -2.0, -0.25, -1.0, -6.0]  # p / p_sampler: e^0.5, 1, e^-0.25, 1, e^3


@pytest.mark.parametrize("with_old", [False, True])
def test_the_correction_by_token(with_old: bool) -> None:
    """With one update a rollout the loss's own log-probabilities are the trainer's; nothing else has to be scored."""
    more = {"old_logprobs": LOGPROBS} if with_old else {}
    batch = build_batch((2.0, -1.0), sampler_logprobs=SAMPLER, **more)
    loss, grad = run(batch, normalize="tokens", importance_cap=2.0)
    weights = [math.exp(0.5), 1.0, math.exp(-0.25), 1.0, 2.0]
    losses = [-2 * w for w in weights[:3]] + weights[3:]
    assert loss.total.item() == pytest.approx(sum(losses), rel=1e-5)
    assert grad == pytest.approx(losses, rel=1e-5)  # the weight itself passes on no gradient
    totals = {name: float(metric.total) for name, metric in loss.metrics.items()}
    assert totals["rl/importance_capped_fraction"] == 1
    assert totals["rl/importance_mean"] == pytest.approx(sum(weights), rel=1e-5)


def test_the_correction_of_a_whole_completion() -> None:
    loss, _ = run(build_batch((2.0, -1.0), sampler_logprobs=SAMPLER), level="sequence", importance_cap=2.0)
    assert loss.total.item() == pytest.approx(-2 * math.exp(0.25) + 2.0, rel=1e-5)


def test_the_penalty_is_not_corrected() -> None:
    batch = build_batch((0.0, 0.0), sampler_logprobs=SAMPLER, ref_logprobs=[lp - 0.5 for lp in LOGPROBS])
    with_cap, _ = run(batch, normalize="tokens", kl_beta=0.5, importance_cap=2.0)
    without, _ = run(batch, normalize="tokens", kl_beta=0.5)
    assert with_cap.total.item() == without.total.item() > 0


def test_a_generator_that_agrees_changes_nothing() -> None:
    batch = build_batch((2.0, -1.0), sampler_logprobs=LOGPROBS)
    assert run(batch, importance_cap=1.5)[1] == run(batch)[1]


def test_the_mismatch_is_measured_against_the_trainer_before_the_update() -> None:
    old = [lp + 0.1 for lp in LOGPROBS]
    loss, _ = run(build_batch((2.0, -1.0), sampler_logprobs=SAMPLER, old_logprobs=old))
    gaps = [o - s for o, s in zip(old, SAMPLER, strict=True)]
    totals = {name: float(metric.total) for name, metric in loss.metrics.items()}
    assert totals["rl/mismatch_mean"] == pytest.approx(sum(map(abs, gaps)), rel=1e-5)
    assert totals["rl/mismatch_max"] == pytest.approx(3.1, rel=1e-5)
    assert totals["rl/mismatch_kl"] == pytest.approx(sum(math.exp(g) - 1 - g for g in gaps), rel=1e-5)
    assert totals["rl/sampler_gap"] == pytest.approx(0.5 + 0.25 + 3.0, rel=1e-5)  # of the learner as it stands


def test_what_it_reads_and_refuses() -> None:
    assert "sampler_logprobs" in build_policy_gradient(**SETTING, importance_cap=2.0).reads
    with pytest.raises(RecipeError, match=r"importance_cap is 0\.0; it must be above 0"):
        build_policy_gradient(**SETTING, importance_cap=0.0)
