"""Choosing the next token: pure functions over logits, and random numbers that belong to a request and a step.

Shape suffixes: R rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from polm.tokens import Array

# Candidates that the first try at a nucleus sorts: most distributions of a trained model need no more.
NUCLEUS_WIDTH = 32
# Constants of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17).
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


def compute_tempered_logprobs(logits_RV: Tensor, temperature: float) -> Tensor:
    """Float32 log-probabilities [R, V] of logits / temperature; a temperature of 0 (greedy) counts as 1."""
    logits_RV = logits_RV.float()
    if temperature not in (0.0, 1.0):
        logits_RV = logits_RV / temperature
    return torch.log_softmax(logits_RV, dim=-1)


def apply_top_k(logprobs_RV: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` likeliest tokens of each row (0 = all), -inf elsewhere; not renormalised."""
    if top_k == 0 or top_k >= logprobs_RV.shape[-1]:
        return logprobs_RV
    top = logprobs_RV.topk(top_k, dim=-1)
    return torch.full_like(logprobs_RV, float("-inf")).scatter_(-1, top.indices, top.values)


def apply_top_p(logprobs_RV: Tensor, top_p: float, width: int = NUCLEUS_WIDTH) -> Tensor:
    """Keep the nucleus of each row, -inf elsewhere; not renormalised.

    The nucleus is the smallest set of likeliest tokens whose probability (of the finite entries, renormalised) is at
    least `top_p`; it never is empty. Source: Holtzman et al. 2020, arXiv 1904.09751, section 3.1. Only the `width`
    likeliest are sorted at first, and more for the rows that need more; the result does not depend on it.
    """
    if top_p >= 1.0:
        return logprobs_RV
    width = min(width, logprobs_RV.shape[-1])
    top = logprobs_RV.topk(width, dim=-1)  # sorted
    mass_RK = (top.values.exp() / logprobs_RV.exp().sum(-1, keepdim=True)).cumsum(-1)
    # A token is outside when those before it hold enough already; the first never is.
    outside_RK = torch.zeros_like(mass_RK, dtype=torch.bool)
    outside_RK[:, 1:] = mass_RK[:, :-1] >= top_p
    values_RK = top.values.masked_fill(outside_RK, float("-inf"))
    kept_RV = torch.full_like(logprobs_RV, float("-inf")).scatter_(-1, top.indices, values_RK)
    if width < logprobs_RV.shape[-1]:
        wider = torch.nonzero(mass_RK[:, -1] < top_p)[:, 0]
        if len(wider):
            kept_RV[wider] = apply_top_p(logprobs_RV[wider], top_p, width * 8)
    return kept_RV


def sample_inverse_cdf(logprobs_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """The token [R] at which the cumulative probability, in the order of token ids, first exceeds the uniform number.

    `logprobs_RV` need not be normalised; a token at -inf is never drawn. `uniforms_R` is in [0, 1).
    """
    cumulative_RV = logprobs_RV.exp().cumsum(-1)
    total_R1 = cumulative_RV[:, -1:]
    # Rounding may lift the product to the total itself, which lies behind the last token.
    aim_R1 = torch.minimum(uniforms_R[:, None] * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(cumulative_RV, aim_R1, right=True)[:, 0]


def build_key(seed: int, prompt_index: int, sample_index: int) -> np.uint64:
    """The random stream of one request; `compute_uniforms` reads it."""
    state: Array = np.random.SeedSequence((seed, prompt_index, sample_index)).generate_state(1, np.uint64)
    return np.uint64(state[0])


def compute_uniforms(keys_R: Array, steps_R: Array | Sequence[int]) -> Array:
    """Number `steps_R` of each stream `keys_R` (uint64): float32 in [0, 1), a multiple of 2^-24.

    SplitMix64 with random access: its state is a counter, so each number depends on its key and step alone, and a
    whole row of requests takes a few vector operations.
    """
    mixed = keys_R + (np.asarray(steps_R, dtype=np.uint64) + np.uint64(1)) * GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * MIX_2
    mixed ^= mixed >> np.uint64(31)
    uniforms: Array = (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return uniforms
