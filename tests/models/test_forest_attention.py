"""A packed, prompt-shared forest gives the log-probabilities and gradients of each sequence run alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from polm.engine.score import score
from polm.models import forest_attention
from polm.models.loading import prepare_model
from polm.tokens import build_completions, build_document, collate

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mistral": {"sliding_window": 5},
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def alone(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("query_block", [128, 4])
def test_forest_equals_each_sequence_alone(family: str, query_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest_attention, "QUERY_BLOCK", query_block)
    monkeypatch.setattr(forest_attention, "SMALL_AREA", 64)  # several groups even at this size
    model = build(family)
    rng = np.random.default_rng(1)
    stranger, prompt = rng.integers(0, 97, 17), rng.integers(0, 97, 9)
    children = [rng.integers(0, 97, n) for n in (12, 5, 1)]
    prompt_size = len(prompt)

    doc = alone(model, stranger.tolist())
    kids = [alone(model, [*prompt, *child])[prompt_size - 1 :] for child in children]
    expected = torch.cat([doc, *kids])
    pull = torch.linspace(-1, 1, len(expected))
    (expected * pull).sum().backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    prepare_model(model, family)
    batch = collate([build_document(stranger), build_completions(prompt, children)])
    scores = score(model, batch)
    assert torch.allclose(scores.logprobs_N, expected, atol=2e-6)
    (scores.logprobs_N * pull).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected_grads:
            assert parameter.grad is not None, name
            gap = (parameter.grad - expected_grads[name]).abs().max() / expected_grads[name].abs().max().clamp(min=1e-6)
            assert gap < 2e-5, (name, gap)


def test_grandchildren_see_the_whole_path() -> None:
    model = build("qwen3")
    from polm.tokens import Segment

    rng = np.random.default_rng(2)
    a, b, c = (rng.integers(0, 97, n) for n in (4, 3, 5))
    expected = alone(model, [*a, *b, *c])[6:]
    prepare_model(model, "qwen3")
    tree = (
        Segment(a),
        Segment(b, parent=0),
        Segment(rng.integers(0, 97, 6), parent=0),
        Segment(c, parent=1, streams={"weights": np.ones(5, dtype=np.float32)}),
    )
    assert torch.allclose(score(model, collate([tree])).logprobs_N, expected, atol=2e-6)


def test_bf16_stays_near_float32() -> None:
    model = prepare_model(build("llama"), "llama")
    batch = collate([build_document(np.arange(20))])
    assert (score(model, batch, bf16=True).logprobs_N - score(model, batch).logprobs_N).abs().max() < 0.05


@pytest.mark.parametrize(("name", "value"), [("KEPT_WEIGHTS", 0), ("KEPT_WEIGHTS", 3), ("QUERY_BLOCK", 5)])
def test_what_is_kept_for_the_backward_pass_changes_nothing(
    name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are kept and weights that are computed again give the same bits; the blocks only other rounding."""
    model = prepare_model(build("qwen3"), "qwen3")
    rng = np.random.default_rng(3)
    prompt, *children = (rng.integers(0, 97, n) for n in (9, 12, 5, 30))
    batch = collate([build_document(rng.integers(0, 97, 17)), build_completions(prompt, children)])

    def compute_gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        score(model, batch).logprobs_N.sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    monkeypatch.setattr(forest_attention, "KEPT_WEIGHTS", 1 << 20)
    monkeypatch.setattr(forest_attention, "SMALL_AREA", 64)
    expected = compute_gradients()
    monkeypatch.setattr(forest_attention, name, value)
    found = compute_gradients()
    for key, gradient in expected.items():
        if name == "KEPT_WEIGHTS":
            assert torch.equal(found[key], gradient), key
        else:
            assert torch.allclose(found[key], gradient, atol=1e-5 * float(gradient.abs().max())), key


def test_round_sizes_change_only_rounding() -> None:
    """What bf16 asks for, seen in float32: padded blocks, queries and keys reach no result."""
    rng = np.random.default_rng(4)
    batch = collate([build_document(rng.integers(0, 97, n)) for n in (40, 37, 21, 20, 19, 18, 9, 9, 8)])
    heads = [torch.randn(n, batch.num_tokens, 8, requires_grad=True) for n in (4, 2, 2)]
    results = []
    for round_up in (False, True):
        plan = forest_attention.build_plan(batch, 4, round_up=round_up)
        out = plan.attend(0, *heads, 0.3, None)
        results.append([out, *torch.autograd.grad(out.square().sum(), heads)])
    assert [g.num_keys for g in plan.groups] == [g.num_keys // 16 * 16 for g in plan.groups]
    for plain, rounded in zip(*results, strict=True):
        assert torch.allclose(plain, rounded, atol=1e-5)
