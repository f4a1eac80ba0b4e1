"""Adapters on a model: which layers, what is frozen, switching off, merging, damaged files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.config import validate
from polm.engine.checkpoint import Progress, restore_checkpoint, save_checkpoint
from polm.engine.optimizer import build_optimizers, split_parameters
from polm.engine.score import score
from polm.errors import ModelError, RecipeError, UserError
from polm.models import adapters
from polm.models.adapters import (
    adapter_parameters,
    as_given,
    attach_adapter,
    find_adapter,
    list_linear_layers,
    load_adapter,
    locate_base,
    merge_adapter,
    save_adapter,
)
from polm.models.loading import load_model, save_model
from polm.models.quantize import build_quantization
from polm.recipe import OptimizerSettings, SFTSettings
from polm.recipe_adapter import ADAPTER_KNOBS, AdapterSettings
from polm.tokens import TokenBatch, build_completions, build_document, collate

Build = Callable[..., PreTrainedModel]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 3, "alpha": 5.0},
    "rslora": {"kind": "lora", "rank": 4, "alpha": 5.0, "rslora": True},
    "dora": {"kind": "lora", "rank": 3, "dora": True},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "p_tuning": {"kind": "p_tuning", "virtual_tokens": 3, "encoder_width": 5},
}
MERGING = ("lora", "rslora", "dora", "ia3")


def attach(model: PreTrainedModel, kind: str, *, spread: float = 0.3) -> PreTrainedModel:
    """An adapter that has moved."""
    attach_adapter(model, AdapterSettings(**KINDS[kind]), "tiny", seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(spread * torch.randn(parameter.shape))
    return model


def build_batch() -> TokenBatch:
    return collate([build_completions([5, 9, 30], [[8, 1], [33, 4, 20]]), build_document([7, 8, 9, 10])])


def score_all(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return score(model.eval(), build_batch()).logprobs_N


# ---- settings ------------------------------------------------------------------------------------------------------


def test_the_defaults_of_a_kind_are_filled_in() -> None:
    settings = AdapterSettings(kind="lora")
    assert (settings.rank, settings.alpha, settings.targets, settings.virtual_tokens) == (16, 32.0, "all-linear", None)
    assert AdapterSettings(kind="prompt").virtual_tokens == 16
    assert AdapterSettings(kind="ia3").feedforward == ("down_proj",)
    assert validate(SFTSettings, {"adapter": {"kind": "lora", "rank": 2}}, "x").adapter == AdapterSettings(
        kind="lora", rank=2
    )
    assert SFTSettings().adapter is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "prompt", "rank": 4}, r"rank is 4, and adapter kind: prompt does not read it.*rank is read by lora"),
        ({"kind": "lora", "virtual_tokens": 4}, "virtual_tokens is 4, and adapter kind: lora does not read it"),
        ({"kind": "ia3", "dora": False}, "dora is False, and adapter kind: ia3 does not read it"),
        ({"kind": "continue", "alpha": 1.0}, "continue reads no other knob; alpha is read by lora"),
        ({"kind": "lora", "targets": []}, "targets is empty; name at least one layer"),
        ({"kind": "ia3", "targets": ["k_proj"]}, r"feedforward \['down_proj'\] are none of the targets"),
        ({"kind": "loha"}, "found 'loha'"),
        ({"rank": 4}, "adapter.kind is missing"),
        ({"kind": "lora", "ranks": 4}, "unknown key 'adapter.ranks'; did you mean 'rank'"),
    ],
)
def test_knobs_that_do_not_belong_together(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        validate(SFTSettings, {"adapter": values}, "x")


def test_every_knob_belongs_to_a_kind() -> None:
    assert {name for knobs in ADAPTER_KNOBS.values() for name in knobs} | {"kind"} == set(AdapterSettings.model_fields)


# ---- layers --------------------------------------------------------------------------------------------------------


def test_unknown_layers_are_refused_with_those_that_there_are(build_tiny: Build) -> None:
    model = build_tiny(tie_embeddings=False)
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert list_linear_layers(model) == names
    with pytest.raises(ModelError, match=r"\['wq'\].*qwen3 has no such linear layer \(it has: down_proj, gate_proj"):
        attach_adapter(model, AdapterSettings(kind="lora", targets=("q_proj", "wq")), "x", seed=0)
    with pytest.raises(ModelError, match="the output head is not adapted"):
        attach_adapter(model, AdapterSettings(kind="lora", targets=("lm_head",)), "x", seed=0)
    assert find_adapter(model) is None


def test_layers_by_their_whole_name(build_tiny: Build) -> None:
    name = "model.layers.1.self_attn.q_proj"
    model = attach_adapter(build_tiny(), AdapterSettings(kind="lora", targets=(name,)), "x", seed=0)
    assert sorted(adapter_parameters(model)) == [f"{name}.lora_{part}.default.weight" for part in "AB"]


def test_all_linear_adapts_each_layer_and_not_the_head(build_tiny: Build) -> None:
    model = attach_adapter(build_tiny(tie_embeddings=False), AdapterSettings(kind="lora", rank=2), "x", seed=0)
    assert len(adapter_parameters(model)) == 2 * 7 * 2
    everything = attach_adapter(build_tiny(), AdapterSettings(kind="ia3", targets="all-linear"), "x", seed=0)
    assert len(adapter_parameters(everything)) == 2 * 7


def test_a_seed_gives_the_same_start(build_tiny: Build) -> None:
    starts = [
        adapter_parameters(attach_adapter(build_tiny(), AdapterSettings(kind="prompt"), "x", seed=seed))
        for seed in (0, 0, 1)
    ]
    first, second, third = (s["prompt_encoder.default.embedding.weight"] for s in starts)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_prompt_starts_from_a_text(build_tiny: Build) -> None:
    model = build_tiny()
    settings = AdapterSettings(kind="prompt", virtual_tokens=5, init_text="…")
    attach_adapter(model, settings, "x", seed=0, init_ids=[7, 3])
    expected = model.get_input_embeddings()(torch.tensor([7, 3, 7, 3, 7]))
    (table,) = adapter_parameters(model).values()
    assert torch.equal(table, expected)


# ---- what is frozen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_frozen_weights_get_no_gradient_and_no_optimizer_state(kind: str, tie: bool, build_tiny: Build) -> None:
    """Also the output head, whose gradient is computed by hand."""
    model = attach(build_tiny(tie_embeddings=tie), kind)
    names = set(adapter_parameters(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for optimizer_kind in ("adamw", "muon"):
        optimizers = build_optimizers(model, OptimizerSettings(kind=optimizer_kind, learning_rate=0.01))
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in adapter_parameters(model).values()}
        score(model, build_batch()).logprobs_N.sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == names
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert sum(len(o.state) for o in optimizers) == len(names)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names


def test_muon_has_no_vectors_and_no_virtual_tokens(build_tiny: Build) -> None:
    """IA3's scales are matrices of one row; decayed, they would leave 1, where they change nothing."""
    settings = OptimizerSettings(kind="muon", weight_decay=0.1)
    for kind in ("ia3", "prompt", "prefix"):
        matrices, others = split_parameters(attach(build_tiny(), kind), settings)
        assert not matrices
        assert others
    (adamw,) = build_optimizers(attach(build_tiny(), "ia3"), settings)
    decayed, free = (len(group["params"]) for group in adamw.param_groups)
    assert (decayed, free) == (0, 6)
    matrices, others = split_parameters(attach(build_tiny(), "dora"), settings)
    assert len(matrices) == 2 * 7 * 2
    assert all(p.ndim == 1 for p in others)


def test_a_checkpoint_holds_the_adapter_only(build_tiny: Build, tmp_path: Path) -> None:
    model = attach(build_tiny(), "lora")
    optimizers = build_optimizers(model, OptimizerSettings())
    save_checkpoint(tmp_path, model, optimizers, Progress(update=1))
    other = attach(build_tiny(), "lora", spread=1.0)
    restore_checkpoint(tmp_path, other, build_optimizers(other, OptimizerSettings()))
    assert torch.equal(score_all(model), score_all(other))
    size = (tmp_path / "checkpoint-00000001" / "weights.safetensors").stat().st_size
    trained = 4 * sum(p.numel() for p in adapter_parameters(model).values())
    assert trained < size < 1.5 * trained + 5000


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_bf16_products_stay_near_float32(kind: str, build_tiny: Build) -> None:
    model = attach(build_tiny(spread=1.0), kind, spread=0.05)
    gradients = []
    for bf16 in (False, True):
        scores = score(model, build_batch(), bf16=bf16)
        scores.logprobs_N.sum().backward()
        found = torch.cat([p.grad.flatten() for p in adapter_parameters(model).values() if p.grad is not None])
        gradients.append(found.clone())
        model.zero_grad()
    assert len(gradients[0]) == sum(p.numel() for p in adapter_parameters(model).values())
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.97


def test_4_bits_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(supported_torch_devices={"cuda"}))
    monkeypatch.setattr("polm.models.quantize.torch.cuda.is_available", lambda: False)
    with pytest.raises(
        UserError, match="nf4 runs on cuda with the bitsandbytes that is installed, and this machine has"
    ):
        build_quantization("nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs `bitsandbytes`, which is not installed: pip install bitsandbytes"):
        build_quantization("nf4")


# ---- off, and merged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_without_the_adapter_the_base_is_left(kind: str, build_tiny: Build) -> None:
    base = score_all(build_tiny())
    model = attach(build_tiny(), kind)
    adapted = score_all(model)
    with as_given(model) as given:
        torch.testing.assert_close(score_all(given), base, rtol=0, atol=1e-6)
    assert torch.equal(score_all(model), adapted)
    assert float((adapted - base).abs().max()) > 0.05
    names = set(adapter_parameters(model))
    with pytest.raises(ZeroDivisionError), as_given(model):
        _ = 1 / 0
    assert torch.equal(score_all(model), adapted)  # on again after an error
    assert set(adapter_parameters(model)) == names  # and trained on


def test_a_model_without_an_adapter_is_handed_on(build_tiny: Build) -> None:
    model = build_tiny()
    with as_given(model) as given:
        assert given is model
    assert merge_adapter(model) is model


@pytest.mark.parametrize("kind", MERGING)
def test_merged_it_is_an_ordinary_model_with_the_same_log_probabilities(
    kind: str, build_tiny: Build, tmp_path: Path
) -> None:
    model = attach(build_tiny(), kind)
    adapted, names = score_all(model), set(build_tiny().state_dict())
    merged = merge_adapter(model)
    assert find_adapter(merged) is None
    assert set(merged.state_dict()) == names
    assert all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(score_all(merged), adapted, rtol=0, atol=2e-5)
    save_model(merged, None, tmp_path / "model")
    torch.testing.assert_close(score_all(load_model(tmp_path / "model")), adapted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p_tuning"])
def test_virtual_tokens_do_not_merge(kind: str, build_tiny: Build) -> None:
    with pytest.raises(ModelError, match="no change of the base's weights does the same"):
        merge_adapter(attach(build_tiny(), kind))


# ---- on disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(build_tiny: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[str], Path]:
    """Saves an adapter of a kind on a base that lies beside it."""

    def save(kind: str) -> Path:
        save_model(build_tiny(), tiny_tokenizer, tmp_path / "base")
        model = load_model(tmp_path / "base")
        attach_adapter(model, AdapterSettings(**KINDS[kind]), str(tmp_path / "base"), seed=0)
        save_adapter(model, tiny_tokenizer, tmp_path / "adapter", "f" * 64)
        return tmp_path / "adapter"

    return save


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_configuration_is_written_in_one_order(saved: Callable[[str], Path]) -> None:
    values = json.loads((saved("lora") / "adapter_config.json").read_text())
    assert values["target_modules"] == sorted(values["target_modules"])
    assert list(values) == sorted(values)
    assert not (saved("lora") / "README.md").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "an adapter of type LOHA; polm reads LORA, IA3"),
        ({"megatron_config": {"a": 1}}, "polm loads no adapter that names code to import"),
    ],
)
def test_adapters_that_are_not_read(changes: dict[str, Any], words: str, saved: Callable[[str], Path]) -> None:
    folder = saved("lora")
    edit(folder, **changes)
    with pytest.raises(ModelError, match=words):
        locate_base(folder)


def test_pickled_weights_are_not_read(saved: Callable[[str], Path]) -> None:
    folder = saved("lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors; other formats of weights are not read"):
        locate_base(folder)


def test_damaged_files(saved: Callable[[str], Path], build_tiny: Build) -> None:
    folder = saved("lora")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ModelError, match="does not fit its base"):
        load_adapter(build_tiny(), folder, "base", trained=False)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        locate_base(folder)


def test_an_adapter_of_another_base(saved: Callable[[str], Path], build_tiny: Build) -> None:
    with pytest.raises(ModelError, match="it belongs to another base, or its files are damaged"):
        load_adapter(build_tiny(hidden_size=16), saved("lora"), "base", trained=False)


@pytest.mark.parametrize(
    ("num_layers", "words"), [(3, r"lacks weights for .*layers.2"), (1, r"layers that are not there: .*layers.1")]
)
def test_weights_too_few_or_too_many(
    num_layers: int, words: str, saved: Callable[[str], Path], build_tiny: Build
) -> None:
    """peft would go on without them."""
    with pytest.raises(ModelError, match=words):
        load_adapter(build_tiny(num_layers=num_layers), saved("lora"), "base", trained=False)


def test_a_hub_base_keeps_its_revision(saved: Callable[[str], Path]) -> None:
    folder = saved("lora")
    edit(folder, base_model_name_or_path="owner/name", revision="abc")
    (folder / "polm_base.json").unlink()
    assert locate_base(folder) == ("owner/name@abc", None)


def test_without_peft(build_tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"adapters need `peft`.*pip install 'polm\[adapters\]'"):
        attach_adapter(build_tiny(), AdapterSettings(kind="lora"), "x", seed=0)
    assert adapters.find_adapter(build_tiny()) is None


def test_a_model_whose_forest_differs_from_its_own_forward_is_refused(
    build_tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual tokens that the forest left out would be found when the adapter is attached."""
    monkeypatch.setattr("polm.models.loading.read_virtual", lambda _: None)
    with pytest.raises(ModelError, match="gives other log-probabilities as a token forest than on its own"):
        attach_adapter(build_tiny(), AdapterSettings(kind="prompt"), "tiny", seed=0)


def test_peft_is_imported_in_one_file() -> None:
    package = Path(adapters.__file__).parent.parent
    importers = {
        p.name for p in package.rglob("*.py") if "import peft" in p.read_text() or "from peft" in p.read_text()
    }
    assert importers == {"adapters.py"}
    assert peft.__version__ in (package.parent / "constraints.txt").read_text()
