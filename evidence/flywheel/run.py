"""Run the flywheel over fresh seeds and write result.json and figure.png beside this script; prints the table.

python evidence/flywheel/run.py            # goes on where it stopped; about half an hour on two cores
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from polm.evals.claims import build_claim, write_claims
from polm.report.compare import Row, compute_rows, describe_point
from polm.report.load import load_run

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs"
NAME = "evidence_flywheel"
METRICS = ("greedy", "pass@1", "nll")


def claim_row(row: Row) -> dict[str, Any]:
    """One entry of result.json: a paired difference to NTP, in points (or nats a token)."""
    assert row.comparison is not None
    return build_claim(
        f"{row.arm.label} is better than ntp {describe_point(row.point)}, {row.metric.title}",
        metric=f"{row.point}/{row.metric.key} ({row.metric.difference_unit})",
        arm=row.arm.label,
        control="ntp · cycle 0",
        differences=[value * row.metric.scale for value in row.comparison.differences_by_seed],
        better="higher" if row.metric.higher_is_better else "lower",
    )


def read_habit(seed: int, place: str) -> tuple[float, float]:
    """(share of the base's samples that answer directly, accuracy of the others), both in percent."""
    lines = (RUNS / NAME / f"s{seed}" / place / "eval_base" / "items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    direct = [item["samples_text"][0].startswith("####") for item in items]
    steps = [item["samples_correct"][0] for item, short in zip(items, direct, strict=True) if not short]
    return 100 * sum(direct) / len(items), 100 * sum(steps) / max(1, len(steps))


def build_habit_claims(seeds: list[int]) -> list[dict[str, Any]]:
    """How much of a sampled gain is a habit: fewer direct answers, against better answers in steps."""
    claims: list[dict[str, Any]] = []
    for arm in ("remit", "shuffled"):
        pairs = [(read_habit(seed, f"c1/{arm}"), read_habit(seed, "c0/ntp")) for seed in seeds]
        for which, words in enumerate(("direct answers, share of samples", "answers in steps, accuracy of samples")):
            differences = [mine[which] - control[which] for mine, control in pairs]
            claims.append(
                build_claim(
                    f"{arm} · cycle 1 differs from ntp in the base's {words}",
                    metric=f"base/{words} (points)",
                    arm=f"{arm} · cycle 1",
                    control="ntp · cycle 0",
                    differences=differences,
                    better="either",
                )
            )
    return claims


def write_table(rows: list[Row]) -> str:
    """The differences as a Markdown table, points or nats, mean with its standard error."""
    points = list(dict.fromkeys(row.point for row in rows))
    lines = [
        "| arm | measure | " + " | ".join(describe_point(p) for p in points) + " |",
        "|---" * (len(points) + 2) + "|",
    ]
    for arm in dict.fromkeys(row.arm for row in rows):
        for metric in METRICS:
            cells = []
            for point in points:
                found = [r for r in rows if (r.arm, r.metric.key, r.point) == (arm, metric, point)]
                if not found or found[0].comparison is None:
                    cells.append("·")
                    continue
                claim = claim_row(found[0])
                decimals = 3 if metric == "nll" else 1
                cells.append(f"{claim['mean']:+.{decimals}f} ± {claim['stderr']:.{decimals}f}")
            lines.append(f"| {arm.label} | {found[0].metric.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Greedy and sampled differences to NTP with 95 % t intervals over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    arms = list(dict.fromkeys(row.arm for row in rows))
    points = list(dict.fromkeys(row.point for row in rows))
    for axis, metric in zip(axes, ("greedy", "pass@1"), strict=True):
        for i, arm in enumerate(arms):
            chosen = [r for p in points for r in rows if (r.arm, r.metric.key, r.point) == (arm, metric, p)]
            means = [100 * r.comparison.interval.mean_difference for r in chosen if r.comparison]
            lows = [100 * r.comparison.interval.low95 for r in chosen if r.comparison]
            highs = [100 * r.comparison.interval.high95 for r in chosen if r.comparison]
            places = [x + (i - (len(arms) - 1) / 2) * 0.18 for x in range(len(means))]
            spread = [
                [m - low for m, low in zip(means, lows, strict=True)],
                [h - m for m, h in zip(means, highs, strict=True)],
            ]
            axis.errorbar(places, means, yerr=spread, fmt="osD^v"[i], capsize=3, label=arm.label)
        axis.axhline(0, color="0.5", linewidth=1)
        axis.set_xticks(
            range(len(points)), [{"base": "base", "sft": "SFT", "dpo": "DPO", "rl": "RL"}[p] for p in points]
        )
        axis.set_title("greedy" if metric == "greedy" else "sampled, temperature 1")
        axis.set_xlabel("after")
    axes[0].set_ylabel("points over NTP")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    subprocess.run(
        [sys.executable, "-m", "polm", "run", str(HERE / "recipe.yaml"), "--runs", str(RUNS), *sys.argv[1:]], check=True
    )
    run = load_run(RUNS / NAME)
    rows = [
        row
        for row in compute_rows(run).rows
        if row.benchmark is None and row.comparison is not None and row.metric.key in METRICS
    ]
    write_claims(HERE / "result.json", [*map(claim_row, rows), *build_habit_claims(list(run.seeds))])
    print(write_table(rows))
    draw(rows, HERE / "figure.png")


if __name__ == "__main__":
    main()
