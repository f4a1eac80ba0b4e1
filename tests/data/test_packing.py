"""Best-fit packing by hand and at random, and batches as a pure function of the update."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from polm.data.packing import PackedTrees, epoch_order, mix_seed, pack_best_fit, pack_trees
from polm.errors import DataError
from polm.tokens import TokenBatch, Tree, build_document


def test_best_fit_by_hand() -> None:
    """Bins of 10, items in the given order: 6 opens A (room 4), 5 opens B (room 5), 4 goes to A, the tighter one
    (room 0), 3 to B (room 2), 7 opens C (room 3), 2 to B (room 0), 3 to C (room 0), 1 opens D."""
    lengths = [6, 5, 4, 3, 7, 2, 3, 1]
    assert pack_best_fit(lengths, 10, range(8)) == [[0, 2], [1, 3, 5], [4, 6], [7]]


def test_the_order_decides() -> None:
    """Backwards: 1 opens A, 3 to A, 2 to A (room 4), 7 opens B, 3 to A (tighter than nothing: B has room 3, taken
    first), and so on."""
    lengths = [6, 5, 4, 3, 7, 2, 3, 1]
    # 7: A=1 (9 left); 6: A=4 (6); 5: A=6 (4); 4: B=7 (3); 3 (of length 3): B, room 3 against 4; 2: A; 1: C=5 (5); 0: D.
    assert pack_best_fit(lengths, 10, range(7, -1, -1)) == [[7, 6, 5, 2], [4, 3], [1], [0]]


@pytest.mark.parametrize("seed", range(5))
def test_every_item_once_and_no_bin_over_its_capacity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(20, 60))
    lengths = rng.integers(0, capacity + 1, 200).tolist()
    order = rng.permutation(200).tolist()
    bins = pack_best_fit(lengths, capacity, order)
    assert Counter(i for members in bins for i in members) == Counter(range(200))
    assert max(sum(lengths[i] for i in members) for members in bins) <= capacity
    assert bins == reference_best_fit(lengths, capacity, order)


def reference_best_fit(lengths: list[int], capacity: int, order: list[int]) -> list[list[int]]:
    """The definition: the open bin with the least room that holds the item, of equals the one changed last."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, when it was changed)
    for clock, item in enumerate(order):
        fitting = [b for b, (room, _) in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            chosen = min(fitting, key=lambda b: (rooms[b][0], -rooms[b][1]))
        else:
            chosen = len(bins)
            bins.append([])
            rooms.append((capacity, 0))
        bins[chosen].append(item)
        rooms[chosen] = (rooms[chosen][0] - lengths[item], clock)
    return bins


def test_too_long_is_an_error() -> None:
    assert pack_best_fit([10], 10, [0]) == [[0]]
    with pytest.raises(DataError, match=r"item 1 has 11 tokens, more than a bin of 10; raise bin_tokens"):
        pack_best_fit([3, 11], 10, [0, 1])


def build_trees(num: int = 20) -> list[Tree]:
    """Documents whose tokens all are the document's number."""
    rng = np.random.default_rng(0)
    return [build_document([i] * int(rng.integers(2, 9))) for i in range(num)]


def build_packed(seed: int = 0, trees: list[Tree] | None = None, **changes: int | float | None) -> PackedTrees:
    values = {"bin_tokens": 16, "bins_per_update": 3, "micro_bins": 2, "updates": 12, "epochs": None, **changes}
    return pack_trees(trees or build_trees(), seed=seed, **values)  # type: ignore[arg-type]


def documents_of(batches: list[TokenBatch]) -> list[int]:
    return [int(batch.tokens_T[start]) for batch in batches for start in batch.starts_S]


def test_an_update_is_a_pure_function() -> None:
    forwards, backwards = build_packed(), build_packed()
    there = [forwards.step(u).batches for u in range(12)]
    back = [backwards.step(u).batches for u in range(11, -1, -1)][::-1]
    for a, b in zip(there, back, strict=True):
        assert len(a) == len(b) == 2  # three bins, two and one
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.tokens_T, y.tokens_T)
            assert x.seed == y.seed
    seeds = [batch.seed for batches in there for batch in batches]
    assert len(set(seeds)) == len(seeds)


def test_each_epoch_has_every_document_once_in_a_fresh_order() -> None:
    packed = build_packed(bins_per_update=1, micro_bins=0, updates=100)
    num_bins = len(packed.bins)
    epochs = [[documents_of(list(packed.step(e * num_bins + i).batches)) for i in range(num_bins)] for e in range(3)]
    for epoch in epochs:
        assert Counter(d for bin_ in epoch for d in bin_) == Counter(range(20))
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1])  # the same bins


def test_an_update_runs_over_into_the_next_epoch() -> None:
    packed = build_packed()
    num_bins = len(packed.bins)
    assert num_bins % 3 != 0  # else there is nothing to see
    bins = [b for u in range(num_bins) for b in packed.bins_of(u)]
    assert Counter(bins) == Counter(dict.fromkeys(range(num_bins), 3))
    for epoch in range(3):
        assert sorted(bins[epoch * num_bins : (epoch + 1) * num_bins]) == list(range(num_bins))


def test_arms_share_the_order() -> None:
    """The order goes by the seed and the lengths: streams and token ids have no say."""
    trees = build_trees()
    weighted = [build_document(t[0].tokens + 1, {"ref_logprobs": np.ones(len(t[0]), np.float32)}) for t in trees]
    a, b = build_packed(trees=trees), build_packed(trees=weighted)
    assert a.bins == b.bins
    assert [a.bins_of(u) for u in range(12)] == [b.bins_of(u) for u in range(12)]
    assert [x.seed for x in a.step(5).batches] == [x.seed for x in b.step(5).batches]
    other = build_packed(seed=1, trees=trees)
    assert [a.bins_of(u) for u in range(12)] != [other.bins_of(u) for u in range(12)]
    assert a.bins != other.bins


def test_length_of_the_training() -> None:
    num_bins = len(build_packed().bins)
    assert build_packed(updates=5, bins_per_update=2).num_updates == 5
    assert build_packed(updates=None, epochs=2.0, bins_per_update=1).num_updates == 2 * num_bins
    assert build_packed(updates=None, epochs=None, bins_per_update=1).num_updates == num_bins
    assert build_packed(updates=None, epochs=0.001).num_updates == 1
    assert all(build_packed().resumable(u) for u in range(5))


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        pack_trees([], bin_tokens=8, bins_per_update=1, micro_bins=0, updates=1, epochs=None, seed=0)


@pytest.mark.parametrize("seed", [0, 7, 20251122, 2**32 - 1])
def test_seeds_of_any_size(seed: int) -> None:
    """A date as a seed is common; the batch's seed must still be one that a generator takes."""
    packed = build_packed(seed=seed, updates=3)
    draws = [
        float(torch.rand((), generator=torch.Generator().manual_seed(batch.seed)))
        for u in range(3)
        for batch in packed.step(u).batches
    ]
    assert len(set(draws)) == 6


def test_other_seeds_draw_other_numbers() -> None:
    """Torch's CPU generator reads 32 bits of a seed: the recipe's seed must be among them."""
    draws = set()
    for seed in range(4):
        (batch, _) = build_packed(seed=seed, updates=1).step(0).batches
        draws.add(float(torch.rand((), generator=torch.Generator().manual_seed(batch.seed))))
    assert len(draws) == 4
    assert len({mix_seed(a, b) & 0xFFFFFFFF for a in range(5) for b in range(5)}) == 25
    assert mix_seed(3, 4) == mix_seed(3, 4) < 2**63


def test_the_memory_of_orders_changes_nothing() -> None:
    first = epoch_order(10, 3, 0).copy()
    for epoch in range(10):
        epoch_order(10, 3, epoch)
    assert (epoch_order(10, 3, 0) == first).all()
    assert sorted(first) == list(range(10))
