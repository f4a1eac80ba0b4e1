"""Learning-rate schedules as pure functions of the update."""

from __future__ import annotations

import math

from polm.recipe import ScheduleSettings


def compute_rate_factor(update: int, num_updates: int, schedule: ScheduleSettings) -> float:
    """The share of the peak learning rate at `update` (counted from 0) of `num_updates`.

    Warm-up is linear and reaches the peak at update `warmup_updates`. linear and cosine fall from there to
    `final_share` at the end; wsd (warm-up, stable, decay) holds the peak and falls linearly over the last
    `decay_share` of all updates.
    """
    if update < schedule.warmup_updates:
        return (update + 1) / (schedule.warmup_updates + 1)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        start = max(schedule.warmup_updates, num_updates - round(schedule.decay_share * num_updates))
    else:
        start = schedule.warmup_updates
    if update < start:
        return 1.0
    progress = (update - start) / max(1, num_updates - start)
    fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return schedule.final_share + (1.0 - schedule.final_share) * fall
