"""Each preference loss by hand arithmetic, its gradient by differences, and its knobs: each one that it reads moves
it, no other does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polm.errors import DataError, RecipeError
from polm.objectives.preference import (
    ANSWER_LOSSES,
    PAIR_LOSSES,
    Knobs,
    build_preference,
    compute_log_complement,
    compute_tail_weights,
    find_pairs,
)
from polm.recipe import PREFERENCE_KNOBS, DPOSettings
from polm.tokens import Scores, TokenBatch, Tree, build_completions, collate


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def build_tree(signs: Sequence[float], references: Sequence[Sequence[float]], *, mismatched: int = 0) -> Tree:
    """A prompt with answers, the last `mismatched` of them to another prompt."""
    streams = [{"ref_logprobs": np.array(r, dtype=np.float32)} for r in references]
    marks = [{"sign": sign} for sign in signs] + [{"mismatched": 1.0}] * mismatched
    return build_completions([7, 8, 9], [list(range(len(r))) for r in references], streams, marks)


# Pair 1: chosen of 2 tokens, sum -2, reference -3.25; rejected of 1 token, -2 against -1.5.
# Pair 2: rejected first, of 1 token, -0.5 against -1.125; chosen of 3 tokens, sum -5, reference -4.
PAIRS = [build_tree([1, -1], [[-1.0, -2.25], [-1.5]]), build_tree([-1, 1], [[-1.125], [-3.0, -0.5, -0.5]])]
LOGPROBS = [-0.5, -1.5, -2.0, -0.5, -3.0, -1.25, -0.75]
# (policy, reference, tokens) of chosen and rejected
BY_HAND = [((-2.0, -3.25, 2), (-2.0, -1.5, 1)), ((-5.0, -4.0, 3), (-0.5, -1.125, 1))]
COLLISIONS = [-0.25, -0.75, -1.0, -0.125, -2.0, -1.0, -0.5]


def pair_scores(knobs: Knobs, loss: str) -> list[tuple[float, float]]:
    """Scores (chosen, rejected) of both pairs, without LD-DPO."""
    spec = PAIR_LOSSES[loss]
    sides = [
        [(p - (r if spec.reference else 0.0)) / (n if knobs.per_token or spec.per_token else 1) for p, r, n in pair]
        for pair in BY_HAND
    ]
    return [(c, r) for c, r in sides]


def log_odds(mean: float) -> float:
    return mean - math.log(1.0 - math.exp(mean))


FORMULAS: dict[str, Callable[[float, float, Knobs], float]] = {
    "sigmoid": lambda c, r, k: (
        (1 - k.label_smoothing) * softplus(-k.beta * (c - r)) + k.label_smoothing * softplus(k.beta * (c - r))
    ),
    "robust": lambda c, r, k: (
        ((1 - k.label_smoothing) * softplus(-k.beta * (c - r)) - k.label_smoothing * softplus(k.beta * (c - r)))
        / (1 - 2 * k.label_smoothing)
    ),
    "ipo": lambda c, r, k: (c - r - 1 / (2 * k.beta)) ** 2,
    "hinge": lambda c, r, k: max(0.0, 1 - k.beta * (c - r)),
    # KL(q || (1 - s, s)), written out as a sum over both answers
    "exo": lambda c, r, k: sum(
        q * math.log(q / p)
        for q, p in (
            (math.exp(k.beta * c) / (math.exp(k.beta * c) + math.exp(k.beta * r)), 1 - k.label_smoothing),
            (math.exp(k.beta * r) / (math.exp(k.beta * c) + math.exp(k.beta * r)), k.label_smoothing),
        )
    ),
    "nca": lambda c, r, k: softplus(-k.beta * c) + 0.5 * softplus(k.beta * c) + 0.5 * softplus(k.beta * r),
    "apo_zero": lambda c, r, k: -sigmoid(k.beta * c) + sigmoid(k.beta * r),
    "apo_down": lambda c, r, k: sigmoid(k.beta * c) - sigmoid(k.beta * (c - r)),
    "sppo": lambda c, r, k: (c - 1 / k.beta * (1.0 - 0.5)) ** 2 + (r - 1 / k.beta * (0.0 - 0.5)) ** 2,
    "discopop": lambda c, r, k: (
        (1 - sigmoid(k.beta * (c - r) / k.discopop_temperature)) * softplus(-k.beta * (c - r))
        + sigmoid(k.beta * (c - r) / k.discopop_temperature) * math.exp(-k.beta * (c - r))
    ),
    "slic": lambda c, r, k: max(0.0, 1 - k.beta * (c - r)),
    "cpo": lambda c, r, k: (
        (1 - k.label_smoothing) * softplus(-k.beta * (c - r)) + k.label_smoothing * softplus(k.beta * (c - r))
    ),
    "simpo": lambda c, r, k: (
        (1 - k.label_smoothing) * softplus(-(k.beta * (c - r) - k.gamma))
        + k.label_smoothing * softplus(k.beta * (c - r) - k.gamma)
    ),
    "orpo": lambda c, r, k: -c + k.orpo_lambda * softplus(-(log_odds(c) - log_odds(r))),
}
PLAIN = Knobs(beta=0.7, discopop_temperature=0.4, gamma=0.3, orpo_lambda=0.6)
CASES = [(loss, PLAIN) for loss in FORMULAS if loss != "exo"]
CASES += [(loss, replace(PLAIN, label_smoothing=0.2)) for loss in ("sigmoid", "robust", "exo", "cpo", "simpo")]
CASES += [
    (loss, replace(PLAIN, label_smoothing=0.1, per_token=True)) for loss in FORMULAS if PAIR_LOSSES[loss].reference
]
CASES += [("slic", replace(PLAIN, nll_weight=0.5)), ("cpo", replace(PLAIN, nll_weight=0.5))]
CASES += [("sigmoid", replace(PLAIN, nll_weight=0.5)), ("simpo", replace(PLAIN, nll_weight=0.5))]


def run_pairs(loss: str, knobs: Knobs, logprobs_N: Tensor) -> Any:
    scores = Scores(logprobs_N, collisions_N=torch.tensor(COLLISIONS))
    return build_preference(loss, knobs).compute(scores, collate(PAIRS))


@pytest.mark.parametrize(("loss", "knobs"), CASES)
def test_pairs_by_hand(loss: str, knobs: Knobs) -> None:
    result = run_pairs(loss, knobs, torch.tensor(LOGPROBS))
    expected = sum(FORMULAS[loss](c, r, knobs) for c, r in pair_scores(knobs, loss))
    for (policy, _, tokens), _ in BY_HAND:
        expected -= knobs.nll_weight * (policy if loss in ("slic", "cpo") else policy / tokens)
    assert result.total.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(result.denominator) == 2.0
    scale = knobs.orpo_lambda if loss == "orpo" else knobs.beta
    margins = [scale * (c - r) for c, r in pair_scores(knobs, loss)]
    assert float(result.metrics["dpo/margin"].total) == pytest.approx(sum(margins), rel=1e-5)
    assert float(result.metrics["dpo/accuracy"].total) == sum(m > 0 for m in margins)
    assert float(result.metrics["dpo/chosen_logprob"].total) == pytest.approx(-7.0)
    assert float(result.metrics["dpo/rejected_logprob"].total) == pytest.approx(-2.5)
    if knobs.nll_weight or loss == "orpo":
        assert float(result.metrics["dpo/nll"].total) == pytest.approx(2.0 / 2 + 5.0 / 3, rel=1e-6)
    assert not any(metric.total.requires_grad for metric in result.metrics.values())


def check_gradient(total: Callable[[Tensor], Tensor], logprobs: Sequence[float]) -> None:
    """Autograd against central differences in float32: steps of 2^-6 leave about four digits."""
    logprobs_N = torch.tensor(logprobs, requires_grad=True)
    total(logprobs_N).backward()
    assert logprobs_N.grad is not None
    step = 2.0**-6
    differences = []
    for i in range(len(logprobs)):
        moved = torch.zeros(len(logprobs))
        moved[i] = step
        up, down = (float(total(logprobs_N.detach() + sign * moved)) for sign in (1.0, -1.0))
        differences.append((up - down) / (2 * step))
    assert logprobs_N.grad.tolist() == pytest.approx(differences, rel=2e-3, abs=2e-4)
    assert logprobs_N.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("loss", "knobs"), CASES)
def test_gradients_of_pairs(loss: str, knobs: Knobs) -> None:
    check_gradient(lambda logprobs_N: run_pairs(loss, knobs, logprobs_N).total, LOGPROBS)


# ---- length and weights ----------------------------------------------------------------------------------------------


def test_ld_dpo_by_hand() -> None:
    """Targets past the shorter answer's length count alpha, of the policy and of the reference."""
    knobs = replace(PLAIN, ld_alpha=0.25)
    result = run_pairs("sigmoid", knobs, torch.tensor(LOGPROBS))
    first = (-0.5 + 1.0) + 0.25 * (-1.5 + 2.25) - (-2.0 + 1.5)
    second = (-3.0 + 3.0) + 0.25 * (-1.25 + 0.5 - 0.75 + 0.5) - (-0.5 + 1.125)
    assert result.total.item() == pytest.approx(softplus(-0.7 * first) + softplus(-0.7 * second), rel=1e-6)
    check_gradient(lambda logprobs_N: run_pairs("sigmoid", knobs, logprobs_N).total, LOGPROBS)


def test_tail_weights() -> None:
    batch = collate(PAIRS)
    assert compute_tail_weights(batch, *find_pairs(batch), 0.25).tolist() == [1, 0.25, 1, 1, 1, 0.25, 0.25]
    whole = run_pairs("sigmoid", replace(PLAIN, ld_alpha=1.0), torch.tensor(LOGPROBS))
    assert whole.total.item() == run_pairs("sigmoid", PLAIN, torch.tensor(LOGPROBS)).total.item()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo"])
def test_wpo_by_hand(loss: str) -> None:
    knobs = replace(PLAIN, wpo=True)
    result = run_pairs(loss, knobs, torch.tensor(LOGPROBS))
    first = math.exp((-0.5 + 0.25 - 1.5 + 0.75) / 2 + (-2.0 + 1.0))
    second = math.exp((-3.0 + 2.0 - 1.25 + 1.0 - 0.75 + 0.5) / 3 + (-0.5 + 0.125))
    losses = [FORMULAS[loss](c, r, knobs) for c, r in pair_scores(knobs, loss)]
    assert result.total.item() == pytest.approx(first * losses[0] + second * losses[1], rel=1e-5)
    assert float(result.metrics["dpo/pair_weight"].total) == pytest.approx(first + second, rel=1e-6)
    # No gradient flows through the weights: it is that of the loss, times the weight of each pair.
    grads = []
    for chosen in (knobs, PLAIN):
        logprobs_N = torch.tensor(LOGPROBS, requires_grad=True)
        run_pairs(loss, chosen, logprobs_N).total.backward()
        assert logprobs_N.grad is not None
        grads.append(logprobs_N.grad)
    assert grads[0].tolist() == pytest.approx((grads[1] * torch.tensor([first] * 3 + [second] * 4)).tolist(), rel=1e-5)


def test_wpo_without_what_it_needs() -> None:
    objective = build_preference("sigmoid", Knobs(wpo=True))
    assert objective.needs.collisions
    assert not build_preference("sigmoid", Knobs()).needs.collisions
    with pytest.raises(DataError, match="collisions_N"):
        objective.compute(Scores(torch.tensor(LOGPROBS)), collate(PAIRS))


def test_the_plain_loss_has_the_bits_it_always_had() -> None:
    """The expression that `polm dpo` had before there were other losses."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = -3.0 * torch.rand(len(LOGPROBS), generator=generator)
        got_N, want_N = (values.clone().requires_grad_() for _ in range(2))
        got = build_preference("sigmoid", Knobs(beta=0.37, label_smoothing=0.2)).compute(Scores(got_N), collate(PAIRS))
        batch = collate(PAIRS)
        sums = [
            torch.zeros(6).index_add(0, batch.target_segments_N, x) for x in (want_N, batch.at_targets("ref_logprobs"))
        ]
        rewards_S = 0.37 * (sums[0] - sums[1])
        margin_P = rewards_S[[1, 5]] - rewards_S[[2, 4]]
        logsigmoid = torch.nn.functional.logsigmoid
        want = (-(1.0 - 0.2) * logsigmoid(margin_P) - 0.2 * logsigmoid(-margin_P)).sum()
        got.total.backward()
        want.backward()
        assert torch.equal(got.total, want)
        assert got_N.grad is not None
        assert want_N.grad is not None
        assert torch.equal(got_N.grad, want_N.grad)


def test_log_complement() -> None:
    x = torch.tensor([-1e-7, -1e-3, -0.1, -0.6931, -0.6932, -1.0, -20.0, -100.0], requires_grad=True)
    value = compute_log_complement(x)
    assert value.tolist() == pytest.approx([math.log(-math.expm1(v)) for v in x.tolist()], rel=1e-5, abs=1e-9)
    value.sum().backward()
    assert x.grad is not None
    assert x.grad[1:].tolist() == pytest.approx([-1.0 / math.expm1(-v) for v in x.tolist()[1:]], rel=1e-4, abs=1e-9)
    certain = torch.zeros(1, requires_grad=True)
    compute_log_complement(certain).sum().backward()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


# ---- single answers --------------------------------------------------------------------------------------------------

# Scores: desirable +1.5, undesirable -0.5, desirable -1; mismatched answers +0.75, +0.25: z0 = 0.5.
ANSWERS = [
    build_tree([1, -1], [[-1.0, -2.5], [-1.5], [-2.0]], mismatched=1),
    build_tree([1], [[-3.0, -1.0], [-1.0]], mismatched=1),
]
ANSWER_LOGPROBS = [-0.5, -1.5, -2.0, -1.25, -4.5, -0.5, -0.75]
SCORES = [1.5, -0.5, -1.0]
SIGNS = [1, -1, 1]


def run_answers(loss: str, knobs: Knobs, logprobs_N: Tensor, trees: Sequence[Tree] = ANSWERS) -> Any:
    return build_preference(loss, knobs).compute(Scores(logprobs_N), collate(trees))


def test_kto_by_hand() -> None:
    knobs = Knobs(beta=0.7, desirable_weight=1.5, undesirable_weight=0.5)
    result = run_answers("kto", knobs, torch.tensor(ANSWER_LOGPROBS))
    values = [(1.5 if y > 0 else 0.5) * (1 - sigmoid(0.7 * y * (s - 0.5))) for s, y in zip(SCORES, SIGNS, strict=True)]
    assert result.total.item() == pytest.approx(sum(values), rel=1e-6)
    assert float(result.denominator) == 3.0
    metrics = {name: float(m.total) / float(m.count) for name, m in result.metrics.items()}
    assert metrics == pytest.approx(
        {
            "dpo/accuracy": 2 / 3,
            "dpo/anchor": 0.5,
            "dpo/chosen_logprob": (-2.0 - 5.0) / 2,
            "dpo/rejected_logprob": -2.0,
            "dpo/chosen_reward": 0.7 * 0.25,
            "dpo/rejected_reward": 0.7 * -0.5,
        },
        rel=1e-6,
    )


def test_kto_s_anchor_is_not_below_zero_and_has_no_gradient() -> None:
    logprobs_N = torch.tensor(ANSWER_LOGPROBS, requires_grad=True)
    run_answers("kto", Knobs(beta=0.7), logprobs_N).total.backward()
    assert logprobs_N.grad is not None
    slopes = [
        -0.7 * y * sigmoid(0.7 * y * (s - 0.5)) * sigmoid(-0.7 * y * (s - 0.5))
        for s, y in zip(SCORES, SIGNS, strict=True)
    ]
    a, b, c = slopes
    assert logprobs_N.grad.tolist() == pytest.approx([a, a, b, 0.0, c, c, 0.0], rel=1e-5)
    low = torch.tensor(ANSWER_LOGPROBS)
    low[[3, 6]] = -9.0
    result = run_answers("kto", Knobs(beta=0.7), low)
    assert float(result.metrics["dpo/anchor"].total) == 0.0
    values = [1 - sigmoid(0.7 * y * s) for s, y in zip(SCORES, SIGNS, strict=True)]
    assert result.total.item() == pytest.approx(sum(values), rel=1e-6)


def test_bco_by_hand() -> None:
    knobs = Knobs(beta=0.7)
    logprobs_N = torch.tensor(ANSWER_LOGPROBS, requires_grad=True)
    result = run_answers("bco", knobs, logprobs_N)
    delta = 0.7 * 0.5 * ((1.5 - 1.0) / 2 + -0.5)
    values = [softplus(-y * (0.7 * s - delta)) for s, y in zip(SCORES, SIGNS, strict=True)]
    assert result.total.item() == pytest.approx(sum(values), rel=1e-6)
    assert float(result.metrics["dpo/anchor"].total) / 3 == pytest.approx(delta / 0.7, rel=1e-6)
    result.total.backward()
    a, b, c = (-0.7 * y * sigmoid(-y * (0.7 * s - delta)) for s, y in zip(SCORES, SIGNS, strict=True))
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([a, a, b, 0.0, c, c, 0.0], rel=1e-5)


def test_bco_of_a_batch_with_one_label() -> None:
    result = run_answers("bco", Knobs(beta=0.7), torch.tensor([-4.5, -0.5, -0.75]), ANSWERS[1:])
    assert result.total.item() == pytest.approx(softplus(0.0))  # its own mean is the anchor
    assert float(result.metrics["dpo/rejected_logprob"].count) == 0


def test_answers_that_are_none() -> None:
    with pytest.raises(DataError, match="needs mismatched answers in each batch"):
        run_answers("kto", Knobs(), torch.tensor([-1.0, -2.0]), [build_tree([1, -1], [[-1.0], [-1.0]])])
    with pytest.raises(DataError, match="an answer in tree 1 of the batch has no target tokens"):
        run_answers("bco", Knobs(), torch.tensor([-1.0]), [build_tree([1], [[-1.0]]), build_tree([-1], [[]])])
    with pytest.raises(DataError, match="no segment carries the mark 'sign'"):
        run_answers("bco", Knobs(), torch.tensor([-1.0]), [build_completions([1], [[2]])])


# ---- names and knobs -------------------------------------------------------------------------------------------------

OTHER_VALUES: dict[str, Any] = {
    "beta": 0.3,
    "label_smoothing": 0.3,
    "per_token": True,
    "ld_alpha": 0.5,
    "wpo": True,
    "nll_weight": 0.5,
    "gamma": 0.9,
    "discopop_temperature": 0.9,
    "orpo_lambda": 0.9,
    "desirable_weight": 2.0,
    "undesirable_weight": 3.0,
}


def compute_total(loss: str, knobs: Knobs) -> float:
    if loss in ANSWER_LOSSES:
        return float(run_answers(loss, knobs, torch.tensor(ANSWER_LOGPROBS)).total)
    return float(run_pairs(loss, knobs, torch.tensor(LOGPROBS)).total)


def test_the_table_of_knobs_knows_every_loss_and_every_knob() -> None:
    assert set(PREFERENCE_KNOBS) == {*PAIR_LOSSES, *ANSWER_LOSSES}
    assert set(OTHER_VALUES) == {name for knobs in PREFERENCE_KNOBS.values() for name in knobs}
    assert set(OTHER_VALUES) == set(Knobs.__dataclass_fields__)
    assert set(OTHER_VALUES) <= set(DPOSettings.model_fields)


@pytest.mark.parametrize("loss", sorted(PREFERENCE_KNOBS))
def test_each_knob_that_a_loss_reads_moves_it(loss: str) -> None:
    settings = DPOSettings(loss=loss)  # type: ignore[arg-type]
    given = {name: getattr(settings, name) for name in OTHER_VALUES}
    knobs = Knobs(**{name: value for name, value in given.items() if value is not None})
    before = compute_total(loss, knobs)
    moved = {
        name
        for name, v in OTHER_VALUES.items()
        if name in PREFERENCE_KNOBS[loss] and compute_total(loss, replace(knobs, **{name: v})) != before
    }
    assert moved == set(PREFERENCE_KNOBS[loss])


@pytest.mark.parametrize("loss", sorted(PREFERENCE_KNOBS))
def test_a_knob_that_a_loss_does_not_read_is_refused(loss: str) -> None:
    for name in set(OTHER_VALUES) - set(PREFERENCE_KNOBS[loss]):
        with pytest.raises(ValueError, match=rf"{name} is .*, and loss: {loss} does not read it"):
            DPOSettings(**{"loss": loss, name: OTHER_VALUES[name]})


def test_a_knob_that_is_given_goes_over_the_default_of_the_loss() -> None:
    """And null is the same as nothing, so that a resolved recipe can be read back."""
    assert DPOSettings().beta == 0.1
    assert DPOSettings(beta=0.2).beta == 0.2
    assert (DPOSettings(loss="simpo", gamma=0.0).gamma, DPOSettings(loss="simpo", gamma=None).gamma) == (0.0, 1.0)
    for loss, knobs in PREFERENCE_KNOBS.items():
        settings = DPOSettings(loss=loss)  # type: ignore[arg-type]
        assert {name: getattr(settings, name) for name in knobs} == knobs
        assert DPOSettings(**settings.model_dump()) == settings


def test_unknown_names_and_numbers_out_of_range() -> None:
    with pytest.raises(RecipeError, match=r"unknown loss 'dop'; there are sigmoid, .*bco"):
        build_preference("dop", Knobs())
    for name, value in (("gamma", -1.0), ("nll_weight", -0.1), ("ld_alpha", 1.5), ("orpo_lambda", 0.0)):
        with pytest.raises(RecipeError, match=f"dpo: {name} is {value}"):
            Knobs(**{name: value})
    with pytest.raises(RecipeError, match="per_token or ld_alpha, not both"):
        Knobs(per_token=True, ld_alpha=0.5)
    with pytest.raises(RecipeError, match="exo needs label_smoothing above 0"):
        run_pairs("exo", Knobs(), torch.tensor(LOGPROBS))


@pytest.mark.parametrize("loss", sorted(PREFERENCE_KNOBS))
def test_a_batch_may_be_split(loss: str) -> None:
    """Pairs add up exactly; single answers too, where the anchor does not depend on the batch."""
    knobs = replace(PLAIN, label_smoothing=0.1)
    if loss in ANSWER_LOSSES:
        low = torch.tensor(ANSWER_LOGPROBS)
        low[[3, 6]] = -9.0  # KTO's anchor is 0 in each part
        whole = run_answers(loss, knobs, low)
        parts = [run_answers(loss, knobs, low[:4], ANSWERS[:1]), run_answers(loss, knobs, low[4:], ANSWERS[1:])]
    else:
        whole = run_pairs(loss, knobs, torch.tensor(LOGPROBS))
        objective = build_preference(loss, knobs)
        halves: list[tuple[list[float], TokenBatch]] = [
            (LOGPROBS[:3], collate(PAIRS[:1])),
            (LOGPROBS[3:], collate(PAIRS[1:])),
        ]
        parts = [objective.compute(Scores(torch.tensor(values)), batch) for values, batch in halves]
    if loss != "bco":
        assert whole.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-6)
    assert float(whole.denominator) == sum(float(part.denominator) for part in parts)
