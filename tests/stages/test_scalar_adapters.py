"""Adapters of reward models, process reward models and critics: what is trained and saved, plain peft, merging, use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from polm.config import validate
from polm.data.holdout import split_holdout
from polm.data.readers import read_preferences, read_stepwise, write_jsonl
from polm.errors import ModelError, RecipeError
from polm.recipe import (
    GRPOSettings,
    MergeAdapterSettings,
    PairsSettings,
    ProcessRewardModelSettings,
    RewardModelSettings,
    SFTSettings,
)
from polm.recipe_adapter import AdapterSettings
from polm.recipe_rl import PPOSettings
from polm.rewards.base import RewardItem
from polm.rewards.reward_model import load_process_reward_model, load_reward_model
from polm.stages import reward_model
from polm.stages.common import Context, load_base
from polm.text.chat import render_prompt

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "ia3": {"kind": "ia3"},
    "prefix": {"kind": "prefix", "virtual_tokens": 4},
    "prompt": {"kind": "prompt", "virtual_tokens": 4, "init_text": "what is"},
    "p_tuning": {"kind": "p_tuning", "virtual_tokens": 4, "encoder_width": 8},
}
MERGING = ("lora", "dora", "ia3")
SMALL: dict[str, Any] = {
    **{"bin_tokens": 192, "precision": "fp32", "updates": 3, "bins_per_update": 2, "holdout_share": 0.3},
    "optimizer": {"kind": "adamw", "learning_rate": 0.02},
}
STEPS: dict[str, Any] = {**SMALL, "separator": ";"}
WEIGHTS = "adapter_model.safetensors"


def run_reward_model(artifact: Any, folder: Path, adapter: Mapping[str, Any] | None, **changes: Any) -> dict[str, Any]:
    inputs = {**artifact.inputs("reward_model"), **changes.pop("inputs", {})}
    settings = RewardModelSettings(**{**SMALL, **changes}, adapter=adapter)
    manifest: dict[str, Any] = artifact.run("reward_model", settings, inputs, folder)
    return manifest


@pytest.fixture(scope="module")
def trained(artifact: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trained("lora") is the artifact of a reward model with that adapter, made on first use."""
    root = tmp_path_factory.mktemp("reward_adapters")

    def get(kind: str) -> Path:
        if not (root / kind / "manifest.json").is_file():
            run_reward_model(artifact, root / kind, KINDS[kind])
        return root / kind

    return get


@pytest.fixture(scope="module")
def step_data(step_rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("steps")
    write_jsonl(folder / "stepwise.jsonl", step_rows)
    return folder


@pytest.fixture(scope="module")
def trained_steps(artifact: Any, step_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("step_adapters")

    def get(kind: str) -> Path:
        if not (root / kind / "manifest.json").is_file():
            settings = ProcessRewardModelSettings(**STEPS, adapter=KINDS[kind])
            inputs = {"base": str(artifact("sft")), "data": str(step_data)}
            artifact.run("process_reward_model", settings, inputs, root / kind)
        return root / kind

    return get


def held_texts(artifact: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of the held-out pairs, chosen and rejected in turn."""
    pairs = read_preferences(artifact("pairs") / "preferences.jsonl")
    held = split_holdout(pairs, SMALL["holdout_share"], 0)[1]
    chats = [[*p.prompt, {"role": "assistant", "content": text}] for p in held for text in (p.chosen, p.rejected)]
    return [list(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats]


def score_plainly(model: Any, texts: list[list[int]]) -> list[float]:
    with torch.no_grad():
        return [float(model.eval()(input_ids=torch.tensor(ids)[None]).logits[0, 0]) for ids in texts]


def held_scores(folder: Path, read_rows: Any) -> list[float]:
    return [row[side] for row in read_rows(folder / "holdout.jsonl") for side in ("chosen", "rejected")]


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_peft_loads_what_the_stage_saves(kind: str, artifact: Any, trained: Any, read_rows: Any) -> None:
    """Both ways of plain peft give the stage's own held-out rewards."""
    folder = trained(kind) / "model"
    texts = held_texts(artifact, AutoTokenizer.from_pretrained(folder))
    ours = held_scores(trained(kind), read_rows)
    automatic = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    theirs = score_plainly(automatic, texts)
    assert max(theirs) - min(theirs) > 0.01
    assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(config["base_model_name_or_path"], num_labels=1)
    assert score_plainly(peft.PeftModel.from_pretrained(base, folder), texts) == pytest.approx(theirs, abs=1e-6)
    assert config["task_type"] == "SEQ_CLS"
    assert not (folder / "model.safetensors").exists()


def test_padded_batches(artifact: Any, trained: Any, read_rows: Any) -> None:
    folder = trained("lora") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    inputs = tokenizer.pad({"input_ids": held_texts(artifact, tokenizer)}, return_tensors="pt")
    with torch.no_grad():
        theirs = model.eval()(**inputs).logits[:, 0].tolist()
    assert theirs == pytest.approx(held_scores(trained("lora"), read_rows), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_steps(kind: str, trained_steps: Any, step_data: Path, read_rows: Any) -> None:
    folder = trained_steps(kind) / "model"
    plain = peft.AutoPeftModelForTokenClassification.from_pretrained(folder, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (separator,) = tokenizer(";", add_special_tokens=False)["input_ids"]
    held = split_holdout(read_stepwise(step_data / "stepwise.jsonl"), SMALL["holdout_share"], 0)[1]
    rewarder = load_process_reward_model(folder)
    assert rewarder.separator == ";"
    again = rewarder.score_steps([record.prompt for record in held], [record.completions for record in held])
    rows = read_rows(trained_steps(kind) / "holdout.jsonl")
    for record, row, read in zip(held, rows, again, strict=True):
        ids, ends = render_prompt(tokenizer, record.prompt).tolist(), []
        for step in record.completions:
            ids += [*tokenizer(step, add_special_tokens=False)["input_ids"], separator]
            ends.append(len(ids) - 1)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor(ids)[None]).logits[0, -len(ids) :][ends]
        assert torch.softmax(logits, -1)[:, 1].tolist() == pytest.approx(row["right"], rel=1e-4, abs=1e-5)
        assert list(read) == pytest.approx(row["right"], rel=1e-4, abs=1e-5)
    note = json.loads((folder / "polm_base.json").read_text())
    assert (note["labels"], note["step_separator"]) == (["wrong", "right"], ";")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_adapter_and_the_head_are_trained(kind: str, artifact: Any, trained: Any, read_manifest: Any) -> None:
    summary = read_manifest(trained(kind))["summary"]
    saved = load_file(trained(kind) / "model" / WEIGHTS)
    width = 32
    (head,) = (tensor for name, tensor in saved.items() if name.endswith("score.weight"))
    assert head.shape == (1, width)
    assert summary["trained_parameters"] >= width + 4  # the head, and more
    assert summary["trained_parameters"] < summary["parameters"] / 3
    fresh = RewardModelSettings(**{**SMALL, "updates": 1, "optimizer": {"kind": "adamw", "learning_rate": 1e-9}})
    # All that is saved has moved from its start.
    folder = trained(kind).parent / f"{kind}-start"
    start = fresh.model_copy(update={"adapter": AdapterSettings(**KINDS[kind])})
    artifact.run("reward_model", start, artifact.inputs("reward_model"), folder)
    before = load_file(folder / "model" / WEIGHTS)
    assert all(float((saved[name] - tensor).abs().max()) > 1e-4 for name, tensor in before.items())


@pytest.mark.parametrize("kind", MERGING)
def test_merged_it_is_an_ordinary_reward_model(
    kind: str, artifact: Any, trained: Any, read_rows: Any, tmp_path: Path
) -> None:
    artifact.run("merge_adapter", MergeAdapterSettings(), {"model": str(trained(kind))}, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged" / "model")
    assert (plain.config.num_labels, plain.config.pad_token_id) == (1, tokenizer.pad_token_id)
    theirs = score_plainly(plain, held_texts(artifact, tokenizer))
    assert theirs == pytest.approx(held_scores(trained(kind), read_rows), rel=1e-4, abs=1e-5)


def test_merged_steps(artifact: Any, trained_steps: Any, tmp_path: Path) -> None:
    artifact.run("merge_adapter", MergeAdapterSettings(), {"model": str(trained_steps("lora"))}, tmp_path / "merged")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged" / "model")
    assert (plain.config.id2label, plain.config.step_separator) == ({0: "wrong", 1: "right"}, ";")
    rewarders = [load_process_reward_model(folder / "model") for folder in (trained_steps("lora"), tmp_path / "merged")]
    one, two = (r.score_steps([[{"role": "user", "content": "1 + 2 ="}]], [["1", "3"]])[0] for r in rewarders)
    assert list(one) == pytest.approx(list(two), rel=1e-4)


def test_virtual_tokens_cannot_be_merged(artifact: Any, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be merged: its virtual tokens stand before every text"):
        artifact.run("merge_adapter", MergeAdapterSettings(), {"model": str(trained("prompt"))}, tmp_path / "merged")
    with pytest.raises(ModelError, match="cannot be merged"):  # nor can all weights below them be trained
        run_reward_model(artifact, tmp_path / "full", None, inputs={"base": str(trained("prompt"))})


# ---- wherever a reward model can be used -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_rewards_are_those_of_the_stage(kind: str, artifact: Any, trained: Any, read_rows: Any) -> None:
    rewarder = load_reward_model(trained(kind) / "model")
    pairs = read_preferences(artifact("pairs") / "preferences.jsonl")
    held = split_holdout(pairs, SMALL["holdout_share"], 0)[1]
    none = rewarder.suffix[:0]
    items = [RewardItem(list(p.prompt), text, none, none) for p in held for text in (p.chosen, p.rejected)]
    values = [reward.value for reward in rewarder(items)]
    assert values == pytest.approx(held_scores(trained(kind), read_rows), rel=1e-4, abs=1e-5)
    long = [{"role": "user", "content": "1 " * 186}]
    length = len(render_prompt(rewarder.tokenizer, long)) + 2
    (reward,) = rewarder([RewardItem(long, "3", none, none)])
    room = 192 - (0 if kind == "lora" else 4)  # virtual tokens take positions
    assert reward.status == ("scored" if length <= room else "error")


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_rl_and_pairs_take_the_reward_from_an_adapter(
    kind: str, artifact: Any, trained: Any, trained_steps: Any, read_rows: Any, tmp_path: Path
) -> None:
    more = {"precision": "fp32", "max_new_tokens": 8, "samples": 4, "reward": ["model"]}
    settings = GRPOSettings(**more, updates=2, prompts_per_rollout=4, bin_tokens=192)
    inputs = {"base": str(artifact("dpo")), "data": str(artifact("data"))}
    for name, source in (("answers", trained(kind)), ("steps", trained_steps(kind))):
        given = {**inputs, "reward_model": str(source)}
        artifact.run("grpo", settings, given, tmp_path / name)
        lines = read_rows(tmp_path / name / "metrics.jsonl")
        assert lines[0]["grad_norm"] > 0.0
    rso = PairsSettings(**more, num_prompts=8, choose="rso")
    manifest = artifact.run("pairs", rso, {**inputs, "reward_model": str(trained(kind))}, tmp_path / "pairs")
    assert manifest["summary"]["pairs"] > 0


# ---- the next stage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_going_on_with_the_same_adapter(kind: str, artifact: Any, trained: Any, tmp_path: Path) -> None:
    still = {"kind": "adamw", "learning_rate": 1e-9}
    inputs = {"base": str(trained(kind))}
    run_reward_model(artifact, tmp_path / "still", {"kind": "continue"}, inputs=inputs, updates=1, optimizer=still)
    mine, same = (load_file(folder / "model" / WEIGHTS) for folder in (trained(kind), tmp_path / "still"))
    assert mine.keys() == same.keys()
    assert all(torch.allclose(same[name], tensor, rtol=0, atol=1e-6) for name, tensor in mine.items())
    run_reward_model(artifact, tmp_path / "moved", {"kind": "continue"}, inputs=inputs)
    moved = load_file(tmp_path / "moved" / "model" / WEIGHTS)
    assert all(not torch.equal(moved[name], tensor) for name, tensor in mine.items())


def test_a_new_adapter_on_an_adapter(artifact: Any, trained: Any, read_rows: Any, tmp_path: Path) -> None:
    """The merged classifier lies in `base/`, and plain peft finds it with its one label."""
    run_reward_model(artifact, tmp_path / "next", KINDS["ia3"], inputs={"base": str(trained("lora"))})
    folder = tmp_path / "next" / "model"
    texts = held_texts(artifact, AutoTokenizer.from_pretrained(folder))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "next" / "base")
    assert score_plainly(base, texts) == pytest.approx(held_scores(trained("lora"), read_rows), rel=1e-4, abs=1e-5)
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder)
    assert score_plainly(plain, texts) == pytest.approx(held_scores(folder.parent, read_rows), rel=1e-4, abs=1e-5)
    full = run_reward_model(artifact, tmp_path / "full", None, inputs={"base": str(trained("lora"))})
    assert "adapter" not in full["summary"]
    assert (tmp_path / "full" / "model" / "model.safetensors").is_file()


def test_a_language_models_adapter_as_the_base(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    sft = SFTSettings(bin_tokens=192, precision="fp32", updates=3, adapter=KINDS["lora"])
    inputs = {"base": str(artifact("midtrain")), "data": str(artifact("data"))}
    artifact.run("sft", sft, inputs, tmp_path / "sft")
    run_reward_model(artifact, tmp_path / "rm", KINDS["lora"], inputs={"base": str(tmp_path / "sft")})
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm" / "model")
    texts = held_texts(artifact, AutoTokenizer.from_pretrained(tmp_path / "rm" / "model"))
    assert score_plainly(plain, texts) == pytest.approx(held_scores(tmp_path / "rm", read_rows), rel=1e-4, abs=1e-5)
    with pytest.raises(RecipeError, match=r"continue, but base=.* is no adapter of a sequence classifier"):
        run_reward_model(artifact, tmp_path / "a", {"kind": "continue"}, inputs={"base": str(tmp_path / "sft")})
    with pytest.raises(ModelError, match="is an adapter of a language model; train a reward model from it first"):
        load_reward_model(tmp_path / "sft" / "model")


def test_a_stopped_run_goes_on_to_the_same_bits(artifact: Any, hash_files: Any, tmp_path: Path) -> None:
    adapter = {**KINDS["lora"], "dropout": 0.1}
    settings = RewardModelSettings(**{**SMALL, "updates": 5}, checkpoint_every=2, adapter=adapter)
    quiet: dict[str, Any] = {"inputs": artifact.inputs("reward_model"), "say": lambda _: None}

    def stop(line: Mapping[str, Any]) -> None:
        if line["update"] == 3:
            raise InterruptedError

    reward_model.run(settings, Context(tmp_path / "whole", **quiet))
    with pytest.raises(InterruptedError):
        reward_model.run(settings, Context(tmp_path / "parts", report=stop, **quiet))
    kept = load_file(tmp_path / "parts" / "checkpoint-00000002" / "weights.safetensors")
    assert all(".lora_" in name or ".modules_to_save." in name for name in kept)
    reward_model.run(settings, Context(tmp_path / "parts", **quiet))
    assert hash_files(tmp_path / "parts" / "model") == hash_files(tmp_path / "whole" / "model")


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_on_a_base_in_4_bits(name: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """From a language model and from a reward model; only adapter and head are saved, as without quantising, and they
    learn as on the base in float32, up to the quantisation."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    lines = {}
    for kind, more in (("plain", {}), ("nf4", {"quantize": "nf4"})):
        inputs = {"base": str(artifact(name))}
        run_reward_model(artifact, tmp_path / kind, {**KINDS["lora"], **more}, inputs=inputs, updates=6)
        lines[kind] = [line["loss"] for line in read_rows(tmp_path / kind / "metrics.jsonl")]
    assert lines["nf4"] != lines["plain"]
    assert lines["nf4"][0] == pytest.approx(lines["plain"][0], abs=0.15)
    assert lines["nf4"][-1] < lines["nf4"][0]
    saved = [load_file(tmp_path / kind / "model" / WEIGHTS) for kind in lines]
    assert saved[0].keys() == saved[1].keys()
    assert load_reward_model(tmp_path / "nf4" / "model").model.config.num_labels == 1
    inputs = {"base": str(tmp_path / "plain")}
    with pytest.raises(RecipeError, match="is an adapter: merge it first"):
        run_reward_model(artifact, tmp_path / "on", {"kind": "lora", "quantize": "nf4"}, inputs=inputs)


# ---- a critic --------------------------------------------------------------------------------------------------------


def test_a_critic_under_an_adapter(artifact: Any, trained: Any, read_rows: Any, tmp_path: Path) -> None:
    """The critic's trunk is that of the base, frozen; it and the policy are two adapters. One critic begins at a
    reward model that is an adapter itself."""
    spec = artifact.spec("ppo")[1]
    lora = AdapterSettings(kind="lora", rank=2)
    settings = spec.model_copy(update={"updates": 4, "adapter": lora, "critic_adapter": lora})
    inputs = artifact.inputs("ppo")
    artifact.run("ppo", settings, inputs, tmp_path / "fresh")
    lines = read_rows(tmp_path / "fresh" / "metrics.jsonl")
    assert lines[0]["ppo/value_mean"] == 0.0  # a fresh critic says 0
    assert lines[-1]["ppo/value_mean"] != 0.0
    assert all(line["grad_norm/critic"] > 0.0 for line in lines)
    critic = tmp_path / "fresh" / "critic"
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(critic, num_labels=1)
    ids = list(range(3, 20))
    with torch.no_grad():
        assert abs(score_plainly(plain, [ids])[0]) > 0.0
    assert load_file(critic / WEIGHTS)["base_model.model.score.weight"].abs().max() > 0.0
    given = {**inputs, "critic": str(trained("lora"))}
    artifact.run("ppo", settings, given, tmp_path / "given")
    assert (tmp_path / "given" / "critic_base" / "model.safetensors").is_file()
    again = {**inputs, "critic": str(tmp_path / "given" / "critic")}
    artifact.run("ppo", spec.model_copy(update={"updates": 2}), again, tmp_path / "again")
    assert (tmp_path / "again" / "critic" / "model.safetensors").is_file()


def test_a_critic_has_no_virtual_tokens() -> None:
    with pytest.raises(RecipeError, match=r"critic_adapter.kind is prefix; a critic takes lora or ia3"):
        validate(PPOSettings, {"updates": 1, "critic_adapter": {"kind": "prefix"}}, "x")


# ---- what cannot be right --------------------------------------------------------------------------------------------


def test_adapters_of_another_kind(artifact: Any, trained: Any, trained_steps: Any, tmp_path: Path) -> None:
    steps, answers = str(trained_steps("lora")), str(trained("lora"))
    for adapter in (None, KINDS["lora"], {"kind": "continue"}):
        with pytest.raises(ModelError, match="is a token classifier, and a sequence classifier is needed here"):
            run_reward_model(artifact, tmp_path / "a", adapter, inputs={"base": steps})
    with pytest.raises(ModelError, match="has 2 labels, and 1 are needed here"):
        load_reward_model(f"{steps}/model")
    with pytest.raises(ModelError, match="belongs to a reward model or another classifier"):
        load_base(answers)
    with pytest.raises(RecipeError, match=r"continue, but base=.* is no adapter of a sequence classifier"):
        run_reward_model(artifact, tmp_path / "c", {"kind": "continue"})
    with pytest.raises(
        ModelError, match=r"adapter targets \['score'\].*the output head is not adapted, as it is trained"
    ):
        run_reward_model(artifact, tmp_path / "d", {"kind": "lora", "targets": ["score"]})


def copy_adapter(source: Path, target: Path) -> None:
    """As another program would write it: without our note."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("polm_base.json"))


def test_an_adapter_from_elsewhere(trained: Any, trained_steps: Any, tmp_path: Path) -> None:
    """Without our note the labels are counted on the head; no separator is named; a missing head is told."""
    copy_adapter(trained("lora") / "model", tmp_path / "rm")
    assert load_reward_model(tmp_path / "rm").model.config.num_labels == 1
    copy_adapter(trained_steps("lora") / "model", tmp_path / "prm")
    with pytest.raises(ModelError, match="names no step_separator"):
        load_process_reward_model(tmp_path / "prm")
    assert load_process_reward_model(tmp_path / "prm", separator=";").separator == ";"
    weights = load_file(tmp_path / "rm" / WEIGHTS)
    save_file({n: t for n, t in weights.items() if not n.endswith("score.weight")}, tmp_path / "rm" / WEIGHTS)
    with pytest.raises(ModelError, match=r"lacks the head \(score or classifier\)"):
        load_reward_model(tmp_path / "rm")


def test_another_base(artifact: Any, trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    copy_adapter(trained("lora") / "model", folder)
    (folder / "polm_base.json").write_bytes((trained("lora") / "model" / "polm_base.json").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(artifact("pretrain") / "model")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is not the one that it was trained on"):
        load_reward_model(folder)
