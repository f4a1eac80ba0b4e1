"""Where annealing curves pass each other: each arm's plain likelihood against the control's, smoothed and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polm.report.compare import CONTROL_NAME

WINDOW_SHARE = 0.1  # of the logged points, at most MAX_WINDOW, go into one smoothed point
MAX_WINDOW = 25


@dataclass(frozen=True)
class Crossing:
    """How an arm's curve lies to the control's, both smoothed.

    update         from here to the end the arm stays on one side; None: it was there from the first point on
    value          the arm's smoothed value there (nats per token)
    final          arm minus control at the end (smoothed)
    reached        the first update at which the arm is at or below the control's final value; None: never
    control_final  that final value
    control_reached  the first update at which the control itself is there (before its end where batches differ)
    first, last    first and last smoothed update
    window         logged points in one smoothed point
    """

    label: str
    update: float | None
    value: float
    final: float
    reached: float | None
    control_final: float
    control_reached: float
    first: float
    last: float
    window: int


def compute_window(num_points: int) -> int:
    return max(1, min(MAX_WINDOW, round(num_points * WINDOW_SHARE)))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the `window` - 1 before it; the first `window` - 1 places are left out."""
    return [math.fsum(values[i - window + 1 : i + 1]) / window for i in range(window - 1, len(values))]


def compute_crossing(
    label: str, updates: Sequence[float], arm: Sequence[float], control: Sequence[float]
) -> Crossing | None:
    """Compare two curves over the same updates; None for fewer than two finite points.

    The smoothed difference decides: noise that both curves share (they read the same text) cancels in it.
    """
    points = [one for one in zip(updates, arm, control, strict=True) if all(map(math.isfinite, one))]
    if len(points) < 2:
        return None
    window = compute_window(len(points))
    x = [point[0] for point in points][window - 1 :]
    mine, theirs = smooth([point[1] for point in points], window), smooth([point[2] for point in points], window)
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    side = _sign(differences[-1])
    start = len(differences) - 1
    while start > 0 and _sign(differences[start - 1]) == side:
        start -= 1
    reached = _find_reached(x, mine, theirs[-1])
    control_reached = _find_reached(x, theirs, theirs[-1])
    assert control_reached is not None  # at its end at the latest
    update = x[start] if start > 0 and side else None
    return Crossing(
        label, update, mine[start], differences[-1], reached, theirs[-1], control_reached, x[0], x[-1], window
    )


def _find_reached(updates: Sequence[float], values: Sequence[float], goal: float) -> float | None:
    return next((update for update, value in zip(updates, values, strict=True) if value <= goal), None)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def describe_crossing(crossing: Crossing) -> str:
    """One sentence about who passed whom, one about the control's final value; "never" is said as never."""
    side = "below" if crossing.final < 0 else "above"
    size = f"{abs(crossing.final):.4f} nats per token at the end"
    if crossing.final == 0:
        first = f"{crossing.label} ends level with {CONTROL_NAME}: neither passes the other."
    elif crossing.update is None:
        first = (
            f"{crossing.label} never passes {CONTROL_NAME}: it lies {side} it at every point from update "
            f"{crossing.first:g} to {crossing.last:g} ({size})."
        )
    else:
        first = (
            f"{crossing.label} passes {CONTROL_NAME} for the last time at update {crossing.update:g} of "
            f"{crossing.last:g} and stays {side} it ({size})."
        )
    goal = f"{CONTROL_NAME}'s final value of {crossing.control_final:.4f}"
    if crossing.reached is None:
        second = f"It never reaches {goal}."
    else:
        second = (
            f"It is first at or below {goal} at update {crossing.reached:g}, {CONTROL_NAME} itself at update "
            f"{crossing.control_reached:g}."
        )
    return f"{first} {second}"
