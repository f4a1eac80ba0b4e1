"""Process reward models from labelled steps: a pure loss over the scores of steps.

Shape suffixes: T tokens of the stream, L labels (wrong, right), N steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polm.errors import DataError
from polm.tokens import Loss, Metric, Needs, Objective, Scores, TokenBatch

WRONG, RIGHT = 0, 1  # columns of the values


def compute_step_loss(values_NL: Tensor, labels_N: Tensor) -> Tensor:
    """-(y log p + (1 - y) log(1 - p)), [N] in nats, with p the softmax's share of "right" and y the label in [0, 1].

    With labels 0 and 1 the cross-entropy of token classification, as Lightman et al. 2023 (arXiv 2305.20050) have it;
    a label in between is a share of right continuations, the soft estimate of Wang et al. 2023 (arXiv 2312.08935).
    """
    logprobs_NL = torch.log_softmax(values_NL.float(), dim=-1)
    return -(labels_N * logprobs_NL[:, RIGHT] + (1.0 - labels_N) * logprobs_NL[:, WRONG])


def build_process_reward_model() -> Objective:
    """The mean over steps of the cross-entropy at their last tokens, which are the targets of the batch.

    Reads the stream `labels`. Raises DataError for a model that has not two labels. Metrics: `steps/accuracy`,
    `steps/right` (mean probability that a step is right), `steps/label` (mean label).
    """

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        if scores.values_TL is None or scores.values_TL.shape[1] != 2:
            found = None if scores.values_TL is None else scores.values_TL.shape[1]
            raise DataError(f"process_reward_model: expected a model with two values at each token, found {found}")
        values_NL = scores.values_TL[batch.targets_N]
        labels_N = batch.at_targets("labels").float()
        loss_N = compute_step_loss(values_NL, labels_N)
        count = len(loss_N)
        right_N = torch.softmax(values_NL.detach().float(), dim=-1)[:, RIGHT]
        metrics = {
            "steps/accuracy": Metric(((right_N > 0.5) == (labels_N > 0.5)).float().sum(), count),
            "steps/right": Metric(right_N.sum(), count),
            "steps/label": Metric(labels_N.sum(), count),
        }
        return Loss(loss_N.sum(), loss_N.new_full((), float(count)), metrics)

    return Objective(
        name="process_reward_model", compute=compute, needs=Needs(values=True), reads=("weights", "labels")
    )
