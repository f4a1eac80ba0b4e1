"""`polm process_reward_model`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from polm.config import find_recipe, load_settings, recipe_folder
from polm.data.holdout import split_holdout
from polm.data.readers import read_stepwise, write_jsonl
from polm.errors import DataError, UserError
from polm.recipe import ProcessRewardModelSettings
from polm.stages import process_reward_model
from polm.stages.common import Context
from polm.text.chat import render_prompt

SHIPPED = sorted(path.stem for path in (recipe_folder() / "process_reward_model").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "bin_tokens": 192,
    "precision": "fp32",
    "updates": 2,
    "holdout_share": 0.3,
    "separator": ";",
    "optimizer": {"learning_rate": 0.01},
}


@pytest.fixture(scope="module")
def data(step_rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("steps")
    write_jsonl(folder / "stepwise.jsonl", step_rows)
    return folder


@pytest.fixture(scope="module")
def trained(artifact: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prm") / "out"
    settings = ProcessRewardModelSettings(**{**SMALL, "updates": 25, "bins_per_update": 3})
    artifact.run("process_reward_model", settings, {"base": str(artifact("sft")), "data": str(data)}, folder)
    return folder


def test_a_turn(trained: Path, data: Path, read_rows: Any, read_manifest: Any) -> None:
    lines, manifest = read_rows(trained / "metrics.jsonl"), read_manifest(trained)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    ledger = manifest["ledger"]
    num_steps = sum(len(record.labels) for record in read_stepwise(data / "stepwise.jsonl"))
    assert ledger["steps_read"] + ledger["holdout_steps_read"] == num_steps
    assert ledger["tokens_supervised"] == ledger["steps_read"]
    config = json.loads((trained / "model" / "config.json").read_text())
    assert config["step_separator"] == ";"
    assert config["id2label"] == {"0": "wrong", "1": "right"}


def test_the_report_of_held_out_answers(trained: Path, read_rows: Any, read_manifest: Any) -> None:
    rows, report = read_rows(trained / "holdout.jsonl"), json.loads((trained / "holdout.json").read_text())
    steps = [(p, y) for row in rows for p, y in zip(row["right"], row["labels"], strict=True)]
    assert report["steps"] == len(steps)
    assert report["accuracy"] == pytest.approx(sum((p > 0.5) == (y > 0.5) for p, y in steps) / len(steps))
    summary = read_manifest(trained)["summary"]
    assert summary["holdout/accuracy"] == report["accuracy"]
    assert summary["holdout/first_error_accuracy"] == report["first_error_accuracy"]


def test_plain_transformers_gives_the_same_probabilities(trained: Path, data: Path, read_rows: Any) -> None:
    plain = AutoModelForTokenClassification.from_pretrained(trained / "model", attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    held = split_holdout(read_stepwise(data / "stepwise.jsonl"), 0.3, 0)[1]
    (separator,) = tokenizer(";", add_special_tokens=False)["input_ids"]
    rows = read_rows(trained / "holdout.jsonl")
    assert len(rows) == len(held) > 1
    for record, row in zip(held, rows, strict=True):
        ids, ends = render_prompt(tokenizer, record.prompt).tolist(), []
        for step in record.completions:
            ids += [*tokenizer(step, add_special_tokens=False)["input_ids"], separator]
            ends.append(len(ids) - 1)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor(ids)[None]).logits[0, ends]
        assert torch.softmax(logits, -1)[:, 1].tolist() == pytest.approx(row["right"], rel=1e-4, abs=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits(artifact: Any, data: Path, hash_files: Any, tmp_path: Path) -> None:
    settings = ProcessRewardModelSettings(**{**SMALL, "updates": 4}, checkpoint_every=2)
    quiet: dict[str, Any] = {"inputs": {"base": str(artifact("sft")), "data": str(data)}, "say": lambda _: None}

    def stop(line: Mapping[str, Any]) -> None:
        if line["update"] == 3:
            raise InterruptedError

    process_reward_model.run(settings, Context(tmp_path / "whole", **quiet))
    with pytest.raises(InterruptedError):
        process_reward_model.run(settings, Context(tmp_path / "parts", report=stop, **quiet))
    process_reward_model.run(settings, Context(tmp_path / "parts", **quiet))
    assert hash_files(tmp_path / "parts") == hash_files(tmp_path / "whole")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_run(name: str, artifact: Any, data: Path, read_rows: Any, tmp_path: Path) -> None:
    """The tokenizer is a word tokenizer, in which the recipes' line break has no token."""
    words = ["epochs=null", "updates=2", "bin_tokens=192", "bins_per_update=2", "micro_bins=0", "precision=fp32"]
    words += ["optimizer.learning_rate=0.01", "schedule.warmup_updates=0", "checkpoint_every=0", "holdout_share=0.3"]
    file = find_recipe(f"process_reward_model/{name}")
    plain = load_settings(ProcessRewardModelSettings, file, words, section="process_reward_model")
    inputs = {"base": str(artifact("sft")), "data": str(data)}
    with pytest.raises(UserError, match="has no token with this tokenizer"):
        artifact.run("process_reward_model", plain, inputs, tmp_path / "refused")
    settings = plain.model_copy(update={"separator": ";"})
    ledger = artifact.run("process_reward_model", settings, inputs, tmp_path / "out")["ledger"]
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0
    assert ledger["tokens_supervised"] == (ledger["kept"] if name == "outcome" else ledger["steps_read"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": [True]}, r"stepwise.jsonl:2: 2 completions and 1 labels"),
        ({"labels": []}, r"stepwise.jsonl:2: 2 completions and 0 labels"),
        (
            {"completions": ["1", ""]},
            r"record 1: completions\[1\] is an empty step.* set bad_records: drop, which leaves",
        ),
    ],
)
def test_bad_records(artifact: Any, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    good = {"prompt": "add 1 and 2 .", "completions": ["1", "2"], "labels": [True, False]}
    write_jsonl(tmp_path / "stepwise.jsonl", [good, {**good, **changes}])
    settings = ProcessRewardModelSettings(**{**SMALL, "holdout_share": 0.0})
    with pytest.raises(DataError, match=match):
        artifact.run(
            "process_reward_model", settings, {"base": str(artifact("sft")), "data": str(tmp_path)}, tmp_path / "out"
        )


@pytest.mark.parametrize("holdout_share", [0.0, 0.3])
def test_records_with_an_empty_step_are_left_out(artifact: Any, holdout_share: float, tmp_path: Path) -> None:
    """And counted, among the held-out ones too; the others are learned as they would be without."""
    good = [{"prompt": f"add {i} and 2 .", "completions": ["1", "2"], "labels": [True, False]} for i in range(8)]
    bad = [{**row, "completions": [" ", "2"]} for row in good]
    write_jsonl(tmp_path / "stepwise.jsonl", [*good, *bad])
    settings = ProcessRewardModelSettings(**{**SMALL, "holdout_share": holdout_share, "bad_records": "drop"})
    inputs = {"base": str(artifact("sft")), "data": str(tmp_path)}
    ledger = artifact.run("process_reward_model", settings, inputs, tmp_path / "out")["ledger"]
    counts = {name: ledger.get(name, 0) + ledger.get(f"holdout_{name}", 0) for name in ("read", "kept", "dropped")}
    assert counts == {"read": 16, "kept": 8, "dropped": 8}
    assert ledger["dropped_empty_step"] + ledger.get("holdout_dropped_empty_step", 0) == 8
    assert ("holdout_dropped_empty_step" in ledger) == bool(holdout_share)
