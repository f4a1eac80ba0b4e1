"""Reward models from comparisons: pure losses over the scores of chosen and rejected answers.

Shape suffixes: T tokens of the stream, L labels, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polm.errors import DataError
from polm.objectives.preference import find_pairs
from polm.tokens import Loss, Metric, Needs, Objective, Scores, TokenBatch


def compute_bradley_terry(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(c - r - margin), [P]: Ouyang et al. 2022 (arXiv 2203.02155, equation 1), with the margin of
    Llama 2 (Touvron et al. 2023, arXiv 2307.09288, equation 2)."""
    return -logsigmoid(chosen_P - rejected_P - margin_P)


def compute_centring(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """(c + r)^2, [P]: keeps rewards around 0, which comparisons leave open (Eisenstein et al. 2023,
    arXiv 2312.09244)."""
    return (chosen_P + rejected_P) ** 2


def build_reward_model(center_coefficient: float = 0.0) -> Objective:
    """The mean over pairs of the Bradley-Terry loss plus `center_coefficient` times the centring term.

    Reads the marks `sign` (+1 chosen, -1 rejected) and, where there is one, `margin` of the chosen child; scores are
    the values at the last tokens of the answers. Raises DataError for trees that are no pairs and for a model with
    more than one label. Metrics: `reward/accuracy` (share of pairs ranked as people did, a tie is a half),
    `reward/margin` (c - r), `reward/chosen`, `reward/rejected`.
    """

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        chosen_S, rejected_S = find_pairs(batch, "reward_model")
        if scores.values_TL is None or scores.values_TL.shape[1] != 1:
            found = None if scores.values_TL is None else scores.values_TL.shape[1]
            raise DataError(f"reward_model: expected a model with one value at each token, found {found}")
        rewards_S = scores.values_TL[:, 0][batch.ends_S.clamp(min=0)]
        chosen_P, rejected_P = rewards_S[chosen_S], rewards_S[rejected_S]
        margins_S = batch.marks.get("margin")
        margin_P = torch.zeros_like(chosen_P) if margins_S is None else margins_S[chosen_S].nan_to_num(0.0)
        loss_P = compute_bradley_terry(chosen_P, rejected_P, margin_P)
        if center_coefficient:
            loss_P = loss_P + center_coefficient * compute_centring(chosen_P, rejected_P)
        count = len(loss_P)
        gap_P = (chosen_P - rejected_P).detach()
        metrics = {
            "reward/accuracy": Metric((gap_P > 0).float().sum() + 0.5 * (gap_P == 0).float().sum(), count),
            "reward/margin": Metric(gap_P.sum(), count),
            "reward/chosen": Metric(chosen_P.detach().sum(), count),
            "reward/rejected": Metric(rejected_P.detach().sum(), count),
        }
        return Loss(loss_P.sum(), loss_P.new_full((), float(count)), metrics)

    return Objective(name="reward_model", compute=compute, needs=Needs(values=True))
