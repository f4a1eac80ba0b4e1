"""The tables of the README, from the claims: paired differences in points and nats a token, with 95 % t intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polm.report.compare import Arm, describe_point

NTP = Arm(0, "ntp").label
NAMES = {
    "remit02": "ReMiT, eps 0.2 (the paper's)",
    "remit": "ReMiT, eps 0.8",
    "sft_guided": "ReMiT 0.8 guided by the SFT model",
    "shuffled": "ReMiT 0.8 shuffled",
    "rho1": "Rho-1, keep 0.6",
    "distill": "distillation, alpha 0.9",
    "plausible": "**plausible, gamma 0.5 (ours)**",
    "plausible_sft": "plausible guided by the SFT model",
    "plausible_shuffled": "plausible shuffled",
}
BASE = {
    "base/greedy": "greedy",
    "base/pass@1": "sampled",
    "base/steps@1": "sampled, in steps",
    "base/nll": "NLL of held-out solutions",
}
ROAD = {
    "sft/greedy": "SFT, greedy",
    "sft/pass@1": "SFT, sampled",
    "dpo/pass@1": "DPO, sampled",
    "rl/greedy": "RL, greedy",
    "rl/pass@1": "RL, sampled",
}
RIVALS = ("remit02", "remit", "rho1", "distill", "sft_guided")
Claims = Mapping[tuple[str, str, str], Mapping[str, Any]]


def index_claims(claims: Sequence[Mapping[str, Any]]) -> Claims:
    """By arm, control, and point with metric."""
    return {(c["arm"], c["control"], c["metric"].split(" ")[0]): c for c in claims}


def write_cells(claims: Claims, arm: str, control: str, metrics: Sequence[str]) -> list[str] | None:
    """A cell for each metric; None where there is no such comparison."""
    cells = []
    for metric in metrics:
        claim = claims.get((arm, control, metric))
        if claim is None:
            return None
        numbers = (claim["mean"], *claim["interval95"])
        decimals = 3 if metric.endswith("nll") else 1
        mean, low, high = (f"{number:+.{decimals}f}".replace("-", "−") for number in numbers)
        cells.append(f"{mean} ({low} to {high})")
    return cells


def write_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_levels(rows: Sequence[Mapping[str, Any]], points: Sequence[str]) -> str:
    """What NTP reaches at some points, over the seeds that have them."""
    parts = []
    for point in points:
        found = [row["scores"][NTP][point] for row in rows if point in row["scores"].get(NTP, {})]
        mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        words = f"greedy {100 * mean['greedy']:.1f} %, sampled {100 * mean['pass@1']:.1f} %"
        if point == "base":
            words += f", in steps {100 * mean['steps@1']:.1f} %, NLL {mean['nll']:.3f}"
            words += f"; it answers {100 * mean['direct']:.0f} % of its samples directly"
        parts.append(words if point == "base" else f"{describe_point(point)} {words}")
    return f"NTP, {len(found)} seeds: {'; '.join(parts)}."


def write_tables(
    bases: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """By the names of their marks: the bases, `plausible` against its rivals, the whole road."""
    by_key = index_claims(claims)
    ours = Arm(1, "plausible").label
    first = [(NAMES[arm], write_cells(by_key, Arm(1, arm).label, NTP, list(BASE))) for arm in NAMES]
    against = [(NAMES[arm], write_cells(by_key, ours, Arm(1, arm).label, list(BASE))) for arm in RIVALS]
    road = [
        (NAMES[arm] if cycle == 1 else "", str(cycle), write_cells(by_key, Arm(cycle, arm).label, NTP, list(ROAD)))
        for arm in NAMES
        for cycle in (1, 2, 3)
    ]
    tables = {
        "bases": write_table(["arm", *BASE.values()], [[name, *cells] for name, cells in first if cells]),
        "rivals": write_table(
            ["`plausible` against", *BASE.values()], [[name, *cells] for name, cells in against if cells]
        ),
        "whole": write_table(
            ["arm", "cycle", *ROAD.values()], [[name, cycle, *cells] for name, cycle, cells in road if cells]
        ),
    }
    tables["bases"] = f"{write_levels([*bases, *whole], ['base'])}\n\n{tables['bases']}"
    tables["whole"] = f"{write_levels(whole, ['sft', 'dpo', 'rl'])}\n\n{tables['whole']}"
    return tables
