"""Learning-rate schedules, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from polm.engine.schedule import compute_rate_factor
from polm.recipe import ScheduleSettings

CASES: list[tuple[dict[str, Any], int, list[float]]] = [
    ({"kind": "constant"}, 3, [1.0, 1.0, 1.0]),
    # Warm-up over 3 updates: 1/4, 2/4, 3/4, and the peak at update 3.
    ({"kind": "constant", "warmup_updates": 3}, 5, [0.25, 0.5, 0.75, 1.0, 1.0]),
    # Linear over 5 updates: 1 - u/5; it would reach 0 at update 5.
    ({"kind": "linear"}, 5, [1.0, 0.8, 0.6, 0.4, 0.2]),
    ({"kind": "linear", "final_share": 0.5}, 4, [1.0, 0.875, 0.75, 0.625]),
    # One update of warm-up, then linear over the 4 that are left.
    ({"kind": "linear", "warmup_updates": 1}, 5, [0.5, 1.0, 0.75, 0.5, 0.25]),
    ({"kind": "cosine"}, 4, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ({"kind": "cosine", "final_share": 0.2}, 2, [1.0, 0.6]),
    # Stable for 8 of 10 updates, then from the peak downwards over the last two: 1, 1/2.
    ({"kind": "wsd", "decay_share": 0.2}, 10, [1.0] * 9 + [0.5]),
    ({"kind": "wsd", "decay_share": 0.4, "warmup_updates": 1, "final_share": 0.1}, 5, [0.5, 1.0, 1.0, 1.0, 0.55]),
    # Nothing left to be stable in: warm-up, then decay.
    ({"kind": "wsd", "decay_share": 1.0, "warmup_updates": 2}, 4, [1 / 3, 2 / 3, 1.0, 0.5]),
    # A warm-up longer than the run never reaches the peak.
    ({"kind": "linear", "warmup_updates": 9}, 3, [0.1, 0.2, 0.3]),
]


@pytest.mark.parametrize(("settings", "num_updates", "expected"), CASES)
def test_schedule(settings: dict[str, Any], num_updates: int, expected: list[float]) -> None:
    schedule = ScheduleSettings(**settings)
    factors = [compute_rate_factor(update, num_updates, schedule) for update in range(num_updates)]
    assert factors == pytest.approx(expected, abs=1e-12)
