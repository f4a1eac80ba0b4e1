"""Trees kept in a scratch file rather than in memory, and streams that are handed to trees as they are read.

What stays in memory is 15 bytes for a tree of one segment, so a data set of any size can be packed and walked over. The
scratch file has no name: it is gone when its process is.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from polm.errors import DataError, StoreError
from polm.tokens import Array, Segment, Tree, tree_length

TOKEN, WEIGHT = np.dtype(np.int32), np.dtype(np.float32)
STRIDE = 256  # segments from one offset that is kept in memory to the next


class LazyTrees(Sequence[Tree]):
    """A sequence whose trees are made when they are asked for. `lengths` are in tokens, integers [trees]."""

    lengths: Array

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self._load(i) for i in range(*index.indices(len(self)))]
        place = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(f"tree {index} of {len(self)}")
        return self._load(place)

    def _load(self, index: int) -> Tree:
        raise NotImplementedError


class StoredTrees(LazyTrees):
    """Trees of `TreeWriter`, read back as they were: token ids, weights where a segment has them, and marks."""

    def __init__(self, writer: TreeWriter):
        self._file = writer.file  # kept open: the file lives as long as its descriptor
        self._first_segment = np.frombuffer(writer.first_segment, dtype=np.int32)
        self._lengths = np.frombuffer(writer.segment_lengths, dtype=np.int32)
        self._parents = np.frombuffer(writer.parents, dtype=np.int16)
        self._weighted = np.frombuffer(writer.weighted, dtype=np.int8)
        self._marks = {name: np.frombuffer(values, dtype=np.float64) for name, values in writer.marks.items()}
        self._offsets = writer.offsets
        self.lengths = np.frombuffer(writer.tree_lengths, dtype=np.int32)

    def _load(self, index: int) -> Tree:
        first, end = int(self._first_segment[index]), int(self._first_segment[index + 1])
        start = first - first % STRIDE
        ends = np.cumsum(self._measure(start, end))
        before = int(ends[first - start - 1]) if first > start else 0
        raw = os.pread(self._file.fileno(), int(ends[-1]) - before, self._offsets[first // STRIDE] + before)
        places = [0, *(ends[first - start : -1] - before).tolist()]
        return tuple(self._build_segment(raw, place, s) for place, s in zip(places, range(first, end), strict=True))

    def _measure(self, first: int, end: int) -> Array:
        """Bytes of each of the segments `first` to `end`, int64."""
        return self._lengths[first:end] * (
            TOKEN.itemsize + WEIGHT.itemsize * self._weighted[first:end].astype(np.int64)
        )

    def _build_segment(self, raw: bytes, offset: int, segment: int) -> Segment:
        num = int(self._lengths[segment])
        tokens = np.frombuffer(raw, TOKEN, num, offset).astype(np.int64)
        streams = {}
        if self._weighted[segment]:
            streams["weights"] = np.frombuffer(raw, WEIGHT, num, offset + num * TOKEN.itemsize)
        marks = {name: float(values[segment]) for name, values in self._marks.items()}
        given = {name: value for name, value in marks.items() if not np.isnan(value)}
        return Segment(tokens, int(self._parents[segment]), streams, given)


class TreeWriter:
    """Takes trees one after another, as a list would, into a scratch file in `folder`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the trees that read it)
        self.first_segment = array("i", [0])
        self.segment_lengths = array("i")
        self.tree_lengths = array("i")
        self.parents = array("h")
        self.weighted = array("b")
        self.offsets = array("q")  # of every STRIDE-th segment in the file
        self.num_bytes = 0
        self.marks: dict[str, array[float]] = {}

    def append(self, tree: Tree) -> None:
        """Write a tree. Its only stream may be `weights`."""
        for segment in tree:
            assert segment.streams.keys() <= {"weights"}, sorted(segment.streams)
            for name in segment.marks.keys() - self.marks.keys():
                self.marks[name] = array("d", [float("nan")] * len(self.segment_lengths))
            for name, values in self.marks.items():
                values.append(segment.marks.get(name, float("nan")))
            weights = segment.streams.get("weights")
            if len(self.segment_lengths) % STRIDE == 0:
                self.offsets.append(self.num_bytes)
            self.segment_lengths.append(len(segment))
            self.parents.append(segment.parent)
            self.weighted.append(int(weights is not None))
            self._write(segment.tokens.astype(TOKEN))
            if weights is not None:
                self._write(weights.astype(WEIGHT))
        self.tree_lengths.append(tree_length(tree))
        self.first_segment.append(len(self.segment_lengths))

    def _write(self, values: Array) -> None:
        try:
            self.num_bytes += self.file.write(values.tobytes())
        except OSError as error:
            raise StoreError(
                f"the scratch file of the token ids could not be written: {error.strerror}; it takes 8 bytes a token "
                "in the folder of the stage's output: free some space there, or put `out` on another disk"
            ) from error

    def close(self) -> StoredTrees:
        """The trees, for reading."""
        self.file.flush()
        return StoredTrees(self)


def measure_trees(trees: Sequence[Tree]) -> Array:
    """Tokens of each tree, integers [trees], without reading those that are on disk."""
    if isinstance(trees, LazyTrees):
        return trees.lengths
    return np.array([tree_length(tree) for tree in trees], dtype=np.int64)


class AttachedTrees(LazyTrees):
    """Trees with flat arrays over all of their tokens (in order) handed out to their segments as streams."""

    def __init__(self, trees: Sequence[Tree], streams: Mapping[str, Array]):
        self.lengths = measure_trees(trees)
        self._trees, self._streams = trees, streams
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        for name, values in streams.items():
            if len(values) != self._offsets[-1]:
                raise DataError(
                    f"the annotation {name!r} covers {len(values)} tokens, the data has {self._offsets[-1]}: it was "
                    "made from other data, another tokenizer or another context; annotate again"
                )

    def _load(self, index: int) -> Tree:
        offset, segments = int(self._offsets[index]), []
        for segment in self._trees[index]:
            part = slice(offset, offset + len(segment))
            own: dict[str, Any] = {name: values[part] for name, values in self._streams.items()}
            streams = {**segment.streams, **own}
            segments.append(Segment(segment.tokens, segment.parent, streams, segment.marks))
            offset += len(segment)
        return tuple(segments)
