"""The attention of the token forest by PyTorch's FlexAttention, which is what a GPU runs.

Segments are numbered in pre-order, so the descendants of a segment are a range of numbers: a token may see another
if it stands within the range of the other's segment, and not before it on the path. Four numbers a token say all of
the mask, with its window. Which tiles of 128 queries and 128 keys hold anything to see, and which hold nothing to
hide, is counted from the segments; a mask of the size of the stream squared is never made.

FlexAttention is compiled for a GPU when it is first used there, and is held against plain attention on that GPU before
anything relies on it: where it fails or gives other numbers, the batched products (`forest_attention.py`) run in its
place, and manifests say so.

Shape suffixes: T stream, S segments, H query heads, J key heads, D head width, Q tiles of queries, K tiles of keys.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from polm.models.kernels.build import explain_switch
from polm.models.kernels.proof import explain_gap, measure_gap, note
from polm.tokens import Array, Layout, send

TILE = 128  # FlexAttention's own
MAX_KINDS = 256
# One kernel for all lengths: the one for short queries has conditions of its own.
OPTIONS: FlexKernelOptions = {"BACKEND": "TRITON"}
MIN_WIDTH = 16  # narrower heads do not fill a matrix instruction
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def number_segments(parents: list[int]) -> tuple[Array, Array]:
    """(first, end) [S]: in pre-order a segment has number `first`, and its descendants those up to `end`."""
    sizes = np.ones(len(parents), dtype=np.int64)
    for child in range(len(parents) - 1, -1, -1):
        if parents[child] >= 0:
            sizes[parents[child]] += sizes[child]
    first = np.zeros(len(parents), dtype=np.int64)
    following = np.zeros(len(parents), dtype=np.int64)  # the number of a segment's next child
    next_root = 0
    for segment, parent in enumerate(parents):
        first[segment] = following[parent] if parent >= 0 else next_root
        if parent >= 0:
            following[parent] += sizes[segment]
        else:
            next_root += int(sizes[segment])
        following[segment] = first[segment] + 1
    return first, first + sizes


def mark_tokens(layout: Layout, spare: int, window: int | None) -> Array:
    """[4, T] int32: the number of each token's segment, the end of its descendants' numbers, the token's position, and
    the first position that it sees.

    A spare row behind the stream is a tree of its own: it sees itself, so that its output is finite.
    """
    first_S, end_S = number_segments(layout.parents)
    own = len(layout.parents) + np.arange(spare)
    positions = np.concatenate([layout.positions, np.zeros(spare, dtype=np.int64)])
    marks = [
        np.concatenate([np.repeat(first_S, layout.lengths), own]),
        np.concatenate([np.repeat(end_S, layout.lengths), own + 1]),
        positions,
        np.zeros_like(positions) if window is None else positions - window + 1,
    ]
    return np.stack(marks).astype(np.int32)


def build_sees(marks_4T: Tensor) -> Sees:
    """The function (batch, head, query, key) -> may the query see the key, in the form that FlexAttention takes.

    The window is in the marks, for a number in the function would be a kernel of its own.
    """
    first_T, end_T, position_T, least_T = marks_4T.unbind()

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        below = (first_T[key] <= first_T[query]) & (first_T[query] < end_T[key])
        return below & (position_T[key] <= position_T[query]) & (position_T[key] >= least_T[query])

    return sees


def find_tiles(layout: Layout, spare: int, window: int | None) -> tuple[Array, Array]:
    """(some, all) [Q, K] bool: tiles in which a query sees some key, and those in which each query sees each key."""
    total = len(layout.positions) + spare
    tiles = -(-total // TILE)
    seen_QK = np.zeros((tiles, tiles), dtype=np.int64)  # pairs that see each other
    some_QK = np.zeros((tiles, tiles), dtype=bool)
    paths: list[tuple[tuple[int, int], ...]] = []
    for start, length, parent in zip(layout.starts, layout.lengths, layout.parents, strict=True):
        above = paths[parent] if parent >= 0 else ()
        paths.append((*above, (start, start + length)) if length else above)
        for begin, end in itertools.pairwise(_edges(start, start + length)):
            for keys in above:
                _count(layout.positions, (begin, end), keys, window, seen_QK, some_QK)
            if length:
                _count(layout.positions, (begin, end), (start, end), window, seen_QK, some_QK)
    alone = np.arange(total - spare, total) // TILE
    np.add.at(seen_QK, (alone, alone), 1)
    some_QK[alone, alone] = True
    all_QK = seen_QK == TILE * TILE
    return some_QK & ~all_QK, all_QK


def _edges(begin: int, end: int) -> list[int]:
    """Where a range begins, passes from tile to tile, and ends; nothing for an empty one."""
    return [begin, *range((begin // TILE + 1) * TILE, end, TILE), end] if end > begin else []


def _count(
    positions: Array,
    queries: tuple[int, int],
    keys: tuple[int, int],
    window: int | None,
    seen_QK: Array,
    some_QK: Array,
) -> None:
    """Add the pairs of queries (of one tile) and keys (of one segment, up to the last query's place in its own)."""
    begin, end = queries
    edges = np.array(_edges(*keys))
    firsts, ends = edges[:-1], edges[1:]
    touched = whole = np.ones(len(firsts), dtype=bool)
    if window is not None:
        touched = positions[begin] - positions[ends - 1] < window
        # Of what the window cuts only a part of the pairs is seen, so the tile is not whole.
        whole = touched & (positions[end - 1] - positions[firsts] < window)
    # Ancestors' keys stand before all queries; of its own segment a query sees those up to itself.
    pairs = (end - begin) * (ends - firsts)
    for place in np.flatnonzero(ends > begin + 1):
        distance = np.arange(begin, end) + 1 - firsts[place]
        pairs[place] = np.clip(distance, 0, ends[place] - firsts[place]).sum()
    row = begin // TILE
    some_QK[row, firsts[touched] // TILE] = True
    seen_QK[row, firsts[whole] // TILE] += pairs[whole]


def build_block_mask(layout: Layout, spare: int, window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's mask over the stream of a forest."""
    some_QK, all_QK = find_tiles(layout, spare, window)
    total = len(layout.positions) + spare
    (num_some, some), (num_whole, whole) = _order(some_QK, device), _order(all_QK, device)
    sees = build_sees(send(torch.from_numpy(mark_tokens(layout, spare, window)), device))
    mask: BlockMask = BlockMask.from_kv_blocks(
        num_some, some, num_whole, whole, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(total, total)
    )
    return mask


def _order(tiles_QK: Array, device: torch.device) -> tuple[Tensor, Tensor]:
    """(number of tiles [1, 1, Q], their indices first in each row [1, 1, Q, K]), int32."""
    counts = tiles_QK.sum(-1).astype(np.int32)
    indices = np.argsort(~tiles_QK, axis=-1, kind="stable").astype(np.int32)
    return send(torch.from_numpy(counts)[None, None], device), send(torch.from_numpy(indices)[None, None], device)


@functools.cache
def _compile() -> Callable[..., Any]:
    """The compiled function: for all lengths one kernel a kind (dtype, shape of heads, which inputs need gradients,
    what they are views of). There must be room for all kinds, for behind the limit plain operations would run.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_KINDS)
    return torch.compile(flex_attention, dynamic=True)


def attend_flex(
    query_HTD: Tensor, key_JTD: Tensor, value_JTD: Tensor, mask: BlockMask, scale: float, *, compiled: bool = True
) -> Tensor:
    """softmax(scale q k^T + mask) v, [T, H, D]; without `compiled` by plain operations, for tests."""
    function = _compile() if compiled else cast(Callable[..., Any], flex_attention)
    shared = query_HTD.shape[0] != key_JTD.shape[0]
    # Tokens first in memory, as the layers' products leave them: other strides would be another kernel.
    heads = [x.transpose(0, 1).contiguous().transpose(0, 1)[None] for x in (query_HTD, key_JTD, value_JTD)]
    out_1HTD: Tensor = function(*heads, block_mask=mask, scale=scale, enable_gqa=shared, kernel_options=OPTIONS)
    return out_1HTD[0].transpose(0, 1)


def can_flex(query_HTD: Tensor, key_JTD: Tensor) -> bool:
    """Whether FlexAttention takes these heads: on a GPU where it was found to give the numbers of plain attention, and
    from the second tile on (one tile is one product, and would be a kernel of its own)."""
    if query_HTD.device.type != "cuda" or query_HTD.shape[1] <= TILE:
        return False
    heads = query_HTD.shape[0], key_JTD.shape[0], query_HTD.shape[2]
    return explain_flex_absence(query_HTD.device, query_HTD.dtype, *heads) is None


@functools.cache
def explain_flex_absence(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int
) -> str | None:
    """Why FlexAttention is not taken for such heads on this GPU; None where it is."""
    name = f"FlexAttention ({heads} heads, {key_heads} key heads, width {width}, {str(dtype).removeprefix('torch.')})"
    if (off := explain_switch()) is not None:
        return note(name, off)
    if width < MIN_WIDTH:
        return note(name, f"heads are narrower than {MIN_WIDTH}")
    return explain_gap(name, functools.partial(_measure, device, dtype, (heads, key_heads, width)), dtype)


def _measure(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int]) -> float:
    """The largest gap to plain attention over a small forest, with a window and without, of two numbers of tiles, some
    of them whole."""
    num_heads, key_heads, width = heads
    positions = np.concatenate([np.arange(420), 300 + np.arange(70), np.arange(45)])
    layout = Layout([0, 300, 420, 490], [300, 120, 70, 45], [-1, 0, 0, -1], positions)
    generator = torch.Generator().manual_seed(0)
    scale, gaps = 1.0 / math.sqrt(width), []
    for window, spare in ((None, 0), (None, 130), (200, 0)):
        total = len(positions) + spare
        shapes = [(num_heads, total, width), (key_heads, total, width), (key_heads, total, width)]
        given = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        mask = build_block_mask(layout, spare, window, device)
        sees = build_sees(torch.from_numpy(mark_tokens(layout, spare, window)).to(device))
        attend = functools.partial(attend_flex, mask=mask, scale=scale)
        gaps.append(measure_gap(attend, functools.partial(attend_plainly, sees=sees, scale=scale), given))
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)


def attend_plainly(query_HTD: Tensor, key_JTD: Tensor, value_JTD: Tensor, sees: Sees, scale: float) -> Tensor:
    """What `attend_flex` computes, by the whole mask and in float32: the yardstick."""
    places = torch.arange(query_HTD.shape[1], device=query_HTD.device)
    none = places.new_zeros(())
    seen_TT = sees(none, none, places[:, None], places[None, :])
    repeats = query_HTD.shape[0] // key_JTD.shape[0]
    key, value = (x.float().repeat_interleave(repeats, 0) for x in (key_JTD, value_JTD))
    scores = (query_HTD.float() @ key.transpose(1, 2) * scale).masked_fill(~seen_TT, float("-inf"))
    return (torch.softmax(scores, -1) @ value).transpose(0, 1)
