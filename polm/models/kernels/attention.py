"""The compiled attention over the token forest (`attention.cpp`), as a differentiable function of tensors.

Shape suffixes: T stream, H query heads, J key heads, D head width, B blocks, R ranges of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polm.models.kernels.build import has_pairs
from polm.models.kernels.rows import call_kernel
from polm.tokens import Array

# Queries of one block. Within a segment half of the last square of scores is masked: small blocks waste less of it.
KERNEL_BLOCK = 64


@dataclass(frozen=True)
class KernelBlocks:
    """Blocks of queries, those of one tree side by side, and the ranges of the stream that hold their keys."""

    queries_B2: Tensor
    offsets: Tensor  # [B + 1] into the ranges
    ranges_R2: Tensor
    trees: Tensor  # first block of each tree, and the number of blocks

    @property
    def num_blocks(self) -> int:
        return len(self.queries_B2)

    @property
    def num_trees(self) -> int:
        return len(self.trees) - 1


def build_kernel_blocks(
    queries: Sequence[tuple[int, int]], keys: Sequence[Sequence[tuple[int, int]]], roots: Sequence[int]
) -> KernelBlocks:
    """From each block's range of queries, ranges of keys (ancestors first, its own segment last) and root segment."""
    order = np.argsort(np.asarray(roots, dtype=np.int64), kind="stable").tolist()
    sorted_roots = [roots[b] for b in order]
    firsts = [0, *(b + 1 for b, (one, other) in enumerate(pairwise(sorted_roots)) if one != other)] if order else []
    ranges = [pair for b in order for pair in keys[b]]
    return KernelBlocks(
        queries_B2=_to_tensor([queries[b] for b in order]).reshape(-1, 2),
        offsets=_to_tensor(np.cumsum([0, *(len(keys[b]) for b in order)])),
        ranges_R2=_to_tensor(ranges).reshape(-1, 2),
        trees=_to_tensor([*firsts, len(order)]),
    )


def _to_tensor(numbers: Array | Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.asarray(numbers, dtype=np.int64).copy())


def can_attend(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel takes these heads: bfloat16 on the CPU, widths of whole vectors."""
    width = query.shape[-1]
    fits = query.dtype == key.dtype == torch.bfloat16 and query.device.type == "cpu"
    return fits and width % 16 == 0 and width <= 512 and has_pairs()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, blocks: KernelBlocks, scale: float, window: int
    ) -> Tensor:
        query_THD, key_TJD, value_TJD = (x.contiguous() for x in (query_THD, key_TJD, value_TJD))
        # Rows of no tree (spare ones) are not written: zeros, for what is behind must be finite.
        out_THD, sums_TH = torch.zeros_like(query_THD), torch.empty(query_THD.shape[:2])
        sizes = blocks.num_blocks, query_THD.shape[1], key_TJD.shape[1], query_THD.shape[2], window
        where = blocks.queries_B2, blocks.offsets, blocks.ranges_R2
        tensors = query_THD, key_TJD, value_TJD, out_THD, sums_TH, *where
        call_kernel("polm_attention_forward", *tensors, *sizes, scale)
        ctx.save_for_backward(query_THD, key_TJD, value_TJD, out_THD, sums_TH)
        ctx.settings = blocks, scale, window
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_THD, key_TJD, value_TJD, out_THD, sums_TH = ctx.saved_tensors
        blocks, scale, window = ctx.settings
        grad_THD = grads[0].contiguous()
        grad_query_THD = torch.zeros_like(query_THD)
        # Float32 accumulators: a shared prompt's keys collect the gradients of all of its children.
        grad_key_TJD = torch.zeros(key_TJD.shape)
        grad_value_TJD = torch.zeros(value_TJD.shape)
        sizes = blocks.num_trees, query_THD.shape[1], key_TJD.shape[1], query_THD.shape[2], window
        given = query_THD, key_TJD, value_TJD, out_THD, sums_TH, grad_THD
        where = blocks.queries_B2, blocks.offsets, blocks.ranges_R2, blocks.trees
        tensors = *given, grad_query_THD, grad_key_TJD, grad_value_TJD, *where
        call_kernel("polm_attention_backward", *tensors, *sizes, scale)
        return grad_query_THD, grad_key_TJD.to(key_TJD.dtype), grad_value_TJD.to(value_TJD.dtype), None, None, None


def attend_blocks(
    query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, blocks: KernelBlocks, scale: float, window: int | None
) -> Tensor:
    """softmax(scale q k^T + mask) v over the blocks, [T, H, D] bfloat16; zeros in rows that no block holds."""
    out: Tensor = _Attention.apply(query_THD, key_TJD, value_TJD, blocks, scale, window or 0)  # type: ignore[no-untyped-call]
    return out
