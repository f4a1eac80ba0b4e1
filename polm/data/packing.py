"""Best-fit packing of trees into bins of bounded length, and the batch source that walks over the bins."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from polm.data.tree_store import measure_trees
from polm.errors import DataError
from polm.tokens import Array, Step, Tree, collate

PACK_AT_ONCE = 1 << 16  # items that are Python numbers at a time


class Bins(Sequence[list[int]]):
    """The items of each bin, in the order in which they came; a few bytes an item, however many there are."""

    def __init__(self, members: Array, starts: Array):
        self._members, self._starts = members, starts  # int32 [items], int64 [bins + 1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} of {len(self)}")
        found: list[int] = self._members[self._starts[index] : self._starts[index + 1]].tolist()
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def pack_best_fit(lengths: Sequence[int] | Array, capacity: int, order: Sequence[int] | Array) -> Bins:
    """Assign items, taken in `order`, each to the open bin with the least room that still holds it.

    Returns the item indices of each bin. O(items) with a bit set of the rooms that occur. Raises DataError when an
    item is longer than `capacity`.
    """
    sizes, items = np.asarray(lengths), np.asarray(order, dtype=np.int32)
    if len(items) and sizes[items].max() > capacity:
        item = int(items[np.argmax(sizes[items] > capacity)])
        raise DataError(f"item {item} has {sizes[item]} tokens, more than a bin of {capacity}; raise bin_tokens")
    bin_of = np.empty(len(items), dtype=np.int32)  # of the item at each place of the order
    by_room = [array("i") for _ in range(capacity + 1)]
    rooms = num_bins = 0  # bit r of rooms is set while some open bin has exactly r tokens of room
    for first in range(0, len(items), PACK_AT_ONCE):
        for place, need in enumerate(sizes[items[first : first + PACK_AT_ONCE]].tolist(), start=first):
            fitting = rooms >> need
            if fitting:
                room = need + (fitting & -fitting).bit_length() - 1
                chosen = by_room[room].pop()
                if not by_room[room]:
                    rooms &= ~(1 << room)
            else:
                room, chosen = capacity, num_bins
                num_bins += 1
            bin_of[place] = chosen
            left = room - need
            by_room[left].append(chosen)
            rooms |= 1 << left
    return _collect(items, bin_of, num_bins)


def _collect(items: Array, bin_of: Array, num_bins: int) -> Bins:
    """The items [items] by their bins, in the order in which they came; a stable sort, but without its memory."""
    counts = np.zeros(num_bins, dtype=np.int64)
    for first in range(0, len(items), PACK_AT_ONCE):
        counts += np.bincount(bin_of[first : first + PACK_AT_ONCE], minlength=num_bins)
    starts = np.concatenate([[0], np.cumsum(counts)])
    members, free = np.empty_like(items), starts[:-1].copy()
    for first in range(0, len(items), PACK_AT_ONCE):
        part = bin_of[first : first + PACK_AT_ONCE]
        order = np.argsort(part, kind="stable")
        own, begins, sizes = np.unique(part[order], return_index=True, return_counts=True)
        members[np.repeat(free[own] - begins, sizes) + np.arange(len(part))] = items[first : first + len(part)][order]
        free[own] += sizes
    return Bins(members, starts)


@dataclass(frozen=True)
class PackedTrees:
    """Trees packed once, walked in a fresh order each epoch; update u is a pure function of (seed, u).

    `bins_per_update` bins make an update, `micro_bins` of them a forward pass (0 = all). The last update of an epoch
    runs over into the next one, so every update has the same number of bins.
    """

    trees: Sequence[Tree]
    bins: Bins
    bins_per_update: int
    micro_bins: int
    num_updates: int
    seed: int

    @property
    def reads_weights(self) -> bool:
        return False

    def resumable(self, update: int) -> bool:
        del update
        return True

    def bins_of(self, update: int) -> list[int]:
        """Indices of the bins of an update."""
        first = update * self.bins_per_update
        out = []
        for place in range(first, first + self.bins_per_update):
            epoch, offset = divmod(place, len(self.bins))
            out.append(int(epoch_order(len(self.bins), self.seed, epoch)[offset]))
        return out

    def count_unseen(self) -> tuple[int, int]:
        """Trees that the updates end before, and their tokens; none once they reach past the first epoch."""
        reached = self.num_updates * self.bins_per_update
        order = epoch_order(len(self.bins), self.seed, 0)
        lengths = measure_trees(self.trees)
        num_trees = num_tokens = 0
        for place in order[reached:].tolist():
            members = self.bins[place]
            num_trees += len(members)
            num_tokens += int(lengths[members].sum())
        return num_trees, num_tokens

    def step(self, update: int, model: Any = None) -> Step:
        """The micro-batches of an update; the model has no say in them."""
        del model
        chosen = self.bins_of(update)
        size = self.micro_bins or len(chosen)
        return Step(
            [
                collate(
                    (self.trees[i] for b in chosen[first : first + size] for i in self.bins[b]),
                    seed=mix_seed(self.seed, update, first),
                )
                for first in range(0, len(chosen), size)
            ]
        )


def mix_seed(*numbers: int) -> int:
    """One seed from several numbers that are not negative, such as (seed, update).

    Shifted into one number they would not do: torch's CPU generator reads the low 32 bits of a seed only, and refuses
    more than 64.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


_ORDERS: dict[tuple[int, int, int], np.ndarray[tuple[int], np.dtype[np.int64]]] = {}


def epoch_order(num: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The permutation of an epoch; the last two are remembered, as an update may touch both."""
    key = (num, seed, epoch)
    if key not in _ORDERS:
        while len(_ORDERS) >= 4:
            _ORDERS.pop(next(iter(_ORDERS)))
        _ORDERS[key] = np.random.default_rng((seed, epoch, 1)).permutation(num)
    return _ORDERS[key]


def pack_trees(
    trees: Sequence[Tree],
    *,
    bin_tokens: int,
    bins_per_update: int,
    micro_bins: int,
    updates: int | None,
    epochs: float | None,
    seed: int,
) -> PackedTrees:
    """Pack trees for training; `updates` or `epochs` (one, when both are absent) says how long it goes on.

    Packing order depends on `seed` and the lengths alone, so the arms of an experiment share it.
    """
    if not len(trees):
        raise DataError("there is nothing to train on: every example was dropped, or the file is empty")
    order = np.arange(len(trees), dtype=np.int32)  # `permutation` gives the same order in twice the memory
    np.random.default_rng((seed, 0)).shuffle(order)
    bins = pack_best_fit(measure_trees(trees), bin_tokens, order)
    if updates is None:
        updates = max(1, round((epochs or 1.0) * len(bins) / bins_per_update))
    return PackedTrees(trees, bins, bins_per_update, micro_bins, updates, seed)
