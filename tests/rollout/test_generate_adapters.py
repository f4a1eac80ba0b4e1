"""Generation under an adapter: the log-probabilities of the trainer, the tokens of peft's own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import score
from polm.errors import UserError
from polm.models.adapters import adapter_parameters, as_given, attach_adapter, find_adapter
from polm.models.forest_attention import FOREST
from polm.models.loading import prepare_model
from polm.recipe_adapter import AdapterSettings
from polm.rollout import generate as module
from polm.rollout.generate import Completion, SamplingParams, generate
from polm.tokens import build_completions, collate

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 3},
    "dora": {"kind": "lora", "rank": 3, "dora": True},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "virtual_tokens": 4},
    "prompt": {"kind": "prompt", "virtual_tokens": 4},
    "p_tuning": {"kind": "p_tuning", "virtual_tokens": 4, "encoder_width": 6},
}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {}, "gemma3_text": WINDOWS}
EOS = 1


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    vocab = {f"w{i}" if i != EOS else "<eos>": i for i in range(97)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "w0")), eos_token="<eos>")


def build(family: str, kind: str) -> PreTrainedModel:
    """An adapter that has moved far on a random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    model = attach_adapter(prepare_model(model, family), AdapterSettings(**KINDS[kind]), family, seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def draw_prompts(lengths: list[int]) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return [rng.integers(2, 97, n) for n in lengths]


def draw(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **more: Any) -> list[Completion]:
    params = SamplingParams(max_new_tokens=12, num_samples=3, seed=5, **more)
    # Two rows only, so that slots are freed, moved and filled again.
    return generate(model, tokenizer, draw_prompts([3, 9, 1, 14]), params, max_rows=2)


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_logprobs_are_those_of_the_trainer(family: str, kind: str, words: PreTrainedTokenizerFast) -> None:
    model = build(family, kind)
    completions = draw(model, words)
    prompts = draw_prompts([3, 9, 1, 14])
    trees = [
        build_completions(prompt, [c.tokens for c in completions if c.prompt_index == i])
        for i, prompt in enumerate(prompts)
    ]
    with torch.no_grad():
        expected = score(model, collate(trees)).logprobs_N
    found = torch.from_numpy(np.concatenate([c.logprobs for c in completions]))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_greedy_is_what_peft_writes(family: str, kind: str, words: PreTrainedTokenizerFast) -> None:
    """By peft's forward over the whole text, token by token, without a cache."""
    model = build(family, kind)
    adapter = find_adapter(model)
    assert adapter is not None
    prompts = draw_prompts([3, 9])
    completions = generate(model, words, prompts, SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True))
    model.eval().set_attn_implementation("eager")
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = prompt.tolist()
        for _ in range(8):
            with torch.no_grad():
                logits = adapter.wrapper(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
        assert completion.tokens.tolist() == ids[len(prompt) :]
    model.set_attn_implementation(FOREST)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_within_as_given_the_base_writes(kind: str, words: PreTrainedTokenizerFast) -> None:
    model, base = build("qwen3", kind), build("qwen3", "lora")
    with as_given(model):
        mine = draw(model, words)
    with as_given(base):
        plain = draw(base, words)
    assert [c.tokens.tolist() for c in mine] == [c.tokens.tolist() for c in plain]
    assert [c.tokens.tolist() for c in draw(model, words)] != [c.tokens.tolist() for c in plain]


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_are_read_once_a_call(
    kind: str, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", kind)
    calls = []
    original = module.read_virtual
    monkeypatch.setattr(module, "read_virtual", lambda m: calls.append(1) or original(m))
    draw(model, words)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_bf16_stays_near_float32(kind: str, words: PreTrainedTokenizerFast) -> None:
    model = build("llama", kind)
    prompts = draw_prompts([3, 9])
    params = SamplingParams(max_new_tokens=6, seed=2)
    completions = generate(model, words, prompts, params, bf16=True)
    trees = [build_completions(p, [c.tokens]) for p, c in zip(prompts, completions, strict=True)]
    with torch.no_grad():
        found = score(model, collate(trees), bf16=True).logprobs_N
        expected = score(model, collate(trees)).logprobs_N
    sampled = torch.from_numpy(np.concatenate([c.logprobs for c in completions]))
    assert float((found - expected).abs().max()) < 0.5
    assert float((sampled - expected).abs().max()) < 0.5


def test_virtual_tokens_take_room(words: PreTrainedTokenizerFast) -> None:
    """64 positions, 4 of them virtual: a prompt of 59 leaves room for one token, one of 60 for none."""
    model = build("llama", "prompt")
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    (completion,) = generate(model, words, draw_prompts([59]), params)
    assert len(completion.tokens) == 1
    with pytest.raises(UserError, match="has 60 tokens, which leaves no room"):
        generate(model, words, draw_prompts([60]), params)
