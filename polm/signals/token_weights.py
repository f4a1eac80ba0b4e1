"""Weights of target tokens from a frozen reference: ReMiT, Rho-1, and the shuffled control.

All functions take detached numbers and return detached numbers: no gradient flows through a weight.

Shape suffixes: N target tokens, S segments (a segment is a sequence: one document, one completion).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from polm.errors import RecipeError

Centring = Literal["sequence", "batch", "none"]
Scope = Literal["batch", "sequence"]


def compute_segment_sum(values_N: Tensor, segments_N: Tensor, num_segments: int) -> Tensor:
    """Sum of `values_N` over each segment, [S]; 0 for a segment without targets. Differentiable in the values."""
    return values_N.new_zeros(num_segments).index_add(0, segments_N, values_N)


def compute_segment_mean(values_N: Tensor, segments_N: Tensor, num_segments: int) -> Tensor:
    """Mean of `values_N` over each segment, [S]; 0 for a segment without targets."""
    counts_S = compute_segment_sum(torch.ones_like(values_N), segments_N, num_segments)
    return compute_segment_sum(values_N, segments_N, num_segments) / counts_S.clamp(min=1.0)


def compute_centred(delta_N: Tensor, segments_N: Tensor, num_segments: int, centring: Centring) -> Tensor:
    """`delta_N` less its mean over the sequence, over the batch, or as it is, [N]. Every target counts once."""
    if centring == "sequence":
        return delta_N - compute_segment_mean(delta_N, segments_N, num_segments)[segments_N]
    if centring == "batch":
        return delta_N - delta_N.sum() / max(1, len(delta_N))
    if centring == "none":
        return delta_N
    raise RecipeError(f"centring is {centring!r}; it must be 'sequence', 'batch' or 'none'")


def compute_remit_weights(
    delta_N: Tensor,
    segments_N: Tensor,
    num_segments: int,
    *,
    eps: float,
    temperature: float,
    centring: Centring,
) -> tuple[Tensor, Tensor]:
    """ReMiT's weights (arXiv 2602.03075): w = clip(2 sigmoid(centred delta / temperature), 1 - eps, 1 + eps).

    delta_N      float32, log p_reference - log p_base of each target, in nats
    segments_N   int64, segment of each target

    Returns (weights [N] float32, clipped [N] bool: the weight was outside the bounds).
    """
    centred_N = compute_centred(delta_N.detach(), segments_N, num_segments, centring)
    raw_N = 2.0 * torch.sigmoid(centred_N / temperature)
    clipped_N = (raw_N < 1.0 - eps) | (raw_N > 1.0 + eps)
    return raw_N.clamp(1.0 - eps, 1.0 + eps), clipped_N


def compute_rho1_selection(
    excess_N: Tensor, segments_N: Tensor, num_segments: int, *, keep: float, scope: Scope
) -> Tensor:
    """Rho-1's selection (arXiv 2404.07965): the ceil(keep * n) targets of largest excess loss, [N] bool.

    `n` counts the targets of the batch or of each segment, by `scope`. Equal excess: the earlier token is kept.
    """
    if scope not in ("batch", "sequence"):
        raise RecipeError(f"scope is {scope!r}; it must be 'batch' or 'sequence'")
    order_N = torch.argsort(excess_N.detach(), descending=True, stable=True)
    if scope == "batch":
        chosen = order_N[: compute_num_kept(len(excess_N), keep)]
    else:
        # Stable twice: by segment, within a segment by excess, within equal excess by place in the stream.
        order_N = order_N[torch.argsort(segments_N[order_N], stable=True)]
        counts_S = torch.bincount(segments_N, minlength=num_segments)
        kept = [compute_num_kept(count, keep) for count in counts_S.tolist()]
        kept_S = torch.tensor(kept, dtype=torch.int64, device=excess_N.device)
        firsts_S = counts_S.cumsum(0) - counts_S
        sorted_segments_N = segments_N[order_N]
        rank_N = torch.arange(len(excess_N), device=excess_N.device) - firsts_S[sorted_segments_N]
        chosen = order_N[rank_N < kept_S[sorted_segments_N]]
    selected_N = torch.zeros_like(excess_N, dtype=torch.bool)
    selected_N[chosen] = True
    return selected_N


def compute_plausible_weights(logprobs_N: Tensor, best_N: Tensor, *, gamma: float, floor: float) -> Tensor:
    """How plausible the reference finds a token beside its own best guess, [N] float32 in [0, 1].

    ratio = p_reference(token) / max over tokens of p_reference;  w = ratio^gamma, and 0 where ratio < floor

    logprobs_N   the reference's log-probability of each target
    best_N       the reference's largest log-probability at that place

    Where the reference is unsure every likely token has a ratio near 1, so nothing is damped there; where it is sure
    of another token the target counts as noise. The threshold alone (gamma 0) is the plausibility constraint of
    contrastive decoding (Li et al. 2022, arXiv 2210.15097, section 3.3) put to another use.
    """
    ratio_N = (logprobs_N.detach().float() - best_N.detach().float()).clamp(max=0.0)
    kept_N = ratio_N >= (math.log(floor) if floor > 0 else -math.inf)
    return (gamma * ratio_N).exp() * kept_N


def compute_num_kept(count: int, keep: float) -> int:
    """ceil(keep * count), not thrown off by the last bit of the product (0.07 * 100 is 7, not 8)."""
    return min(count, math.ceil(keep * count - 1e-9))


def compute_shuffled(weights_N: Tensor, seed: int) -> Tensor:
    """The same weights in another order, drawn from `seed` alone and so the same on every device, [N]."""
    generator = torch.Generator().manual_seed(seed)
    return weights_N[torch.randperm(len(weights_N), generator=generator).to(weights_N.device)]
