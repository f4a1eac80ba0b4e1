"""Keys and values for decoding: the objects that the generator hands to a model's forward as `forest`.

While prompts are read, `PrefillCapture` attends by a plan and keeps each layer's keys and values. While
tokens are decoded, the stream is one token of each live row, and `DecodeCache` attends over that row's own past.

Shape suffixes: T stream, R live rows (one token each in a decoding step), S slots, H query heads, J key heads,
G query heads per key head, L positions, D head width, N tokens to copy.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.errors import ModelError
from polm.models.forest_attention import Attends
from polm.models.kernels.decode import attend_past, can_attend
from polm.tokens import Array

Captured = dict[int, tuple[Tensor, Tensor]]  # layer -> (key_JTD, value_JTD) of a whole stream


@dataclass(frozen=True)
class CacheShape:
    """What one position of one row takes."""

    num_layers: int
    num_key_heads: int
    head_width: int

    @property
    def num_values(self) -> int:
        """Numbers kept for one position of one row, keys and values of all layers."""
        return 2 * self.num_layers * self.num_key_heads * self.head_width


def read_cache_shape(model: PreTrainedModel) -> CacheShape:
    """The shape that a model's config tells."""
    config = model.config.get_text_config()
    num_heads = int(config.num_attention_heads)
    return CacheShape(
        num_layers=int(config.num_hidden_layers),
        num_key_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_width=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
    )


class PrefillCapture:
    """Attends by the plan of a packed batch of prompts and keeps each layer's (key_JTD, value_JTD)."""

    def __init__(self, plan: Attends):
        self.plan = plan
        self.layers: Captured = {}

    def attend(
        self, layer: int, query_HTD: Tensor, key_JTD: Tensor, value_JTD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        self.layers[layer] = (key_JTD, value_JTD)
        return self.plan.attend(layer, query_HTD, key_JTD, value_JTD, scale, window)


class DecodeCache:
    """Static keys and values of `num_slots` rows; the live rows are always slots 0 to R - 1.

    A key of position p of a row lies at p, so attention reads the positions up to the longest live row only (the
    kernel each row's own).
    `begin_step` or `begin` must be called before each forward over one token per live row.
    """

    def __init__(self, shape: CacheShape, num_slots: int, length: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.num_slots, self.length, self.dtype, self.device = shape, num_slots, length, dtype, device
        heads, width = shape.num_key_heads, shape.head_width
        self.store = _allocate((shape.num_layers, 2, num_slots, heads, length, width), dtype, device)
        self.by_kernel = dtype == torch.bfloat16 and device.type == "cpu" and can_attend(width)
        self._heads_J = torch.arange(heads, device=device)
        self._write_at = torch.empty(0, dtype=torch.int64, device=device)
        self._positions_R = torch.empty(0, dtype=torch.int64, device=device)
        self._first = self._end = 0
        self._bias: dict[int | None, Tensor] = {}

    def begin_step(self, positions_R: Array) -> Tensor:
        """Note where the tokens of the coming step stand; returns the positions [R] on the device."""
        on_device_R = torch.from_numpy(positions_R).to(self.device)
        self.begin(on_device_R, int(positions_R.min()), int(positions_R.max()) + 1)
        return on_device_R

    def begin(self, positions_R: Tensor, first: int, end: int) -> None:
        """`begin_step` for positions on the device, of which it is known that they lie in [first, end)."""
        self._positions_R = positions_R
        if self.by_kernel:
            return
        rows_R = torch.arange(len(positions_R), device=self.device)
        heads_RJ = rows_R[:, None] * self.shape.num_key_heads + self._heads_J
        self._write_at = (heads_RJ * self.length + positions_R[:, None]).reshape(-1)
        self._first, self._end = first, end
        self._bias = {}

    def attend(
        self, layer: int, query_HTD: Tensor, key_JTD: Tensor, value_JTD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Write the rows' new keys and values, and attend over their pasts; T is R here. Returns [R, H, D]."""
        keys, values = self.store[layer]
        if self.by_kernel:
            query, key, value = (x.transpose(0, 1).to(self.dtype).contiguous() for x in (query_HTD, key_JTD, value_JTD))
            out = attend_past(query, key, value, keys, values, self._positions_R, scale=scale, window=window)
            return out.to(value_JTD.dtype)
        num_heads, num_rows, width = query_HTD.shape
        num_batches = num_rows * self.shape.num_key_heads
        for target, source in ((keys, key_JTD), (values, value_JTD)):
            rows = source.transpose(0, 1).reshape(num_batches, width).to(self.dtype)
            target.view(-1, width).index_copy_(0, self._write_at, rows)
        first = 0 if window is None else max(0, self._first - window + 1)
        past = (slice(0, num_batches), slice(first, self._end))
        keys, values = keys.view(-1, self.length, width)[past], values.view(-1, self.length, width)[past]
        queries = query_HTD.transpose(0, 1).reshape(num_batches, -1, width).to(self.dtype)
        # The cache has its own dtype, which autocast must not touch.
        with torch.autocast(self.device.type, enabled=False):
            scores = torch.bmm(queries, keys.transpose(1, 2)).float().view(num_rows, num_heads, -1)
            weights = torch.softmax(scores.mul_(scale).add_(self._build_bias(window, first)), dim=-1)
            out = torch.bmm(weights.view(num_batches, -1, weights.shape[-1]).to(self.dtype), values)
        return out.view(num_rows, num_heads, width).to(value_JTD.dtype)

    def _build_bias(self, window: int | None, first: int) -> Tensor:
        """Additive mask [R, 1, positions from `first`], the same in all layers with this window."""
        if window not in self._bias:
            distance = self._positions_R[:, None] - torch.arange(first, self._end, device=self.device)
            unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
            bias = torch.zeros(unseen.shape, dtype=torch.float32, device=self.device)
            self._bias[window] = bias.masked_fill_(unseen, float("-inf"))[:, None]
        return self._bias[window]

    def fill(
        self, layers: dict[int, tuple[Tensor, Tensor]], source_N: Array, slots_N: Array, positions_N: Array
    ) -> None:
        """Copy token `source_N` of a captured stream to position `positions_N` of slot `slots_N`, in all layers."""
        shape = self.shape
        source = torch.from_numpy(source_N).to(self.device)
        slots, positions = torch.from_numpy(slots_N).to(self.device), torch.from_numpy(positions_N).to(self.device)
        heads_JN = slots * shape.num_key_heads + self._heads_J[:, None]
        target = (heads_JN * self.length + positions).reshape(-1)
        if len(layers) != shape.num_layers:
            raise ModelError(
                f"the model has {shape.num_layers} layers, of which {len(layers)} use the token forest's attention; "
                "the generator needs a decoder in which every layer does"
            )
        for layer, captured in layers.items():
            for part, rows_JTD in enumerate(captured):
                if rows_JTD.shape[::2] != (shape.num_key_heads, shape.head_width):
                    raise ModelError(
                        f"layer {layer} has {rows_JTD.shape[0]} key heads of width {rows_JTD.shape[2]}, the config "
                        f"says {shape.num_key_heads} of {shape.head_width}; the generator needs the same in all layers"
                    )
                rows = rows_JTD.index_select(1, source).reshape(-1, shape.head_width).to(self.dtype)
                self.store[layer, part].view(-1, shape.head_width).index_copy_(0, target, rows)

    def move(self, sources: Array, targets: Array, length: int) -> None:
        """Copy the first `length` positions of some slots to other slots (none is both)."""
        source, target = torch.from_numpy(sources).to(self.device), torch.from_numpy(targets).to(self.device)
        self.store[:, :, target, :, :length] = self.store[:, :, source, :, :length]


def _allocate(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty memory: what lies behind a row's end gets weight 0, and 0 times NaN would be NaN.

    Most rows end long before their limit. On Linux a CPU's store is therefore mapped apart, in small pages, which take
    memory when they are first written and give it back with the store. From the heap (`keep_freed_memory`), or in the
    huge pages that numpy asks for, all of it would be cleared and held.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return torch.zeros(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, math.prod(size) * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(size)).view(size)


def compute_ranges(starts: Array, lengths: Array) -> tuple[Array, Array]:
    """Concatenate the ranges [start, start + length): (their members, the offset of each in its own range)."""
    ends = np.cumsum(lengths)
    offsets = np.arange(int(ends[-1]), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    return np.repeat(starts, lengths) + offsets, offsets


def round_width(size: int) -> int:
    """`size` up to one of four sizes an octave (from 8 on), so that steps of like size are of the same."""
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step
