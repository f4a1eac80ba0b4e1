"""Part `losses`: every preference loss against the SFT model it started from, at equal data.

An arm is a recipe of recipes/dpo with its own loss and knobs (the papers' where these name one); optimizer, batch and
length are replaced by ours, and the learning rate is the one chosen for the arm on the tuning seeds.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from common import (
    HERE,
    RUNS,
    SEEDS,
    TUNING_SEEDS,
    Measured,
    World,
    describe,
    describe_against,
    load,
    measure,
    prepare,
    read_questions,
    read_row,
    read_rows,
    run_stage,
    write_labels,
    write_row,
)

from polm.config import load_settings
from polm.evals.claims import build_claim
from polm.recipe import AnnotateSettings, DPOSettings
from polm.stages.common import Base

PART = "losses"
RECIPES = HERE.parent.parent / "recipes" / "dpo"
ALONE, WARM = "kto_alone", "discopop_warm"
# Arms beside the recipes: the recipe, and what is changed in it.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ALONE: ("kto", {}),  # on the same answers judged one by one, instead of on pairs taken apart
    WARM: ("discopop", {"discopop_temperature": 0.2}),  # at the paper's 0.05 margins first fall (its docstring)
}
ARMS = (*sorted(path.stem for path in RECIPES.glob("*.yaml")), *VARIANTS)
MY_SEEDS = SEEDS
NUM_PAIRS = 600
TRAIN = {"epochs": 1, "bin_tokens": 1024, "bins_per_update": 1, "micro_bins": 0, "checkpoint_every": 0, "log_every": 5}
SCHEDULE = {"kind": "linear", "warmup_updates": 3}
RATES = (3e-4, 1e-3)
# By mean gold on the tuning seeds (evidence/LOG.md); 3e-4 for all others.
CHOSEN: Mapping[str, float] = {
    **dict.fromkeys(ARMS, 3e-4),
    **dict.fromkeys(("apo_zero", "cpo", "discopop", "kto", ALONE, "nca", "orpo", "rpo", "slic", "wpo"), 1e-3),
    "apo_down": 1e-4,
}


def build_settings(arm: str, rate: float, seed: int) -> DPOSettings:
    """The recipe of an arm with our optimizer, batch and length."""
    name, changes = VARIANTS.get(arm, (arm, {}))
    recipe = load_settings(DPOSettings, RECIPES / f"{name}.yaml", [])
    optimizer = {"kind": "adamw", "learning_rate": rate, "beta2": 0.99}
    given = {**recipe.model_dump(exclude={"updates"}), **changes}
    return DPOSettings.model_validate({**given, **TRAIN, "seed": seed, "optimizer": optimizer, "schedule": SCHEDULE})


def train(world: World, arm: str, rate: float) -> Path:
    """The model of an arm. The reference's scores are shared; losses that pair answers anew score it themselves."""
    pairs = world.folder / "pairs"
    settings = build_settings(arm, rate, world.seed)
    inputs = {"base": world.sft, "data": pairs / "feedback" if arm == ALONE else pairs}
    if settings.loss not in ("kto", "bco", "slic", "cpo", "simpo", "orpo"):
        scores = AnnotateSettings(data="preferences", max_tokens=TRAIN["bin_tokens"], too_long="drop")
        inputs["reference"] = run_stage(
            "annotate", world.folder / "reference", scores, model=world.sft, data=pairs / "preferences.jsonl"
        )
    folder = RUNS / f"seed-{world.seed}" / PART / arm
    shutil.rmtree(folder, ignore_errors=True)  # of another rate
    return run_stage("dpo", folder, settings, **inputs)


def prepare_pairs(seed: int) -> tuple[World, Base, list[str], Measured]:
    """The world of a seed with its labelled pairs, the SFT model, the held-out prompts, and its answers to them."""
    world = prepare(seed)
    sft = load(world.sft)
    write_labels(world.folder / "pairs", sft, read_questions(world.data, NUM_PAIRS), seed=seed)
    prompts = read_questions(world.data / "held_out")
    return world, sft, prompts, measure(sft, world, prompts)


def run(seed: int, path: Path, arms: Sequence[str] = ARMS) -> None:
    """All arms of a seed at their chosen rates; `path` is written after each."""
    row = {"seed": seed, **read_row(path)}
    missing = [arm for arm in arms if arm not in row["arms"]]
    if not missing:
        return
    world, sft, prompts, control = prepare_pairs(seed)
    row["sft"] = describe(control)
    for arm in missing:
        model = load(train(world, arm, CHOSEN[arm]))
        row["arms"][arm] = describe_against(measure(model, world, prompts), control, sft, prompts)
        write_row(path, row)
        print(f"{PART} seed {seed} {arm}: {row['arms'][arm]['win_rate']:.3f}", flush=True)


def tune(wanted: Sequence[str]) -> None:
    """Arms at rates, each ARM or ARM:RATE, on the tuning seeds, written to runs/; what is chosen is copied to CHOSEN
    and evidence/LOG.md."""
    parts = [name.partition(":") for name in wanted]
    pairs = [(arm, float(rate)) for arm, _, given in parts for rate in ((given,) if given else RATES)]
    for seed in TUNING_SEEDS:
        path = RUNS / "tuning" / f"{PART}-{seed}.json"
        row = {"seed": seed, **read_row(path)}
        missing = [(arm, rate) for arm, rate in pairs if f"{arm} {rate:g}" not in row["arms"]]
        if missing:
            world, sft, prompts, control = prepare_pairs(seed)
        for arm, rate in missing:
            model = load(train(world, arm, rate))
            found = describe_against(measure(model, world, prompts), control, sft, prompts)
            row["arms"][f"{arm} {rate:g}"] = found
            write_row(path, row)
            shown = {k: round(found[k], 3) for k in ("win_rate", "gold", "kl", "violations")}
            print(f"seed {seed} {arm} {rate:g} {shown}", flush=True)
    print_tuning()


def print_tuning() -> None:
    rows = [json.loads(path.read_text()) for path in sorted((RUNS / "tuning").glob(f"{PART}-*.json"))]
    for name in rows[0]["arms"]:
        mine = [row["arms"][name] for row in rows if name in row["arms"]]
        cells = [" ".join(f"{m[key]:.3f}" for m in mine) for key in ("win_rate", "gold", "kl")]
        print(f"| {name} | " + " | ".join(cells) + " |")


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """Every arm against the SFT model: the win rate less 50 %, points of gold, violations."""
    rows = read_rows(PART)
    claims = []
    for arm in ARMS:
        pairs = [(row["arms"][arm], row["sft"]) for row in rows if arm in row["arms"]]
        if len(pairs) < 2:
            continue
        common = {"arm": arm, "control": "sft"}
        wins = [100 * (mine["win_rate"] - 0.5) for mine, _ in pairs]
        golds = [mine["gold"] - sft["gold"] for mine, sft in pairs]
        rude = [100 * (mine["violations"] - sft["violations"]) for mine, sft in pairs]
        claims += [
            build_claim(
                f"{arm} wins against the SFT model more often than half, by gold reward",
                metric="losses/win rate less 50 % (points)", differences=wins, better="higher", **common,
            ),
            build_claim(
                f"{arm} has a higher gold reward than the SFT model",
                metric="losses/gold (points of 10)", differences=golds, better="higher", **common,
            ),
            build_claim(
                f"{arm} writes fewer stories with a rude sentence than the SFT model",
                metric="losses/violations (% of stories)", differences=rude, better="lower", **common,
            ),
        ]  # fmt: skip
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    rows = read_rows(PART)
    lines = ["| loss | rate | win rate, % | gold | violations | KL, nats | words |", "|---" * 7 + "|"]
    sft = [row["sft"] for row in rows]
    lines.append(
        f"| SFT | | | {_mean(sft, 'gold'):.2f} | {100 * _mean(sft, 'violations'):.0f} % | | {_mean(sft, 'words'):.1f} |"
    )
    wins = {c["arm"]: c for c in claims if c["metric"].startswith("losses/win")}
    for arm in sorted(wins, key=lambda arm: -wins[arm]["mean"]):
        mine, claim = [row["arms"][arm] for row in rows if arm in row["arms"]], wins[arm]
        low, high = claim["interval95"]
        cells = [
            f"{50 + claim['mean']:.1f} ({50 + low:.1f} to {50 + high:.1f})",
            f"{_mean(mine, 'gold'):.2f}",
            f"{100 * _mean(mine, 'violations'):.0f} %",
            f"{_mean(mine, 'kl'):.1f}",
            f"{_mean(mine, 'words'):.1f}",
        ]
        lines.append(f"| {arm} | {CHOSEN[arm]:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Win rates with their intervals, and the gold gained against the KL spent."""
    rows = read_rows(PART)
    wins = sorted((c for c in claims if c["metric"].startswith("losses/win")), key=lambda c: c["mean"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6))
    for place, claim in enumerate(wins):
        low, high = claim["interval95"]
        mean = claim["mean"]
        left.errorbar(50 + mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color="C0")
    left.set_yticks(range(len(wins)), [c["arm"] for c in wins], fontsize=8)
    left.axvline(50, color="0.5", linewidth=1)
    left.set_xlabel("win rate against the SFT model, % (95 % t interval over seeds)")
    crowds: list[list[tuple[float, float, str]]] = []
    for claim in wins:
        mine = [(row["arms"][claim["arm"]], row["sft"]) for row in rows if claim["arm"] in row["arms"]]
        kl, gain = _mean([a for a, _ in mine], "kl"), sum(a["gold"] - s["gold"] for a, s in mine) / len(mine)
        right.plot(kl, gain, "o", color="C0")
        spot = (kl, gain, claim["arm"])
        near = [c for c in crowds if any(abs(log10(k / kl)) < 0.16 and abs(g - gain) < 0.065 for k, g, _ in c)]
        crowds = [c for c in crowds if c not in near] + [[spot, *(other for c in near for other in c)]]
    for crowd in crowds:  # names that would cover each other stand together; of many, on the empty left
        names = textwrap.fill(", ".join(sorted(arm for _, _, arm in crowd)), 24)
        (kl, gain, _), side = (min(crowd), "right") if len(crowd) > 3 else (max(crowd), "left")
        place = {"xytext": (6 if side == "left" else -6, 0 if side == "left" else 14), "ha": side, "va": "center"}
        right.annotate(names, (kl, gain), fontsize=7, textcoords="offset points", **place)
    right.set_xscale("log")
    right.set_xlim(0.4, 150)
    right.set_xlabel("KL from the SFT model, nats an answer")
    right.set_ylabel("gold reward over the SFT model, points")
    figure.tight_layout()
    figure.savefig(HERE / "losses.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(sys.argv[1:] or ARMS)
