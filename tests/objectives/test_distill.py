"""Distillation by hand, and against the full-vocabulary divergence of two models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from polm.engine.score import score, score_top_k
from polm.errors import DataError, RecipeError
from polm.models.loading import prepare_model
from polm.objectives.distill import build_distill
from polm.objectives.ntp import build_ntp
from polm.tokens import Scores, Segment, TokenBatch, build_document, collate

# One document of two targets (weights 1 and 0.5); the reference's two likeliest tokens at each.
REFERENCE = [[0.6, 0.2], [0.5, 0.25]]  # renormalised: 3/4, 1/4 and 2/3, 1/3
MODEL = [[0.3, 0.3], [0.5, 0.125]]
LOGPROBS = [math.log(0.3), math.log(0.1)]


def build_batch() -> TokenBatch:
    topk = np.log(np.array([[1.0, 1.0], *REFERENCE])).astype(np.float32)
    streams = {
        "weights": np.array([0, 1, 0.5], dtype=np.float32),
        "ref_ids": np.array([[0, 0], [4, 2], [1, 9]]),
        "ref_topk": topk,
    }
    return collate([(Segment(np.array([3, 4, 5]), streams=streams),)])


def build_scores() -> Scores:
    logprobs_N = torch.tensor(LOGPROBS, requires_grad=True)
    return Scores(logprobs_N, candidates_NK=torch.tensor(MODEL).log().requires_grad_())


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_arithmetic_and_gradient(alpha: float) -> None:
    scores = build_scores()
    loss = build_distill(alpha=alpha, top_k=2).compute(scores, build_batch())
    kl = [
        0.75 * math.log(0.75 / 0.3) + 0.25 * math.log(0.25 / 0.3),
        2 / 3 * math.log(2 / 3 / 0.5) + 1 / 3 * math.log(1 / 3 / 0.125),
    ]
    total = (1 - alpha) * (-LOGPROBS[0] - 0.5 * LOGPROBS[1]) + alpha * (kl[0] + 0.5 * kl[1])
    assert loss.total.item() == pytest.approx(total, rel=1e-6)
    assert float(loss.denominator) == 1.5
    assert float(loss.metrics["distill/kl"].total) == pytest.approx(kl[0] + 0.5 * kl[1], rel=1e-6)
    assert float(loss.metrics["distill/covered"].total) == pytest.approx(0.8 + 0.5 * 0.75, rel=1e-6)
    assert float(loss.metrics["ntp/nll"].total) == pytest.approx(-LOGPROBS[0] - 0.5 * LOGPROBS[1], rel=1e-6)
    assert all(not metric.total.requires_grad for metric in loss.metrics.values())
    loss.total.backward()
    assert scores.logprobs_N.grad is not None
    assert scores.candidates_NK is not None
    assert scores.candidates_NK.grad is not None
    assert scores.logprobs_N.grad.tolist() == pytest.approx([-(1 - alpha), -(1 - alpha) * 0.5])
    assert scores.candidates_NK.grad.flatten().tolist() == pytest.approx(
        [-alpha * 0.75, -alpha * 0.25, -alpha * 0.5 * 2 / 3, -alpha * 0.5 / 3]
    )


def test_alpha_zero_is_next_token_prediction_to_the_bit() -> None:
    ntp = build_ntp().compute(build_scores(), build_batch())
    assert torch.equal(build_distill(alpha=0.0, top_k=2).compute(build_scores(), build_batch()).total, ntp.total)


def test_fewer_candidates_may_be_used_but_not_more() -> None:
    loss = build_distill(alpha=1.0, top_k=1).compute(build_scores(), build_batch())
    assert loss.total.item() == pytest.approx(-math.log(0.3) - 0.5 * math.log(0.5), rel=1e-6)
    with pytest.raises(DataError, match="hold 2 tokens for each position, top_k is 3"):
        build_distill(alpha=1.0, top_k=3).compute(build_scores(), build_batch())


def build_model(seed: int) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return prepare_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), "tiny")


def test_over_the_whole_vocabulary_it_is_the_divergence_of_two_models() -> None:
    model, reference = build_model(0), build_model(1)
    document = np.random.default_rng(0).integers(0, 23, 12)
    plain = collate([build_document(document)])
    _, ids_NK, topk_NK = score_top_k(reference, plain, 23)
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(m(torch.from_numpy(document)[None], use_cache=False).logits[0, :-1], -1)
            for m in (_unforested(model), _unforested(reference))
        )
    expected = float((log_q.exp() * (log_q - log_p)).sum())
    ids = np.concatenate([np.zeros((1, 23), dtype=np.int64), ids_NK.numpy()])
    topk = np.concatenate([np.zeros((1, 23), dtype=np.float32), topk_NK.numpy()])
    batch = collate([build_document(document, {"ref_ids": ids, "ref_topk": topk})])
    objective = build_distill(alpha=1.0, top_k=23)
    loss = objective.compute(score(model, batch, objective.needs), batch)
    assert expected > 1.0
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    same = objective.compute(score(reference, batch, objective.needs), batch)
    assert abs(same.total.item()) < 1e-4
    assert float(same.metrics["distill/covered"].total) == pytest.approx(11, rel=1e-5)


def _unforested(model: PreTrainedModel) -> PreTrainedModel:
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    return plain


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"alpha is 1\.2"):
        build_distill(alpha=1.2, top_k=2)
    with pytest.raises(RecipeError, match="top_k is 0"):
        build_distill(alpha=0.5, top_k=0)
