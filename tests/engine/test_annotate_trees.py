"""Annotation in bins equals scoring tree by tree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from polm.engine.annotate import annotate_trees
from polm.engine.score import score
from polm.models.loading import compute_hidden, output_logits
from polm.tokens import Segment, Tree, build_completions, build_document, collate, tree_length


def build_trees() -> list[Tree]:
    """Documents, a prompt with two children, and a document of which only a part is supervised."""
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(2, 40, size)  # noqa: E731
    partly = Segment(draw(9), streams={"weights": np.array([0, 0, 1, 1, 0, 0, 1, 0, 0], dtype=np.float32)})
    return [
        build_document(draw(5)),
        build_completions(draw(4), [draw(3), draw(6)]),
        (partly,),
        build_document(draw(21)),
        build_document(draw(2)),
    ]


@pytest.mark.parametrize("bin_tokens", [1, 16, 1000])
def test_in_bins_as_one_by_one(build_tiny: Callable[..., PreTrainedModel], bin_tokens: int) -> None:
    model = build_tiny().train()
    trees = build_trees()
    seen: list[tuple[int, int]] = []
    annotation = annotate_trees(model, trees, bin_tokens=bin_tokens, report=lambda *x: seen.append(x))
    assert annotation.top_ids is None
    assert len(annotation.logprobs) == sum(map(tree_length, trees))
    offset = 0
    for tree in trees:
        batch = collate([tree])
        with torch.no_grad():
            alone = score(model, batch).logprobs_N.numpy()
        part = annotation.logprobs[offset : offset + tree_length(tree)]
        places = batch.targets_N.numpy()
        np.testing.assert_allclose(part[places], alone, rtol=1e-4, atol=2e-5)
        others = np.setdiff1d(np.arange(len(part)), places)
        assert (part[others] == 0).all()
        assert len(others) > 0
        offset += tree_length(tree)
    # No bin is longer than asked for, unless a single tree is: 21 tokens are one bin, all 50 fit into 1000.
    num_bins = {1: 3, 16: 3, 1000: 1}[bin_tokens]
    assert seen == [(i + 1, num_bins) for i in range(num_bins)]


def test_the_likeliest_tokens(build_tiny: Callable[..., PreTrainedModel]) -> None:
    model = build_tiny()
    trees = build_trees()
    annotation = annotate_trees(model, trees, bin_tokens=32, top_k=3)
    assert annotation.top_ids is not None
    assert annotation.top_logprobs is not None
    offset = 0
    for tree in trees:
        batch = collate([tree])
        with torch.no_grad():
            hidden = compute_hidden(model, batch)[batch.target_predictors_N]
            full_NV = torch.log_softmax(output_logits(model, hidden), -1)
        places = offset + batch.targets_N.numpy()
        np.testing.assert_allclose(annotation.top_logprobs[places], full_NV.topk(3).values, rtol=1e-4, atol=2e-5)
        ids = torch.from_numpy(annotation.top_ids[places])
        np.testing.assert_allclose(annotation.top_logprobs[places], full_NV.gather(1, ids), rtol=1e-4, atol=2e-5)
        offset += tree_length(tree)
