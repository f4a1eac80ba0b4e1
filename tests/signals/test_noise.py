"""NEFTune's noise: its scale by each token's own sequence, its draw by the batch's seed, and what it is added to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from polm.engine.score import score
from polm.models.virtual import VIRTUAL, VirtualTokens
from polm.signals.noise import compute_path_lengths, draw_embedding_noise
from polm.tokens import Needs, Segment, build_completions, build_document, collate

TURNS = (Segment(np.arange(2)), Segment(np.arange(3), 0), Segment(np.arange(1), 1), Segment(np.arange(4), 0))


def test_lengths_of_paths_by_hand() -> None:
    """A packed document has its own length; a shared token that of its longest path."""
    batch = collate([build_document([1, 2, 3]), build_completions([1, 2], [[3], [3, 4, 5]]), TURNS])
    assert compute_path_lengths(batch).tolist() == [3] * 3 + [5, 5, 3, 5, 5, 5] + [6, 6, 6, 6, 6, 6, 6, 6, 6, 6]
    short = collate([(Segment(np.arange(2)), Segment(np.arange(0), 0), Segment(np.arange(3), 1))])
    assert compute_path_lengths(short).tolist() == [5] * 5  # an empty segment hands its parent's end on


def test_the_scale_is_the_documents_own() -> None:
    """alpha / sqrt(L d): 5 / sqrt(4 · 16) beside 5 / sqrt(100 · 16), whatever shares the stream."""
    batch = collate([build_document(np.arange(4)), build_document(np.arange(100))], seed=3)
    noise_TD = draw_embedding_noise(batch, 16, 5.0)
    bounds = 5.0 / 8.0, 5.0 / 40.0
    for part, bound in zip((noise_TD[:4], noise_TD[4:]), bounds, strict=True):
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.9 * bound
        assert float(part.mean()) == pytest.approx(0.0, abs=0.2 * bound)
        assert float(part.std()) == pytest.approx(bound / 3**0.5, rel=0.15)  # of a uniform draw


def test_the_draw_is_the_seeds() -> None:
    batch = collate([build_document(np.arange(6))], seed=7)
    torch.manual_seed(1)
    first = draw_embedding_noise(batch, 8, 5.0)
    torch.manual_seed(2)  # what is drawn elsewhere does not matter
    assert torch.equal(draw_embedding_noise(batch, 8, 5.0), first)
    assert not torch.equal(draw_embedding_noise(replace(batch, seed=8), 8, 5.0), first)
    torch.testing.assert_close(draw_embedding_noise(batch, 8, 10.0), 2.0 * first)


def test_scores_are_noisy_only_where_they_are_asked_to_be(build_tiny: Callable[..., PreTrainedModel]) -> None:
    model = build_tiny(num_layers=1)
    batch = collate([build_document(np.arange(2, 9)), build_document(np.arange(9, 14))], seed=1)
    plain = score(model, batch).logprobs_N
    noisy = score(model, batch, Needs(embedding_noise=5.0)).logprobs_N
    assert (noisy - plain).abs().max() > 1e-2
    assert torch.equal(score(model, batch, Needs(embedding_noise=5.0)).logprobs_N, noisy)
    assert torch.equal(score(model, batch, Needs(embedding_noise=0.0)).logprobs_N, plain)
    torch.testing.assert_close(score(model, batch, Needs(embedding_noise=1e-6)).logprobs_N, plain, rtol=0, atol=1e-4)
    noisy.sum().backward()  # the table of embeddings learns through the noise
    table = model.get_input_embeddings().weight
    assert table.grad is not None
    assert table.grad[batch.tokens_T].abs().sum() > 0


def test_virtual_tokens_get_no_noise(build_tiny: Callable[..., PreTrainedModel]) -> None:
    """Prompt tuning's own embeddings are not text: the noise of the text is the same with and without them."""
    model = build_tiny(num_layers=1)
    batch = collate([build_document(np.arange(2, 9))], seed=1)
    seen: list[torch.Tensor] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"][0].detach()), with_kwargs=True
    )
    virtual_PD = torch.randn(3, 32)
    score(model, batch, Needs(embedding_noise=5.0))
    setattr(model, VIRTUAL, lambda: VirtualTokens(3, embeddings_PD=virtual_PD))
    score(model, batch, Needs(embedding_noise=5.0))
    assert torch.equal(seen[1][:3], virtual_PD)
    assert torch.equal(seen[1][3:], seen[0])
