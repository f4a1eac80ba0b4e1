"""Trees in a scratch file are the trees in memory; streams are handed out in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from polm.data.fingerprint import fingerprint_trees
from polm.data.packing import pack_trees
from polm.data.tree_store import STRIDE, AttachedTrees, TreeWriter, measure_trees
from polm.errors import DataError, StoreError
from polm.tokens import Segment, Tree, build_completions, build_document

TREES: list[Tree] = [
    build_document([1, 2, 3]),
    build_completions([4], [[5, 6], [7]], marks=[{"sign": 1.0}, {"sign": -1.0}]),
    (Segment(np.array([70_000, 8]), streams={"weights": np.array([0.0, 0.25], dtype=np.float32)}),),
    build_completions([9, 9], [[], [1]], marks=[{"margin": 0.1}, {}]),
]


def store(folder: Path, trees: list[Tree]) -> object:
    writer = TreeWriter(folder)
    for tree in trees:
        writer.append(tree)
    return writer.close()


def describe(tree: Tree) -> list[object]:
    return [
        (s.tokens.tolist(), s.parent, {k: v.tolist() for k, v in s.streams.items()}, dict(s.marks), s.tokens.dtype)
        for s in tree
    ]


def test_trees_come_back_as_they_were(tmp_path: Path) -> None:
    stored = store(tmp_path, TREES)
    assert [describe(tree) for tree in stored] == [describe(tree) for tree in TREES]  # type: ignore[attr-defined]
    assert describe(stored[-1]) == describe(TREES[-1])  # type: ignore[index]
    assert [describe(tree) for tree in stored[1:3]] == [describe(tree) for tree in TREES[1:3]]  # type: ignore[index]
    assert measure_trees(stored).tolist() == measure_trees(TREES).tolist() == [3, 4, 2, 3]  # type: ignore[arg-type]
    assert fingerprint_trees(stored) == fingerprint_trees(TREES)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        stored[4]  # type: ignore[index]
    assert list(tmp_path.iterdir()) == []  # the file has no name, so that nothing is left behind


def test_places_are_found_between_the_offsets_that_are_kept(tmp_path: Path) -> None:
    """Trees of one to three segments, weighted or not, so that trees lie across the places where an offset is kept."""
    rng = np.random.default_rng(0)
    trees: list[Tree] = []
    for number in range(3 * STRIDE):
        answers = [rng.integers(0, 99, rng.integers(1, 4)) for _ in range(number % 3)]
        trees.append(build_completions(rng.integers(0, 99, 2), answers) if answers else build_document([number, 1]))
    stored = store(tmp_path, trees)
    for place in (*range(0, len(trees), 7), len(trees) - 1):
        assert describe(stored[place]) == describe(trees[place])  # type: ignore[index]
    assert fingerprint_trees(stored) == fingerprint_trees(trees)  # type: ignore[arg-type]


def test_batches_are_the_same(tmp_path: Path) -> None:
    lengths = {"bin_tokens": 7, "bins_per_update": 1, "micro_bins": 0, "updates": 4, "epochs": None, "seed": 3}
    ours = pack_trees(store(tmp_path, TREES), **lengths)  # type: ignore[arg-type]
    theirs = pack_trees(TREES, **lengths)  # type: ignore[arg-type]
    for update in range(4):
        (a,), (b,) = ours.step(update).batches, theirs.step(update).batches
        assert a.tokens_T.tolist() == b.tokens_T.tolist()
        assert a.streams["weights"].tolist() == b.streams["weights"].tolist()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    writer = TreeWriter(tmp_path)
    writer.file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with pytest.raises(StoreError, match="No space left on device; it takes 8 bytes a token"):
        writer.append(TREES[0])


def test_nothing_stored(tmp_path: Path) -> None:
    assert len(store(tmp_path, [])) == 0  # type: ignore[arg-type]


def test_streams_are_handed_out_in_order(tmp_path: Path) -> None:
    flat, wide = np.arange(7, dtype=np.float32), np.arange(14).reshape(7, 2)
    for trees in (TREES[:2], store(tmp_path, TREES[:2])):
        out = AttachedTrees(trees, {"ref_logprobs": flat, "ref_ids": wide})  # type: ignore[arg-type]
        assert [s.streams["ref_logprobs"].tolist() for tree in out for s in tree] == [[0, 1, 2], [3], [4, 5], [6]]
        assert out[1][1].streams["ref_ids"].tolist() == [[8, 9], [10, 11]]
        assert out[0][0].streams["weights"].tolist() == [0, 1, 1]
        assert out[1][2].marks["sign"] == -1.0
    assert "ref_logprobs" not in TREES[0][0].streams  # the given trees are left as they were


@pytest.mark.parametrize("length", [6, 8, 0])
def test_streams_of_other_data_are_refused(length: int) -> None:
    trees = [build_document([1, 2, 3]), build_document([4, 5, 6, 7])]
    with pytest.raises(DataError, match=rf"'ref_logprobs' covers {length} tokens, the data has 7.*annotate again"):
        AttachedTrees(trees, {"ref_logprobs": np.zeros(length, dtype=np.float32)})
