"""Averages over seeds and differences to the control, by hand; which samples are shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from polm.report.compare import CONTROL, Arm
from polm.report.load import load_run
from polm.report.sections_samples import OUTCOMES, build_transitions, section_samples
from polm.report.sections_training import compute_curve, compute_difference_log, section_training


def test_curves_average_over_the_updates_that_all_seeds_have() -> None:
    first = [{"update": 1, "tokens": 100, "loss": 3.0}, {"update": 2, "tokens": 200, "loss": 2.0}]
    second = [{"update": 1, "tokens": 110, "loss": 1.0}, {"update": 3, "tokens": 300, "loss": 9.0}]
    curve = compute_curve([first, second], "loss", "tokens")
    assert curve is not None
    assert (curve.x, curve.mean, curve.low, curve.high, curve.num_seeds) == ([105.0], [2.0], [1.0], [3.0], 2)
    alone = compute_curve([first], "loss", "update")
    assert alone is not None
    assert (alone.x, alone.mean) == ([1.0, 2.0], [3.0, 2.0])
    assert compute_curve([first], "absent", "tokens") is None


def test_differences_are_taken_at_the_same_update() -> None:
    arm = [{"update": 1, "tokens": 5, "x": 3.0}, {"update": 2, "tokens": 9, "x": 2.5}, {"update": 3, "x": 1.0}]
    control = [{"update": 2, "x": 2.0}, {"update": 1, "x": 1.0}]
    assert [(line["update"], line["x"]) for line in compute_difference_log(arm, control, "x")] == [(1, 2.0), (2, 0.5)]


def test_training_section_shows_every_stage_and_the_weights(small_run: Path) -> None:
    page = section_training(load_run(small_run))
    for title in ("midtrain: ntp/nll, difference to ntp", "grpo: rl/reward", "sft: loss", "pretrain: loss"):
        assert f"<h4>{title}</h4>" in page
    assert "remit · cycle 1, midtrain: remit/weight_histogram" in page
    assert "0.4 to 0.6: 0.12" in page  # ten bins over weights from 0 to 2
    assert page.index("midtrain: ntp/nll") < page.index("midtrain: loss")
    assert page.index("grpo: rl/reward") < page.index("grpo: loss")
    assert "means over 2 seeds" in page


def test_curves_say_over_how_many_seeds_they_are(build_run: Callable[..., Path]) -> None:
    """Two seeds of remit have not begun their mid-training; the control and rho1 have all three."""
    run_dir = build_run(seeds=3)
    nodes = json.loads((run_dir / "run.json").read_text())["nodes"]
    for node in nodes:
        if node["arm"] == "remit" and node["stage"] == "midtrain" and node["seed"] > 0:
            shutil.rmtree(run_dir / node["artifact"])
    page = section_training(load_run(run_dir))
    assert page.count("Lines are means over 1 to 3 seeds, bands their full range.") > 1
    assert "Lines are means over 3 seeds, bands their full range." in page  # the other stages


def test_samples_show_one_of_each_outcome(build_run: Callable[..., Path]) -> None:
    run = load_run(build_run(num_items=60, benchmarks=("add",)))
    point, transitions = build_transitions(run, Arm(1, "remit"), 0)
    assert point == "dpo"
    assert len(transitions) == 60
    page = section_samples(run)
    present = [name for name in OUTCOMES if any(one.outcome == name for one in transitions)]
    assert [page.count(f'data-outcome="{name}"') for name in present] == [1] * len(present)
    for name in present:
        first = next(one for one in transitions if one.outcome == name)
        assert (
            first.outcome
            == {(0, 1): "fixed", (1, 0): "broken", (1, 1): "right", (0, 0): "wrong"}[
                first.before.greedy_correct, first.after.greedy_correct
            ]
        )  # type: ignore[index]
    num_fixed = sum(one.outcome == "fixed" for one in transitions)
    assert f"add: 60 items, {num_fixed} fixed by RL" in page
    assert "control ntp · cycle 0, after RL" in page


def test_samples_fall_back_to_the_control(build_run: Callable[..., Path]) -> None:
    run = load_run(build_run(until="midtrain"))
    assert build_transitions(run, Arm(1, "remit"), 0) == ("", [])
    assert f"Greedy answers of {CONTROL.label}" in section_samples(run)
