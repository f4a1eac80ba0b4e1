"""The shipped files of reinforcement learning: each runs two updates on the tiny model; ReFT runs from end to end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from polm.config import find_recipe, load_settings, recipe_folder
from polm.recipe import GRPOSettings
from polm.report.metric_words import LOSS_WORDS, WORDS
from polm.stages.table import STAGES

# File -> stage.
SHIPPED = {
    "rl/grpo": "grpo",
    "rl/dapo": "grpo",
    "rl/dr_grpo": "grpo",
    "rl/rloo": "rloo",
    "rl/reinforce_pp": "reinforce_pp",
    "rl/reinforce_pp_baseline": "reinforce_pp",
    "rl/remax": "remax",
    "rl/ppo": "ppo",
    "reft/ppo": "ppo",
}
SMALL = [
    *("epochs=null", "updates=2", "bin_tokens=192", "precision=fp32", "prompts_per_rollout=4", "max_new_tokens=8"),
    *("optimizer.learning_rate=0.01", "checkpoint_every=0"),
]


def test_every_file_is_named_here() -> None:
    root = recipe_folder()
    found = {str(path.relative_to(root).with_suffix("")) for name in ("rl", "reft") for path in root.glob(f"{name}/*")}
    assert found == {*SHIPPED, "reft/warmup"}


def test_the_table_of_methods_names_them() -> None:
    text = (recipe_folder().parent / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"--recipe {name}`" in text for name in (*SHIPPED, "reft/warmup"))


def run(artifact: Any, name: str, out: Path, base: str | None = None) -> Any:
    settings = load_settings(STAGES[SHIPPED[name]].settings, find_recipe(name), SMALL, section=SHIPPED[name])
    inputs = {"base": base or str(artifact("dpo")), "data": str(artifact("data"))}
    if name == "rl/ppo":
        inputs |= {role: str(artifact("reward_model")) for role in ("reward_model", "critic")}
    return artifact.run(SHIPPED[name], settings, inputs, out)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_run(name: str, artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    manifest = run(artifact, name, tmp_path / "out")
    lines = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert len(lines) == manifest["summary"]["updates"] == 2
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {"rl/reward", "rl/length", "rl/entropy", "rl/mismatch_mean"} <= lines[0].keys()
    assert "rl/kl" in lines[0] or STAGES[SHIPPED[name]].settings is GRPOSettings
    unknown = {n for n in lines[0] if n.startswith(("rl/", "ppo/", "grad_norm"))} - WORDS.keys()
    assert unknown == set()
    assert SHIPPED[name] in LOSS_WORDS


def test_reft_from_end_to_end(artifact: Any, read_rows: Any, tmp_path: Path) -> None:
    """SFT on chains of thought, then PPO on the questions of the same folder, by the two shipped files."""
    words = ["epochs=null", "updates=3", "bin_tokens=192", "bins_per_update=2", "micro_bins=0", "precision=fp32"]
    words += ["optimizer.learning_rate=0.01", "schedule.warmup_updates=0", "checkpoint_every=0"]
    warmup = load_settings(STAGES["sft"].settings, find_recipe("reft/warmup"), words, section="sft")
    artifact.run("sft", warmup, artifact.inputs("sft"), tmp_path / "warmup")
    manifest = run(artifact, "reft/ppo", tmp_path / "out", base=str(tmp_path / "warmup"))
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    assert (tmp_path / "out" / "critic" / "config.json").is_file()
    assert manifest["config"]["partial_reward"] == 0.1
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        for sample in row["samples"]:
            assert sample.get("reward", float(sample["status"] == "right")) in (0.0, 0.1, 1.0)
