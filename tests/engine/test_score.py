"""The chunked head against a dense log-softmax, and whole models against their own forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from polm.engine import score as engine
from polm.engine.score import score, score_top_k
from polm.tokens import Needs, Segment, TokenBatch, build_completions, build_document, collate

NUM_TARGETS, WIDTH, VOCAB = 7, 6, 11


def compute_dense(
    hidden_ND: Tensor, weight_VD: Tensor, ids_NK: Tensor, temperature: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """(log-probabilities [N, K], entropy [N]) from full logits, differentiated by autograd."""
    logits_NV = hidden_ND @ weight_VD.t()
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    logp_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    return logp_NV.gather(1, ids_NK), -(logp_NV.exp() * logp_NV).sum(-1)


@pytest.mark.parametrize("num_candidates", [0, 3])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "kept"), [(1, 4), (3, 0), (3, 100), (100, 0), (100, 100)])
def test_the_chunked_head_is_a_dense_log_softmax(
    monkeypatch: pytest.MonkeyPatch, rows: int, kept: int, temperature: float, cap: float | None, num_candidates: int
) -> None:
    """However many rows a chunk has, and for however many of them the distribution is kept."""
    monkeypatch.setattr(engine, "MAX_LOGITS", rows * VOCAB)
    monkeypatch.setattr(engine, "KEPT_LOGITS", kept * VOCAB)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(NUM_TARGETS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    ids = torch.randint(0, VOCAB, (NUM_TARGETS, 1 + num_candidates), generator=generator)
    ids[0] = ids[0, 0]  # the same token twice: its gradients must add up
    pull_NK = torch.randn(ids.shape, generator=generator)
    pull_N = torch.randn(NUM_TARGETS, generator=generator)
    results = []
    for with_entropy in (True, False):
        pulls = pull_N if with_entropy else torch.zeros(NUM_TARGETS)
        logprobs, entropy = engine._ChunkedHead.apply(
            hidden, weight, ids, temperature, cap, with_entropy, torch.float32, True
        )
        total = (pull_NK * logprobs).sum() + ((pulls * entropy).sum() if with_entropy else 0.0)
        got = (logprobs, *torch.autograd.grad(total, (hidden, weight)))
        dense_logprobs, dense_entropy = compute_dense(hidden, weight, ids, temperature, cap)
        dense_total = (pull_NK * dense_logprobs).sum() + (pulls * dense_entropy).sum()
        expected = (dense_logprobs, *torch.autograd.grad(dense_total, (hidden, weight)))
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        if with_entropy:
            torch.testing.assert_close(entropy, dense_entropy, rtol=1e-5, atol=2e-6)
        results.append(got)
    assert not torch.allclose(results[0][1], results[1][1])  # the entropy's gradient is really there


def test_chunks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_LOGITS", 100)
    assert engine._chunks(7, 30) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert engine._chunks(2, 1000) == [slice(0, 1), slice(1, 2)]  # a vocabulary over the limit: one row at a time
    assert engine._chunks(0, 10) == [slice(0, 0)]


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


def test_no_full_logits_are_made(build_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only targets reach the head, never more of them at once than the limit allows, and what is kept of them for the
    backward pass, which else computes them again, is limited too."""
    monkeypatch.setattr(engine, "MAX_LOGITS", 4 * 40)
    monkeypatch.setattr(engine, "KEPT_LOGITS", 9 * 40)
    sizes: list[int] = []
    real = engine._chunk_logits

    def spy(hidden: Tensor, *rest: object) -> Tensor:
        sizes.append(len(hidden))
        return real(hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "_chunk_logits", spy)
    batch, _ = build_batch()
    score(build_tiny(), batch).logprobs_N.sum().backward()
    assert max(sizes) == 4
    assert batch.num_targets > 9
    assert sum(sizes) == 2 * batch.num_targets - 8  # once forward; once backward, but for the two chunks kept
    assert batch.num_targets < batch.num_tokens


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


def test_a_second_backward_pass_computes_again_what_the_first_gave_up() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TARGETS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    ids = torch.arange(NUM_TARGETS)[:, None] % VOCAB
    logprobs, _ = engine._ChunkedHead.apply(hidden, weight, ids, 1.0, None, False, torch.float32, True)
    first = torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
