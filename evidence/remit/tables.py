"""The tables of the README, from the claims: paired differences in points and nats a token, with 95 % t intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polm.evals.claims import build_claim
from polm.report.compare import Arm, describe_point

NTP = Arm(0, "ntp").label
METRICS = {  # in words, unit, scale, which way is better
    "greedy": ("greedy", "points", 100.0, "higher"),
    "pass@1": ("sampled", "points", 100.0, "higher"),
    "steps@1": ("sampled, in steps", "points", 100.0, "higher"),
    "nll": ("NLL of held-out solutions", "nats/token", 1.0, "lower"),
}
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
SPEED = {
    "ntp75": "NTP, 75 updates",
    "ntp110": "NTP, 110 updates",
    "remit38": "ReMiT 0.8, 38 updates",
    "remit75": "ReMiT 0.8, 75 updates",
    "remit110": "ReMiT 0.8, 110 updates",
    "plausible38": "plausible, 38 updates",
    "plausible75": "plausible, 75 updates",
    "plausible110": "plausible, 110 updates",
}
STUDY_NAMES = {
    "clean": "no corrupted solutions",
    "noisy": "60 % corrupted",
    "no_prose": "no prose",
    "prose": "80 % prose",
    "no_direct": "no direct answers",
    "weak_reference": "RL of 10 updates",
    "strong_reference": "RL of 160 updates",
    "short_annealing": "50 updates",
    "long_annealing": "450 updates",
    "size_2m": "2 M parameters",
    "size_10m": "10 M parameters",
    "cool": "sampled at temperature 0.5",
    "cool_10m": "10 M parameters, sampled at 0.5",
}
SHORT = {
    "ntp": "NTP",
    "remit": "ReMiT",
    "shuffled": "its shuffled control",
    "rho1": "Rho-1",
    "distill": "distillation",
    "plausible": "plausible",
}
DUELS = {"remit": ("shuffled", "rho1", "distill"), "plausible": ("remit", "rho1", "distill")}
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


def write_study_tables(
    claims: Sequence[Mapping[str, Any]], studies: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, str]:
    """By the names of their marks: fewer updates against NTP's whole annealing; the other regimes, against NTP; ReMiT
    and `plausible` against their rivals in each, and a map of what is shown.

    `claims` are those of the demo's mixture, `studies` holds those of each study; one without claims has not been run.
    """
    speed = index_claims(studies["speed"])
    few = [(name, write_cells(speed, Arm(1, arm).label, NTP, list(BASE))) for arm, name in SPEED.items()]
    rows = []
    for study, words in STUDY_NAMES.items():
        by_key = index_claims(studies[study])
        found = [(NAMES[arm], write_cells(by_key, Arm(1, arm).label, NTP, list(BASE))) for arm in NAMES]
        rows += [[words if not place else "", name, *cells] for place, (name, cells) in enumerate(_only_run(found))]
    places = [("as the demo", claims), *((words, studies[study]) for study, words in STUDY_NAMES.items())]
    return {
        **{f"duels_{arm}": write_duels(arm, places) for arm in DUELS},
        "map": write_map(places),
        "speed": write_table(["arm", *BASE.values()], [[name, *cells] for name, cells in _only_run(few)]),
        "regimes": write_table(["what differs", "arm", *BASE.values()], rows) if rows else "None has been run.",
    }


def write_duels(arm: str, places: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    """An arm against its rivals in each place that was run: pairs of its name and its claims."""
    rows = []
    for words, claims in places:
        by_key = index_claims(claims)
        found = [
            (NAMES[rival], write_cells(by_key, Arm(1, arm).label, Arm(1, rival).label, list(BASE)))
            for rival in DUELS[arm]
        ]
        rows += [[words if not place else "", name, *cells] for place, (name, cells) in enumerate(_only_run(found))]
    return write_table(["where", f"{NAMES[arm].strip('*')} against", *BASE.values()], rows)


def write_map(places: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Where each arm is shown to be ahead: for each metric of `BASE` a mark, + better, − worse, · not shown."""
    pairs = [(arm, rival) for arm, rivals in DUELS.items() for rival in ("ntp", *rivals)]
    heads = [f"{SHORT[arm]} to {SHORT[rival]}" for arm, rival in pairs]
    rows = []
    for words, claims in places:
        by_key = index_claims(claims)
        cells = [
            _mark(by_key, Arm(1, arm).label, NTP if rival == "ntp" else Arm(1, rival).label) for arm, rival in pairs
        ]
        rows += [[words, *cells]] if all(cells) else []
    return write_table(["where", *heads], rows)


def _mark(claims: Claims, arm: str, control: str) -> str:
    found = [claims.get((arm, control, metric)) for metric in BASE]
    marks = []
    for metric, claim in zip(BASE, found, strict=True):
        if claim is None:
            return ""
        low, high = claim["interval95"]
        worse = low > 0 if metric.endswith("nll") else high < 0
        marks.append("+" if claim["holds"] else "−" if worse else "·")
    return f"`{' '.join(marks)}`"


def write_chains(rows: Sequence[Mapping[str, Any]]) -> str:
    """By task, shortest solutions first: NTP's base made to work in steps, and what two weightings add to it."""
    rows = [row for row in rows if NTP in row.get("benchmarks", {})]
    arms = [Arm(1, name).label for name in ("remit", "plausible")]
    names = sorted(rows[0]["benchmarks"][NTP], key=lambda name: _mean_of(rows, NTP, name, "tokens"))
    lines = []
    for name in names:
        cells = [name, f"{_mean_of(rows, NTP, name, 'tokens'):.0f}"]
        cells.append(f"{100 * _mean_of(rows, NTP, name, 'steps@1'):.1f}")
        for arm in arms:
            gains = [100 * (_score(row, arm, name, "steps@1") - _score(row, NTP, name, "steps@1")) for row in rows]
            claim = build_claim(name, metric="steps@1", arm=arm, control=NTP, differences=gains, better="higher")
            low, high = claim["interval95"]
            cells.append(f"{claim['mean']:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−"))
        lines.append(cells)
    heads = ["task", "tokens of a solution", "NTP, in steps, %", "ReMiT 0.8", "plausible"]
    return f"{len(rows)} seeds:\n\n{write_table(heads, lines)}"


def _score(row: Mapping[str, Any], arm: str, task: str, metric: str) -> float:
    return float(row["benchmarks"][arm][task][metric])


def _mean_of(rows: Sequence[Mapping[str, Any]], arm: str, task: str, metric: str) -> float:
    return float(np.mean([_score(row, arm, task, metric) for row in rows]))


def _only_run(found: Sequence[tuple[str, list[str] | None]]) -> list[tuple[str, list[str]]]:
    return [(name, cells) for name, cells in found if cells]
