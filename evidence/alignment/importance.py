"""Part `importance`: RL whose answers a coarser copy of the policy draws, with and without `importance_cap`.

A fast generator holds the weights in int8 or fp8, so what it draws comes with other probabilities than the trainer's
and RL is off-policy (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
polm's own generator and trainer hardly differ (float32 against bf16 products, where the CPU has them). Here answers are
drawn by the policy with its linear layers rounded to a few bits, and what is measured is the policy itself: arithmetic
with a verifier, from the warm model of `reft`, of whose training solutions 30 % are wrong.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import reft
import torch
from common import (
    HERE,
    RUNS,
    SEEDS,
    claim_difference,
    compute_logprobs,
    load,
    read_row,
    read_rows,
    run_stage,
    sample,
    write_row,
)
from torch import Tensor, nn

from polm.demo.corpus import VERIFIER, build_benchmark
from polm.rewards.verify import VerifyItem, verify_many
from polm.rollout.answers import sample_answers
from polm.rollout.generate import Completion
from polm.stages.common import Base

PART = "importance"
MY_SEEDS = SEEDS
TUNING_SEEDS = (0, 1)
CASE = "noisy"
CAP = 2.0  # the note's
MEASURE_DRAW, SAMPLED = 61, 4  # answers to a question


@dataclass(frozen=True)
class Arm:
    """The stage, how many bits the generator's weights have (None: float32), and the trainer's `importance_cap`, which
    bounds the weight of a token in GRPO and of a whole answer in RLOO."""

    stage: str
    bits: int | None = None
    cap: float | None = None
    rate: float = 1e-3
    updates: int = 60


STAGES = ("grpo", "rloo")
BITS = 3
KINDS: Mapping[str, tuple[int | None, float | None]] = {
    "exact": (None, None),
    "rounded": (BITS, None),
    "corrected": (BITS, CAP),
}
ARMS: Mapping[str, Arm] = {f"{stage}/{kind}": Arm(stage, *given) for stage in STAGES for kind, given in KINDS.items()}
RL = {**reft.RL, "prompts_per_rollout": 16, "kl_groups": 0}  # those would measure the generator, not the trainer


# ---- the generator ---------------------------------------------------------------------------------------------------


def round_rows(weight_RC: Tensor, bits: int) -> Tensor:
    """Each row to 2^bits - 1 levels, symmetric around 0, the outermost at the row's largest magnitude."""
    top = 2 ** (bits - 1) - 1
    scale_R1 = (weight_RC.abs().amax(dim=1, keepdim=True) / top).clamp(min=torch.finfo(weight_RC.dtype).tiny)
    rounded_RC: Tensor = (weight_RC / scale_R1).round() * scale_R1
    return rounded_RC


@contextmanager
def rounded_weights(model: nn.Module, bits: int) -> Iterator[None]:
    """Within it, the linear layers (all but the output layer, as quantised engines leave it) have rounded weights."""
    weights = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.copy_(round_rows(weight, bits))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


@contextmanager
def rounded_generator(bits: int | None) -> Iterator[None]:
    """Within it, the stages of RL draw their answers with rounded weights, those of the policy at that moment.

    `polm.stages.rollouts` calls `sample_answers` for every rollout and nothing else; the log-probabilities that come
    with the answers are the rounded model's. Scores and gradients are taken after it, with the exact weights again.
    """

    def draw_rounded(model: nn.Module, *rest: Any, **more: Any) -> list[Completion]:
        assert bits is not None
        with rounded_weights(model, bits):
            return sample_answers(model, *rest, **more)

    with mock.patch("polm.stages.rollouts.sample_answers", draw_rounded if bits else sample_answers):
        yield


# ---- an arm ----------------------------------------------------------------------------------------------------------


def train(seed: int, name: str, arm: Arm) -> Path:
    """The artifact of an arm, from half as many questions a rollout as in `reft`."""
    _, data, warm = reft.prepare(seed, CASE)
    folder = RUNS / f"seed-{seed}" / PART / name.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)  # of other settings
    optimizer = {"kind": "muon", "learning_rate": arm.rate, "embedding_learning_rate": arm.rate / 4}
    settings = {**RL, "seed": seed, "updates": arm.updates, "importance_cap": arm.cap, "optimizer": optimizer}
    with rounded_generator(arm.bits):
        return run_stage(arm.stage, folder, settings, base=warm, data=data)


def read_metric(folder: Path, name: str) -> list[float]:
    """A metric of every update."""
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measure(base: Base, warm: Base, seed: int) -> dict[str, float]:
    """Accuracy on held-out questions, greedy and sampled, and KL(model || warm model) in nats an answer."""
    items = [item for name in reft.NAMES for item in build_benchmark(name, reft.NUM_ITEMS)]
    prompts = [item.prompt for item in items]
    completions = sample(base, prompts, seed=seed, draw=MEASURE_DRAW, samples=SAMPLED)
    verdicts = verify_many([VerifyItem(VERIFIER, c.text, items[c.prompt_index].answer) for c in completions])
    own = np.array([c.logprobs.sum() for c in completions])
    return {
        "greedy": reft.measure(base, seed)["greedy"],
        "sampled": float(np.mean([verdict.is_right for verdict in verdicts])),
        "kl": float((own - compute_logprobs(warm, prompts, completions)).mean()),
    }


def run_arm(seed: int, name: str, arm: Arm, warm: Base) -> dict[str, Any]:
    folder = train(seed, name, arm)
    mismatch = [round(value, 8) for value in read_metric(folder, "rl/mismatch_kl")]
    return {**measure(load(folder), warm, seed), "mismatch": mismatch}


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    warm = load(reft.prepare(seed, CASE)[2])
    row.setdefault("warm", measure(warm, warm, seed))
    for name, arm in ARMS.items():
        if name not in row["arms"]:
            row["arms"][name] = run_arm(seed, name, arm, warm)
            write_row(path, row)
            print(f"{PART} seed {seed} {name}: {row['arms'][name]['sampled']:.3f}", flush=True)


def tune(wanted: Sequence[str]) -> None:
    """Arms as STAGE/FIELD=VALUE/…, for example grpo/bits=3/rate=0.003; what is chosen is copied to Arm and the log."""
    kinds: Mapping[str, type] = {"bits": int, "updates": int, "cap": float, "rate": float}
    for seed in TUNING_SEEDS:
        warm = load(reft.prepare(seed, CASE)[2])
        for text in wanted:
            stage, *changes = text.split("/")
            pairs = [part.split("=") for part in changes]
            found = run_arm(seed, text, Arm(stage, **{key: kinds[key](value) for key, value in pairs}), warm)
            print(f"| {text} | {seed} | {_write_cells([found])} |", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """Of each stage: what the mismatch costs, what the correction gives back, and each arm against the warm model."""
    rows = [{**row["arms"], "warm": row["warm"]} for row in read_rows(PART, MY_SEEDS)]
    at = f"with a generator of {BITS} bits"
    claims: list[dict[str, Any]] = []
    for stage in STAGES:
        corrected, rounded, exact = (f"{stage}/{kind}" for kind in ("corrected", "rounded", "exact"))
        asked = [
            (f"{stage} {at}: importance_cap {CAP:g} is better than no correction", corrected, rounded, "higher"),
            (f"{stage} {at}, without a correction, is worse than with the trainer's own", rounded, exact, "lower"),
            (f"{stage} {at} and importance_cap differs from one with the trainer's own", corrected, exact, "either"),
            *((f"{arm} is better than the warm model", arm, "warm", "higher") for arm in (exact, rounded, corrected)),
        ]
        for words, arm, control, better in asked:
            for metric in ("sampled", "greedy"):
                claims += claim_difference(
                    f"{words}, {metric}",
                    rows,
                    key=metric,
                    arm=arm,
                    control=control,
                    metric=f"{PART}/{metric} (points)",
                    scale=100.0,
                    better=better,  # type: ignore[arg-type]
                )
    return claims


def _write_cells(found: Sequence[Mapping[str, Any]]) -> str:
    mean = {key: float(np.mean([arm[key] for arm in found])) for key in ("greedy", "sampled", "kl", "mismatch")}
    return f"{mean['mismatch']:.2g} | {100 * mean['sampled']:.1f} | {100 * mean['greedy']:.1f} | {mean['kl']:.2f}"


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = read_rows(PART, MY_SEEDS)
    heads = "generator | importance_cap | mismatch KL, nats a token | sampled, % | greedy, % | KL from warm, nats"
    sampled, greedy = (100 * float(np.mean([row["warm"][key] for row in rows])) for key in ("sampled", "greedy"))
    lines = [f"| | {heads} |", "|---" * 7 + "|", f"| warm model | | | | {sampled:.1f} | {greedy:.1f} | |"]
    for name, arm in ARMS.items():
        found = [row["arms"][name] for row in rows if name in row["arms"]]
        generator = f"{arm.bits} bits" if arm.bits else "float32"
        lines.append(f"| {name} | {generator} | {f'{arm.cap:g}' if arm.cap else ''} | {_write_cells(found)} |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """A column a stage: accuracy by arm (thin: a seed, thick: the mean), and the mismatch over the updates."""
    del claims
    rows = read_rows(PART, MY_SEEDS)
    figure, axes = plt.subplots(2, len(STAGES), figsize=(8.4, 6.4), sharey="row")
    for stage, (top, bottom) in zip(STAGES, axes.T, strict=True):
        arms = [{"warm": row["warm"], **{kind: row["arms"][f"{stage}/{kind}"] for kind in KINDS}} for row in rows]
        found = [[100 * by_kind[kind]["sampled"] for kind in by_kind] for by_kind in arms]
        for values in found:
            top.plot(["warm", *KINDS], values, "-", color="C0", alpha=0.4, linewidth=1)
        top.plot(["warm", *KINDS], np.mean(found, axis=0), "o-", color="C3")
        top.set_title(f"{stage}, generator of {BITS} bits (exact: float32)", fontsize=9)
        for color, kind in zip(("C2", "C1", "C0"), KINDS, strict=True):
            curve = np.mean([by_kind[kind]["mismatch"] for by_kind in arms], axis=0)
            bottom.plot(range(1, len(curve) + 1), curve, color=color, label=kind)
        bottom.set_xlabel("update", fontsize=9)
    axes[0, 0].set_ylabel("right among sampled answers\nto held-out questions, %", fontsize=9)
    axes[1, 0].set_ylabel("KL(generator || trainer), nats a token,\nmean over seeds", fontsize=9)
    axes[1, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / f"{PART}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(sys.argv[1:] or tuple(STAGES))
