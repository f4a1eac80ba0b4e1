"""The token forest: what `collate` makes of trees, in explicit arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polm.errors import DataError
from polm.tokens import Segment, TokenBatch, Tree, build_completions, build_document, collate, tree_length

# Tree 0: prompt 10 11 12 with children 20 21 and 30; the first has a child 40 41. Tree 1: the document 50 51 52.
BRANCHED: Tree = (
    Segment(np.array([10, 11, 12])),
    Segment(
        np.array([20, 21]),
        parent=0,
        streams={"weights": np.array([1.0, 0.5]), "advantages": np.array([0.25, 0.75])},
        marks={"sign": 1.0},
    ),
    Segment(np.array([30]), parent=0, streams={"weights": np.array([2.0])}, marks={"sign": -1.0, "pair": 7.0}),
    Segment(np.array([40, 41]), parent=1, streams={"weights": np.array([0.0, 1.0])}),
)
DOCUMENT = build_document([50, 51, 52], {"ref_ids": np.array([[1, 2], [3, 4], [5, 6]])})


def build_batch() -> TokenBatch:
    return collate([BRANCHED, DOCUMENT], seed=5)


def test_the_stream_and_its_paths() -> None:
    batch = build_batch()
    assert batch.tokens_T.tolist() == [10, 11, 12, 20, 21, 30, 40, 41, 50, 51, 52]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 5, 6, 0, 1, 2]
    assert batch.segments_T.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 4]
    assert batch.predictors_T.tolist() == [-1, 0, 1, 2, 3, 2, 4, 6, -1, 8, 9]
    assert batch.starts_S.tolist() == [0, 3, 5, 6, 8]
    assert batch.lengths_S.tolist() == [3, 2, 1, 2, 3]
    assert batch.parents_S.tolist() == [-1, 0, 0, 1, -1]
    assert batch.trees_S.tolist() == [0, 0, 0, 0, 1]
    assert (batch.num_tokens, batch.num_segments, batch.seed) == (11, 5, 5)
    for name in ("tokens_T", "positions_T", "segments_T", "predictors_T", "targets_N", "parents_S", "trees_S"):
        assert getattr(batch, name).dtype == torch.int64, name


def test_the_targets() -> None:
    batch = build_batch()
    assert batch.targets_N.tolist() == [3, 4, 5, 7, 9, 10]
    assert batch.num_targets == 6
    assert batch.target_tokens_N.tolist() == [20, 21, 30, 41, 51, 52]
    assert batch.target_predictors_N.tolist() == [2, 3, 2, 6, 8, 9]
    assert batch.target_segments_N.tolist() == [1, 1, 2, 3, 4, 4]
    assert batch.at_targets("weights").tolist() == [1.0, 0.5, 2.0, 1.0, 1.0, 1.0]
    assert batch.at_targets("advantages").tolist() == [0.25, 0.75, 0.0, 0.0, 0.0, 0.0]


def test_streams_are_filled_with_zeros_and_keep_their_kind() -> None:
    batch = build_batch()
    assert batch.streams["weights"].tolist() == [0, 0, 0, 1.0, 0.5, 2.0, 0, 1.0, 0, 1.0, 1.0]
    assert batch.streams["weights"].dtype == torch.float32
    assert batch.streams["advantages"].dtype == torch.float32  # given in float64
    assert batch.streams["ref_ids"].dtype == torch.int64
    assert batch.streams["ref_ids"].shape == (11, 2)
    assert batch.at_targets("ref_ids").tolist() == [[0, 0]] * 4 + [[3, 4], [5, 6]]
    with pytest.raises(KeyError, match="no stream 'ref_logprobs'; it has"):
        batch.at_targets("ref_logprobs")


def test_marks_are_nan_where_a_segment_has_none() -> None:
    marks = build_batch().marks
    assert sorted(marks) == ["pair", "sign"]
    assert marks["sign"].dtype == torch.float32
    assert marks["sign"].nan_to_num(0.0).tolist() == [0.0, 1.0, -1.0, 0.0, 0.0]
    assert marks["sign"].isnan().tolist() == [True, False, False, True, True]
    assert marks["pair"].nan_to_num(0.0).tolist() == [0.0, 0.0, 7.0, 0.0, 0.0]


def test_the_first_token_of_a_root_is_no_target() -> None:
    weights = np.ones(2, dtype=np.float32)
    batch = collate([(Segment(np.array([1, 2]), streams={"weights": weights}),), BRANCHED])
    assert batch.targets_N.tolist() == [1, 5, 6, 7, 9]
    assert batch.streams["weights"][0] == 0.0
    assert weights.tolist() == [1.0, 1.0]  # the tree itself is left as it was


def test_an_empty_segment_hands_its_parent_on() -> None:
    tree = (
        Segment(np.array([1, 2])),
        Segment(np.array([9]), parent=0),
        Segment(np.array([], dtype=np.int64), parent=0),
        Segment(np.array([3]), parent=2),
    )
    batch = collate([tree])
    assert batch.tokens_T.tolist() == [1, 2, 9, 3]
    assert batch.positions_T.tolist() == [0, 1, 2, 2]
    assert batch.predictors_T.tolist() == [-1, 0, 1, 1]
    assert batch.segments_T.tolist() == [0, 0, 1, 3]
    assert batch.lengths_S.tolist() == [2, 1, 0, 1]


def test_build_document_and_completions() -> None:
    (root,) = build_document([4, 5, 6])
    assert root.streams["weights"].tolist() == [0.0, 1.0, 1.0]
    tree = build_completions(
        [1, 2], [[3], [4, 5]], [{"a": np.zeros(1)}, {"weights": np.float32([1, 0])}], [{"m": 1}, {}]
    )
    assert [segment.parent for segment in tree] == [-1, 0, 0]
    assert "weights" not in tree[0].streams
    assert tree[1].streams["weights"].tolist() == [1.0]
    assert tree[2].streams["weights"].tolist() == [1.0, 0.0]  # a given stream goes before the default
    assert tree[1].marks == {"m": 1}
    assert tree_length(tree) == 5
    assert tree_length(BRANCHED) == 8


def test_with_streams_and_to_keep_the_rest() -> None:
    batch = build_batch()
    more = batch.with_streams(ref_logprobs=torch.arange(11.0)).to("cpu")
    assert more.at_targets("ref_logprobs").tolist() == [3.0, 4.0, 5.0, 7.0, 9.0, 10.0]
    assert more.tokens_T.tolist() == batch.tokens_T.tolist()
    assert more.seed == 5
    assert "ref_logprobs" not in batch.streams


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([], "an empty batch"),
        ([()], "an empty batch"),
        ([(Segment(np.array([], dtype=np.int64)),)], "root is empty"),
        ([(Segment(np.array([1])), Segment(np.array([2]), parent=1))], "segment 1 names parent 1"),
        ([(Segment(np.array([1]), parent=2),)], "parents must stand before children"),
        (
            [(Segment(np.array([1, 2]), streams={"advantages": np.zeros(3)}),)],
            "stream 'advantages' has 3 entries for a segment of 2 tokens",
        ),
    ],
)
def test_trees_that_are_none_are_refused(trees: list[Tree], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collate(trees)
