"""BENCHMARKS.md from BENCHMARKS.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WORK = {
    "sft": "Supervised fine-tuning, useful tokens (lengths lognormal, mean 120, at most 512; completions are targets)",
    "dpo": "DPO, the reference's scores computed beforehand where the peer's settings allow it",
    "grpo": "GRPO step: 8 prompts x 8 completions of 64 tokens (forced), sampling and training",
    "generation-equal": "Generation: 32 prompts, 64 new tokens each",
    "generation-varying": "Generation: 32 prompts, lognormal lengths of the answers (mean 64, at most 256)",
    "scoring": "Scoring of documents by a frozen model (lengths lognormal, mean 300, at most 1,024)",
    "midtrain": "Mid-training with ReMiT, beside plain next-token prediction and a reference scored in each update",
}
# Targets of the project, beside the measured: (work, side) -> least ratio.
TARGETS = {
    ("sft", "best"): 2.0,
    ("sft", "defaults"): 5.0,
    ("dpo", "best"): 3.0,
    ("dpo", "defaults"): 6.0,
    ("grpo", "best"): 4.5,
    ("generation-varying", "best"): 4.0,
}


def name_peer(work: str, side: str) -> str:
    if work == "midtrain":
        return {"ntp": "polm, ntp", "live": "polm, remit with a live reference"}[side]
    return "transformers" if work.startswith("generation") or work == "scoring" else "trl"


def describe_peer(work: str, side: str) -> str:
    if work == "midtrain":
        return side
    from bench import peer_side

    words = {"best": "best found", "defaults": "defaults"}.get(side, side)
    return f"{words}: {peer_side.describe(work, side)}"


def line(row: Mapping[str, Any]) -> str:
    """One row for the terminal."""
    return (
        f"{row['work']} {row['model']}: polm {number(row['polm_median'])} {row['unit']} "
        f"({row['peak_share']:.0%} of the peak, {row['polm_peak_mb']:.0f} MB), {row['peer']} "
        f"({row['peer_settings'].partition(':')[0]}) {number(row['peer_median'])} ({row['peer_peak_mb']:.0f} MB): "
        f"{row['ratio']:.2f}x ({row['cpu_ratio']:.2f}x by processor time)"
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def build(data: Mapping[str, Any]) -> str:
    """The whole page."""
    machine, rows, curves = data["machine"], data["rows"], data["curves"]
    parts = [
        "# Benchmarks\n\nWritten by `make bench`; what is measured, and how, stands in `bench/README.md`. All numbers "
        "of a row come from one run, polm and its peer in alternation, repetition by repetition, each in a process of "
        "its own; the ratio is the median over neighbouring repetitions. Brackets hold the least and the greatest "
        "value.\n",
        describe(machine),
    ]
    for work, title in WORK.items():
        mine = [row for row in rows if row["work"] == work]
        if mine:
            parts.append(f"## {title}\n\n" + table(mine))
            parts.extend(parts_table(row) for row in mine if "parts" in row)
    if curves:
        from bench import curves as module

        parts.append(
            "## Cost curves\n\npolm alone. The expected growth is that of the operations counted from "
            "the shapes (`bench/flops.py`), both set to 1 at the row marked *.\n"
        )
        parts.extend(module.describe(name, points) for name, points in curves.items())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def describe(machine: Mapping[str, Any]) -> str:
    gpu = f", {machine['gpu']}" if machine.get("gpu") else "; no GPU: the GPU columns are open"
    return (
        f"Machine: {machine['processor']} ({', '.join(machine['vectors'])}), {machine['cores']} cores, "
        f"{machine['threads']} threads used{gpu}. torch {machine['torch']}, transformers {machine['transformers']}, "
        f"TRL {machine['trl']}; commit {machine['commit']}, {machine['date']}, load at the start "
        f"{machine['load_at_start']}."
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    out = [
        "| model | peer | unit | polm | peer | ratio | target | polm's share of the peak | memory polm / peer, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        side = "best" if row["peer_settings"].startswith("best") else row["peer_settings"].partition(":")[0]
        target = TARGETS.get((row["work"], side))
        out.append(
            f"| {row['model']}, {row['precision']} | {row['peer']}, {row['peer_settings']} | {row['unit']} "
            f"| {ranged(row['polm_median'], row['polm_range'])} | {ranged(row['peer_median'], row['peer_range'])} "
            f"| **{row['ratio']:.2f}** [{row['ratio_range'][0]:.2f}, {row['ratio_range'][1]:.2f}] "
            f"| {f'{target:g}' if target else ''} | {row['peak_share']:.0%} of {row['peak_gflops']:.0f} GF/s "
            f"| {row['polm_peak_mb']:.0f} / {row['peer_peak_mb']:.0f} |"
        )
    return "\n".join(out)


def ranged(value: float, bounds: Sequence[float]) -> str:
    return f"{number(value)} [{number(bounds[0])}, {number(bounds[1])}]"


def parts_table(row: Mapping[str, Any]) -> str:
    lines = [
        f"Apart, seconds a step ({row['model']}, {row['peer_settings'].partition(':')[0]}): "
        + "; ".join(
            f"{name} {part['polm_seconds']:.2f} against {part['peer_seconds']:.2f} ({part['ratio']:.2f}x)"
            for name, part in row["parts"].items()
        )
        + "."
    ]
    return "\n".join(lines)
