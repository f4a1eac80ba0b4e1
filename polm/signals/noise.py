"""NEFTune: uniform noise on the input embeddings while training (arXiv 2310.05914, section 2).

Shape suffixes: T tokens of the stream, S segments, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polm.tokens import TokenBatch


def compute_path_lengths(batch: TokenBatch) -> Tensor:
    """Tokens of each token's own sequence, [T] int64, on the batch's device.

    A sequence is the path from a root to a leaf: a packed document, or a prompt with one answer behind it. A token of
    a prompt that several answers share belongs to several sequences; the longest one counts.
    """
    lengths, parents = batch.layout.lengths, batch.layout.parents
    ends: list[int] = []  # parents stand before children
    for length, parent in zip(lengths, parents, strict=True):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    for segment in range(len(ends) - 1, -1, -1):
        if parents[segment] >= 0:
            ends[parents[segment]] = max(ends[parents[segment]], ends[segment])
    return torch.tensor(ends, device=batch.segments_T.device)[batch.segments_T]


def draw_embedding_noise(batch: TokenBatch, width: int, alpha: float) -> Tensor:
    """Noise [T, D] float32: uniform in (-1, 1) times alpha / sqrt(L D), L the length of the token's own sequence.

    L is not that of the packed stream, and no padding counts: a document gets the noise that it would get alone. The
    draw is a function of `batch.seed` and the shape (and of the kind of device), so a run that goes on from a
    checkpoint repeats it; another split into micro-batches draws other numbers.
    """
    device = batch.tokens_T.device
    generator = torch.Generator(device).manual_seed(batch.seed)
    uniform_TD = torch.rand((batch.num_tokens, width), generator=generator, device=device) * 2.0 - 1.0
    scale_T = alpha / torch.sqrt(compute_path_lengths(batch).float() * width)
    return uniform_TD * scale_T[:, None]
