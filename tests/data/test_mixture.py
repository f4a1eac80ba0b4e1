"""Mixtures: shares, determinism, both ends, and taking up at any index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest

from polm.data import mixture
from polm.data.mixture import count_before, draw_block, mix
from polm.errors import DataError


def source(name: str, size: int) -> Callable[[], Iterator[str]]:
    return lambda: iter([f"{name}{i}" for i in range(size)])


def test_shares_are_the_weights() -> None:
    drawn = np.concatenate([draw_block([3.0, 1.0, 0.5], 7, block) for block in range(10)])
    shares = np.bincount(drawn) / len(drawn)
    np.testing.assert_allclose(shares, np.array([3, 1, 0.5]) / 4.5, atol=4 * 0.5 / len(drawn) ** 0.5)
    assert np.array_equal(draw_block([1, 2], 3, 4), draw_block([10, 20], 3, 4))  # only the ratio counts
    assert not np.array_equal(draw_block([1, 2], 3, 4), draw_block([1, 2], 4, 4))


def test_the_first_exhausted_source_ends_it_and_nothing_comes_twice() -> None:
    ledger: Counter[str] = Counter()
    records = [r for _, r in mix([source("a", 5), source("b", 500)], [1, 1], seed=0, stop="first", ledger=ledger)]
    assert len(set(records)) == len(records)
    assert [r for r in records if r[0] == "a"] == [f"a{i}" for i in range(5)]  # all of it, in its own order
    assert ledger == Counter()
    # It ends exactly where a sixth record of `a` is drawn.
    drawn = draw_block([1, 1], 0, 0)
    assert len(records) == np.flatnonzero(drawn == 0)[5]


def test_all_repeats_the_short_ones_until_each_has_ended() -> None:
    ledger: Counter[str] = Counter()
    records = [r for _, r in mix([source("a", 3), source("b", 40)], [1, 1], seed=1, stop="all", ledger=ledger)]
    counts = Counter(records)
    assert records[-1] == "b39"
    assert all(counts[f"b{i}"] == 1 for i in range(40))
    taken = [r for r in records if r[0] == "a"]
    assert taken == [f"a{i % 3}" for i in range(len(taken))]
    assert ledger["repeated"] == len(taken) - 3 > 0


@pytest.mark.parametrize("stop", ["first", "all"])
@pytest.mark.parametrize("block", [4, 4096])
def test_it_goes_on_at_any_index(monkeypatch: pytest.MonkeyPatch, stop: Any, block: int) -> None:
    monkeypatch.setattr(mixture, "BLOCK", block)
    run = partial(mix, [source("a", 4), source("b", 30), source("c", 9)], [1, 5, 2], seed=3, stop=stop)
    whole = list(run())
    assert len(whole) > 12
    assert whole == list(run())
    for start in range(len(whole) + 2):
        assert list(run(start=start)) == whole[start:], start
    assert count_before([1, 5, 2], 3, 12) == [sum(s == n for s, _ in whole[:12]) for n in range(3)]


def test_it_reads_no_more_than_it_needs() -> None:
    read: Counter[str] = Counter()

    def endless(name: str) -> Iterator[int]:
        for i in range(10**9):
            read[name] += 1
            yield i

    taken = list(islice(mix([partial(endless, "a"), partial(endless, "b")], [1, 3], seed=0, stop="first"), 100))
    assert len(taken) == 100
    assert sum(read.values()) <= 100 + 2  # one record of each is read ahead


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(DataError, match="source 1 of the mixture has no records"):
        list(mix([source("a", 1), source("b", 0)], [1, 1], seed=0, stop="all"))
