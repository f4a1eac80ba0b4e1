"""Recorded decoding steps give what the steps give, over batches that shrink, move and are filled again.

There is no CUDA here. A trace of the operations (`make_fx`) stands in for a CUDA graph: it too holds nothing of the
host's code, and reads and writes the same memory when it is played.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from polm.models.adapters import attach_adapter
from polm.models.kernels import install, proof
from polm.models.loading import prepare_model
from polm.recipe import AdapterSettings
from polm.rollout import reader, recorded
from polm.rollout.generate import Completion, Mixture, SamplingParams, generate
from polm.rollout.recorded import RecordedSteps, choose_recorder, choose_size

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Tracer:
    """Records by tracing, and counts."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, function: Callable[..., None], buffers: Buffers) -> Callable[[], None]:
        def run(tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            function(tokens, positions, logits)
            return logits

        trace = make_fx(run)(*buffers)
        self.recorded += 1

        def play() -> None:
            self.played += 1
            trace(*buffers)

        return play


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    found = Tracer()
    monkeypatch.setattr(reader, "choose_recorder", lambda _: found)
    # They are no operations of torch, so a trace does not see them.
    monkeypatch.setattr(install, "load_library", lambda: None)
    monkeypatch.setattr(proof, "_found", {})
    monkeypatch.setattr(recorded, "_given_up", set())
    return found


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    vocab = {f"w{i}" if i != 1 else "<eos>": i for i in range(97)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "w0")), eos_token="<eos>")


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    return prepare_model(model, family)


def draw(model: PreTrainedModel, words: PreTrainedTokenizerFast, new_tokens: int = 40, **more: Any) -> list[Completion]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 97, n) for n in (3, 9, 1, 100, 14)]
    params = SamplingParams(max_new_tokens=new_tokens, num_samples=3, seed=5, temperature=0.9)
    return generate(model, words, prompts, params, max_rows=6, **more)


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    assert [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "choose_recorder", lambda _: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_give_the_same_completions(
    family: str, tracer: Tracer, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows end at different times, slots are moved and filled again, and the longest row passes 128 positions."""
    model = build(family)
    found = draw(model, words)
    assert proof.describe_proofs() == "CUDA graphs: in use"
    assert tracer.recorded >= 3
    assert tracer.played > 4 * tracer.recorded
    without(monkeypatch)
    assert_same(found, draw(model, words))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_stand_before_each_row(
    kind: str, tracer: Tracer, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"prompt": {"kind": "prompt", "virtual_tokens": 3}, "prefix": {"kind": "prefix", "virtual_tokens": 3}}
    model = attach_adapter(build("llama"), AdapterSettings(**settings[kind]), "llama", seed=0)
    found = draw(model, words)
    assert tracer.played
    without(monkeypatch)
    assert_same(found, draw(model, words))


def test_two_models_have_recordings_of_their_own(
    tracer: Tracer, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = build("llama"), build("qwen3")
    found = draw(one, words, mixture=Mixture(other, 0.3))
    assert tracer.played
    without(monkeypatch)
    assert_same(found, draw(one, words, mixture=Mixture(other, 0.3)))


def test_a_recording_that_fails_costs_nothing_but_itself(
    tracer: Tracer, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = build("llama")
    without(monkeypatch)
    expected = draw(model, words)
    monkeypatch.setattr(reader, "choose_recorder", lambda _: fail)
    assert_same(draw(model, words), expected)
    reason = "cannot record here: RuntimeError: operation not permitted when stream is capturing"
    assert proof.describe_proofs() == f"CUDA graphs: {reason}"
    assert tracer.recorded == 0


def test_a_recording_that_gives_other_numbers_is_given_up(
    tracer: Tracer, words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(*_: object) -> Callable[[], None]:
        return lambda: None

    model = build("llama")
    without(monkeypatch)
    expected = draw(model, words)
    monkeypatch.setattr(reader, "choose_recorder", lambda _: forget)
    assert_same(draw(model, words), expected)
    assert "CUDA graphs: differ from the steps that they record by 1" in proof.describe_proofs()
    assert tracer.recorded == 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda positions: int(positions.max()),
        lambda positions: positions.nonzero().float().mean(),
        lambda positions: positions[positions > 3].float().mean(),
        lambda positions: positions.unique().float().mean(),
        lambda positions: positions.bincount().float().mean(),
    ],
    ids=["number", "nonzero", "mask", "unique", "bincount"],
)
def test_a_step_that_waits_for_the_device_is_not_recorded(
    wait: Callable[[torch.Tensor], Any], tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tried, for a capture that fails may leave a process worse off."""
    monkeypatch.setattr(recorded, "_given_up", set())

    def look(tokens_R: torch.Tensor, positions_R: torch.Tensor, end: int) -> torch.Tensor:
        return torch.zeros(len(tokens_R), 5) + wait(positions_R) + end

    steps = RecordedSteps(look, tracer, 4, 200, 5, torch.device("cpu"))
    for _ in range(3):
        found = steps.run(np.array([1, 2]), np.array([3, 7]))
    assert torch.equal(found, look(torch.zeros(2), torch.tensor([3, 7]), 128))
    assert tracer.recorded == 0
    assert steps.given_up
    assert recorded._given_up == {torch.device("cpu")}
    assert "the step waits for the device (aten." in proof.describe_proofs()


def test_a_device_on_which_it_failed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_given_up", {torch.device("cuda:0")})
    assert choose_recorder(torch.device("cuda:0")) is None


def test_sizes_by_hand() -> None:
    assert [choose_size(n, 1, 100, 1000)[0] for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 100]
    ends = (1, 128, 129, 160, 161, 257, 900)
    assert [choose_size(1, n, 100, 1000)[1] for n in ends] == [128, 128, 160, 160, 192, 320, 1000]
    assert choose_size(1, 5, 100, 40)[1] == 40


def test_a_cpu_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_recorder(torch.device("cpu")) is None
    monkeypatch.setenv("POLM_KERNELS", "off")
    assert choose_recorder(torch.device("cuda")) is None
