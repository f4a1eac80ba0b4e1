"""Preference optimisation: pure losses over the scores of judged answers. A tree is a prompt with its answers.

The score of an answer is log p - log p_ref, or log p alone where a loss reads no reference; each is the sum over the
answer's targets (times the data's weights), or their mean. docs/methods.md has the formulas and papers in a table.

Shape suffixes: N target tokens, S segments, P pairs, A judged answers, M mismatched answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polm.errors import DataError, RecipeError
from polm.signals.token_weights import compute_segment_mean, compute_segment_sum
from polm.tokens import Loss, Metric, Needs, Objective, Scores, TokenBatch


@dataclass(frozen=True)
class Knobs:
    """What losses read beside the scores; `polm.recipe.PREFERENCE_KNOBS` says which loss reads which.

    beta                  scale of the scores; with a reference, strength of the pull towards it; above 0
    label_smoothing       share of pairs that is held to be labelled the wrong way round, in [0, 0.5)
    per_token             scores are means over the answer's targets
    ld_alpha              weight of the targets past the length of the shorter answer, in [0, 1]; None = 1
    wpo                   weight each pair by the policy's own probability of it
    nll_weight            weight of the chosen answer's negative log-likelihood
    gamma                 simpo: the margin that beta times the difference must exceed
    discopop_temperature  discopop: temperature of the blend
    orpo_lambda           orpo: weight of the odds ratio
    desirable_weight, undesirable_weight   kto: weights of answers labelled true and false

    Raises RecipeError for a number out of range.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    per_token: bool = False
    ld_alpha: float | None = None
    wpo: bool = False
    nll_weight: float = 0.0
    gamma: float = 1.0
    discopop_temperature: float = 0.05
    orpo_lambda: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta", "discopop_temperature", "orpo_lambda", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0.0:
                raise RecipeError(f"dpo: {name} is {getattr(self, name)}; it must be above 0, for example 0.1")
        for name in ("nll_weight", "gamma"):
            if not getattr(self, name) >= 0.0:
                raise RecipeError(f"dpo: {name} is {getattr(self, name)}; it must not be negative")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise RecipeError(f"dpo: label_smoothing is {self.label_smoothing}; it must lie in [0, 0.5)")
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise RecipeError(f"dpo: ld_alpha is {self.ld_alpha}; it must lie in [0, 1]")
        if self.per_token and self.ld_alpha is not None:
            raise RecipeError("dpo: give per_token or ld_alpha, not both")


# ---- losses of pairs: (scores of the chosen [P], scores of the rejected [P], knobs) -> loss [P] ----------------------


def compute_sigmoid(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7), smoothed as conservative DPO has it; with per_token length-normalised DPO,
    with ld_alpha LD-DPO. On scores without a reference: CPO's preference term (arXiv 2401.08417, equation 3).

    -(1 - s) log sigmoid(beta (c - r)) - s log sigmoid(-beta (c - r)), s = label_smoothing
    """
    margin_P = knobs.beta * chosen_P - knobs.beta * rejected_P
    return -(1.0 - knobs.label_smoothing) * logsigmoid(margin_P) - knobs.label_smoothing * logsigmoid(-margin_P)


def compute_robust(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """Robust DPO (arXiv 2403.00409): an unbiased estimate of DPO's loss where a share s of the labels is flipped.

    (-(1 - s) log sigmoid(m) + s log sigmoid(-m)) / (1 - 2 s), m = beta (c - r)
    """
    margin_P = knobs.beta * (chosen_P - rejected_P)
    flipped = knobs.label_smoothing
    return (flipped * logsigmoid(-margin_P) - (1.0 - flipped) * logsigmoid(margin_P)) / (1.0 - 2.0 * flipped)


def compute_ipo(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17): (c - r - 1 / (2 beta))^2; beta is the paper's tau.

    The paper's c and r are sums. TRL takes means over tokens (it says that the authors did): `per_token` is that.
    """
    return (chosen_P - rejected_P - 1.0 / (2.0 * knobs.beta)) ** 2


def compute_hinge(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """max(0, 1 - beta (c - r)): with a reference RSO's hinge-norm (arXiv 2309.06657), without one SLiC's calibration
    loss (arXiv 2305.10425; its delta is 1 / beta, and its loss is ours times delta)."""
    return torch.relu(1.0 - knobs.beta * (chosen_P - rejected_P))


def compute_exo(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """EXO for pairs (arXiv 2402.00856, equation 16): KL(q || (1 - s, s)) with q = softmax(beta c, beta r).

    s = label_smoothing must be above 0, or the divergence is infinite.
    """
    if not knobs.label_smoothing > 0.0:
        raise RecipeError("dpo: loss exo needs label_smoothing above 0, for example 0.001")
    smoothing = torch.tensor(knobs.label_smoothing, device=chosen_P.device, dtype=chosen_P.dtype)
    margin_P = knobs.beta * (chosen_P - rejected_P)
    chosen_part = torch.sigmoid(margin_P) * (logsigmoid(margin_P) - torch.log1p(-smoothing))
    return chosen_part + torch.sigmoid(-margin_P) * (logsigmoid(-margin_P) - torch.log(smoothing))


def compute_nca(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """NCA for pairs (arXiv 2402.05369): -log sigmoid(C) - 1/2 log sigmoid(-C) - 1/2 log sigmoid(-R), C = beta c."""
    chosen_P, rejected_P = knobs.beta * chosen_P, knobs.beta * rejected_P
    return -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)


def compute_apo_zero(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """APO-zero (arXiv 2408.06266, equation 7): sigmoid(beta r) - sigmoid(beta c); TRL's loss is this plus 1."""
    return torch.sigmoid(knobs.beta * rejected_P) - torch.sigmoid(knobs.beta * chosen_P)


def compute_apo_down(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """APO-down (arXiv 2408.06266, equation 8): sigmoid(beta c) - sigmoid(beta (c - r)); TRL's loss is this plus 1."""
    return torch.sigmoid(knobs.beta * chosen_P) - torch.sigmoid(knobs.beta * (chosen_P - rejected_P))


def compute_sppo(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """SPPO (arXiv 2405.00675, equation 4.7) with the win rates 1 and 0 of a hard label; beta is 1 / eta.

    (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2
    """
    half = 0.5 / knobs.beta
    return (chosen_P - half) ** 2 + (rejected_P + half) ** 2


def compute_discopop(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, equation 5): a blend of the logistic and the exponential loss of m = beta (c - r).

    -(1 - w) log sigmoid(m) + w exp(-m), w = sigmoid(m / discopop_temperature). Its slope at m = 0, where training
    starts, is (1 - ln 2) / (4 discopop_temperature) - 3/4: positive for temperatures below 0.102, as for the paper's
    0.05, so that margins first fall.
    """
    margin_P = knobs.beta * (chosen_P - rejected_P)
    blend_P = torch.sigmoid(margin_P / knobs.discopop_temperature)
    return -(1.0 - blend_P) * logsigmoid(margin_P) + blend_P * torch.exp(-margin_P)


def compute_simpo(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6) on means without a reference: the sigmoid loss of beta (c - r) - gamma."""
    margin_P = knobs.beta * (chosen_P - rejected_P) - knobs.gamma
    return -(1.0 - knobs.label_smoothing) * logsigmoid(margin_P) - knobs.label_smoothing * logsigmoid(-margin_P)


def compute_orpo(chosen_P: Tensor, rejected_P: Tensor, knobs: Knobs) -> Tensor:
    """ORPO (arXiv 2403.07691, equations 6 and 7) on means without a reference: -c - lambda log sigmoid(log odds ratio).

    odds = P / (1 - P) with log P = the mean. The likelihood is over the answer, as in the paper; TRL's also covers
    the prompt.
    """
    log_odds_P = (chosen_P - compute_log_complement(chosen_P)) - (rejected_P - compute_log_complement(rejected_P))
    return -chosen_P - knobs.orpo_lambda * logsigmoid(log_odds_P)


def compute_log_complement(logprobs: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact at both ends. At x = 0 (in float32 a certain answer) x is taken as -1e-7."""
    x = logprobs.clamp(max=-1e-7)
    small = x > -0.6931472  # each branch must be finite where the other is taken, or its gradient is NaN
    near = torch.log(-torch.expm1(torch.where(small, x, -1.0)))
    return torch.where(small, near, torch.log1p(-torch.exp(torch.where(small, -1.0, x))))


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs. `reference`: scores are against the reference. `per_token`: scores are always means. `nll_sum`:
    the likelihood that nll_weight adds is a sum over the answer, else a mean (arXiv 2404.19733, equation 1)."""

    compute: Callable[[Tensor, Tensor, Knobs], Tensor]
    reference: bool = True
    per_token: bool = False
    nll_sum: bool = False


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": PairLoss(compute_sigmoid),
    "robust": PairLoss(compute_robust),
    "ipo": PairLoss(compute_ipo),
    "hinge": PairLoss(compute_hinge),
    "exo": PairLoss(compute_exo),
    "nca": PairLoss(compute_nca),
    "apo_zero": PairLoss(compute_apo_zero),
    "apo_down": PairLoss(compute_apo_down),
    "sppo": PairLoss(compute_sppo),
    "discopop": PairLoss(compute_discopop),
    "slic": PairLoss(compute_hinge, reference=False, nll_sum=True),
    "cpo": PairLoss(compute_sigmoid, reference=False, nll_sum=True),
    "simpo": PairLoss(compute_simpo, reference=False, per_token=True),
    "orpo": PairLoss(compute_orpo, reference=False, per_token=True),
}


# ---- losses of single answers: what a score is held against, and (scores less that [A], signs [A], knobs) -> loss [A]


def compute_kto(score_A: Tensor, sign_A: Tensor, knobs: Knobs) -> Tensor:
    """KTO (arXiv 2402.01306): lambda_y (1 - sigmoid(+-beta (log ratio - z0))), + for a desirable answer."""
    weight_A = torch.where(sign_A > 0, knobs.desirable_weight, knobs.undesirable_weight)
    return weight_A * (1.0 - torch.sigmoid(knobs.beta * sign_A * score_A))


def compute_kl_anchor(score_A: Tensor, sign_A: Tensor, score_M: Tensor) -> Tensor:
    """KTO's z0: the mean log ratio of answers to other prompts, at least 0: an estimate of KL(p || p_ref), in nats."""
    del score_A, sign_A
    if len(score_M) == 0:
        raise DataError("dpo: loss kto needs mismatched answers in each batch (mark 'mismatched'), found none")
    return score_M.mean().clamp(min=0.0)


def compute_bco(score_A: Tensor, sign_A: Tensor, knobs: Knobs) -> Tensor:
    """BCO (arXiv 2404.04656): -log sigmoid(+-(beta log ratio - delta)), + for a desirable answer."""
    return -logsigmoid(knobs.beta * sign_A * score_A)


def compute_mean_anchor(score_A: Tensor, sign_A: Tensor, score_M: Tensor) -> Tensor:
    """BCO's shift delta / beta: half the mean score of desirable plus half that of undesirable answers of the batch.

    A running mean over batches would be state beside the weights, and a killed run could not repeat it. A batch with
    one label only has the mean of that one.
    """
    del score_M
    sides = [score_A[sign_A == sign] for sign in (1.0, -1.0)]
    return torch.stack([side.mean() for side in sides if len(side)]).mean()


@dataclass(frozen=True)
class AnswerLoss:
    """A loss of single answers. `anchor` is computed without a gradient over the micro-batch, so that its size matters
    a little. `mismatched`: the anchor reads answers to other prompts, which the trees must hold."""

    compute: Callable[[Tensor, Tensor, Knobs], Tensor]
    anchor: Callable[[Tensor, Tensor, Tensor], Tensor]
    mismatched: bool = False


ANSWER_LOSSES: Mapping[str, AnswerLoss] = {
    "kto": AnswerLoss(compute_kto, compute_kl_anchor, mismatched=True),
    "bco": AnswerLoss(compute_bco, compute_mean_anchor),
}


# ---- from a batch to the loss ----------------------------------------------------------------------------------------


def build_preference(loss: str, knobs: Knobs) -> Objective:
    """The objective of a loss by its name; a mean over pairs, or over judged answers.

    Reads the mark `sign` (+1 chosen or desirable, -1 rejected or undesirable), for kto `mismatched`, and the stream
    `ref_logprobs` where the loss has a reference. Raises RecipeError for an unknown loss, and DataError for trees that
    are not what the loss needs. Metrics: `dpo/accuracy` (share of pairs of positive margin, or of answers on the right
    side of the anchor), `dpo/margin` (beta times the difference of the scores; pairs), `dpo/anchor` (kto, bco; nats),
    `dpo/chosen_logprob`, `dpo/rejected_logprob` (sums over the answer), `dpo/chosen_reward`, `dpo/rejected_reward`
    (beta times the score), `dpo/nll` (nats per token of the chosen, where the loss has it), `dpo/pair_weight` (wpo).
    """
    if loss in PAIR_LOSSES:
        return _build_pairs(PAIR_LOSSES[loss], knobs)
    if loss in ANSWER_LOSSES:
        return _build_answers(ANSWER_LOSSES[loss], knobs)
    raise RecipeError(f"dpo: unknown loss {loss!r}; there are {', '.join((*PAIR_LOSSES, *ANSWER_LOSSES))}")


def _build_pairs(spec: PairLoss, knobs: Knobs) -> Objective:
    scale = knobs.orpo_lambda if spec.compute is compute_orpo else knobs.beta

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        chosen_P, rejected_P = find_pairs(batch)
        weights_N = batch.at_targets("weights")
        segments_N, num_segments = batch.target_segments_N, batch.num_segments
        logprobs_N = scores.logprobs_N.float()
        logprobs_S = compute_segment_sum(weights_N * logprobs_N, segments_N, num_segments)
        sizes_S = compute_segment_sum(weights_N, segments_N, num_segments)
        score_S = logprobs_S
        if knobs.ld_alpha is not None:
            weights_N = weights_N * compute_tail_weights(batch, chosen_P, rejected_P, knobs.ld_alpha)
            score_S = compute_segment_sum(weights_N * logprobs_N, segments_N, num_segments)
        if spec.reference:
            reference_N = batch.at_targets("ref_logprobs").float()
            score_S = score_S - compute_segment_sum(weights_N * reference_N, segments_N, num_segments)
        better_P, worse_P = score_S[chosen_P], score_S[rejected_P]
        if knobs.per_token or spec.per_token:
            better_P, worse_P = better_P / sizes_S[chosen_P], worse_P / sizes_S[rejected_P]
        loss_P = spec.compute(better_P, worse_P, knobs)
        rewards = scale * better_P.detach(), scale * worse_P.detach()
        count = len(loss_P)
        metrics = {
            "dpo/accuracy": Metric((rewards[0] - rewards[1] > 0).float().sum(), count),
            "dpo/margin": Metric((rewards[0] - rewards[1]).sum(), count),
            **_side_metrics(logprobs_S[chosen_P], logprobs_S[rejected_P], *rewards),
        }
        if knobs.wpo:
            weight_P = compute_pair_weights(scores, batch, chosen_P, rejected_P)
            loss_P = loss_P * weight_P
            metrics["dpo/pair_weight"] = Metric(weight_P.sum(), count)
        mean_P = logprobs_S[chosen_P] / sizes_S[chosen_P]
        if knobs.nll_weight:
            loss_P = loss_P - knobs.nll_weight * (logprobs_S[chosen_P] if spec.nll_sum else mean_P)
        if knobs.nll_weight or spec.compute is compute_orpo:
            metrics["dpo/nll"] = Metric(-mean_P.detach().sum(), count)
        return Loss(loss_P.sum(), loss_P.new_full((), float(count)), metrics)

    reads = ("weights", "ref_logprobs") if spec.reference else ("weights",)
    return Objective(name="dpo", compute=compute, needs=Needs(collisions=knobs.wpo), reads=reads)


def _build_answers(spec: AnswerLoss, knobs: Knobs) -> Objective:
    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        answers_A, mismatched_M = find_answers(batch)
        sign_A = batch.marks["sign"][answers_A]
        weights_N = batch.at_targets("weights")
        segments_N, num_segments = batch.target_segments_N, batch.num_segments
        logprobs_S = compute_segment_sum(weights_N * scores.logprobs_N.float(), segments_N, num_segments)
        reference_N = batch.at_targets("ref_logprobs").float()
        score_S = logprobs_S - compute_segment_sum(weights_N * reference_N, segments_N, num_segments)
        score_A = score_S[answers_A]
        anchor = spec.anchor(score_A.detach(), sign_A, score_S[mismatched_M].detach())
        loss_A = spec.compute(score_A - anchor, sign_A, knobs)
        count = len(loss_A)
        good, bad = sign_A > 0, sign_A < 0
        logprobs_A, rewards_A = logprobs_S[answers_A], knobs.beta * score_A.detach()
        metrics = {
            "dpo/accuracy": Metric((sign_A * (score_A.detach() - anchor) > 0).float().sum(), count),
            "dpo/anchor": Metric(anchor * count, count),
            **_side_metrics(logprobs_A[good], logprobs_A[bad], rewards_A[good], rewards_A[bad]),
        }
        return Loss(loss_A.sum(), loss_A.new_full((), float(count)), metrics)

    return Objective(name="dpo", compute=compute, reads=("weights", "ref_logprobs"))


def _side_metrics(
    chosen: Tensor, rejected: Tensor, chosen_reward: Tensor, rejected_reward: Tensor
) -> dict[str, Metric]:
    """Means over each side of the log-probabilities of whole answers, and of their rewards."""
    sides = {
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
    }
    return {f"dpo/{name}": Metric(values.detach().sum(), len(values)) for name, values in sides.items()}


def compute_tail_weights(batch: TokenBatch, chosen_P: Tensor, rejected_P: Tensor, alpha: float) -> Tensor:
    """LD-DPO's weight of each target (arXiv 2409.06411), [N]: 1 up to the length of the pair's shorter
    answer, in targets, and `alpha` past it."""
    counts_S = torch.bincount(batch.target_segments_N, minlength=batch.num_segments)
    _, tree_S = torch.unique_consecutive(batch.trees_S, return_inverse=True)
    shared_S = torch.minimum(counts_S[chosen_P], counts_S[rejected_P])[tree_S]
    firsts_S = counts_S.cumsum(0) - counts_S
    rank_N = torch.arange(batch.num_targets, device=counts_S.device) - firsts_S[batch.target_segments_N]
    return torch.where(rank_N < shared_S[batch.target_segments_N], 1.0, alpha)


@torch.no_grad()
def compute_pair_weights(scores: Scores, batch: TokenBatch, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """WPO's weight of each pair (arXiv 2406.11827, equation 2, sampled alignment), [P], without a gradient.

    The product over both answers of exp(mean over targets of log p(token) - log sum of p^2). An answer whose tokens
    are as likely as the policy's own samples has the factor 1.
    """
    if scores.collisions_N is None:
        raise DataError("dpo: wpo needs the engine's collisions_N, and the scores have none")
    aligned_N = scores.logprobs_N.float() - scores.collisions_N
    mean_S = compute_segment_mean(aligned_N, batch.target_segments_N, batch.num_segments)
    return torch.exp(mean_S[chosen_P] + mean_S[rejected_P])


def find_pairs(batch: TokenBatch, name: str = "dpo") -> tuple[Tensor, Tensor]:
    """Segment indices of the chosen and of the rejected completion of each tree, [P] and [P] int64.

    `name` is the stage that errors name. Raises DataError where a tree has not exactly one of each, or one without
    target tokens.
    """
    if "sign" not in batch.marks:
        raise DataError(
            f"{name}: no segment carries the mark 'sign'; mark each pair's chosen child +1, its rejected -1"
        )
    _, tree_S = torch.unique_consecutive(batch.trees_S, return_inverse=True)
    num_trees = int(tree_S[-1]) + 1
    num_targets_S = torch.bincount(batch.target_segments_N, minlength=batch.num_segments)
    sides = []
    for sign, answer in ((1.0, "chosen"), (-1.0, "rejected")):
        side = torch.nonzero(batch.marks["sign"] == sign)[:, 0]
        found = torch.bincount(tree_S[side], minlength=num_trees)
        if bool((found != 1).any()):
            tree = int(torch.nonzero(found != 1)[0])
            raise DataError(
                f"{name}: tree {tree} of the batch has {int(found[tree])} {answer} completions (mark sign = {sign:+.0f}"
                "), expected exactly one; a tree is one prompt with one chosen and one rejected child"
            )
        if bool((num_targets_S[side] == 0).any()):
            tree = int(tree_S[side[num_targets_S[side] == 0][0]])
            raise DataError(
                f"{name}: the {answer} completion of tree {tree} of the batch has no target tokens (weight other than "
                "0); drop the pair or cut its prompt"
            )
        sides.append(side)
    return sides[0], sides[1]


def find_answers(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Segment indices of the judged (mark `sign`) and of the mismatched answers (mark `mismatched`), [A], [M] int64.

    Raises DataError where there is no judged answer, or one has no target tokens.
    """
    nothing = batch.starts_S.new_zeros(0)
    if "sign" not in batch.marks:
        raise DataError("dpo: no segment carries the mark 'sign'; mark desirable answers +1 and undesirable ones -1")
    answers_A = torch.nonzero(batch.marks["sign"].abs() == 1.0)[:, 0]
    num_targets_S = torch.bincount(batch.target_segments_N, minlength=batch.num_segments)
    if bool((num_targets_S[answers_A] == 0).any()):
        tree = int(batch.trees_S[answers_A[num_targets_S[answers_A] == 0][0]])
        raise DataError(
            f"dpo: an answer in tree {tree} of the batch has no target tokens (weight other than 0); drop it"
        )
    marked = batch.marks.get("mismatched")
    return answers_A, nothing if marked is None else torch.nonzero(marked == 1.0)[:, 0]
