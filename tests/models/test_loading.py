"""Models in and out: an ordinary checkpoint, refusals that name the cure, and nothing that would be trained wrongly."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from polm.engine.score import score
from polm.errors import ModelError, StoreError
from polm.models import loading
from polm.models.loading import (
    build_model,
    compute_hidden,
    count_parameters,
    load_model,
    load_tokenizer,
    prepare_model,
    save_model,
)
from polm.tokens import build_completions, build_document, collate

Build = Callable[..., PreTrainedModel]
WEIGHTS = "model.safetensors"
IDS = [7, 3, 9, 9, 12, 30, 2, 5]


def build_plain(architecture: str, **changes: Any) -> PreTrainedModel:
    """A random model straight from `transformers`, far from uniform."""
    values = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        **changes,
    }
    if architecture == "mamba":  # its config keeps whatever it is given
        values = {name: value for name, value in values.items() if "heads" not in name}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **values), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def plain_logprobs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(IDS)[None], use_cache=False).logits[0].float()
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(IDS)[1:, None])[:, 0]


def forest_logprobs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return score(model, collate([build_document(IDS)])).logprobs_N


# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_is_an_ordinary_checkpoint(
    build_tiny: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, architecture: str, tie: bool
) -> None:
    model = build_tiny(len(tiny_tokenizer), architecture=architecture, tie_embeddings=tie)
    expected = forest_logprobs(model)
    folder = tmp_path / "model"
    save_model(model, tiny_tokenizer, folder)
    assert not list(tmp_path.glob("*.tmp"))
    assert "forest" not in (folder / "config.json").read_text()

    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain_logprobs(plain), expected, rtol=1e-4, atol=2e-5)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer.get_vocab()
    again = load_model(folder)
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert torch.equal(forest_logprobs(again), expected)
    assert count_parameters(again) == sum(p.numel() for p in plain.parameters())


def test_a_second_save_replaces_the_first(build_tiny: Build, tmp_path: Path) -> None:
    save_model(build_tiny(seed=0), None, tmp_path / "model")
    (tmp_path / "model" / "left-over").write_text("x")
    other = build_tiny(seed=1)
    save_model(other, None, tmp_path / "model")
    assert not (tmp_path / "model" / "left-over").exists()
    assert torch.equal(forest_logprobs(load_model(tmp_path / "model")), forest_logprobs(other))


def test_a_full_disk_leaves_the_old_model(build_tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny()
    save_model(model, None, tmp_path / "model")
    before = forest_logprobs(model)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    other = build_tiny(seed=1)
    monkeypatch.setattr(other, "save_pretrained", full)
    with pytest.raises(StoreError, match=r"could not be written.*free space and run again"):
        save_model(other, None, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert torch.equal(forest_logprobs(load_model(tmp_path / "model")), before)


def test_build_is_a_function_of_the_seed(build_tiny: Build) -> None:
    one, same, other = (build_tiny(seed=seed) for seed in (0, 0, 1))
    names = [name for name, p in one.named_parameters() if p.ndim == 2]
    pick = lambda model: dict(model.named_parameters())  # noqa: E731
    assert all(torch.equal(pick(one)[n], pick(same)[n]) for n in names)
    assert not any(torch.equal(pick(one)[n], pick(other)[n]) for n in names)
    assert one.training


def test_build_refuses_what_transformers_does_not_know(build_tiny: Build) -> None:
    with pytest.raises(ModelError, match=r"architecture 'qwen33' is not one.*llama, qwen3"):
        build_tiny(architecture="qwen33")


# ---- folders that cannot be loaded ---------------------------------------------------------------------------------


@pytest.fixture
def saved(build_tiny: Build, tmp_path: Path) -> Path:
    save_model(build_tiny(tie_embeddings=False), None, tmp_path / "saved")
    return tmp_path / "saved"


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def cut(folder: Path, size: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"not a model folder: no config.json in it \(found .*model.saf",
    ),
    "a torn config": (lambda f: (f / "config.json").write_text("{"), r"not a valid JSON.*damaged or incomplete"),
    "a config of another kind": (
        lambda f: (f / "config.json").write_text("[]"),
        r"could not be loaded.*copy or download",
    ),
    "an unknown type": (lambda f: change_config(f, model_type="nonsense"), r"nonsense.*does not recognize"),
    "an encoder": (lambda f: change_config(f, model_type="t5"), r"could not be loaded.*T5Config"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"no file named model.safetensors"),
    "cut in the data": (lambda f: cut(f, -100), r"could not be loaded: .*damaged or incomplete: copy or download it"),
    "cut in the header": (lambda f: cut(f, 50), r"could not be loaded: .*copy or download it again"),
    "empty": (lambda f: cut(f, 0), r"could not be loaded: .*copy or download it again"),
    "noise": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 999), r"could not be loaded: .*copy or download it again"),
    "other shapes": (lambda f: change_config(f, intermediate_size=64), r"could not be loaded: .*copy or download"),
    "a missing tensor": (lambda f: change_weights(f, lambda t: t.pop(UP)), rf"lacks 1 of its weights \({UP}"),
    "a missing head": (lambda f: change_weights(f, lambda t: t.pop("lm_head.weight")), r"lacks 1 .*lm_head.weight"),
    "a missing layer": (
        lambda f: change_config(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"lacks 11 of its weights .*model.layers.2.*do not belong together",
    ),
    "not a number": (lambda f: change_weights(f, lambda t: t[UP].fill_(float("nan"))), r"not finite.*damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(saved: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    load_model(saved)
    change(saved)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere", "a/b/c", "nowhere/"])
def test_a_missing_folder(name: str) -> None:
    for load, what in ((load_model, "model"), (load_tokenizer, "tokenizer")):
        with pytest.raises(ModelError, match=rf"no {what} folder at {re.escape(name)}; give a folder.*or a hub id"):
            load(name)


def test_a_file_is_no_folder(saved: Path) -> None:
    with pytest.raises(ModelError, match="no model folder at"):
        load_model(saved / WEIGHTS)


@pytest.mark.parametrize("name", ["somebody/some-model", "some-model", "somebody/some-model@step-1000"])
def test_a_hub_id_without_a_connection(name: str) -> None:
    """HF_HUB_OFFLINE=1 in all tests: nothing is asked for over the network."""
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=rf"{name} could not be loaded.*connection, or give the folder of a copy"):
            load(name)


class Session:
    """Of the hub's library; fails the first `failures` times, and counts what is asked."""

    def __init__(self, failures: int):
        self.failures, self.asked = failures, 0

    def head(self, url: str, **options: Any) -> None:
        assert url.startswith("https://")
        assert options["timeout"] <= 10
        self.asked += 1
        if self.asked <= self.failures:
            raise httpx.ConnectError("no")


@pytest.mark.parametrize(("failures", "asked", "offline"), [(0, 1, False), (1, 2, False), (2, 2, True)])
def test_a_hub_is_asked_once_whether_it_is_there(
    failures: int, asked: int, offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it is not, the libraries read the cache alone; they would try each file for 20 seconds."""
    session = Session(failures)
    monkeypatch.setattr(loading.time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "get_session", lambda: session)
    loading.check_hub.cache_clear()
    assert loading.find(str(tmp_path)) == loading.locate(str(tmp_path))
    assert session.asked == 0
    assert loading.find("a/b@v1") == loading.locate("a/b@v1")
    assert loading.find("a/c") == loading.locate("a/c")
    assert session.asked == asked
    assert constants.HF_HUB_OFFLINE is offline
    loading.check_hub.cache_clear()
    constants.HF_HUB_OFFLINE = True  # as a user may have said
    loading.find("a/b")
    assert session.asked == asked
    loading.check_hub.cache_clear()


def test_without_a_connection_the_answer_comes_at_once() -> None:
    """Nothing is tried again, neither for the model nor for an adapter of that name."""
    code = (
        "import httpx, huggingface_hub\n"
        "from polm.models import loading\n"
        "def refuse(request): raise httpx.ConnectError('no')\n"
        "huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(refuse)))\n"
        "try: loading.load_model('nosuch/model')\n"
        "except loading.ModelError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "nosuch/model could not be loaded" in run.stdout
    assert "Retrying" not in run.stderr


def test_a_revision_stands_after_the_at(tmp_path: Path) -> None:
    assert loading.locate("a/b@main") == {"pretrained_model_name_or_path": "a/b", "revision": "main"}
    assert loading.locate("a/b") == {"pretrained_model_name_or_path": "a/b"}
    folder = tmp_path / "model@2"
    folder.mkdir()
    assert loading.locate(str(folder)) == {"pretrained_model_name_or_path": str(folder)}


def test_tokenizers_that_cannot_be_used(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    good = tmp_path / "good"
    tiny_tokenizer.save_pretrained(good)
    assert load_tokenizer(good).eos_token == "<|eos|>"
    no_end = tmp_path / "no-end"
    shutil.copytree(good, no_end)
    config = json.loads((no_end / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (no_end / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"no end-of-text token; set eos_token in its tokenizer_config.json"):
        load_tokenizer(no_end)
    torn = tmp_path / "torn"
    shutil.copytree(good, torn)
    (torn / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ModelError, match="could not be loaded"):
        load_tokenizer(torn)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"not a tokenizer folder: no tokenizer_config.json in it \(found nothing\)"):
        load_tokenizer(tmp_path / "empty")


# ---- architectures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("olmo2", {}),
        ("smollm3", {}),
        ("qwen2", {}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 1.0, "embedding_multiplier": 3.0}),
    ],
)
def test_architectures_that_are_computed_rightly(architecture: str, changes: dict[str, Any]) -> None:
    plain = build_plain(architecture, **changes)
    expected = plain_logprobs(plain)
    torch.testing.assert_close(forest_logprobs(prepare_model(plain, architecture)), expected, rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    # State along the stream.
    "mamba": ("mamba", {"state_size": 4}, "layers without attention"),
    "linear attention": (
        "qwen3_next",
        {
            "head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "other log-probabilities as a token forest",
    ),
    # Logits that are scaled after the output matrix.
    "granite": ("granite", {"logits_scaling": 4.0}, "other log-probabilities as a token forest"),
    "cohere": ("cohere", {"logit_scale": 0.0625}, "other log-probabilities as a token forest"),
    # Attention that the forest does not compute.
    "gemma2": ("gemma2", {"head_dim": 8}, "softcap"),
    # An output layer that the chunked head does not compute.
    "phi": ("phi", {}, "the output layer has a bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_are_refused(name: str) -> None:
    architecture, changes, message = REFUSED[name]
    with pytest.raises(ModelError, match=message) as caught:
        prepare_model(build_plain(architecture, **changes), f"the {name} model")
    assert f"the {name} model" in str(caught.value)


def test_the_check_sees_a_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the forest let a token see a stranger, no model would load."""
    real = loading.build_plan

    def wrong(batch: Any, *more: int, **named: bool) -> Any:
        batch.layout.parents[1] = 0  # the second tree hangs below the first
        return real(batch, *more, **named)

    monkeypatch.setattr(loading, "build_plan", wrong)
    with pytest.raises(ModelError, match="other log-probabilities"):
        prepare_model(build_plain("llama"), "x")


def test_dropout_of_the_attention_is_off(saved: Path) -> None:
    """The forest has no dropout; a checkpoint that names one must train all the same."""
    change_config(saved, attention_dropout=0.3)
    model = load_model(saved)
    assert model.training
    first, second = (score(model, collate([build_document(IDS)])).logprobs_N for _ in range(2))
    first.sum().backward()
    assert torch.equal(first, second)


def test_a_model_in_bfloat16(saved: Path) -> None:
    exact = forest_logprobs(load_model(saved))
    rough = forest_logprobs(load_model(saved, dtype=torch.bfloat16))
    assert 0 < (exact - rough).abs().max() < 0.3


def test_without_a_forest_the_attention_says_what_to_do(build_tiny: Build) -> None:
    model = build_tiny()
    with pytest.raises(ModelError, match=r'without one; call model.set_attn_implementation\("sdpa"\)'):
        model(input_ids=torch.tensor([IDS]), use_cache=False)


def test_shapes_that_cannot_be(build_tiny: Build) -> None:
    with pytest.raises(ModelError, match="does not run"):
        build_tiny(hidden_size=12)  # four heads of width 3: the rotary embedding needs an even one


def test_what_is_built_has_what_was_asked_for() -> None:
    model = build_model(
        architecture="llama",
        vocab_size=50,
        hidden_size=24,
        num_layers=3,
        num_heads=2,
        num_key_value_heads=1,
        intermediate_size=40,
        max_positions=77,
        tie_embeddings=False,
        rope_theta=5000.0,
        seed=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    layer = 24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40 + 2 * 24  # q and o, k and v of one head, the MLP, two norms
    assert count_parameters(model) == 2 * 50 * 24 + 3 * layer + 24
    config = model.config
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (77, 5000.0)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (1, 0, None)


def test_spare_rows_change_no_gradient() -> None:
    """Rows added to make the number round belong to nobody: no token's gradient may reach the weights through them.

    The first row of a group of blocks is a child's here, whose queries have a gradient (a root's first token has none).
    """
    model = prepare_model(build_plain("llama"), "x")
    batch = collate([build_completions([5, 9, 30], [[8, 1], [33, 4, 20]]), build_document([7, 8, 9, 10])])
    gradients = []
    for round_up in (False, True):
        hidden = compute_hidden(model, batch, round_up=round_up)
        weights = torch.linspace(-1.0, 1.0, hidden.numel()).view_as(hidden)
        (weights * hidden).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for name, exact in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
