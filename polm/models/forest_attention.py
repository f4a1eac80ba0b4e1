"""The attention of the token forest, registered with `transformers` under the name `polm_forest`.

A model's forward gets one extra keyword argument, `forest`: anything with an `attend` method. In training and
scoring it is a `ForestPlan`; the generator passes its key-value cache instead. So the model's own code stays
untouched and every stage uses the same seam.

The plan cuts each segment into blocks of queries. A block's keys are its ancestors' tokens and its own segment up to
the block's end. Blocks of like size are padded into one batched matrix product. One autograd function gathers the
blocks, attends, and scatters the gradients, so that no per-segment slice ever builds a full-size zero gradient.

Shape suffixes: T stream, B blocks of a group, Q queries of a block, K keys of a block, H query heads, J key heads,
G query heads per key head, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from polm.errors import ModelError
from polm.models.flex_attention import attend_flex, build_block_mask, can_flex
from polm.models.kernels.attention import KERNEL_BLOCK, KernelBlocks, attend_blocks, build_kernel_blocks, can_attend
from polm.tokens import Array, Layout, TokenBatch

FOREST = "polm_forest"
QUERY_BLOCK = 128
# Numbers of keys are multiples of this, for the sake of vector instructions.
KEY_STEP = 8
# Two blocks share a padded group while padding costs at most this factor, or while the group is small anyway.
MAX_PADDING = 1.15
SMALL_AREA = 1 << 13
# Largest number of scores (blocks x heads x queries x keys) that one product holds. On a CPU 2 MB in float32: the
# passes over them stay in the cache.
MAX_SCORES = {"cpu": 1 << 19, "other": 1 << 24}
# Attention weights that a layer keeps for its backward pass, per query head and token of the stream; groups beyond that
# are computed again. Short segments fit, and the memory stays in proportion to the stream.
KEPT_WEIGHTS = 256


class Attends(Protocol):
    """What the `forest` keyword argument of a model's forward must offer."""

    def attend(
        self, layer: int, query_HTD: Tensor, key_JTD: Tensor, value_JTD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention output [T, H, D] of one layer."""
        ...


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 (part of the interface; the forest is the mask)
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Attends | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The function that `transformers` calls in each layer; query [1, H, T, D], key and value [1, J, T, D]."""
    if forest is None:
        raise ModelError(
            "this model was loaded for the token forest and was called without one; "
            'call model.set_attn_implementation("sdpa") to use it as an ordinary model'
        )
    refused = {"softcap": softcap, "dropout": dropout or None, "attention sinks": unused.get("s_aux")}
    for name, found in refused.items():
        if found is not None:
            raise ModelError(
                f"{type(module).__name__} asks for attention with {name} ({found}), which the token forest does not "
                "compute; use a model without it" + (" or set attention_dropout: 0" if name == "dropout" else "")
            )
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    layer = int(getattr(module, "layer_idx", 0))
    # Under autocast the rotary embedding leaves query and key in float32 beside a bf16 value.
    with torch.autocast(value.device.type, enabled=False):
        out_THD = forest.attend(
            layer, query[0].to(value.dtype), key[0].to(value.dtype), value[0], scale, sliding_window
        )
    return out_THD.unsqueeze(0), None


# No mask is registered beside it: transformers then makes none, and asks no device whether sequences are packed.
AttentionInterface.register(FOREST, forest_attention)


@dataclass(frozen=True)
class _Group:
    """Blocks padded to the same numbers of queries and keys."""

    query_index: Tensor  # [B*Q] stream index, 0 where padded
    query_valid: Tensor | None  # [B*Q, 1, 1] float, 0 where padded; None without padding
    key_index: Tensor  # [B*K] stream index, 0 where padded
    query_position_BQ: Tensor
    key_position_BK: Tensor  # a huge position where padded, so that no query may see it
    num_blocks: int
    num_queries: int
    num_keys: int

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [B, 1, Q, K]: 0 where a query may see a key, -inf elsewhere."""
        distance = self.query_position_BQ[:, :, None] - self.key_position_BK[:, None, :]
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return bias.masked_fill_(~seen, float("-inf"))[:, None]


class ForestPlan:
    """How to attend over one `TokenBatch`; built once, used by every layer. Windows go by distance on the path.

    On a GPU FlexAttention takes a mask (`flex_attention.py`). On a CPU the compiled attention (`kernels/attention.py`)
    takes the blocks as they are. The batched products, which need them padded into groups, stand in for both. Each is
    made when it is first asked for.
    """

    def __init__(self, layout: Layout, num_heads: int, spare: int, device: torch.device, *, round_up: bool):
        self.layout, self.num_heads, self.spare = layout, num_heads, spare
        self.device, self.round_up = device, round_up
        self._bias: dict[int | None, list[Tensor]] = {}
        self._masks: dict[int | None, BlockMask] = {}

    @cached_property
    def kernel_blocks(self) -> KernelBlocks:
        blocks = _cut_blocks(self.layout, KERNEL_BLOCK)
        return build_kernel_blocks([b.queries for b in blocks], [b.keys for b in blocks], [b.root for b in blocks])

    @cached_property
    def _padded(self) -> tuple[list[_Group], Tensor]:
        """The groups, and the place of each stream token among their padded queries (0 for spare rows)."""
        inverse = np.zeros(len(self.layout.positions) + self.spare, dtype=np.int64)
        groups: list[_Group] = []
        offset = 0
        max_area = MAX_SCORES["cpu" if self.device.type == "cpu" else "other"] // self.num_heads
        for members in _group_blocks(_cut_blocks(self.layout, QUERY_BLOCK), max_area):
            positions = self.layout.positions
            groups.append(_build_group(members, positions, inverse, offset, self.device, self.round_up))
            offset += groups[-1].num_blocks * groups[-1].num_queries
        return groups, torch.from_numpy(inverse).to(self.device)

    @property
    def groups(self) -> list[_Group]:
        return self._padded[0]

    @property
    def inverse_T(self) -> Tensor:
        return self._padded[1]

    def biases(self, window: int | None) -> list[Tensor]:
        if window not in self._bias:
            self._bias[window] = [group.bias(window, torch.float32) for group in self.groups]
        return self._bias[window]

    def block_mask(self, window: int | None) -> BlockMask:
        if window not in self._masks:
            self._masks[window] = build_block_mask(self.layout, self.spare, window, self.device)
        return self._masks[window]

    def attend(
        self, layer: int, query_HTD: Tensor, key_JTD: Tensor, value_JTD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        del layer
        if can_flex(query_HTD, key_JTD):
            return attend_flex(query_HTD, key_JTD, value_JTD, self.block_mask(window), scale)
        rows = query_HTD.transpose(0, 1), key_JTD.transpose(0, 1), value_JTD.transpose(0, 1)
        if can_attend(query_HTD, key_JTD):
            return attend_blocks(*rows, self.kernel_blocks, scale, window)
        out: Tensor = _ForestAttention.apply(  # type: ignore[no-untyped-call]
            *rows, self, scale, window, torch.is_grad_enabled()
        )
        return out


@dataclass(frozen=True)
class _Block:
    queries: tuple[int, int]  # stream range
    keys: tuple[tuple[int, int], ...]  # stream ranges, ancestors first
    num_keys: int
    root: int  # its tree's first segment

    @property
    def num_queries(self) -> int:
        return self.queries[1] - self.queries[0]


def round_rows(count: int) -> int:
    """`count` up to one of eight sizes an octave (and to a multiple of 64 below 1,024).

    CPU bf16 products are compiled for each new shape, and the code is kept: with a free number of rows a long run's
    memory grows by hundreds of megabytes.
    """
    step = max(64, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def build_plan(
    batch: TokenBatch, num_heads: int, spare: int = 0, virtual: int = 0, *, round_up: bool = False
) -> ForestPlan:
    """The plan for a batch; `num_heads` only bounds the size of one product.

    `spare` rows stand behind the stream, belong to no tree, and get an output that nobody may read. `virtual` tokens
    stand before it: a root of its own, under which all trees of the batch hang. With `round_up` the products have
    round sizes, for the reason that `round_rows` gives.
    """
    layout = batch.layout
    if virtual:
        layout = Layout(
            starts=[0, *(start + virtual for start in layout.starts)],
            lengths=[virtual, *layout.lengths],
            parents=[-1, *(parent + 1 for parent in layout.parents)],  # a root's parent, -1, becomes the new root, 0
            positions=np.concatenate([np.arange(virtual), layout.positions + virtual]),
        )
    return ForestPlan(layout, num_heads, spare, batch.tokens_T.device, round_up=round_up)


def _cut_blocks(layout: Layout, most_queries: int) -> list[_Block]:
    blocks = []
    paths: list[tuple[tuple[int, int], ...]] = []
    roots: list[int] = []
    for start, length, parent in zip(layout.starts, layout.lengths, layout.parents, strict=True):
        above = paths[parent] if parent >= 0 else ()
        roots.append(roots[parent] if parent >= 0 else len(roots))
        paths.append((*above, (start, start + length)) if length else above)
        num_above = sum(b - a for a, b in above)
        for first in range(0, length, most_queries):
            end = min(first + most_queries, length)
            keys = (*above, (start, start + end))
            blocks.append(_Block((start + first, start + end), keys, num_above + end, roots[-1]))
    return blocks


def _group_blocks(blocks: list[_Block], max_area: int) -> list[list[_Block]]:
    """Greedy: blocks sorted by size join the current group while its padding stays cheap and its product small."""
    groups: list[list[_Block]] = []
    useful = most_queries = most_keys = 0
    for block in sorted(blocks, key=lambda b: (b.num_keys, b.num_queries), reverse=True):
        queries, keys = max(most_queries, block.num_queries), max(most_keys, block.num_keys)
        area = useful + block.num_queries * block.num_keys
        padded = (len(groups[-1]) + 1 if groups else 1) * queries * keys
        cheap = padded <= MAX_PADDING * area or padded <= SMALL_AREA
        if groups and cheap and padded <= max_area:
            groups[-1].append(block)
            useful, most_queries, most_keys = area, queries, keys
        else:
            groups.append([block])
            useful, most_queries, most_keys = block.num_queries * block.num_keys, block.num_queries, block.num_keys
    return groups


def _round_up(size: int, step: int) -> int:
    """Sizes above `step` go up to its next multiple."""
    return size if size <= step else -(-size // step) * step


def _build_group(
    blocks: list[_Block], positions: Array, inverse: Array, offset: int, device: torch.device, round_up: bool
) -> _Group:
    """Pad the blocks of one group, and note in `inverse` where each of their tokens stands."""
    num_blocks = _round_up(len(blocks), 8 if round_up else 1)
    num_queries = _round_up(max(block.num_queries for block in blocks), 16 if round_up else 1)
    num_keys = _round_up(max(block.num_keys for block in blocks), 16 if round_up else KEY_STEP)
    query_index = np.zeros((num_blocks, num_queries), dtype=np.int64)
    query_position = np.full((num_blocks, num_queries), np.iinfo(np.int64).max // 4, dtype=np.int64)
    query_valid = np.zeros((num_blocks, num_queries), dtype=np.float32)
    key_index = np.zeros((num_blocks, num_keys), dtype=np.int64)
    key_position = np.full((num_blocks, num_keys), np.iinfo(np.int64).max // 2, dtype=np.int64)
    key_position[len(blocks) :, 0] = 0  # a padded block sees one token, so that its scores are finite
    last_key = np.zeros((num_blocks, 1), dtype=np.int64)
    for b, block in enumerate(blocks):
        first, end = block.queries
        query_index[b, : end - first] = np.arange(first, end)
        query_position[b, : end - first] = positions[first:end]
        query_valid[b, : end - first] = 1.0
        inverse[first:end] = offset + b * num_queries + np.arange(end - first)
        keys = np.concatenate([np.arange(a, z) for a, z in block.keys])
        key_index[b, : len(keys)] = keys
        key_position[b, : len(keys)] = positions[keys]
        last_key[b] = positions[end - 1]
    # A padded query stands at its block's last key, so that its row of scores is finite; its output is never read.
    query_position = np.minimum(query_position, last_key)
    full = bool(query_valid.all())
    return _Group(
        query_index=torch.from_numpy(query_index.reshape(-1)).to(device),
        query_valid=None if full else torch.from_numpy(query_valid.reshape(-1, 1, 1)).to(device),
        key_index=torch.from_numpy(key_index.reshape(-1)).to(device),
        query_position_BQ=torch.from_numpy(query_position).to(device),
        key_position_BK=torch.from_numpy(key_position).to(device),
        num_blocks=num_blocks,
        num_queries=num_queries,
        num_keys=num_keys,
    )


def _rows_to_heads(rows: Tensor, group: _Group, num_key_heads: int) -> Tensor:
    """[B*Q, H, D] -> [B, J, G*Q, D]: the query heads that share a key head stand in the same matrix."""
    heads, width = rows.shape[1:]
    rows = rows.view(group.num_blocks, group.num_queries, num_key_heads, heads // num_key_heads, width)
    return rows.permute(0, 2, 3, 1, 4).reshape(group.num_blocks, num_key_heads, -1, width)


def _scatter_queries(rows_BJRD: Tensor, group: _Group, num_heads: int) -> Tensor:
    """[B, J, G*Q, D] -> [B*Q, H, D], the inverse of `_rows_to_heads`."""
    blocks, key_heads, _, width = rows_BJRD.shape
    rows = rows_BJRD.view(blocks, key_heads, num_heads // key_heads, group.num_queries, width)
    return rows.permute(0, 3, 1, 2, 4).reshape(blocks * group.num_queries, num_heads, width)


def _gather_keys(key_TJD: Tensor, group: _Group) -> Tensor:
    """[T, J, D] -> [B, J, K, D]."""
    rows = key_TJD.index_select(0, group.key_index)
    return rows.view(group.num_blocks, group.num_keys, *key_TJD.shape[1:]).transpose(1, 2)


def _compute_weights(queries: Tensor, keys: Tensor, bias: Tensor, group: _Group) -> Tensor:
    """Attention weights [B, J, G*Q, K] in float32; the queries are scaled already."""
    scores = torch.matmul(queries, keys.transpose(2, 3)).float()
    blocks, key_heads, rows, num_keys = scores.shape
    scores = scores.view(blocks, -1, group.num_queries, num_keys)
    return torch.softmax(scores.add_(bias), dim=-1).view(blocks, key_heads, rows, num_keys)


class _ForestAttention(torch.autograd.Function):
    """softmax(scale q k^T + mask) v over the plan's groups; what of the weights is not kept is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TJD: Tensor,
        value_TJD: Tensor,
        plan: ForestPlan,
        scale: float,
        window: int | None,
        keep: bool,
    ) -> Tensor:
        num_tokens, num_heads = query_THD.shape[:2]
        num_key_heads = key_TJD.shape[1]
        scaled_THD = query_THD * scale
        room = KEPT_WEIGHTS * num_tokens * num_heads if keep else 0
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        for group, bias in zip(plan.groups, plan.biases(window), strict=True):
            queries = _rows_to_heads(scaled_THD.index_select(0, group.query_index), group, num_key_heads)
            keys, values = _gather_keys(key_TJD, group), _gather_keys(value_TJD, group)
            weights = _compute_weights(queries, keys, bias, group).to(values.dtype)
            outputs.append(_scatter_queries(torch.matmul(weights, values), group, num_heads))
            room -= weights.numel()
            kept.append(weights if room >= 0 else None)
        ctx.save_for_backward(scaled_THD, key_TJD, value_TJD, *kept)
        ctx.plan, ctx.scale, ctx.window = plan, scale, window
        return torch.cat(outputs).index_select(0, plan.inverse_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out_THD,) = grads
        scaled_THD, key_TJD, value_TJD, *kept = ctx.saved_tensors
        plan: ForestPlan = ctx.plan
        num_heads, num_key_heads = scaled_THD.shape[1], key_TJD.shape[1]
        # Float32 accumulators: a shared prompt's keys collect the gradients of all of its children.
        grad_key = torch.zeros(key_TJD.shape, dtype=torch.float32, device=key_TJD.device)
        grad_value = torch.zeros_like(grad_key)
        grad_queries = []
        for group, bias, weights in zip(plan.groups, plan.biases(ctx.window), kept, strict=True):
            queries = _rows_to_heads(scaled_THD.index_select(0, group.query_index), group, num_key_heads)
            keys, values = _gather_keys(key_TJD, group), _gather_keys(value_TJD, group)
            grad_rows_THD = grad_out_THD.index_select(0, group.query_index)
            if group.query_valid is not None:  # padded queries must not reach the keys
                grad_rows_THD = grad_rows_THD * group.query_valid.to(grad_rows_THD.dtype)
            grad_rows = _rows_to_heads(grad_rows_THD, group, num_key_heads)
            if weights is None:
                weights = _compute_weights(queries, keys, bias, group).to(queries.dtype)
            grad_weights = torch.matmul(grad_rows, values.transpose(2, 3))
            # weights * (grad_weights - sum over keys of weights * grad_weights), in one pass
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_queries.append(_scatter_queries(torch.matmul(grad_scores, keys), group, num_heads))
            _add_keys(grad_key, torch.matmul(grad_scores.transpose(2, 3), queries), group)
            _add_keys(grad_value, torch.matmul(weights.transpose(2, 3), grad_rows), group)
        grad_query = torch.cat(grad_queries).index_select(0, plan.inverse_T).mul_(ctx.scale)
        if plan.spare:  # their place is another token's, whose gradient is not theirs
            grad_query[-plan.spare :] = 0.0
        return grad_query, grad_key.to(key_TJD.dtype), grad_value.to(value_TJD.dtype), None, None, None, None


def _add_keys(total_TJD: Tensor, grad_BJKD: Tensor, group: _Group) -> None:
    """Add the blocks' key gradients at their places in the stream (padded keys carry exact zeros)."""
    rows = grad_BJKD.transpose(1, 2).reshape(group.num_blocks * group.num_keys, *total_TJD.shape[1:])
    total_TJD.index_add_(0, group.key_index, rows.float())
