"""Part `own_answers`: every method that learns from a model's own answers, against the SFT model that it starts from.

All of them may ask one reward model (from 3,200 noisy pairs) about as many answers: 2,560. Offline ones draw all
answers from the SFT model, choose by the reward, and train on the choice; the others draw them as they go. An arm is a
recipe of recipes/ with its own knobs, KL weight included; optimizer, batch and length are ours, and the learning rate
is the one chosen for the arm on the tuning seeds.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import reward_model
import yaml
from common import (
    BIN_TOKENS,
    HERE,
    MAX_NEW_TOKENS,
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
    write_row,
)

from polm.evals.claims import build_claim
from polm.stages.common import Base

PART = "own_answers"
MY_SEEDS = SEEDS
RECIPES = HERE.parent.parent / "recipes"
PROXY_PAIRS = 3200
ANSWERS = 2560  # that the reward model is asked about, in each arm
PER_ROLLOUT, SAMPLES = 64, 4
KL_TARGET = 4.0  # nats an answer, of the arm with a controller


@dataclass(frozen=True)
class Method:
    """A stage, its recipe, what is changed in it, and how many answers to a prompt are drawn. `then` trains on what
    the stage has made: (stage, recipe, changes)."""

    stage: str
    recipe: str = ""
    samples: int = SAMPLES
    changes: Mapping[str, Any] = field(default_factory=dict)
    then: tuple[str, str, Mapping[str, Any]] | None = None


CRITIC = {"critic_optimizer": {"kind": "adamw", "learning_rate": 1e-3, "beta2": 0.99}}
ONE = {"updates_per_rollout": 1}
METHODS: Mapping[str, Method] = {
    # offline
    "raft": Method("rejection", "rejection/raft", then=("sft", "sft/best", {"epochs": 1})),
    "top_share": Method(
        "rejection", "rejection/raft", 4, {"keep": "top_share", "share": 0.25, "per_prompt": None},
        then=("sft", "sft/best", {"epochs": 1}),
    ),
    "best_worst": Method("pairs", "pairs/best_worst", then=("dpo", "dpo/dpo", {})),
    "rso": Method(
        "pairs", "pairs/rso", 16, {"rso_accepted": 8, "temperature": 1.0, "top_k": 0}, then=("dpo", "dpo/hinge", {})
    ),
    # preferences among fresh answers
    "online_dpo": Method("online", "online/dpo"),
    "ipo_md": Method("online", "online/ipo_md"),
    "xpo": Method("online", "online/xpo"),
    "nash_md": Method("online", "online/nash_md"),
    # reinforcement learning
    "ppo": Method("ppo", "rl/ppo", 1, {"minibatches": 1, "epochs_per_rollout": 2, "value_clip": None, **CRITIC}),
    "ppo_target": Method(
        "ppo", "rl/ppo", 1,
        {"minibatches": 1, "epochs_per_rollout": 2, "value_clip": None, **CRITIC,
         "kl_target": KL_TARGET, "kl_horizon": 160.0},
    ),
    "rloo": Method("rloo", "rl/rloo", SAMPLES, {"kl_beta": 0.05}),
    "reinforce_pp": Method("reinforce_pp", "rl/reinforce_pp", 1, ONE),
    "reinforce_pp_baseline": Method("reinforce_pp", "rl/reinforce_pp_baseline", SAMPLES, ONE),
    "remax": Method("remax", "rl/remax", 1),
    "grpo": Method("grpo"),
    "dr_grpo": Method("grpo", "", SAMPLES, {"normalize": "constant", "advantage_scale": "none"}),
}  # fmt: skip
OFFLINE = ("raft", "top_share", "best_worst", "rso")
RATES = (3e-4, 1e-3)
# By mean gold on the tuning seeds (evidence/LOG.md).
CHOSEN: Mapping[str, float] = {
    **dict.fromkeys(METHODS, 3e-4),
    **dict.fromkeys(("raft", "top_share", "rloo", "remax"), 1e-3),
}


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe without its length, which is ours."""
    values: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) if name else {}
    return {key: value for key, value in values.items() if key not in ("epochs", "updates", "reward_function")}


def build_optimizer(rate: float) -> dict[str, Any]:
    return {
        "optimizer": {"kind": "adamw", "learning_rate": rate, "beta2": 0.99},
        "schedule": {"kind": "linear", "warmup_updates": 3},
        "checkpoint_every": 0,
        "log_every": 5,
    }


def train(world: World, arm: str, rate: float, proxy: Path) -> Path:
    """The model of an arm."""
    method, folder = METHODS[arm], RUNS / f"seed-{world.seed}" / PART / arm
    ours = {"seed": world.seed, "samples": method.samples, "max_new_tokens": MAX_NEW_TOKENS, "reward": "model"}
    settings = {**read_recipe(method.recipe), **ours, **method.changes}
    inputs = {"base": world.sft, "data": world.data, "reward_model": proxy}
    shutil.rmtree(folder, ignore_errors=True)  # of another rate
    if method.then is None:
        epochs = settings.get("epochs_per_rollout", 1)
        length = {
            "updates": ANSWERS // PER_ROLLOUT * epochs,
            "prompts_per_rollout": PER_ROLLOUT // method.samples,
            "bin_tokens": 4096,
        }
        return run_stage(method.stage, folder, {**settings, **length, **build_optimizer(rate)}, **inputs)
    made = folder.with_name(f"made-{arm}")
    run_stage(method.stage, made, {**settings, "num_prompts": ANSWERS // method.samples}, **inputs)
    stage, recipe, changes = method.then
    length = {"epochs": 1, "bin_tokens": BIN_TOKENS, "bins_per_update": 1, "micro_bins": 0}
    training = {**read_recipe(recipe), "seed": world.seed, **length, **changes, **build_optimizer(rate)}
    return run_stage(stage, folder, training, base=world.sft, data=made)


def prepare_arms(seed: int) -> tuple[World, Base, Path, list[str], Measured]:
    """The world of a seed, the SFT model, the reward model, the held-out prompts, and the SFT model's answers."""
    world = prepare(seed)
    sft = load(world.sft)
    prompts = read_questions(world.data / "held_out")
    return world, sft, Path(reward_model.train(world, PROXY_PAIRS)), prompts, measure(sft, world, prompts)


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    missing = [arm for arm in METHODS if arm not in row["arms"]]
    if not missing:
        return
    world, sft, proxy, prompts, control = prepare_arms(seed)
    row["sft"] = describe(control)
    for arm in missing:
        model = load(train(world, arm, CHOSEN[arm], proxy))
        row["arms"][arm] = describe_against(measure(model, world, prompts), control, sft, prompts)
        write_row(path, row)
        print(f"{PART} seed {seed} {arm}: {row['arms'][arm]['win_rate']:.3f}", flush=True)


def tune(wanted: Sequence[str]) -> None:
    """Arms at rates, each ARM or ARM:RATE, on the tuning seeds; what is chosen is copied to CHOSEN and the log."""
    parts = [name.partition(":") for name in wanted]
    pairs = [(arm, float(rate)) for arm, _, given in parts for rate in ((given,) if given else RATES)]
    for seed in TUNING_SEEDS:
        world, sft, proxy, prompts, control = prepare_arms(seed)
        print(f"seed {seed} sft { {k: round(v, 2) for k, v in describe(control).items()} }", flush=True)
        for arm, rate in pairs:
            model = load(train(world, arm, rate, proxy))
            found = describe_against(measure(model, world, prompts), control, sft, prompts)
            cells = [f"{found[key]:.3f}" for key in ("win_rate", "gold", "kl")]
            print(f"| {arm} | {rate:g} | {seed} | " + " | ".join(cells) + " |", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """Every arm against the SFT model by wins and gold; methods on fresh answers against DPO on the SFT model's; what
    the controller makes of the KL."""
    rows = read_rows(PART)
    claims = []
    for arm in METHODS:
        pairs = [(row["arms"][arm], row["sft"]) for row in rows if arm in row["arms"]]
        if len(pairs) < 2:
            continue
        wins = [100 * (mine["win_rate"] - 0.5) for mine, _ in pairs]
        golds = [mine["gold"] - sft["gold"] for mine, sft in pairs]
        for words, metric, differences in (
            (
                f"{arm} wins against the SFT model more often than half, by gold reward",
                "win rate less 50 % (points)",
                wins,
            ),
            (f"{arm} has a higher gold reward than the SFT model", "gold (points of 10)", golds),
        ):
            claims.append(
                build_claim(
                    words, metric=f"{PART}/{metric}", arm=arm, control="sft", differences=differences, better="higher"
                )
            )
    for arm in ("online_dpo", "ipo_md", "xpo", "nash_md", "grpo"):
        both = [row["arms"] for row in rows if {arm, "best_worst"} <= row["arms"].keys()]
        if len(both) > 1:
            claims.append(
                build_claim(
                    f"{arm}, on fresh answers, has a higher gold reward than DPO on as many of the SFT model's",
                    metric=f"{PART}/gold (points of 10)",
                    arm=arm,
                    control="best_worst",
                    differences=[arms[arm]["gold"] - arms["best_worst"]["gold"] for arms in both],
                    better="higher",
                )
            )
    both = [row["arms"] for row in rows if {"ppo", "ppo_target"} <= row["arms"].keys()]
    if len(both) > 1:
        claims.append(
            build_claim(
                f"with kl_target: {KL_TARGET:g} PPO's KL ends nearer to it than with a fixed kl_beta",
                metric=f"{PART}/distance of KL from the target (nats)",
                arm="ppo_target",
                control="ppo",
                differences=[
                    abs(arms["ppo_target"]["kl"] - KL_TARGET) - abs(arms["ppo"]["kl"] - KL_TARGET) for arms in both
                ],
                better="lower",
            )
        )
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    rows = read_rows(PART)
    sft = [row["sft"] for row in rows]
    lines = ["| method | answers | rate | win rate, % | gold | violations | KL, nats |", "|---" * 7 + "|"]
    lines.append(f"| SFT | | | | {_mean(sft, 'gold'):.2f} | {100 * _mean(sft, 'violations'):.0f} % | |")
    wins = {c["arm"]: c for c in claims if c["metric"].startswith(f"{PART}/win")}
    for arm in sorted(wins, key=lambda arm: -wins[arm]["mean"]):
        mine, claim = [row["arms"][arm] for row in rows if arm in row["arms"]], wins[arm]
        low, high = claim["interval95"]
        cells = [
            "the SFT model's" if arm in OFFLINE else "fresh",
            f"{CHOSEN[arm]:g}",
            f"{50 + claim['mean']:.1f} ({50 + low:.1f} to {50 + high:.1f})",
            f"{_mean(mine, 'gold'):.2f}",
            f"{100 * _mean(mine, 'violations'):.0f} %",
            f"{_mean(mine, 'kl'):.1f}",
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Win rates with their intervals; offline methods have another colour."""
    wins = sorted((c for c in claims if c["metric"].startswith(f"{PART}/win")), key=lambda c: c["mean"])
    figure, axis = plt.subplots(figsize=(7, 4.8))
    for place, claim in enumerate(wins):
        low, high = claim["interval95"]
        mean, offline = claim["mean"], claim["arm"] in OFFLINE
        axis.errorbar(
            50 + mean, place, xerr=[[mean - low], [high - mean]], fmt="s" if offline else "o", capsize=3,
            color="C1" if offline else "C0",
        )  # fmt: skip
    for marker, color, label in (("s", "C1", "answers of the SFT model"), ("o", "C0", "fresh answers")):
        axis.plot([], [], marker, color=color, label=label)
    axis.set_yticks(range(len(wins)), [c["arm"] for c in wins], fontsize=8)
    axis.axvline(50, color="0.5", linewidth=1)
    axis.set_xlabel("win rate against the SFT model by gold, % (95 % t interval over seeds)")
    axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / f"{PART}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(sys.argv[1:] or tuple(METHODS))
