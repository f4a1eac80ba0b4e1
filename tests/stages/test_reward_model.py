"""`polm reward_model`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from polm.config import find_recipe, load_settings, recipe_folder
from polm.data.holdout import split_holdout
from polm.data.readers import read_preferences, write_jsonl
from polm.errors import DataError, ModelError
from polm.models.heads import build_scalar_model, load_scalar_model
from polm.models.loading import load_model, load_tokenizer, save_model
from polm.recipe import RewardModelSettings
from polm.stages import reward_model
from polm.stages.common import Context

SHIPPED = sorted(path.stem for path in (recipe_folder() / "reward_model").glob("*.yaml"))
SMALL: dict[str, Any] = {"bin_tokens": 192, "precision": "fp32", "updates": 2, "holdout_share": 0.3}


def test_a_turn(artifact: Any, read_rows: Any, read_manifest: Any) -> None:
    folder = artifact("reward_model")
    lines, manifest = read_rows(folder / "metrics.jsonl"), read_manifest(folder)
    assert lines[0]["loss"] == pytest.approx(math.log(2.0), abs=0.5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["reward/accuracy"] > 0.8
    before = load_file(artifact("sft") / "model" / "model.safetensors")
    after = load_file(folder / "model" / "model.safetensors")
    assert "score.weight" in after
    assert all(not torch.equal(p, before[name]) for name, p in after.items() if name in before)
    ledger, summary = manifest["ledger"], manifest["summary"]
    assert ledger["read"] + ledger["holdout_read"] == read_manifest(artifact("pairs"))["summary"]["pairs"]
    assert ledger["tokens_supervised"] == 2 * ledger["kept"]  # the end of each answer
    assert summary["holdout/pairs"] == ledger["holdout_kept"]
    assert not list(folder.glob("*checkpoint*"))


def test_the_report_of_held_out_pairs(artifact: Any, read_rows: Any, read_manifest: Any) -> None:
    folder = artifact("reward_model")
    rows = read_rows(folder / "holdout.jsonl")
    report = json.loads((folder / "holdout.json").read_text())
    summary = read_manifest(folder)["summary"]
    wins = [(row["chosen"] > row["rejected"]) + 0.5 * (row["chosen"] == row["rejected"]) for row in rows]
    assert report["accuracy"] == pytest.approx(sum(wins) / len(wins))
    assert report["mean_margin"] == pytest.approx(sum(row["chosen"] - row["rejected"] for row in rows) / len(rows))
    assert sum(row["pairs"] for row in report["reliability"]) == len(rows)
    for name in ("accuracy", "brier", "calibration_error", "mean_margin", "length_accuracy"):
        assert summary[f"holdout/{name}"] == report[name]


def test_plain_transformers_gives_the_same_scores(artifact: Any, read_rows: Any) -> None:
    """Padded batches through AutoModelForSequenceClassification against the stage's own held-out rewards."""
    folder = artifact("reward_model")
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model", attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pairs = read_preferences(artifact("pairs") / "preferences.jsonl")
    settings = artifact.spec("reward_model")[1]
    held = split_holdout(pairs, settings.holdout_share, settings.seed)[1]
    chats = [[*p.prompt, {"role": "assistant", "content": text}] for p in held for text in (p.chosen, p.rejected)]
    inputs = tokenizer.apply_chat_template(chats, return_tensors="pt", padding=True, return_dict=True)
    with torch.no_grad():
        theirs = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
    ours = [row[side] for row in read_rows(folder / "holdout.jsonl") for side in ("chosen", "rejected")]
    assert float(theirs.std()) > 0.01
    assert theirs.tolist() == pytest.approx(ours, rel=1e-4, abs=1e-5)


def test_a_reward_model_is_trained_on(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """As a base, a reward model keeps its head."""
    inputs = {**artifact.inputs("reward_model"), "base": str(artifact("reward_model"))}
    settings = RewardModelSettings(**SMALL, bins_per_update=2)
    artifact.run("reward_model", settings, inputs, tmp_path / "out")
    again = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert again[0]["loss"] < 0.6 * math.log(2.0)


def test_a_stopped_run_goes_on_to_the_same_bits(artifact: Any, hash_files: Any, tmp_path: Path) -> None:
    settings = RewardModelSettings(**{**SMALL, "updates": 5}, checkpoint_every=2)
    quiet: dict[str, Any] = {"inputs": artifact.inputs("reward_model"), "say": lambda _: None}

    def stop(line: Mapping[str, Any]) -> None:
        if line["update"] == 3:
            raise InterruptedError

    reward_model.run(settings, Context(tmp_path / "whole", **quiet))
    with pytest.raises(InterruptedError):
        reward_model.run(settings, Context(tmp_path / "parts", report=stop, **quiet))
    seen: list[int] = []
    again = Context(tmp_path / "parts", report=lambda line: seen.append(line["update"]), **quiet)
    reward_model.run(settings, again)
    assert seen[0] == 3
    assert hash_files(tmp_path / "parts") == hash_files(tmp_path / "whole")
    names = ("holdout.json", "holdout.jsonl")
    assert all((tmp_path / "parts" / n).read_text() == (tmp_path / "whole" / n).read_text() for n in names)


def test_margins_are_trained_on(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """The first loss with rewards that begin at 0 is -log sigmoid(-margin)."""
    rows = [
        {"prompt": f"add {i} and 1 .", "chosen": str(i + 1), "rejected": str(i + 2), "margin": 2.0} for i in range(6)
    ]
    write_jsonl(tmp_path / "preferences.jsonl", rows)
    settings = RewardModelSettings(**{**SMALL, "updates": 1, "holdout_share": 0.0}, head_spread=0.0)
    inputs = {"base": str(artifact("sft")), "data": str(tmp_path)}
    manifest = artifact.run("reward_model", settings, inputs, tmp_path / "out")
    assert read_rows(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(
        math.log1p(math.exp(2.0)), rel=1e-5
    )
    assert manifest["ledger"]["margins"] == 6
    assert not (tmp_path / "out" / "holdout.json").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run(name: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    words = ["epochs=null", "updates=2", "bin_tokens=192", "bins_per_update=2", "micro_bins=0", "precision=fp32"]
    words += ["optimizer.learning_rate=0.01", "schedule.warmup_updates=0", "checkpoint_every=0", "holdout_share=0.3"]
    settings = load_settings(RewardModelSettings, find_recipe(f"reward_model/{name}"), words, section="reward_model")
    assert bool(settings.center_coefficient) == (name == "centred")
    artifact.run("reward_model", settings, artifact.inputs("reward_model"), tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0


# ---- what cannot be right --------------------------------------------------------------------------------------------


def run_refused(artifact: Any, folder: Path, rows: list[dict[str, Any]], match: str, **changes: Any) -> None:
    write_jsonl(folder / "preferences.jsonl", rows)
    inputs = {"base": str(artifact("sft")), "data": str(folder)}
    with pytest.raises(DataError, match=match):
        artifact.run("reward_model", RewardModelSettings(**{**SMALL, **changes}), inputs, folder / "out")


def test_only_equal_answers(artifact: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2 =", "chosen": "4", "rejected": "4"}]
    run_refused(artifact, tmp_path, rows, r"no token is supervised \(1 examples read, 1 dropped\)", holdout_share=0.0)


def test_prompts_of_a_pair_that_differ(artifact: Any, tmp_path: Path) -> None:
    rows = [
        {
            "chosen": [{"role": "user", "content": "3 + 3 ="}, {"role": "assistant", "content": "6"}],
            "rejected": [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "5"}],
        }
    ]
    run_refused(artifact, tmp_path, rows, r"preferences.jsonl:1: chosen must end in exactly one assistant message")


def test_too_few_to_hold_out(artifact: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}]
    run_refused(artifact, tmp_path, rows, "of 1 records, .* both are needed")


def test_a_process_reward_model_as_a_base(artifact: Any, tmp_path: Path) -> None:

    source = artifact("sft") / "model"
    model = build_scalar_model(load_model(source), "token", num_labels=2)
    save_model(model, load_tokenizer(source), tmp_path / "prm")
    inputs = {**artifact.inputs("reward_model"), "base": str(tmp_path / "prm")}
    with pytest.raises(ModelError, match="is a token classifier, and a sequence classifier is needed here"):
        artifact.run("reward_model", RewardModelSettings(**SMALL), inputs, tmp_path / "out")


def test_a_reward_model_is_not_a_policy(artifact: Any, tmp_path: Path) -> None:
    inputs = {"base": str(artifact("reward_model")), "data": str(artifact("data"))}
    with pytest.raises(ModelError, match="is a reward model or another classifier"):
        artifact.run("sft", artifact.spec("sft")[1], inputs, tmp_path / "out")
    assert load_scalar_model(artifact("reward_model") / "model").config.num_labels == 1
