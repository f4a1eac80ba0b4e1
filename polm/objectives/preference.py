"""Direct preference optimisation: a tree is a pair, a prompt with a chosen and a rejected child.

Shape suffixes: N target tokens, S segments, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polm.errors import DataError, RecipeError
from polm.signals.token_weights import compute_segment_sum
from polm.tokens import Loss, Metric, Objective, Scores, TokenBatch


def build_dpo(*, beta: float, label_smoothing: float) -> Objective:
    """DPO (arXiv 2305.18290, equation 7), with label smoothing as conservative DPO has it; the mean over pairs.

    margin = (log p - log p_ref of the chosen) - (the same of the rejected), each summed over the segment's targets
    (times the data's weights);
    loss = -(1 - label_smoothing) log sigmoid(beta margin) - label_smoothing log sigmoid(-beta margin).

    beta              strength of the pull towards the reference, above 0
    label_smoothing   share of pairs that is held to be labelled the wrong way round, in [0, 0.5)

    Reads the stream `ref_logprobs` and the mark `sign` (+1 chosen, -1 rejected). Raises RecipeError for a number out
    of range, and DataError for a tree that is not one pair. Metrics: `dpo/accuracy` (share of pairs of positive
    margin), `dpo/margin` (beta * margin), `dpo/chosen_logprob`, `dpo/rejected_logprob` (sums over the completion),
    `dpo/chosen_reward`, `dpo/rejected_reward` (beta * (log p - log p_ref)).
    """
    if not beta > 0.0:
        raise RecipeError(f"dpo: beta is {beta}; it must be above 0, for example 0.1")
    if not 0.0 <= label_smoothing < 0.5:
        raise RecipeError(f"dpo: label_smoothing is {label_smoothing}; it must lie in [0, 0.5)")

    def compute(scores: Scores, batch: TokenBatch) -> Loss:
        chosen_P, rejected_P = find_pairs(batch)
        weights_N = batch.at_targets("weights")
        segments_N = batch.target_segments_N
        logprobs_S = compute_segment_sum(weights_N * scores.logprobs_N.float(), segments_N, batch.num_segments)
        reference_N = batch.at_targets("ref_logprobs").float()
        rewards_S = beta * (logprobs_S - compute_segment_sum(weights_N * reference_N, segments_N, batch.num_segments))
        margin_P = rewards_S[chosen_P] - rewards_S[rejected_P]
        loss_P = -(1.0 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)
        count = len(margin_P)
        with torch.no_grad():
            metrics = {
                "dpo/accuracy": Metric((margin_P > 0).float().sum(), count),
                "dpo/margin": Metric(margin_P.detach().sum(), count),
                "dpo/chosen_logprob": Metric(logprobs_S[chosen_P].sum(), count),
                "dpo/rejected_logprob": Metric(logprobs_S[rejected_P].sum(), count),
                "dpo/chosen_reward": Metric(rewards_S[chosen_P].sum(), count),
                "dpo/rejected_reward": Metric(rewards_S[rejected_P].sum(), count),
            }
        return Loss(loss_P.sum(), loss_P.new_tensor(float(count)), metrics)

    return Objective(name="dpo", compute=compute, reads=("weights", "ref_logprobs"))


def find_pairs(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Segment indices of the chosen and of the rejected completion of each tree, [P] and [P] int64.

    Raises DataError where a tree has not exactly one of each, or one without target tokens.
    """
    if "sign" not in batch.marks:
        raise DataError("dpo: no segment carries the mark 'sign'; mark each pair's chosen child +1, its rejected -1")
    _, tree_S = torch.unique_consecutive(batch.trees_S, return_inverse=True)
    num_trees = int(tree_S[-1]) + 1
    num_targets_S = torch.bincount(batch.target_segments_N, minlength=batch.num_segments)
    sides = []
    for sign, name in ((1.0, "chosen"), (-1.0, "rejected")):
        side = torch.nonzero(batch.marks["sign"] == sign)[:, 0]
        found = torch.bincount(tree_S[side], minlength=num_trees)
        if bool((found != 1).any()):
            tree = int(torch.nonzero(found != 1)[0])
            raise DataError(
                f"dpo: tree {tree} of the batch has {int(found[tree])} {name} completions (mark sign = {sign:+.0f}), "
                "expected exactly one; a tree is one prompt with one chosen and one rejected child"
            )
        if bool((num_targets_S[side] == 0).any()):
            tree = int(tree_S[side[num_targets_S[side] == 0][0]])
            raise DataError(
                f"dpo: the {name} completion of tree {tree} of the batch has no target tokens (weight other than 0); "
                "drop the pair or cut its prompt"
            )
        sides.append(side)
    return sides[0], sides[1]
