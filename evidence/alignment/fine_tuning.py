"""Part `fine_tuning`: DFT (arXiv 2508.05629) and NEFTune (arXiv 2310.05914) against plain SFT.

Cases: the questions of part `reft` (few, many, and many of whose solutions 30 % are wrong), and the stories, whose
demonstrations are of mixed quality. All arms of a case go on from one model after a short SFT on the same data
(`start`): from a base that does not know the form of an answer DFT learns slowly or not at all (evidence/LOG.md). Each
has as many epochs as did best for it on the tuning seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import reft
from common import (
    HERE,
    SFT,
    TUNING_SEEDS,
    Measured,
    claim_difference,
    describe,
    load,
    measure,
    prepare,
    read_questions,
    read_row,
    read_rows,
    run_stage,
    write_row,
)

PART = "fine_tuning"
MY_SEEDS = (110, 111, 112, 113, 114)
STORIES = "stories"
CASES = (*reft.CASES, STORIES)
ARMS = ("sft", "dft", "neftune")
EPOCHS: Mapping[str, Sequence[int]] = {
    "few": (4, 8, 16),
    "many": (2, 4, 8),
    "noisy": (2, 4, 8),
    STORIES: (1, 3),
}
# Epochs by case and arm, and NEFTune's alpha (evidence/LOG.md).
CHOSEN: Mapping[str, Mapping[str, int]] = {
    "few": {"sft": 4, "dft": 4, "neftune": 8},
    "many": {"sft": 8, "dft": 8, "neftune": 8},
    "noisy": {"sft": 4, "dft": 4, "neftune": 8},
    STORIES: {"sft": 3, "dft": 3, "neftune": 3},
}
ALPHA: Mapping[str, float] = {**dict.fromkeys(reft.CASES, 5.0), STORIES: 15.0}


def prepare_case(seed: int, case: str) -> tuple[Path, Path, Path]:
    """(folder, data, the model after a short SFT)."""
    if case == STORIES:
        world = prepare(seed)
        return world.folder / PART, world.data, world.sft
    sums, data, warm = reft.prepare(seed, case)
    return sums.folder / PART, data, warm


def train(seed: int, case: str, arm: str, epochs: int) -> Path:
    folder, data, start = prepare_case(seed, case)
    changes = {"dft": {"loss": "dft"}, "neftune": {"neftune_alpha": ALPHA[case]}}.get(arm, {})
    settings = {"seed": seed, **SFT, **changes, "epochs": epochs}
    return run_stage("sft", folder / f"{arm}-{epochs}", settings, data=data, base=start)


def measure_sums(seed: int, case: str, arm: str, epochs: int) -> dict[str, float]:
    return reft.measure(load(train(seed, case, arm, epochs)), seed)


def measure_story(seed: int, arm: str, epochs: int) -> Measured:
    world = prepare(seed)
    return measure(load(train(seed, STORIES, arm, epochs)), world, read_questions(world.data / "held_out"))


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    for case in CASES:
        for arm in ARMS:
            name, epochs = f"{arm}/{case}", CHOSEN[case][arm]
            if name in row["arms"]:
                continue
            if case == STORIES:
                row["arms"][name] = describe(measure_story(seed, arm, epochs))
            else:
                row["arms"][name] = measure_sums(seed, case, arm, epochs)
            write_row(path, row)
            print(f"{PART} seed {seed} {name}: {row['arms'][name]}", flush=True)


def tune(wanted: Sequence[str]) -> None:
    """Every length of every arm in the cases named, on the tuning seeds."""
    for case in wanted:
        for seed in TUNING_SEEDS:
            for arm in ARMS:
                for epochs in EPOCHS[case]:
                    if case == STORIES:
                        found = describe(measure_story(seed, arm, epochs))
                        cells = [f"{found[key]:.3f}" for key in ("gold", "helpfulness", "violations")]
                    else:
                        cells = [f"{100 * value:.1f}" for value in measure_sums(seed, case, arm, epochs).values()]
                    print(f"| {case} | {arm} | {epochs} | {seed} | " + " | ".join(cells) + " |", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------

WORDS = {"dft": "DFT", "neftune": "NEFTune"}


def build_claims() -> list[dict[str, Any]]:
    """DFT and NEFTune against SFT, by case."""
    rows = [row["arms"] for row in read_rows(PART, MY_SEEDS)]
    claims: list[dict[str, Any]] = []
    for case in CASES:
        metrics = dict.fromkeys(("gold", "helpfulness"), ("points of 10", 1.0)) if case == STORIES else {}
        metrics |= {} if case == STORIES else dict.fromkeys(("greedy", "sampled"), ("points", 100.0))
        for arm, words in WORDS.items():
            for metric, (unit, scale) in metrics.items():
                claims += claim_difference(
                    f"{case}: {words} is better than SFT, {'gold reward' if metric == 'gold' else metric}",
                    rows,
                    key=metric,
                    arm=f"{arm}/{case}",
                    control=f"sft/{case}",
                    metric=f"{PART}/{metric} ({unit})",
                    scale=scale,
                )
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = [row["arms"] for row in read_rows(PART, MY_SEEDS)]
    heads = " | ".join(f"{case}: epochs | greedy, % | sampled, %" for case in reft.CASES)
    lines = [f"| | {heads} | stories: epochs | gold | helpfulness | violations |"]
    lines.append("|---" * (3 * len(reft.CASES) + 5) + "|")
    for arm in ARMS:
        cells = []
        for case in CASES:
            found = [arms[f"{arm}/{case}"] for arms in rows if f"{arm}/{case}" in arms]
            cells.append(f"{CHOSEN[case][arm]}")
            if case == STORIES:
                cells += [f"{float(np.mean([f[key] for f in found])):.2f}" for key in ("gold", "helpfulness")]
                cells.append(f"{100 * float(np.mean([f['violations'] for f in found])):.0f} %")
            else:
                cells += [f"{100 * float(np.mean([f[key] for f in found])):.1f}" for key in ("greedy", "sampled")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Differences to SFT with their intervals: accuracy by case, and gold of the stories."""
    groups = [
        ("accuracy over SFT, points", [c for c in claims if not c["arm"].endswith(STORIES)]),
        ("over SFT, points of 10", [c for c in claims if c["arm"].endswith(STORIES)]),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), width_ratios=(3, 2))
    for axis, (words, mine) in zip(axes, groups, strict=True):
        for place, claim in enumerate(mine):
            mean, (low, high) = claim["mean"], claim["interval95"]
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color="C0")
        names = [f"{c['arm']}, {c['metric'].split('/')[1].split(' ')[0]}" for c in mine]
        axis.set_yticks(range(len(mine)), names, fontsize=8)
        axis.axvline(0, color="0.5", linewidth=1)
        axis.set_xlabel(f"{words} (95 % t interval)", fontsize=8)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(HERE / f"{PART}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(sys.argv[1:] or CASES)
