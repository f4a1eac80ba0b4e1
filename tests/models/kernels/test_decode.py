"""The kernels of a decoding step against the formula, and the generator's layers that take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from polm.engine.score import autocast, score
from polm.errors import ModelError
from polm.models.adapters import attach_adapter
from polm.models.halved import halve_matrices
from polm.models.kernels import install
from polm.models.kernels.build import explain_absence, has_pairs
from polm.models.kernels.decode import attend_past, can_attend, multiply_few_rows
from polm.models.kernels.install import kernels_while_sampling, multiply_while_sampling, takes_kernels
from polm.models.loading import prepare_model
from polm.recipe import AdapterSettings
from polm.rollout.cache import CacheShape, DecodeCache
from polm.rollout.reader import build_readers
from polm.tokens import build_document, collate

pytestmark = pytest.mark.skipif(
    not has_pairs(), reason=explain_absence() or "this processor has no AVX512-BF16, or has AMX besides"
)
ROUNDING = 2.0**-8  # of bfloat16, relative


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# Whole loads of 32 numbers and rests; fewer columns than a tile has, and more than a block; enough for two threads.
@pytest.mark.parametrize(("columns", "depth"), [(1, 8), (16, 32), (37, 52), (100, 384), (301, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_every_number_of_rows(columns: int, depth: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    weight, bias = draw(columns, depth, seed=1), torch.randn(columns, generator=torch.Generator().manual_seed(2))
    for rows in (*range(1, 22), 64):
        x = draw(rows, depth, seed=rows)
        for more in (None, bias):
            exact = x.double() @ weight.double().t() + (0.0 if more is None else more.double())
            found = multiply_few_rows(x, weight, more, dtype)
            assert found.dtype == dtype
            tolerance = 2e-6 if dtype == torch.float32 else ROUNDING
            assert float((found.double() - exact).abs().max()) <= tolerance * float(exact.abs().max()) + 1e-5


def test_products_do_not_depend_on_threads_or_on_the_other_rows() -> None:
    weight, x = draw(301, 1000, seed=1), draw(13, 1000, seed=2)
    torch.set_num_threads(2)
    whole = multiply_few_rows(x, weight, None, torch.float32)
    assert torch.equal(whole[:4], multiply_few_rows(x[:4], weight, None, torch.float32))
    torch.set_num_threads(1)
    assert torch.equal(whole, multiply_few_rows(x, weight, None, torch.float32))


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(6, 2, 64), (4, 4, 32), (8, 1, 96)])
def test_each_row_attends_to_its_own_past(window: int | None, heads: int, key_heads: int, width: int) -> None:
    assert can_attend(width)
    rows = (0, 1, 15, 16, 17, 33, 69)  # positions: pasts of fewer keys than a vector has, of just as many, and more
    keys, values = draw(9, key_heads, 70, width, seed=1), draw(9, key_heads, 70, width, seed=2)
    before = keys.clone()
    query, key, value = (draw(7, n, width, seed=3 + n) for n in (heads, key_heads, key_heads))
    out = attend_past(query, key, value, keys, values, torch.tensor(rows), scale=0.2, window=window)
    for row, place in enumerate(rows):
        assert torch.equal(keys[row, :, place], key[row])
        assert torch.equal(values[row, :, place], value[row])
        keys[row, :, place] = before[row, :, place]  # to see below that nothing else was written
        first = 0 if window is None else max(0, place + 1 - window)
        for head in range(heads):
            own = head // (heads // key_heads)
            past = torch.cat([before[row, own, first:place], key[row, own : own + 1]]).double()
            seen = torch.cat([values[row, own, first:place], value[row, own : own + 1]]).double()
            exact = torch.softmax(past @ query[row, head].double() * 0.2, 0) @ seen
            assert float((out[row, head].double() - exact).abs().max()) <= ROUNDING * float(exact.abs().max())
    assert torch.equal(keys, before)


def test_a_number_that_is_not_finite_stays_so() -> None:
    keys, values = draw(1, 1, 20, 32, seed=1), draw(1, 1, 20, 32, seed=2)
    keys[0, 0, 3, 0] = float("nan")
    out = attend_past(
        *(draw(1, 1, 32, seed=s) for s in (3, 4, 5)), keys, values, torch.tensor([19]), scale=1.0, window=None
    )
    assert not torch.isfinite(out).any()
    x = draw(2, 40)
    x[1, 7] = float("inf")
    found = multiply_few_rows(x, draw(5, 40, seed=1).abs() + 1, None, torch.float32)
    assert torch.isfinite(found[0]).all()
    assert torch.isinf(found[1]).all()


def build_model(family: str = "qwen3", **more: Any) -> PreTrainedModel:
    shape = {
        **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0},
        **more,
    }
    torch.manual_seed(0)
    return prepare_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)), family)


def decode(model: PreTrainedModel, *, steps: int = 5, whole: bool | None = None) -> Tensor:
    """Logits of three rows that begin with different prompts and are fed the same tokens then.

    whole   whether all layers are one call; False: layer by layer; None: not looked at
    """
    prompts = [np.arange(1, 1 + n) for n in (3, 9, 20)]
    with torch.no_grad(), autocast("cpu", True), kernels_while_sampling():
        (reader,) = build_readers([model], [None], prompts, [steps] * 3, True, 3, 1 << 20)
        if whole is False:
            reader.stack = None
        elif whole:
            assert reader.stack is not None
        found = [reader.read_prompts(np.arange(3), np.arange(3), waiting=False)]
        for step in range(steps - 1):
            positions = np.array([len(ids) + step for ids in prompts])
            found.append(reader.read_tokens(np.full(3, 30 + step), positions))
    return torch.stack(found)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "qwen2": {},  # its projections have biases
    "qwen3": {},  # with norms of single heads
    "mistral": {"sliding_window": 7},
    "olmo2": {},  # its attention is its own, as is gemma3's: float32 in it, more norms
    "gemma3_text": {},
}
WHOLE = ("llama", "qwen2", "qwen3", "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_decodes_as_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(family, **FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases of 0 and norms of 1 would hide a mistake
            if "bias" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    by_layers = decode(model, whole=False)
    monkeypatch.setattr(install, "has_pairs", lambda: False)
    monkeypatch.setattr("polm.rollout.reader.can_attend", lambda _: False)
    without = decode(model)
    monkeypatch.undo()
    assert by_layers.dtype == without.dtype == torch.float32
    near = 4 * ROUNDING * float(without.abs().max())
    assert 0 < float((by_layers - without).abs().max()) <= near
    if family in WHOLE:
        whole = decode(model, whole=True)
        assert torch.equal(whole[0], by_layers[0])  # prompts are read by the layers
        assert 0 < float((whole - without).abs().max()) <= near
        assert float((whole - by_layers).abs().max()) <= near


def test_one_call_is_not_made_of_what_it_would_leave_out() -> None:
    def read_stack(model: PreTrainedModel, *, bf16: bool = True) -> Any:
        with torch.no_grad(), autocast("cpu", bf16), kernels_while_sampling():
            return build_readers([model], [None], [np.arange(1, 5)], [3], bf16, 3, 1 << 20)[0].stack

    assert read_stack(build_model()) is not None
    assert read_stack(build_model(), bf16=False) is None
    assert read_stack(build_model(head_dim=24)) is None  # its attention is not one of the kernels'
    assert read_stack(build_model("olmo2")) is None
    hooked = build_model()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert read_stack(hooked) is None
    adapted = build_model()
    layer = adapted.model.layers[0].self_attn

    class Adapter(torch.nn.Linear):
        pass

    layer.v_proj = Adapter(64, 64)
    assert read_stack(adapted) is None
    layer.v_proj = torch.nn.Linear(64, 64)  # put there after the kernels were: nobody has looked at it
    assert read_stack(adapted) is None
    narrow = build_model()
    narrow.model.rotary_emb.inv_freq = narrow.model.rotary_emb.inv_freq[:8]  # half of each head would be turned
    assert read_stack(narrow) is None
    odd = build_model()
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double):
        assert read_stack(cast(build_model("qwen2"))) is None  # norms and biases would be read as float32
    odd.model.layers[1].input_layernorm.variance_epsilon = 0.1
    assert read_stack(odd) is None


def test_products_are_taken_while_sampling_in_bf16_only() -> None:
    x, weight = torch.randn(3, 64), torch.nn.Parameter(torch.randn(8, 64))
    with torch.no_grad(), autocast("cpu", True):
        assert multiply_while_sampling(x, weight, None, torch.float32) is None
    with torch.no_grad(), kernels_while_sampling():
        assert multiply_while_sampling(x, weight, None, torch.float32) is None
    with kernels_while_sampling(), autocast("cpu", True):
        assert multiply_while_sampling(x, weight, None, torch.float32) is None  # a gradient is asked for
        with torch.no_grad():
            few, many = (multiply_while_sampling(x.repeat(n, 1), weight, None, torch.float32) for n in (1, 100))
    assert few is not None
    assert many is not None
    torch.testing.assert_close(many, few.repeat(100, 1), rtol=1e-2, atol=1e-2)  # the library's is rounded to bf16


def test_weights_are_rounded_once_in_all_of_the_sampling() -> None:
    model, copies = build_model(), []
    to = Tensor.to

    def watch(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self, torch.nn.Parameter) and args == (torch.bfloat16,):
            copies.append(id(self))
        return to(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", watch)
        decode(model)
    assert len(copies) == len(set(copies)) == 2 * 7 + 1


def test_the_cache_is_in_bf16_for_heads_that_the_kernel_takes() -> None:
    model = build_model()
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        (reader,) = build_readers([model], [None], [np.arange(1, 5)], [3], bf16, 3, 1 << 20)
        assert reader.cache.dtype == dtype
    narrow = DecodeCache(CacheShape(1, 2, 24), 2, 5, torch.bfloat16, torch.device("cpu"))
    narrow.begin_step(np.array([0, 0]))  # a width that the kernel does not take: the plain products do
    value = draw(2, 2, 24)
    out = narrow.attend(0, draw(4, 2, 24), draw(2, 2, 24), value, 1.0, None)
    assert torch.equal(out, value.transpose(0, 1).repeat_interleave(2, dim=1))


class TestHalved:
    """bf16 alone for a model that is only read (`models/halved.py`)."""

    def test_embeddings_that_compute_something_stay(self) -> None:
        model = build_model("gemma3_text")
        wanted = decode(model)
        assert halve_matrices(model) == 2 * 7
        assert torch.equal(decode(model), wanted)

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_numbers_are_those_of_autocast_on_rounded_embeddings(self, tied: bool) -> None:
        model = build_model(tie_word_embeddings=tied)
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight
            embedding.copy_(embedding.bfloat16())
        wanted = decode(model)
        assert halve_matrices(model) == 2 * 7 + 1 + (not tied)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
        assert torch.equal(decode(model), wanted)
        kinds = {p.dtype for name, p in model.named_parameters() if "norm" in name}
        assert kinds == {torch.float32}

    @pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
    def test_it_is_not_asked_in_float32(self, family: str) -> None:
        model = build_model(family)
        assert halve_matrices(model) > 0
        assert halve_matrices(model) == 0  # nothing is left to be rounded, copied or hooked
        with pytest.raises(ModelError, match="kept in bf16"):
            model.get_decoder()(input_ids=torch.tensor([[1, 2]]))

    def test_it_is_not_trained(self) -> None:
        model = build_model()
        halve_matrices(model)
        scores = score(model, collate([build_document(np.arange(1, 9))]), bf16=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            scores.logprobs_N.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_another_dtype(dtype: torch.dtype) -> None:
    """Biases and norms in it too: they are what the kernels would read as float32."""
    model = build_model("qwen2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    wanted = decode(model)
    found = decode(model.to(dtype))
    assert float((found - wanted).abs().max()) <= 4 * ROUNDING * float(wanted.abs().max())


def test_the_layers_of_an_adapter_take_the_kernel_and_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    bare = decode(model)
    attach_adapter(model, AdapterSettings(kind="lora", rank=4), "base", seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert takes_kernels(model)
    adapted = decode(model, whole=False)
    assert torch.equal(adapted, decode(model))
    monkeypatch.setattr(install, "has_pairs", lambda: False)
    monkeypatch.setattr("polm.rollout.reader.can_attend", lambda _: False)
    without = decode(model)
    near = 4 * ROUNDING * float(without.abs().max())
    assert float((adapted - without).abs().max()) <= near < float((bare - without).abs().max())


def test_rows_are_padded_where_a_product_is_not_the_kernels() -> None:
    assert takes_kernels(build_model())
    foreign = build_model()
    foreign.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    assert not takes_kernels(foreign)
    seen = []
    foreign.model.layers[0].mlp.up_proj.register_forward_hook(lambda *seen_by: seen.append(seen_by[2].shape[-2]))
    with torch.no_grad(), autocast("cpu", True), kernels_while_sampling():
        (reader,) = build_readers([foreign], [None], [np.arange(1, 5)] * 16, [4] * 16, True, 16, 1 << 20)
        reader.read_prompts(np.arange(16), np.arange(16), waiting=False)
        seen.clear()
        for rows in (13, 15, 9):
            assert len(reader.read_tokens(np.ones(rows, dtype=np.int64), np.full(rows, 4))) == rows
    assert seen == [14, 16, 10]
