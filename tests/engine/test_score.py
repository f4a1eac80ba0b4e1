"""Whole models against their own forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.engine import head as engine
from polm.engine.fit import accumulate
from polm.engine.score import score, score_top_k
from polm.objectives.ntp import build_ntp
from polm.tokens import Needs, Segment, TokenBatch, build_completions, build_document, collate


def build_batch(seed: int = 0) -> tuple[TokenBatch, list[tuple[np.ndarray, np.ndarray]]]:
    """A forest of a document and a prompt with two children, and its paths: (token ids, weights)."""
    rng = np.random.default_rng(seed)
    document, prompt, *children = (rng.integers(2, 40, size) for size in (9, 4, 3, 5))
    batch = collate([build_document(document), build_completions(prompt, children)])
    paths = [(document, np.arange(len(document)) > 0)]
    for child in children:
        ids = np.concatenate([prompt, child])
        paths.append((ids, np.arange(len(ids)) >= len(prompt)))
    return batch, paths


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights as an ordinary model of `transformers`."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    return other.train(model.training)


@pytest.mark.parametrize("tie", [True, False])
def test_values_and_gradients_of_a_model(
    build_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, tie: bool
) -> None:
    """Forest, gather and chunked head together, against each path on its own with dense logits."""
    monkeypatch.setattr(engine, "MAX_LOGITS", 4 * 40)
    model = build_tiny(tie_embeddings=tie)
    plain = plain_copy(model)
    batch, paths = build_batch()
    scores = score(model, batch, Needs(entropy=True), temperature=0.8)
    pulls = torch.linspace(-1.0, 1.0, batch.num_targets)
    (pulls * scores.logprobs_N).sum().add((pulls.square() * scores.entropy_N).sum()).backward()

    logprobs, entropies = [], []
    for ids, weights in paths:
        logits = plain(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].float() / 0.8
        logp = torch.log_softmax(logits, dim=-1)
        places = torch.tensor(np.flatnonzero(weights))
        logprobs.append(logp[places - 1, torch.tensor(ids)[places]])
        entropies.append(-(logp.exp() * logp).sum(-1)[places - 1])
    (pulls * torch.cat(logprobs)).sum().add((pulls.square() * torch.cat(entropies)).sum()).backward()

    torch.testing.assert_close(scores.logprobs_N, torch.cat(logprobs), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(scores.entropy_N, torch.cat(entropies), rtol=1e-4, atol=2e-5)
    grads = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


def test_candidates_are_scored_where_they_stand(build_tiny: Callable[..., PreTrainedModel]) -> None:
    model = build_tiny()
    ids = np.array([5, 6, 7, 8])
    candidates = np.array([[0, 0], [6, 9], [7, 3], [2, 2]])
    tree = (Segment(ids, streams={"weights": np.array([0.0, 1.0, 1.0, 0.5]), "top_ids": candidates}),)
    batch = collate([tree])
    with torch.no_grad():
        scores = score(model, batch, Needs(candidates="top_ids"))
        logits = plain_copy(model)(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0]
    logp_TV = torch.log_softmax(logits.float(), dim=-1)
    assert scores.candidates_NK is not None
    expected = torch.stack([logp_TV[t - 1, torch.tensor(candidates[t])] for t in (1, 2, 3)])
    torch.testing.assert_close(scores.candidates_NK, expected, rtol=1e-5, atol=1e-5)
    # The first two targets are their own first candidates.
    assert torch.equal(scores.candidates_NK[:2, 0], scores.logprobs_N[:2])
    assert scores.entropy_N is None


def test_top_k_is_that_of_the_full_softmax(
    build_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_LOGITS", 3 * 40)
    model = build_tiny()
    batch, paths = build_batch(1)
    logprobs_N, ids_NK, values_NK = score_top_k(model, batch, 5)
    rows = []
    for ids, weights in paths:
        with torch.no_grad():
            logits = plain_copy(model)(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0]
        rows.append(torch.log_softmax(logits.float(), -1)[torch.tensor(np.flatnonzero(weights)) - 1])
    full_NV = torch.cat(rows)
    targets_N1 = batch.target_tokens_N[:, None]
    torch.testing.assert_close(logprobs_N, full_NV.gather(1, targets_N1)[:, 0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(values_NK, full_NV.topk(5).values, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(full_NV.gather(1, ids_NK), values_NK, rtol=1e-4, atol=2e-5)
    assert score_top_k(model, batch, 1000)[1].shape == (batch.num_targets, 40)  # never more than there are


def watch_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product of hidden states with the output matrix from now on."""
    sizes: list[int] = []
    real = engine.compute_chunk_logits

    def spy(hidden: Tensor, *rest: object) -> Tensor:
        sizes.append(len(hidden))
        return real(hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "compute_chunk_logits", spy)
    return sizes


def test_no_full_logits_are_made(build_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only targets reach the head, never more of them at once than the limit allows, and what is kept of them for the
    backward pass, which else computes them again, is limited too."""
    monkeypatch.setattr(engine, "MAX_LOGITS", 4 * 40)
    monkeypatch.setattr(engine, "KEPT_LOGITS", 9 * 40)
    sizes = watch_products(monkeypatch)
    batch, _ = build_batch()
    score(build_tiny(), batch).logprobs_N.sum().backward()
    assert max(sizes) == 4
    assert batch.num_targets > 9
    assert sum(sizes) == 2 * batch.num_targets - 8  # once forward; once backward, but for the two chunks kept
    assert batch.num_targets < batch.num_tokens


@pytest.mark.parametrize("bf16", [False, True])
def test_a_linear_objective_multiplies_with_the_output_matrix_once_less(
    build_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    """Its gradient is computed in the head's forward pass, with the same bits in the end."""
    monkeypatch.setattr(engine, "load_library", lambda: None)
    monkeypatch.setattr(engine, "MAX_LOGITS", 4 * 40)
    monkeypatch.setattr(engine, "KEPT_LOGITS", 0)
    sizes = watch_products(monkeypatch)
    model, (batch, _) = build_tiny(), build_batch()
    grads, rows = [], []
    for linear in (True, False):
        sizes.clear()
        loss, _ = accumulate(model, [batch], replace(build_ntp(), linear=linear), 1.0, bf16)
        rows.append(sum(sizes))
        grads.append([torch.tensor(loss), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad(set_to_none=True)
    assert rows[1] == 2 * rows[0] >= 2 * batch.num_targets
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bf16_stays_near_fp32(build_tiny: Callable[..., PreTrainedModel]) -> None:
    """Values, entropy, candidates and gradients; the log-softmax itself is in float32."""
    model = build_tiny(spread=1.0)
    rng = np.random.default_rng(0)
    batch = collate([build_document(rng.integers(2, 40, 21), {"top_ids": rng.integers(0, 40, (21, 3))})])
    found = []
    for bf16 in (False, True):
        model.zero_grad(set_to_none=True)
        scores = score(model, batch, Needs(entropy=True, candidates="top_ids"), bf16=bf16)
        assert scores.entropy_N is not None
        assert scores.candidates_NK is not None
        (-scores.logprobs_N.mean()).backward()
        values = (scores.logprobs_N, scores.entropy_N, scores.candidates_NK)
        assert [tuple(v.shape) for v in values] == [(20,), (20,), (20, 3)]
        assert all(v.dtype == torch.float32 for v in values)
        found.append((values, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (exact, exact_grad), (rough, rough_grad) = found
    for a, b in zip(exact, rough, strict=True):
        assert 0 < (a - b).abs().max() < 0.05
    assert torch.nn.functional.cosine_similarity(exact_grad, rough_grad, dim=0) > 0.995
    assert rough_grad.norm() == pytest.approx(float(exact_grad.norm()), rel=0.03)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_collisions(
    build_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """log of the sum of p^2, against dense logits of each path; it has no gradient and changes nothing else."""
    monkeypatch.setattr(engine, "MAX_LOGITS", 4 * 40)
    model = build_tiny()
    plain = plain_copy(model)
    batch, paths = build_batch()
    scores = score(model, batch, Needs(collisions=True), temperature=temperature)
    expected = []
    for ids, weights in paths:
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].float() / temperature
        places = torch.tensor(np.flatnonzero(weights))
        expected.append(torch.softmax(logits, -1).square().sum(-1).log()[places - 1])
    assert scores.collisions_N is not None
    assert not scores.collisions_N.requires_grad
    torch.testing.assert_close(scores.collisions_N, torch.cat(expected), rtol=1e-4, atol=2e-5)
    without = score(model, batch, temperature=temperature)
    assert without.collisions_N is None
    assert torch.equal(without.logprobs_N, scores.logprobs_N)
