"""The generator against plain loops without a cache, against `transformers`, and against the engine's scores."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import score
from polm.errors import NonFiniteError, UserError
from polm.models.loading import compute_hidden, output_logits, prepare_model
from polm.rollout import generate as module
from polm.rollout import reader
from polm.rollout.generate import Completion, Mixture, SamplingParams, generate
from polm.tokens import Segment, build_completions, collate

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
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
EOS = 1


def build(family: str, **changes: Any) -> PreTrainedModel:
    """Random weights, larger than usual, so that the distributions are far from flat."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    return model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return prepare_model(build("llama"), "llama")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """97 words, decoded with spaces between them."""
    vocab = {f"w{i}" if i != EOS else "<eos>": i for i in range(97)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "w0")), eos_token="<eos>")


@pytest.fixture(scope="module")
def byte_tokens() -> PreTrainedTokenizerFast:
    """An end-of-text token and 96 bytes: printable ASCII up to |, and the two bytes of "é"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    chosen = [c for c in letters if "!" <= c <= "|"] + ["Ġ", "Ã", "©"]
    vocab = {token: i for i, token in enumerate(["<s>", "<eos>", *chosen])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<s>")


def draw_prompts(lengths: list[int], seed: int = 1) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 97, n) for n in lengths]


def token_lists(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_a_loop_without_cache_and_transformers(family: str, words: PreTrainedTokenizerFast) -> None:
    plain = build(family).eval()
    plain.set_attn_implementation("sdpa")
    plain.generation_config.eos_token_id = None
    model = prepare_model(copy.deepcopy(plain), family)
    prompts = draw_prompts([9, 3, 14, 1])
    params = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    found = token_lists(generate(model, words, prompts, params, max_rows=3))

    for prompt, tokens in zip(prompts, found, strict=True):
        path = torch.from_numpy(prompt)[None]
        with torch.no_grad():
            theirs = plain.generate(path, attention_mask=torch.ones_like(path), do_sample=False, max_new_tokens=12)
            for _ in range(12):
                path = torch.cat([path, plain(input_ids=path, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert tokens == path[0, len(prompt) :].tolist()
        assert tokens == theirs[0, len(prompt) :].tolist()
    assert len({token for tokens in found for token in tokens}) > 3


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_that_the_engine_computes(
    family: str, temperature: float, words: PreTrainedTokenizerFast
) -> None:
    """The trainer's log-probabilities of sampled tokens are the sampler's: top-k and top-p do not enter."""
    model = prepare_model(build(family), family)
    prompts = draw_prompts([7, 4, 10])
    params = SamplingParams(max_new_tokens=11, temperature=temperature, top_k=40, top_p=0.9, num_samples=3, seed=5)
    completions = generate(model, words, prompts, params, max_rows=4)
    trees = [
        build_completions(prompt, [c.tokens for c in completions if c.prompt_index == index])
        for index, prompt in enumerate(prompts)
    ]
    with torch.no_grad():
        expected = score(model, collate(trees), temperature=temperature or 1.0).logprobs_N
    found = np.concatenate([c.logprobs for c in completions])
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert found.min() < -1  # not a comparison of zeros


def test_bf16_stays_near_the_engine_in_bf16(llama: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    prompt = draw_prompts([8])[0]
    completions = generate(llama, words, [prompt], SamplingParams(max_new_tokens=10, num_samples=4), bf16=True)
    with torch.no_grad():
        batch = collate([build_completions(prompt, [c.tokens for c in completions])])
        expected = score(llama, batch, bf16=True).logprobs_N
    gap = np.abs(np.concatenate([c.logprobs for c in completions]) - expected.numpy())
    assert gap.mean() < 0.02
    assert gap.max() < 0.1


def test_the_layout_does_not_change_the_result(llama: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    """Rows end at different times (12 stop tokens of 97), leave gaps and are refilled."""
    prompts = draw_prompts([5, 12, 3, 8, 3, 20, 1])
    prompts.append(prompts[1])  # the same prompt again is another request

    def run(seed: int, **limits: Any) -> list[Completion]:
        params = SamplingParams(max_new_tokens=24, num_samples=3, seed=seed, stop_token_ids=tuple(range(10, 22)))
        return generate(llama, words, prompts, params, **limits)

    whole = run(0)
    expected = token_lists(whole)
    lengths = [len(tokens) for tokens in expected]
    assert len(set(lengths)) > 6
    assert 24 in lengths
    assert min(lengths) < 6
    assert [(c.prompt_index, c.sample_index) for c in whole] == [(i, j) for i in range(8) for j in range(3)]
    for max_rows in (1, 2, 5, 9):
        assert token_lists(run(0, max_rows=max_rows)) == expected, max_rows
    row_bytes = 2 * 3 * 2 * 8 * 4 * (20 + 24 - 1)
    assert token_lists(run(0, max_cache_bytes=4 * row_bytes)) == expected
    assert token_lists(run(0, max_cache_bytes=1)) == expected  # one row at least
    assert token_lists(run(1)) != expected
    assert expected[3:6] != expected[21:24]
    assert expected[0] != expected[1]


def test_a_prompt_is_read_once(
    llama: PreTrainedModel, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its samples do not fit into one refill, and when the prefill is cut into several streams."""
    read: list[list[int]] = []
    rows: list[int] = []
    plain_prefill, plain_decoder = reader.prefill, reader.run_decoder

    def counting_prefill(model: PreTrainedModel, prompts: Any, *rest: Any) -> Any:
        read.append([len(prompt) for prompt in prompts])
        return plain_prefill(model, prompts, *rest)

    def counting_decoder(model: PreTrainedModel, tokens_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(tokens_T))
        return plain_decoder(model, tokens_T, *rest)

    monkeypatch.setattr(reader, "prefill", counting_prefill)
    monkeypatch.setattr(reader, "run_decoder", counting_decoder)
    prompts = draw_prompts([6, 9, 4, 7])
    prompts.append(prompts[0])
    params = SamplingParams(max_new_tokens=4, num_samples=5, ignore_eos=True)
    expected = token_lists(generate(llama, words, prompts, params))
    assert read == [[6, 9, 4, 7]]
    assert rows == [26, 25, 25, 25]  # one forward over the prompts, then a token of each row

    read.clear()
    assert token_lists(generate(llama, words, prompts, params, max_rows=3)) == expected
    assert sorted(length for lengths in read for length in lengths) == [4, 6, 7, 9]

    read.clear()
    monkeypatch.setattr(reader, "PREFILL_TOKENS", 13)
    assert token_lists(generate(llama, words, prompts, params)) == expected
    assert read == [[6], [9, 4], [7]]


def test_finished_rows_leave_the_batch_at_once(
    llama: PreTrainedModel, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    plain = reader.run_decoder

    def counting(model: PreTrainedModel, tokens_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(tokens_T))
        return plain(model, tokens_T, *rest)

    monkeypatch.setattr(reader, "run_decoder", counting)
    params = SamplingParams(max_new_tokens=20, num_samples=9, stop_token_ids=tuple(range(10, 22)))
    completions = generate(llama, words, draw_prompts([5]), params)
    lengths = [len(c.tokens) for c in completions]
    assert rows[1:] == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


def test_top_k_1_and_a_tiny_nucleus_are_greedy(llama: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    prompts = draw_prompts([5, 9])
    greedy, top_k, top_p = (
        token_lists(generate(llama, words, prompts, SamplingParams(max_new_tokens=15, seed=3, **choice)))
        for choice in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6})
    )
    assert greedy == top_k == top_p


def test_frequencies_match_the_probabilities(words: PreTrainedTokenizerFast) -> None:
    """First and second token of 3000 samples; chi-square over 8 cells: 24.3 has probability 0.001."""
    model = prepare_model(build("llama", vocab_size=8), "llama")
    prompt = np.array([3, 5, 2])
    params = SamplingParams(max_new_tokens=2, temperature=0.5, num_samples=3000, seed=11, ignore_eos=True)
    drawn = np.array(token_lists(generate(model, words, [prompt], params, max_rows=1000)))

    likeliest = int(np.bincount(drawn[:, 0]).argmax())
    after = drawn[drawn[:, 0] == likeliest, 1]
    assert len(after) > 400
    for path, tokens in ((prompt, drawn[:, 0]), (np.append(prompt, likeliest), after)):
        batch = collate([build_completions(path, [np.array([token]) for token in range(8)])])
        with torch.no_grad():
            expected = score(model, batch, temperature=0.5).logprobs_N.exp().numpy() * len(tokens)
        assert expected.max() > 2 * expected.min()
        assert ((np.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum() < 24.3


def test_stop_strings_that_span_tokens(llama: PreTrainedModel, byte_tokens: PreTrainedTokenizerFast) -> None:
    """Each completion ends with the very token that completes a stop string in its text."""
    prompts = draw_prompts([4, 6])
    free = SamplingParams(max_new_tokens=40, num_samples=4, seed=2, ignore_eos=True)
    whole = generate(llama, byte_tokens, prompts, free)
    assert all(c.finish == "length" and len(c.tokens) == 40 for c in whole)
    stop = (whole[0].text[7:10], whole[5].text[20:25], whole[6].text[11], "never in it")
    params = SamplingParams(max_new_tokens=40, num_samples=4, seed=2, ignore_eos=True, stop=stop)
    cut = generate(llama, byte_tokens, prompts, params, max_rows=3)
    for before, after in zip(whole, cut, strict=True):
        ends = [before.text.find(s) for s in stop if s in before.text]
        if not ends:
            assert after.tokens.tolist() == before.tokens.tolist()
            assert (after.finish, after.text) == ("length", before.text)
            continue
        size = next(
            n for n in range(1, 41) if any(s in byte_tokens.decode(before.tokens[:n].tolist(), True) for s in stop)
        )
        assert after.tokens.tolist() == before.tokens[:size].tolist()
        assert after.logprobs.tolist() == pytest.approx(before.logprobs[:size].tolist(), abs=1e-5)
        assert after.finish == "stop"
        assert before.text.startswith(after.text)
        assert not any(s in after.text for s in stop)
    assert [c.finish for c in cut].count("stop") >= 3


def find_stop(tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...], tokens: list[int]) -> int:
    """The length of the first prefix of `tokens` in which a stop string is found."""
    search = module._StopStrings(tokenizer, stop)
    rows = np.tile(np.array(tokens), (len(tokens), 1))
    return int(search.find(rows, np.arange(1, len(tokens) + 1))[0]) + 1


def test_stop_strings_of_split_characters_specials_and_spaces(
    byte_tokens: PreTrainedTokenizerFast, words: PreTrainedTokenizerFast
) -> None:
    ids = byte_tokens.convert_tokens_to_ids
    a, space, first, second, bos = ids("a"), ids("Ġ"), ids("Ã"), ids("©"), ids("<s>")
    assert find_stop(byte_tokens, ("é",), [a, first, second, a]) == 3
    assert find_stop(byte_tokens, ("aé a",), [a, first, second, space, a]) == 5
    assert find_stop(byte_tokens, ("aa",), [a, bos, bos, bos, bos, bos, bos, a]) == 8
    assert find_stop(byte_tokens, ("a ", "zz"), [a, space, first, second]) == 2
    # The decoder puts the space before the second word once there is one.
    assert find_stop(words, ("w5 ",), [5, 6]) == 2
    assert find_stop(words, ("w5 w6",), [6, 5, EOS, 6]) == 4


def test_stop_tokens_and_lengths(llama: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    prompt = draw_prompts([5])
    free = generate(llama, words, prompt, SamplingParams(max_new_tokens=9, seed=1, ignore_eos=True))[0]
    assert (free.finish, len(free.tokens)) == ("length", 9)
    assert free.text == " ".join(f"w{token}" for token in free.tokens if token != EOS)

    third = int(free.tokens[2])
    assert third not in free.tokens[:2]
    params = SamplingParams(max_new_tokens=9, seed=1, stop_token_ids=(third,))
    stopped = generate(llama, words, prompt, params)[0]
    assert stopped.tokens.tolist() == free.tokens[:3].tolist()
    assert stopped.finish == "stop"
    assert stopped.text == " ".join(f"w{token}" for token in free.tokens[:2])
    # The tokenizer's own end-of-text token needs no mention.
    own = copy.deepcopy(words)
    own.eos_token = f"w{third}"
    assert generate(llama, own, prompt, SamplingParams(max_new_tokens=9, seed=1))[0].finish == "stop"
    # An end on the last token that is allowed is a stop.
    params = SamplingParams(max_new_tokens=3, seed=1, stop_token_ids=(third,))
    assert generate(llama, words, prompt, params)[0].finish == "stop"
    # 64 positions: a prompt of 60 has room for 4.
    near_end = generate(llama, words, draw_prompts([60, 63]), SamplingParams(max_new_tokens=9, ignore_eos=True))
    assert [(len(c.tokens), c.finish) for c in near_end] == [(4, "length"), (1, "length")]


def test_a_limit_for_each_prompt(llama: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    """Each prompt's completions are what they are without it, cut; also where two prompts are the same one."""
    prompts = draw_prompts([5, 8, 3, 62])
    prompts.append(prompts[1])
    params = SamplingParams(max_new_tokens=12, num_samples=2, seed=4, ignore_eos=True)
    whole = generate(llama, words, prompts, params)
    limits = [3, 12, 1, 9, 7]
    for max_rows in (256, 3):
        cut = generate(llama, words, prompts, params, limits=limits, max_rows=max_rows)
        for before, after in zip(whole, cut, strict=True):
            limit = min(limits[after.prompt_index], 64 - len(prompts[after.prompt_index]))
            assert after.tokens.tolist() == before.tokens[:limit].tolist()
            assert (len(after.tokens), after.finish) == (limit, "length")
    # It stands in the place of `max_new_tokens`.
    assert len(generate(llama, words, prompts[:1], SamplingParams(2, ignore_eos=True), limits=[5])[0].tokens) == 5
    for wrong in ([1, 2], [1, 2, 3, 4, 0]):
        with pytest.raises(UserError, match="a number for each prompt, at least 1"):
            generate(llama, words, prompts, params, limits=wrong)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_model_is_left_as_it_was(words: PreTrainedTokenizerFast, bf16: bool) -> None:
    model = prepare_model(build("qwen3"), "qwen3")
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    modes = [part.training for part in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    calls: list[tuple[int, int]] = []
    params = SamplingParams(max_new_tokens=3, num_samples=2, ignore_eos=True)
    generate(
        model, words, draw_prompts([3, 4]), params, bf16=bf16, max_rows=2, progress=lambda *done: calls.append(done)
    )
    assert [part.training for part in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert all(parameter.grad is None for parameter in model.parameters())
    assert calls == [(2, 4), (4, 4)]
    assert generate(model, words, [], params) == []


def test_users_mistakes_are_named(llama: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    params = SamplingParams(max_new_tokens=2)
    for prompts, message in (
        ([[5], []], "prompt 1 is empty"),
        ([[5], [5] * 64], r"prompt 1 has 64 tokens.*64 positions.*shorten the prompt"),
        ([[5, 97]], "prompt 0 has token id 97, the model has ids 0 to 96"),
        ([[-1]], "token id -1"),
    ):
        with pytest.raises(UserError, match=message):
            generate(llama, words, prompts, params)
    with pytest.raises(UserError, match="max_rows is 0"):
        generate(llama, words, [[5]], params, max_rows=0)
    with pytest.raises(UserError, match="stop token 200"):
        generate(llama, words, [[5]], SamplingParams(max_new_tokens=2, stop_token_ids=(200,)))
    wrong: dict[str, Any] = {
        "max_new_tokens": 0,
        "temperature": float("nan"),
        "top_p": 0.0,
        "top_k": -1,
        "stop": ("a", ""),
        "num_samples": 0,
        "seed": -1,
    }
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"sampling: {name} is"):
            SamplingParams(**{"max_new_tokens": 1, name: value})
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2 of 2 rows"):
        generate(broken, words, [[5], [6]], params)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_no_completion_may_begin_with(
    llama: PreTrainedModel, words: PreTrainedTokenizerFast, temperature: float
) -> None:
    prompts = [[5, 9, 11], [7, 8], [20]]
    free = generate(llama, words, prompts, SamplingParams(6, temperature, num_samples=4, seed=3))
    banned = tuple(sorted({int(c.tokens[0]) for c in free}))
    params = SamplingParams(6, temperature, num_samples=4, seed=3, not_first=banned)
    bound = generate(llama, words, prompts, params)
    assert not {int(c.tokens[0]) for c in bound} & set(banned)
    # Only the first token is restricted, and its log-probability is that of the whole distribution.
    for completion in bound[::4]:
        prompt = np.array(prompts[completion.prompt_index])
        batch = collate([build_completions(prompt, [np.array([token]) for token in range(97)])])
        with torch.no_grad():
            logp = score(llama, batch).logprobs_N
        first = int(completion.tokens[0])
        assert completion.logprobs[0] == pytest.approx(float(logp[first]), abs=1e-5)
        if temperature == 0.0:
            logp[list(banned)] = float("-inf")
            assert first == int(logp.argmax())


# ---- two models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    """Another layout of another family with the same words, unlike the first in what it would say."""
    model = build("qwen3", num_hidden_layers=2, num_key_value_heads=4, max_position_embeddings=48)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight.roll(5, 0))
    return prepare_model(model, "other")


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_a_mixture_equals_a_loop_without_cache(
    temperature: float, llama: PreTrainedModel, other: PreTrainedModel, words: PreTrainedTokenizerFast
) -> None:
    """Token by token the log-probabilities are those of the renormalised product p^0.7 q^0.3, tempered, over both
    models' own forward passes; greedy takes its best token."""
    prompts = draw_prompts([7, 4, 10])
    params = SamplingParams(max_new_tokens=9, temperature=temperature, num_samples=3, seed=4)
    completions = generate(llama, words, prompts, params, max_rows=4, mixture=Mixture(other, 0.3))
    assert len(completions) == 9
    for completion in completions:
        prompt = prompts[completion.prompt_index]
        path = np.concatenate([prompt, completion.tokens])
        with torch.no_grad():
            logits = [
                output_logits(model, compute_hidden(model, collate([(Segment(path),)])))[len(prompt) - 1 : -1]
                for model in (llama, other)
            ]
        mixed = 0.7 * torch.log_softmax(logits[0], -1) + 0.3 * torch.log_softmax(logits[1], -1)
        expected = torch.log_softmax(mixed / (temperature or 1.0), -1)
        tokens = torch.from_numpy(completion.tokens)
        own = expected.gather(1, tokens[:, None])[:, 0].numpy()
        assert np.abs(own - completion.logprobs).max() < 1e-4
        if temperature == 0.0:
            assert torch.equal(expected.argmax(-1), tokens)


def test_ends_of_a_mixture(llama: PreTrainedModel, other: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    """A share of 0 is the first model, of 1 the second, also where rows end, move and are refilled."""
    prompts = draw_prompts([3, 8, 5, 8, 2])
    params = SamplingParams(max_new_tokens=12, num_samples=3, seed=2, stop_token_ids=tuple(range(2, 14)))
    alone = [token_lists(generate(model, words, prompts, params)) for model in (llama, other)]
    for max_rows in (2, 4, 256):
        for share in (0.0, 1.0):
            mixture = Mixture(other, share)
            found = token_lists(generate(llama, words, prompts, params, max_rows=max_rows, mixture=mixture))
            assert found == alone[int(share)]
    half = [
        token_lists(generate(llama, words, prompts, params, max_rows=n, mixture=Mixture(other, 0.5))) for n in (2, 256)
    ]
    assert half[0] == half[1]
    assert half[0] not in alone


def test_a_mixture_in_the_memory_of_one(
    llama: PreTrainedModel, other: PreTrainedModel, words: PreTrainedTokenizerFast
) -> None:
    """The bytes are for both caches; the room is that of the model with fewer positions; modes come back."""
    prompts = draw_prompts([6, 6, 6])
    params = SamplingParams(max_new_tokens=60, temperature=0.0, ignore_eos=True)
    llama.train()
    completions = generate(llama, words, prompts, params, max_cache_bytes=1, mixture=Mixture(other, 0.5))
    assert [len(c.tokens) for c in completions] == [42] * 3  # 48 positions less 6
    assert llama.training
    whole = generate(llama, words, prompts, params, mixture=Mixture(other, 0.5))
    assert token_lists(whole) == token_lists(completions)


def test_mixtures_that_cannot_be(llama: PreTrainedModel, words: PreTrainedTokenizerFast) -> None:
    narrow = prepare_model(build("llama", vocab_size=90), "narrow")
    with pytest.raises(UserError, match="the models have 97 and 90 token ids"):
        generate(llama, words, draw_prompts([3]), SamplingParams(max_new_tokens=2), mixture=Mixture(narrow, 0.5))
    with pytest.raises(UserError, match=r"share is 1.5; expected a number from 0"):
        Mixture(narrow, 1.5)
