"""Adapters through the training stages: what is trained and saved, the free reference, the next stage, resuming."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from polm.config import find_recipe, load_settings, recipe_folder
from polm.engine import fit as fit_module
from polm.engine.score import score
from polm.errors import ModelError, RecipeError, UserError
from polm.models.adapters import adapter_parameters, attach_adapter
from polm.models.loading import load_model
from polm.recipe import (
    DPOSettings,
    EvalSettings,
    GRPOSettings,
    MergeAdapterSettings,
    MidtrainSettings,
    PairsSettings,
    PretrainSettings,
    SFTSettings,
)
from polm.recipe_adapter import ADAPTER_KNOBS, AdapterSettings
from polm.stages import common
from polm.stages.common import load_base
from polm.tokens import build_document, collate

ADAMW = {"optimizer": {"kind": "adamw", "learning_rate": 0.02}}
SLOW = {"kind": "adamw", "learning_rate": 0.003}
SMALL: dict[str, Any] = {"bin_tokens": 192, "precision": "fp32", "updates": 3, **ADAMW}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8},
    "rslora": {"kind": "lora", "rank": 4, "rslora": True},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "virtual_tokens": 4},
    "prompt": {"kind": "prompt", "virtual_tokens": 4, "init_text": "what is"},
    "p_tuning": {"kind": "p_tuning", "virtual_tokens": 4, "encoder_width": 8},
}
TYPES = {
    "lora": "LORA",
    "ia3": "IA3",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "p_tuning": "P_TUNING",
}
IDS = torch.arange(3, 23)


def run_sft(artifact: Any, folder: Path, adapter: Mapping[str, Any] | None, **changes: Any) -> dict[str, Any]:
    inputs = {"base": str(artifact("midtrain")), "data": str(artifact("data"))} | changes.pop("inputs", {})
    manifest: dict[str, Any] = artifact.run("sft", SFTSettings(**{**SMALL, **changes}, adapter=adapter), inputs, folder)
    return manifest


def score_forest(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return score(model, collate([build_document(IDS.numpy())])).logprobs_N


def score_plainly(model: Any) -> torch.Tensor:
    """By the forward of a model that polm has not touched."""
    with torch.no_grad():
        logits = model(input_ids=IDS[None], use_cache=False).logits[0, -len(IDS) :].float()
    return torch.log_softmax(logits, -1)[:-1].gather(1, IDS[1:, None])[:, 0]


@pytest.fixture(scope="module")
def trained(artifact: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trained("lora") is the artifact of an SFT with that adapter, made on first use."""
    root = tmp_path_factory.mktemp("adapters")

    def get(kind: str) -> Path:
        if not (root / kind / "manifest.json").is_file():
            run_sft(artifact, root / kind, KINDS[kind])
        return root / kind

    return get


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_peft_loads_what_a_stage_saves(kind: str, trained: Any) -> None:
    """Plain transformers for the base, plain peft for the adapter: the log-probabilities of `load_base`, which differ
    from the base's."""
    folder = trained(kind) / "model"
    config = json.loads((folder / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    before = score_plainly(base)
    plain = score_plainly(peft.PeftModel.from_pretrained(base, folder))
    ours = score_forest(load_base(str(trained(kind))).model)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert float((plain - before).abs().max()) > 1e-2
    assert not (folder / "model.safetensors").exists()
    assert not list((trained(kind)).glob("*checkpoint*"))
    assert len(AutoTokenizer.from_pretrained(folder)) == base.config.vocab_size
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(score_plainly(automatic), plain, rtol=0, atol=1e-5)


def test_transformers_alone_loads_a_lora(trained: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained("lora") / "model")
    ours = score_forest(load_base(str(trained("lora"))).model)
    torch.testing.assert_close(score_plainly(model), ours, rtol=0, atol=1e-5)


def test_the_manifest_names_the_base(artifact: Any, trained: Any, read_manifest: Any, tmp_path: Path) -> None:
    manifest = read_manifest(trained("lora"))
    note = json.loads((trained("lora") / "model" / "polm_base.json").read_text())
    assert manifest["summary"]["base_fingerprint"] == note["fingerprint"]
    assert manifest["summary"]["adapter"] == "LORA"
    assert manifest["inputs"]["base"] == read_manifest(artifact("midtrain"))["key"]
    weights = load_file(trained("lora") / "model" / "adapter_model.safetensors")
    assert manifest["summary"]["trained_parameters"] == sum(p.numel() for p in weights.values())
    # An adapter from elsewhere, without a manifest: its base is a part of what it is.
    bare = shutil.copytree(trained("lora") / "model", tmp_path / "bare")
    (bare / "polm_base.json").unlink()
    before = common_key(bare)
    config = json.loads((bare / "adapter_config.json").read_text())
    other = shutil.copytree(config["base_model_name_or_path"], tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    monkey = {**config, "base_model_name_or_path": str(other)}
    (bare / "adapter_config.json").write_text(json.dumps(monkey))
    assert common_key(bare) != before


def common_key(folder: Path) -> str:
    from polm.flywheel.store import external_key

    return external_key(str(folder))


def test_a_base_that_moved_with_its_adapter_is_found(artifact: Any, trained: Any, tmp_path: Path) -> None:
    base = shutil.copytree(artifact("midtrain"), tmp_path / "old" / "base")
    run_sft(artifact, tmp_path / "old" / "sft", KINDS["lora"], inputs={"base": str(base)})
    (tmp_path / "old").rename(tmp_path / "new")
    moved = score_forest(load_base(str(tmp_path / "new" / "sft")).model)
    torch.testing.assert_close(moved, score_forest(load_base(str(trained("lora"))).model), rtol=0, atol=1e-6)


def test_a_base_that_is_gone_or_another_one(artifact: Any, tmp_path: Path) -> None:
    base = shutil.copytree(artifact("midtrain"), tmp_path / "base")
    run_sft(artifact, tmp_path / "sft", KINDS["lora"], inputs={"base": str(base)})
    shutil.copyfile(artifact("pretrain") / "model" / "model.safetensors", base / "model" / "model.safetensors")
    with pytest.raises(ModelError, match=r"is not the one that it was trained on .*expected"):
        load_base(str(tmp_path / "sft"))
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"is not where it was.*write where it lies now into base_model_name_or_path"):
        load_base(str(tmp_path / "sft"))


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p_tuning"])
def test_virtual_tokens_are_not_merged(kind: str, artifact: Any, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be merged: its virtual tokens stand before every text"):
        artifact.run("merge_adapter", MergeAdapterSettings(), {"model": str(trained(kind))}, tmp_path / "merged")
    with pytest.raises(ModelError, match="cannot be merged"):  # nor can the next stage train what is below them
        run_sft(artifact, tmp_path / "full", None, inputs={"base": str(trained(kind))})


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_the_next_stage_merges_first(kind: str, artifact: Any, trained: Any, tmp_path: Path) -> None:
    """The merged base is a part of the new artifact, so that plain peft finds it."""
    run_sft(artifact, tmp_path / "next", {"kind": "lora", "rank": 2}, inputs={"base": str(trained(kind))}, seed=1)
    merged = score_forest(load_model(tmp_path / "next" / "base"))
    torch.testing.assert_close(merged, score_forest(load_base(str(trained(kind))).model), rtol=0, atol=1e-5)
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "next" / "model")
    ours = score_forest(load_base(str(tmp_path / "next")).model)
    torch.testing.assert_close(score_plainly(plain), ours, rtol=0, atol=1e-5)
    assert float((ours - merged).abs().max()) > 1e-2
    full = run_sft(artifact, tmp_path / "full", None, inputs={"base": str(trained(kind))})
    assert "adapter" not in full["summary"]
    assert (tmp_path / "full" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["dora", "prefix", "prompt"])
def test_going_on_with_the_same_adapter(kind: str, artifact: Any, trained: Any, tmp_path: Path) -> None:
    """The second stage starts where the first one ended, and keeps the base."""
    first, second = trained(kind), tmp_path / "second"
    run_sft(artifact, second, {"kind": "continue"}, inputs={"base": str(first)}, updates=1, optimizer=frozen_rate())
    mine, theirs = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (first, second))
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)
    configs = [json.loads((folder / "model" / "adapter_config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]
    run_sft(artifact, tmp_path / "third", {"kind": "continue"}, inputs={"base": str(first)})
    moved = load_file(tmp_path / "third" / "model" / "adapter_model.safetensors")
    assert all(not torch.equal(moved[name], tensor) for name, tensor in mine.items())


def frozen_rate() -> dict[str, Any]:
    return {"kind": "adamw", "learning_rate": 1e-9}


def test_continue_needs_an_adapter_that_can_go_on(artifact: Any, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapter.kind: continue, but base=.* is no adapter"):
        run_sft(artifact, tmp_path / "a", {"kind": "continue"})
    with pytest.raises(ModelError, match="cannot be trained further"):
        run_sft(artifact, tmp_path / "b", {"kind": "continue"}, inputs={"base": str(trained("p_tuning"))})


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_whatever_reads_a_model_reads_an_adapter(kind: str, artifact: Any, trained: Any, tmp_path: Path) -> None:
    """Evaluating, sampling pairs, and annotating: as a reference of the base it has other scores than the base."""
    data = str(artifact("data"))
    settings = EvalSettings(samples=1, pass_k=(1,), max_new_tokens=6, precision="fp32")
    results = [
        artifact.run("eval", settings, {"model": str(model), "data": data}, tmp_path / name)["summary"]["mean/nll"]
        for name, model in (("adapted", trained(kind)), ("plain", artifact("midtrain")))
    ]
    assert results[0] != pytest.approx(results[1], abs=1e-3)
    pairs = PairsSettings(num_prompts=6, samples=4, max_new_tokens=6, precision="fp32")
    assert artifact.run("pairs", pairs, {"base": str(trained(kind)), "data": data}, tmp_path / "pairs")
    inputs = {"base": str(artifact("midtrain")), "data": data, "reference": str(trained(kind))}
    remit = MidtrainSettings(**SMALL, weighting="remit")
    assert artifact.run("midtrain", remit, inputs, tmp_path / "remit")["summary"]["last/remit/mean_abs_delta"] > 0.01


# ---- recipes ---------------------------------------------------------------------------------------------------------


SHIPPED = sorted(path.stem for path in (recipe_folder() / "adapters").glob("*.yaml"))
TINY_WORDS = ["epochs=null", "updates=2", "bin_tokens=192", "bins_per_update=1", "micro_bins=0", "precision=fp32"]
TINY_WORDS += ["schedule.warmup_updates=0", "checkpoint_every=0"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run(name: str, artifact: Any, tmp_path: Path) -> None:
    """Two updates on the tiny model, with the file's own adapter; 4 bits need bitsandbytes."""
    settings = load_settings(SFTSettings, find_recipe(f"adapters/{name}"), TINY_WORDS, section="sft")
    assert settings.adapter is not None
    if name == "qlora":  # test_qlora
        assert settings.adapter.quantize == "nf4"
        return
    inputs = {"base": str(artifact("midtrain")), "data": str(artifact("data"))}
    manifest = artifact.run("sft", settings, inputs, tmp_path / "out")
    assert manifest["summary"]["adapter"] == TYPES[settings.adapter.kind]
    assert manifest["summary"]["last/grad_norm"] > 0
    assert load_settings(DPOSettings, find_recipe(f"adapters/{name}"), TINY_WORDS).adapter == settings.adapter


def test_there_is_a_recipe_for_each_kind() -> None:
    found = {load_settings(SFTSettings, find_recipe(f"adapters/{name}")).adapter for name in SHIPPED}
    assert {adapter.kind for adapter in found if adapter is not None} == set(ADAPTER_KNOBS) - {"continue"}
    text = (recipe_folder().parent / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"| `polm sft --recipe adapters/{name}` |" in text for name in SHIPPED)


# ---- the free reference ----------------------------------------------------------------------------------------------


@pytest.fixture
def loads(artifact: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that stages load from here on, in order."""
    artifact("dpo")
    seen: list[str] = []
    original = common.load_model

    def watch(source: str, **more: Any) -> PreTrainedModel:
        seen.append(str(source))
        return original(source, **more)

    monkeypatch.setattr(common, "load_model", watch)
    return seen


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("lora", "sigmoid"), ("lora", "kto"), ("lora", "simpo"), ("prefix", "ipo"), ("prompt", "sigmoid")],
)
def test_dpo_takes_its_reference_from_the_same_weights(
    kind: str, loss: str, artifact: Any, loads: list[str], read_rows: Any, tmp_path: Path
) -> None:
    """One model is loaded, and the result is that of an explicit reference: the base."""
    inputs = artifact.inputs("dpo")
    settings = DPOSettings(**SMALL, loss=loss, adapter=KINDS[kind])
    artifact.run("dpo", settings, inputs, tmp_path / "free")
    assert len(loads) == 1
    lines = read_rows(tmp_path / "free" / "metrics.jsonl")
    assert lines[0]["grad_norm"] > 0
    if loss == "simpo":  # reads no reference
        return
    artifact.run("dpo", settings, {**inputs, "reference": inputs["base"]}, tmp_path / "explicit")
    free, explicit = (read_weights(tmp_path / name) for name in ("free", "explicit"))
    for name, tensor in free.items():
        torch.testing.assert_close(tensor, explicit[name], rtol=0, atol=1e-5)
    if kind == "lora" and loss == "sigmoid":  # it changes nothing yet
        assert lines[0]["dpo/margin"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_grpo_takes_its_reference_from_the_same_weights(
    kind: str, artifact: Any, loads: list[str], read_rows: Any, tmp_path: Path
) -> None:
    inputs = {"base": str(artifact("dpo")), "data": str(artifact("data"))}
    more = {"prompts_per_rollout": 4, "samples": 4, "max_new_tokens": 8, "updates_per_rollout": 1}
    settings = GRPOSettings(**{**SMALL, "updates": 4}, **more, kl_beta=0.1, adapter=KINDS[kind])
    artifact.run("grpo", settings, inputs, tmp_path / "free")
    assert len(loads) == 1
    artifact.run("grpo", settings, {**inputs, "reference": inputs["base"]}, tmp_path / "explicit")
    free, explicit = (read_weights(tmp_path / name) for name in ("free", "explicit"))
    for name, tensor in free.items():
        torch.testing.assert_close(tensor, explicit[name], rtol=0, atol=1e-4)
    kls = [line["rl/kl"] for line in read_rows(tmp_path / "free" / "metrics.jsonl")]
    assert kls[-1] > 0
    if kind == "lora":
        assert kls[0] == pytest.approx(0.0, abs=1e-6)


def test_grpo_measures_the_distance_from_the_start_without_a_second_model(
    artifact: Any, loads: list[str], read_rows: Any, tmp_path: Path
) -> None:
    inputs = {"base": str(artifact("dpo")), "data": str(artifact("data"))}
    more = {"prompts_per_rollout": 4, "samples": 4, "max_new_tokens": 8, "updates_per_rollout": 2}
    dropout = {**KINDS["lora"], "dropout": 0.1}
    artifact.run("grpo", GRPOSettings(**{**SMALL, "updates": 6}, **more, adapter=dropout), inputs, tmp_path / "out")
    assert len(loads) == 1
    kls = [line["rl/kl_start"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")]
    assert kls[0] == pytest.approx(0.0, abs=1e-5)
    assert kls[-1] > 1e-5


def test_the_reference_of_an_adapter_that_goes_on_is_the_adapter_as_it_came(
    artifact: Any, trained: Any, read_rows: Any, tmp_path: Path
) -> None:
    """Not the bare base: DPO after SFT pulls to the SFT model."""
    inputs = {"base": str(trained("lora")), "data": artifact.inputs("dpo")["data"]}
    artifact.run("dpo", DPOSettings(**SMALL, adapter={"kind": "continue"}), inputs, tmp_path / "free")
    explicit = {**inputs, "reference": inputs["base"]}
    artifact.run("dpo", DPOSettings(**SMALL, adapter={"kind": "continue"}), explicit, tmp_path / "explicit")
    assert read_rows(tmp_path / "free" / "metrics.jsonl")[0]["dpo/margin"] == pytest.approx(0.0, abs=1e-4)
    for name, tensor in read_weights(tmp_path / "free").items():
        torch.testing.assert_close(tensor, read_weights(tmp_path / "explicit")[name], rtol=0, atol=1e-5)
    more = {"prompts_per_rollout": 4, "samples": 4, "max_new_tokens": 8}
    settings = GRPOSettings(**{**SMALL, "updates": 3}, **more, kl_beta=0.1, adapter={"kind": "continue"})
    artifact.run("grpo", settings, {"base": inputs["base"], "data": str(artifact("data"))}, tmp_path / "rl")
    kls = [line["rl/kl"] for line in read_rows(tmp_path / "rl" / "metrics.jsonl")]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "optimizer"), [("dora", "muon"), ("p_tuning", "adamw")])
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str, optimizer: str, artifact: Any, hash_files: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also with dropout; and a checkpoint holds what is trained and nothing else."""
    adapter = {**KINDS[kind], **({"dropout": 0.2} if kind == "dora" else {})}
    more: dict[str, Any] = {"updates": 4, "checkpoint_every": 2, "optimizer": {"kind": optimizer, "weight_decay": 0.1}}
    run_sft(artifact, tmp_path / "whole", adapter, **more)
    original = fit_module.add_up
    calls = []

    def die(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(fit_module, "add_up", die)
    with pytest.raises(KeyboardInterrupt):
        run_sft(artifact, tmp_path / "killed", adapter, **more)
    kept = load_file(tmp_path / "killed" / "checkpoint-00000002" / "weights.safetensors")
    assert kept
    assert all(".lora_" in name or name.startswith("prompt_encoder.") for name in kept)
    monkeypatch.setattr(fit_module, "add_up", original)
    run_sft(artifact, tmp_path / "killed", adapter, **more)
    assert hash_files(tmp_path / "killed" / "model") == hash_files(tmp_path / "whole" / "model")


def test_midtrain_and_pretrain_take_an_adapter(artifact: Any, tmp_path: Path) -> None:
    inputs = {"base": str(artifact("pretrain")), "data": str(artifact("data"))}
    settings = MidtrainSettings(**SMALL, adapter=KINDS["lora"], weighting="remit", base="frozen")
    reference = {"reference": str(artifact("annotate"))}
    manifest = artifact.run("midtrain", settings, {**inputs, **reference}, tmp_path / "midtrain")
    assert manifest["summary"]["adapter"] == "LORA"
    manifest = artifact.run("pretrain", PretrainSettings(**SMALL, adapter=KINDS["ia3"]), inputs, tmp_path / "pretrain")
    assert manifest["summary"]["adapter"] == "IA3"
    fresh = {"tokenizer": str(artifact("tokenizer")), "data": str(artifact("data"))}
    with pytest.raises(UserError, match="has nothing to adapt"):
        artifact.run("pretrain", PretrainSettings(**SMALL, adapter=KINDS["ia3"]), fresh, tmp_path / "fresh")


def test_the_context_is_shorter_by_the_virtual_tokens(artifact: Any, trained: Any) -> None:
    assert load_base(str(trained("prompt"))).max_positions == load_base(str(artifact("midtrain"))).max_positions - 4
    assert not adapter_parameters(load_base(str(trained("prompt"))).model)  # frozen


@pytest.mark.parametrize("kind", ["ia3", "lora", "prefix", "prompt"])
def test_the_loss_falls(kind: str, artifact: Any, tmp_path: Path, read_rows: Any) -> None:
    """Every update sees all of the data."""
    manifest = run_sft(artifact, tmp_path / "out", KINDS[kind], updates=6, bins_per_update=6, optimizer=SLOW)
    losses = [line["loss"] for line in read_rows(tmp_path / "out" / "metrics.jsonl")]
    assert manifest["ledger"]["bins"] <= 6
    assert losses[-1] < losses[0] - 0.001


def test_4_bits_without_bitsandbytes(artifact: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"adapter.quantize: nf4 needs `bitsandbytes`, which is not installed"):
        run_sft(artifact, tmp_path / "out", {"kind": "lora", "quantize": "nf4"})


@pytest.fixture
def quantizes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")


@pytest.mark.usefixtures("quantizes")
def test_qlora(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """The shipped recipe: the frozen base is in 4 bits, what is saved is plain LoRA, and it learns as LoRA on the base
    in float32 does, up to the quantisation."""
    words = [*TINY_WORDS, "updates=6", "bins_per_update=6", "optimizer.learning_rate=0.01", "schedule.kind=constant"]
    losses = {}
    for name in ("qlora", "lora"):
        settings = load_settings(SFTSettings, find_recipe(f"adapters/{name}"), words, section="sft")
        inputs = {"base": str(artifact("midtrain")), "data": str(artifact("data"))}
        assert artifact.run("sft", settings, inputs, tmp_path / name)["summary"]["adapter"] == "LORA"
        losses[name] = [line["loss"] for line in read_rows(tmp_path / name / "metrics.jsonl")]
    assert losses["qlora"] != losses["lora"]
    assert losses["qlora"] == pytest.approx(losses["lora"], rel=0.05)
    assert losses["qlora"][-1] < losses["qlora"][0] - 0.01
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "qlora" / "model", dtype=torch.float32)
    torch.testing.assert_close(score_plainly(plain), score_forest(load_base(str(tmp_path / "qlora")).model))


@pytest.mark.usefixtures("quantizes")
def test_the_base_of_qlora_is_in_4_bits(artifact: Any) -> None:
    """Its log-probabilities are those of the base with each weight written back from its 4 bits."""
    from bitsandbytes.functional import dequantize_4bit

    folder = str(artifact("midtrain"))
    small, base = load_base(folder, quantize="nf4").model, load_base(folder).model
    layers = dict(small.named_modules())
    assert {type(layers[name]).__name__ for name in layers if name.endswith("_proj")} == {"Linear4bit"}
    assert all(p.dtype == torch.uint8 for name, p in small.named_parameters() if name.endswith("_proj.weight"))
    before = score_forest(base)
    for name, layer in base.named_modules():
        if name.endswith("_proj"):
            packed = layers[name].weight
            layer.weight.data = dequantize_4bit(packed.data, packed.quant_state)
    torch.testing.assert_close(score_forest(small), score_forest(base), rtol=0, atol=1e-4)
    assert float((score_forest(small) - before).abs().max()) > 1e-2


@pytest.mark.usefixtures("quantizes")
def test_gradients_flow_through_4_bits_after_eval_mode(artifact: Any) -> None:
    """To the adapter of the first layer, as through the dequantised weights."""
    model = attach_adapter(
        load_base(str(artifact("midtrain")), quantize="nf4").model,
        AdapterSettings(kind="lora", rank=2, quantize="nf4"),
        "base",
        seed=0,
    )
    model.eval()
    score_forest(model)
    model.train()
    score(model, collate([build_document(IDS.numpy())])).logprobs_N.sum().backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in adapter_parameters(model).items() if p.grad is not None}
    assert sizes.keys() == adapter_parameters(model).keys()
    assert all(size > 0.0 for name, size in sizes.items() if ".lora_B." in name)


@pytest.mark.parametrize("stage", ["rloo", "reinforce_pp", "remax", "ppo"])
def test_stages_of_reinforcement_learning_take_an_adapter(stage: str, artifact: Any, tmp_path: Path) -> None:
    """Only the adapter is trained and kept, and its absence is the reference of the KL penalty: zero at the start."""
    settings = artifact.spec(stage)[1].model_copy(
        update={"updates": 2, "kl_beta": 0.1, "adapter": AdapterSettings(kind="lora", rank=2)}
    )
    manifest = artifact.run(stage, settings, artifact.inputs(stage), tmp_path / "out")
    assert manifest["summary"]["adapter"] == "LORA"
    assert manifest["summary"]["trained_parameters"] < manifest["summary"]["parameters"] / 4
    assert (tmp_path / "out" / "model" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "model" / "model.safetensors").exists()
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["rl/kl_penalty"]) < 1e-5
