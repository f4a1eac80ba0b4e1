"""Runs without a control, such as self-rewarding iterations: each evaluation against the first one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polm.evals.statistics import compute_t_interval
from polm.report.compare import Arm, build_evaluations
from polm.report.html import build_report
from polm.report.load import load_run
from polm.report.rounds import NO_CONTROL, compute_rounds, describe_rounds
from polm.report.tables import build_rounds_summary

SELF = Arm(0, "self")


def rename_control(run_dir: Path, *, keep: Callable[[dict[str, Any]], bool] | None = None) -> Path:
    """The run with the arm `self` in place of the control, and of its nodes those that are kept."""
    content = json.loads((run_dir / "run.json").read_text())
    nodes = [node for node in content["nodes"] if keep is None or keep(node)]
    for node in nodes:
        node["id"] = node["id"].replace("/ntp/", "/self/")
        node["inputs"] = {role: source.replace("/ntp/", "/self/") for role, source in node["inputs"].items()}
        node["arm"] = "self" if node["arm"] == "ntp" else node["arm"]
    (run_dir / "run.json").write_text(json.dumps({**content, "nodes": nodes}))
    return run_dir


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_last_model_against_the_first(build_run: Callable[..., Path], seeds: int) -> None:
    run = load_run(rename_control(build_run(arms=(), seeds=seeds, num_items=40)))
    rounds = compute_rounds(run)
    assert rounds is not None
    assert rounds.places == (("base", SELF), ("sft", SELF), ("dpo", SELF), ("rl", SELF))
    evaluations = build_evaluations(run)

    def score(point: str, seed: int) -> float:
        return float(np.mean([item.greedy_correct for item in evaluations[point, SELF][seed].items]))

    differences = [score("rl", seed) - score("base", seed) for seed in range(seeds)]
    row = rounds.rows[("rl", SELF), "greedy"]
    assert row.comparison is not None
    assert row.comparison.interval.mean_difference == pytest.approx(np.mean(differences))
    words = describe_rounds(rounds)
    assert words.startswith("Self · cycle 0, after RL, against self · cycle 0, base model, after mid-training: ")
    if seeds == 1:
        assert words.endswith("One seed, so nothing is shown.")
    else:
        interval = compute_t_interval(differences)
        assert row.comparison.interval.low95 == pytest.approx(interval.low95)
        verdict = "No difference was shown" if not interval.excludes_zero else "Better than before"
        assert words.endswith(f"{verdict}.")
    assert rounds.rows[("base", SELF), "greedy"].comparison is None


def test_the_page_and_the_terminal_say_it(build_run: Callable[..., Path]) -> None:
    run = load_run(rename_control(build_run(arms=())))
    rounds = compute_rounds(run)
    assert rounds is not None
    page = build_report(run)
    text = re.sub(r"<[^>]+>", " ", page)
    for words in (
        describe_rounds(rounds),
        NO_CONTROL,
        "Round by round: greedy",
        "next cycle, which begins with the model",
    ):
        assert words in text, words
    assert "Along the pipeline" not in text
    assert "control has not been evaluated" not in text
    assert build_rounds_summary(rounds).row_count == 4


def test_samples_of_the_first_and_the_last_round(build_run: Callable[..., Path]) -> None:
    """Without an evaluation after RL, the first model stands beside the last one."""
    run_dir = rename_control(build_run(arms=()), keep=lambda node: not node["id"].endswith("eval_rl"))
    page = build_report(load_run(run_dir))
    assert "wrong before training, right after" in page
    assert "self · cycle 0, after preference optimisation" in page
    assert "before RL" not in page[page.index('<section id="samples">') : page.index('<section id="rollouts">')]


def test_no_evaluation_is_said_to_be_none(build_run: Callable[..., Path]) -> None:
    run_dir = rename_control(build_run(arms=()), keep=lambda node: node["stage"] != "eval")
    run = load_run(run_dir)
    assert compute_rounds(run) is None
    assert "The recipe evaluates nothing, so nothing says whether the model became better" in build_report(run)


def test_a_flywheel_has_its_control(build_run: Callable[..., Path]) -> None:
    assert compute_rounds(load_run(build_run())) is None
