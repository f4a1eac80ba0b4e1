"""The figures of the README: paired differences to NTP with 95 % t intervals over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tables import METRICS, NAMES, NTP, STUDY_NAMES, index_claims

from polm.report.compare import Arm

MARKERS = {"plausible": "D", "distill": "^", "rho1": "s", "remit": "o", "shuffled": "x"}


def draw_bases(claims: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Differences of the bases to NTP with 95 % t intervals over the seeds, a panel a metric."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(12, 3.6), sharey=True)
    for axis, (metric, (words, unit, _, better)) in zip(axes, METRICS.items(), strict=True):
        chosen = [c for c in claims if c["control"] == NTP and c["metric"].startswith(f"base/{metric} ")]
        chosen = [c for c in chosen if c["arm"].endswith("cycle 1")]
        for place, claim in enumerate(chosen):
            mean, (low, high) = claim["mean"], claim["interval95"]
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color="C0")
        axis.set_yticks(range(len(chosen)), [c["arm"].split(" ")[0] for c in chosen])
        axis.axvline(0, color="0.5", linewidth=1)
        axis.set_title(words, fontsize=9)
        axis.set_xlabel(f"{unit} over NTP ({'more' if better == 'higher' else 'less'} is better)", fontsize=8)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_regimes(
    claims: Sequence[Mapping[str, Any]], studies: Mapping[str, Sequence[Mapping[str, Any]]], path: Path
) -> None:
    """The bases' differences to NTP in each regime that was run, an arm a marker: in steps and greedily.

    `claims` are those of the demo's mixture, `studies` holds those of each study.
    """
    places = [("as the demo", claims), *((words, studies[study]) for study, words in STUDY_NAMES.items())]
    places = [(words, index_claims(found)) for words, found in places if found]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.62 * len(places) + 1.6), sharey=True)
    for axis, metric in zip(axes, ("steps@1", "greedy"), strict=True):
        for place, (_, by_key) in enumerate(places):
            for offset, (arm, marker) in enumerate(MARKERS.items()):
                claim = by_key[Arm(1, arm).label, NTP, f"base/{metric}"]
                mean, (low, high) = claim["mean"], claim["interval95"]
                where = place + 0.15 * (offset - (len(MARKERS) - 1) / 2)
                label = NAMES[arm].strip("*") if not place else None
                bars = [[mean - low], [high - mean]]
                axis.errorbar(
                    mean, where, xerr=bars, fmt=marker, color=f"C{offset}", markersize=5, linewidth=1, label=label
                )
        axis.axvline(0, color="0.5", linewidth=1)
        axis.set_title(METRICS[metric][0], fontsize=10)
        axis.set_xlabel("points over NTP in the same regime, 95 % interval (more is better)", fontsize=8)
    axes[0].set_yticks(range(len(places)), [words for words, _ in places])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="upper center", ncols=len(MARKERS))
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)
