"""The head against a dense log-softmax; its gradient in the forward pass against that of the backward pass."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polm.engine import head as engine
from polm.engine.head import HeadSettings, compute_head
from polm.engine.score import find_slopes
from polm.models.kernels.build import load_library
from polm.models.kernels.rows import head_backward_, head_forward, head_gradient_
from polm.objectives.dft import build_dft
from polm.objectives.distill import build_distill
from polm.objectives.ntp import build_ntp
from polm.objectives.plausible import build_plausible
from polm.objectives.remit import build_remit
from polm.objectives.rho1 import build_rho1
from polm.tokens import Objective, Scores, TokenBatch, build_completions, build_document, collate

needs_kernels = pytest.mark.skipif(load_library() is None, reason="no compiled kernels here")
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
            hidden, weight, ids, HeadSettings(temperature, cap, torch.float32), with_entropy, True
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
    assert engine.split_rows(7, 30) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert engine.split_rows(2, 1000) == [slice(0, 1), slice(1, 2)]  # over the limit: one row at a time
    assert engine.split_rows(0, 10) == [slice(0, 0)]
    assert engine.split_rows(7, 30, 200) == [slice(0, 6), slice(6, 7)]


def test_a_second_backward_pass_computes_again_what_the_first_gave_up() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TARGETS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    ids = torch.arange(NUM_TARGETS)[:, None] % VOCAB
    logprobs, _ = compute_head(hidden, weight, ids, HeadSettings(1.0, None, torch.float32))
    first = torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def draw_inputs(num_targets: int, width: int, vocab: int, num_ids: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden states, output matrix, ids, slopes); an id stands twice."""
    generator = torch.Generator().manual_seed(num_targets)
    hidden = torch.randn(num_targets, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    ids = torch.randint(0, vocab, (num_targets, num_ids), generator=generator)
    ids[0] = ids[0, 0]
    return hidden, weight, ids, torch.randn(ids.shape, generator=generator)


@pytest.mark.parametrize("num_ids", [1, 4])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_known_gradient_is_that_of_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, temperature: float, cap: float | None, num_ids: int
) -> None:
    """To the bit, in the plain head."""
    monkeypatch.setattr(engine, "load_library", lambda: None)
    monkeypatch.setattr(engine, "MAX_LOGITS", rows * VOCAB)
    hidden, weight, ids, slopes = draw_inputs(NUM_TARGETS, WIDTH, VOCAB, num_ids)
    found = []
    for known in (slopes, None):
        logprobs, _ = compute_head(hidden, weight, ids, HeadSettings(temperature, cap, dtype), slopes_NK=known)
        found.append((logprobs, *torch.autograd.grad((slopes * logprobs).sum(), (hidden, weight))))
    for ours, later in zip(*found, strict=True):
        assert torch.equal(ours, later)
    assert found[0][1].abs().max() > 0
    assert found[0][2].abs().max() > 0


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kernel_of_both_passes(dtype: torch.dtype, temperature: float) -> None:
    _, _, ids, slopes = draw_inputs(70, 4, 515, 3)
    logits = torch.randn(70, 515, generator=torch.Generator().manual_seed(1)).to(dtype)
    once, apart = logits.clone(), logits.clone()
    logprobs, total, _ = head_forward(apart, ids, temperature, with_entropy=False)
    head_backward_(apart, ids, temperature, total, None, slopes, None)
    assert torch.equal(head_gradient_(once, ids, temperature, slopes), logprobs)
    assert torch.equal(once, apart)
    assert not torch.equal(once, logits)


@needs_kernels
@pytest.mark.parametrize("num_ids", [1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [70, 33, 1])
def test_a_known_gradient_of_the_compiled_head(
    monkeypatch: pytest.MonkeyPatch, rows: int, temperature: float, num_ids: int
) -> None:
    """The same bits where the logits are one chunk; else as near to float64 as the backward pass."""
    hidden, weight, ids, slopes = draw_inputs(70, 64, 515, num_ids)
    settings = HeadSettings(temperature, None, torch.bfloat16)
    dense, _ = compute_dense(hidden.double(), weight.double(), ids, temperature, None)
    exact = torch.autograd.grad((slopes * dense).sum(), (hidden, weight))
    found, errors = [], []
    for known in (None, slopes):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "PART_NUMBERS", 64 * 200)  # three parts of the vocabulary
            if known is not None:
                patch.setattr(engine, "KEPT_BYTES", 2 * 515 * rows)
            logprobs, _ = compute_head(hidden, weight, ids, settings, slopes_NK=known)
        grads = torch.autograd.grad((slopes * logprobs).sum(), (hidden, weight))
        found.append((logprobs, *grads))
        errors.append([float((ours - true).norm() / true.norm()) for ours, true in zip(grads, exact, strict=True)])
    assert torch.equal(found[0][0], found[1][0])
    assert rows < 70 or all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for later, ours in zip(*errors, strict=True):
        assert 0 < ours < 1.2 * later < 0.05


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_kernels)])
def test_a_known_gradient_of_a_frozen_output_matrix_takes_no_room(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(engine, "load_library", lambda: None)
    monkeypatch.setattr(engine, "_add_weight_gradient", None)  # not called
    hidden, weight, ids, slopes = draw_inputs(NUM_TARGETS, WIDTH, VOCAB, 1)
    weight.requires_grad_(False)
    logprobs, _ = compute_head(hidden, weight, ids, HeadSettings(1.0, None, torch.bfloat16), slopes_NK=slopes)
    (slopes * logprobs).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_promise_that_is_not_kept_is_an_error() -> None:
    """Other slopes than the loss brings, and a second backward pass."""
    hidden, weight, ids, slopes = draw_inputs(NUM_TARGETS, WIDTH, VOCAB, 1)
    settings = HeadSettings(1.0, None, torch.float32)
    logprobs, _ = compute_head(hidden, weight, ids, settings, slopes_NK=slopes)
    with pytest.raises(RuntimeError, match="other slopes than the loss brings"):
        (2 * slopes * logprobs).sum().backward()
    total = (slopes * compute_head(hidden, weight, ids, settings, slopes_NK=slopes)[0]).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given up by a backward pass"):
        total.backward()


def test_a_device_that_is_not_waited_for_gives_no_numbers() -> None:
    """No number of it is read (a tensor on `meta` has none); what it multiplies the gradients with is 1 or NaN."""
    slopes = torch.tensor([[1.0], [math.nan]])
    assert engine.check_promise(slopes, slopes.clone()) is None
    factor = engine.check_promise(slopes.to("meta"), slopes.to("meta"))
    assert factor is not None
    assert factor.device.type == "meta"


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (math.nan, math.nan)])
def test_the_factor_of_such_a_device(monkeypatch: pytest.MonkeyPatch, factor: float, expected: float) -> None:
    monkeypatch.setattr(engine, "check_promise", lambda *_: torch.tensor(factor))
    hidden, weight, ids, slopes = draw_inputs(NUM_TARGETS, WIDTH, VOCAB, 1)
    settings = HeadSettings(1.0, None, torch.float32)
    found = []
    for known in (slopes, None):
        logprobs, _ = compute_head(hidden, weight, ids, settings, slopes_NK=known)
        found.append(torch.autograd.grad((slopes * logprobs).sum(), (hidden, weight)))
    for ours, later in zip(*found, strict=True):
        torch.testing.assert_close(ours, later * expected, rtol=0, atol=0, equal_nan=True)


def test_without_gradients_nothing_is_computed_beforehand() -> None:
    hidden, weight, ids, slopes = draw_inputs(NUM_TARGETS, WIDTH, VOCAB, 1)
    settings = HeadSettings(1.0, None, torch.float32)
    with torch.no_grad():
        known, _ = compute_head(hidden, weight, ids, settings, slopes_NK=slopes)
    assert not known.requires_grad
    assert torch.equal(known, compute_head(hidden, weight, ids, settings)[0])


REMIT = {"eps": 0.8, "temperature": 1.0, "centring": "sequence", "denominator": "tokens", "shuffled": False}
LINEAR: dict[str, Objective] = {
    "ntp": build_ntp(),
    "plausible": build_plausible(gamma=0.5, floor=0.01, denominator="tokens"),
    "shuffled": build_plausible(gamma=0.5, floor=0.01, denominator="weights", shuffled=True),
    "distill": build_distill(alpha=0.9, top_k=3),
    "remit": build_remit(**REMIT, base="frozen"),
    "rho1": build_rho1(keep=0.6, base="frozen", scope="batch"),
}
OTHERS: dict[str, Objective] = {
    "remit": build_remit(**REMIT, base="live"),
    "rho1": build_rho1(keep=0.6, base="live", scope="batch"),
    "dft": build_dft(),
}


def build_annotated() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 40, (size,), generator=generator).numpy() for size in (9, 4, 3, 5)]
    batch = collate([build_document(ids[0]), build_completions(ids[1], ids[2:])], seed=3)
    num = batch.num_tokens
    top = -torch.rand(num, 4, generator=generator).sort(dim=1).values
    return batch.with_streams(
        weights=batch.streams["weights"] * torch.rand(num, generator=generator).add(0.5),
        ref_logprobs=-torch.rand(num, generator=generator),
        base_logprobs=-torch.rand(num, generator=generator),
        ref_topk=top,
        ref_ids=torch.randint(0, 40, (num, 4), generator=generator),
    )


def differentiate(objective: Objective, batch: TokenBatch, seed: int) -> Tensor:
    """The gradient of the total at random log-probabilities, [N, K]."""
    num_ids = 5 if objective.needs.candidates else 1
    generator = torch.Generator().manual_seed(seed)
    at = (-3.0 * torch.rand(batch.num_targets, num_ids, generator=generator)).requires_grad_()
    scores = Scores(at[:, 0], candidates_NK=at[:, 1:] if num_ids > 1 else None)
    (grad,) = torch.autograd.grad(objective.compute(scores, batch).total, at)
    return grad


@pytest.mark.parametrize("name", LINEAR)
def test_the_slopes_of_a_linear_objective_are_its_gradient_anywhere(name: str) -> None:
    batch = build_annotated()
    slopes = find_slopes(LINEAR[name], batch)
    assert slopes is not None
    assert slopes.abs().max() > 0
    assert torch.equal(slopes, differentiate(LINEAR[name], batch, 1))
    assert torch.equal(slopes, differentiate(LINEAR[name], batch, 2))


def test_every_linear_objective_is_in_the_list() -> None:
    folder = Path(inspect.getfile(build_ntp)).parent
    assert {path.stem for path in folder.glob("*.py") if "linear=" in path.read_text()} == {
        objective.name for objective in LINEAR.values()
    }


@pytest.mark.parametrize("name", OTHERS)
def test_what_reads_the_learner_is_not_linear(name: str) -> None:
    batch = build_annotated()
    assert find_slopes(OTHERS[name], batch) is None
    assert not torch.equal(differentiate(OTHERS[name], batch, 1), differentiate(OTHERS[name], batch, 2))
