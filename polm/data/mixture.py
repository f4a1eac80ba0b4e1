"""Mixtures: records of several sources in given shares, in an order that is a pure function of (weights, seed).

Which source record i comes from is drawn in blocks of BLOCK from (seed, block), so that a mixture can be taken up at
any index: the draws before it are counted, and each source is read on from its own place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal, TypeVar

import numpy as np

from polm.errors import DataError
from polm.tokens import Array

T = TypeVar("T")
Stop = Literal["first", "all"]
BLOCK = 4096


def draw_block(weights: Sequence[float], seed: int, block: int) -> Array:
    """The sources of records [block * BLOCK, (block + 1) * BLOCK), int64 [BLOCK]; the share of s is w_s / sum w."""
    edges = np.cumsum(np.array(weights, dtype=np.float64))
    points = np.random.default_rng((seed, block, 2)).random(BLOCK) * edges[-1]
    drawn: Array = np.minimum(np.searchsorted(edges, points, side="right"), len(weights) - 1)
    return drawn


def count_before(weights: Sequence[float], seed: int, index: int) -> list[int]:
    """How many of the first `index` records come from each source."""
    counts = np.zeros(len(weights), dtype=np.int64)
    for block in range(-(-index // BLOCK)):
        drawn = draw_block(weights, seed, block)[: index - block * BLOCK]
        counts += np.bincount(drawn, minlength=len(weights))
    return [int(count) for count in counts]


def mix(
    sources: Sequence[Callable[[], Iterator[T]]],
    weights: Sequence[float],
    *,
    seed: int,
    stop: Stop,
    start: int = 0,
    ledger: Counter[str] | None = None,
) -> Iterator[tuple[int, T]]:
    """Yields (source, record) from index `start` on. A source is a function that opens it from its beginning.

    stop   "first": end where a source is drawn that has no record left, so no record comes twice;
           "all": begin such a source again, and end once each has been read to its end

    With `start` the records are those of a run from 0 without its first `start`. The ledger counts `repeated`, the
    records that have come before.

    Raises:
        DataError: a source without records.
    """
    readers = [_Reader(source, number, repeat=stop == "all") for number, source in enumerate(sources)]
    for reader, count in zip(readers, count_before(weights, seed, start), strict=True):
        for _ in range(count):
            if reader.take() is None:  # a run from 0 would have ended before
                return
    index = start
    while True:
        for number in draw_block(weights, seed, index // BLOCK)[index % BLOCK :]:
            if stop == "all" and all(reader.finished for reader in readers):
                return
            reader = readers[number]
            taken = reader.take()
            if taken is None:
                return
            if ledger is not None and reader.passes:
                ledger["repeated"] += 1
            yield int(number), taken[0]
            index += 1


class _Reader(Generic[T]):
    """A source with one record read ahead (in a tuple, None at its end), so that its last record is known as such."""

    def __init__(self, source: Callable[[], Iterator[T]], number: int, repeat: bool):
        self.source, self.repeat = source, repeat
        self.passes, self.finished = 0, False
        self.rows = source()
        self.ahead = self._read()
        if self.ahead is None:
            raise DataError(f"source {number} of the mixture has no records; leave it out, or check what was dropped")

    def take(self) -> tuple[T] | None:
        """The next record; at the end None, or with `repeat` the first one again."""
        if self.ahead is None and self.repeat:
            self.passes += 1
            self.rows = self.source()
            self.ahead = self._read()
        taken = self.ahead
        if taken is not None:
            self.ahead = self._read()
            self.finished = self.finished or self.ahead is None
        return taken

    def _read(self) -> tuple[T] | None:
        for record in self.rows:
            return (record,)
        return None
