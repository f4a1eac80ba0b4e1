"""Where annealing curves pass each other, in numbers and in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polm.report.annealing import compute_crossing, describe_crossing, smooth
from polm.report.compare import Arm
from polm.report.load import load_run
from polm.report.sections_training import _list_trained, build_crossings, section_training

UPDATES = [1.0, 2.0, 3.0, 4.0, 5.0]
CONTROL = [5.0, 4.0, 3.0, 2.0, 1.0]


def test_a_crossing_by_hand() -> None:
    """Above at 1 and 2, below from 3 on; the control ends at 1.0, which the arm has at update 4."""
    found = compute_crossing("arm", UPDATES, [6.0, 4.5, 2.5, 1.0, 0.5], CONTROL)
    assert found is not None
    assert (found.update, found.value, found.final, found.reached, found.window) == (3.0, 2.5, -0.5, 4.0, 1)
    words = describe_crossing(found)
    assert "arm passes ntp for the last time at update 3 of 5 and stays below it (0.5000 nats" in words
    assert "first at or below ntp's final value of 1.0000 at update 4, ntp itself at update 5" in words


def test_the_last_crossing_counts() -> None:
    found = compute_crossing("arm", UPDATES, [4.0, 4.5, 2.5, 2.5, 1.5], CONTROL)
    assert found is not None
    assert found.update == 4.0
    assert found.final > 0
    assert "stays above it" in describe_crossing(found)
    assert "It never reaches ntp's final value" in describe_crossing(found)


@pytest.mark.parametrize(("shift", "side"), [(0.5, "above"), (-0.5, "below")])
def test_never_survives(shift: float, side: str) -> None:
    found = compute_crossing("arm", UPDATES, [y + shift for y in CONTROL], CONTROL)
    assert found is not None
    assert found.update is None
    assert f"arm never passes ntp: it lies {side} it at every point from update 1 to 5" in describe_crossing(found)


def test_level_curves_do_not_cross() -> None:
    found = compute_crossing("arm", UPDATES, CONTROL, CONTROL)
    assert found is not None
    assert found.update is None
    assert "ends level with ntp" in describe_crossing(found)


def test_gaps_and_single_points() -> None:
    assert compute_crossing("arm", [1.0], [1.0], [2.0]) is None
    found = compute_crossing("arm", UPDATES, [6.0, float("nan"), 2.5, 1.5, 0.5], CONTROL)
    assert found is not None
    assert found.update == 3.0


def test_smoothing() -> None:
    assert smooth([1.0, 2.0, 6.0, 4.0], 2) == [1.5, 4.0, 5.0]
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]


def test_the_section_marks_and_says_it(build_run: Callable[..., Path]) -> None:
    run = load_run(build_run())
    crossings = build_crossings(_list_trained(run)["midtrain"])
    assert set(crossings) == {Arm(1, "remit"), Arm(1, "rho1")}
    page = section_training(run)
    for one in crossings.values():
        assert (f"passes ntp at update {one.update:g}</title>" in page) == (one.update is not None)
    assert page.count("ntp&#x27;s final value") == 2
    assert "averaged over 4 logged points" in page
