"""A decoder with the kernels against the same decoder without, and where they are not used."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from polm.engine import head
from polm.engine.fit import accumulate, set_activation_checkpointing
from polm.engine.score import score
from polm.models.kernels import build, install, rows
from polm.models.kernels.build import explain_absence, has_pairs
from polm.models.kernels.install import kernels_while_sampling
from polm.models.loading import prepare_model
from polm.objectives.ntp import build_ntp
from polm.tokens import Needs, TokenBatch, build_completions, build_document, collate

needs_kernels = pytest.mark.skipif(explain_absence() is not None, reason=f"no row kernels: {explain_absence()}")
SHAPE: dict[str, Any] = {
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
# What of each family is replaced: layers' norms and the last one, feed-forwards, attentions.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({}, 7 + 3 + 3),
    "qwen2": ({}, 7 + 3 + 3),
    "qwen3": ({}, 7 + 6 + 3 + 3),  # and the norms of the heads
    "mistral": ({"sliding_window": 5}, 7 + 3 + 3),
    "olmo2": ({}, 7 + 6 + 3),  # its attention is its own
    "smollm3": ({"no_rope_layer_interval": 2}, 7 + 3),
    "gemma3_text": ({"sliding_window": 6, "layer_types": ["sliding_attention"] * 3}, 0),
}


def build_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **FAMILIES[family][0]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1.0 + 0.3 * torch.randn_like(parameter))
    return prepare_model(model, family)


def build_batch() -> TokenBatch:
    ids = torch.randint(1, 97, (60,), generator=torch.Generator().manual_seed(1)).numpy()
    return collate([build_document(ids[:20]), build_completions(ids[20:30], [ids[30:45], ids[45:60]])])


def switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (build, install, rows, head):
        monkeypatch.setattr(module, "load_library", lambda: None)


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_replaced_where_their_code_is_known(family: str) -> None:
    model = build_model(family)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert sum("forward" in vars(module) for module in linear) == (len(linear) if has_pairs() else 0)
    others = [module for module in model.modules() if not isinstance(module, torch.nn.Linear)]
    assert sum("forward" in vars(module) for module in others) == FAMILIES[family][1]


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_training_is_untouched(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is the parity mode: the same bits with the kernels and without."""
    model, batch = build_model(family), build_batch()
    with_kernels = score(model, batch).logprobs_N
    switch_off(monkeypatch)
    assert torch.equal(with_kernels, score(model, batch).logprobs_N)


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_in_float32_gives_equal_numbers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build_model(family), build_batch()
    with torch.no_grad(), kernels_while_sampling():
        with_kernels = score(model, batch).logprobs_N
    switch_off(monkeypatch)
    torch.testing.assert_close(with_kernels, score(model, batch).logprobs_N.detach(), rtol=1e-5, atol=1e-5)


def measure_error(model: PreTrainedModel, exact: dict[str, torch.Tensor], batch: TokenBatch) -> float:
    """Relative distance of the bf16 gradients of all weights to the float64 ones."""
    accumulate(model, [batch], build_ntp(), 1.0, True)
    gaps = [(p.grad.double() - exact[name]).norm() ** 2 for name, p in model.named_parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return float(sum(gaps)) ** 0.5 / float(sum(g.norm() ** 2 for g in exact.values())) ** 0.5


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gradients_are_as_near_to_float64_as_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build_model(family), build_batch()
    double = copy.deepcopy(model).double()
    accumulate(double, [batch], build_ntp(), 1.0, False)
    exact = {name: p.grad for name, p in double.named_parameters() if p.grad is not None}
    with_kernels = measure_error(model, exact, batch)
    switch_off(monkeypatch)
    assert 0.0 < with_kernels < 1.2 * measure_error(model, exact, batch) < 0.1


@needs_kernels
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bf16_entropy_and_candidates(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the head gives, in several chunks and with none of them kept."""
    model, batch = build_model("qwen3"), build_batch()
    needs = Needs(entropy=True, candidates="top")
    top = torch.randint(0, 97, (batch.num_tokens, 4), generator=torch.Generator().manual_seed(2))
    batch = batch.with_streams(top=top)
    found = []
    for case in ("whole", "chunks", "without"):
        with monkeypatch.context() as patch:
            if case != "whole":
                patch.setattr(head, "MAX_LOGITS", 97 * 7)
                patch.setattr(head, "KEPT_LOGITS", 0)
                patch.setattr(head, "KEPT_BYTES", 0)
            if case == "without":
                switch_off(patch)
            scores = score(model, batch, needs, temperature=temperature, bf16=True)
            assert scores.entropy_N is not None
            assert scores.candidates_NK is not None
            (scores.logprobs_N.sum() + 0.3 * scores.entropy_N.sum() + 0.1 * scores.candidates_NK.sum()).backward()
        grad = model.get_output_embeddings().weight.grad.clone()
        model.zero_grad(set_to_none=True)
        found.append((scores.logprobs_N.detach(), scores.entropy_N.detach(), scores.candidates_NK.detach(), grad))
    for one, other, without in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(one, without, rtol=5e-2, atol=5e-2)


@needs_kernels
def test_checkpointed_layers_give_the_same_bits() -> None:
    """They are computed again outside of the forward pass, where autocast alone says what was used."""
    model, batch = build_model("qwen3"), build_batch()
    grads = []
    for enabled in (False, True):
        set_activation_checkpointing(model, enabled)
        model.train()
        accumulate(model, [batch], build_ntp(), 1.0, True)
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@needs_kernels
def test_a_copy_calls_its_own_weights() -> None:
    model, batch = build_model("qwen3"), build_batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
        mine, theirs = score(model, batch, bf16=True), score(other, batch, bf16=True)
    assert not torch.allclose(mine.logprobs_N, theirs.logprobs_N, atol=1e-2)


def ask(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"HOME": "/tmp", **environment}
    )
    return run.stdout.strip()


def test_the_switch_and_a_missing_compiler_are_named(tmp_path: Path) -> None:
    code = "from polm.models.kernels.build import *; print(load_library(), describe_kernels(), explain_absence())"
    assert ask(code, POLM_KERNELS="off", PATH="/usr/bin:/bin") == "None off POLM_KERNELS is off"
    assert "no C++ compiler" in ask(code, PATH=str(tmp_path))


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\necho "no such flag" >&2\nexit 1\n')
    fake.chmod(0o755)
    code = "from polm.models.kernels.build import *; print(explain_absence())"
    found = ask(code, PATH=f"{tmp_path}:/usr/bin:/bin", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "could not build them: no such flag" in found
