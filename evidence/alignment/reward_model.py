"""Part `reward_model`: reward models from ever more pairs: accuracy on held-out prompts, and agreement with gold."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from common import (
    HERE,
    SEEDS,
    World,
    encode_prompts,
    group_texts,
    load,
    prepare,
    read_questions,
    read_row,
    read_rows,
    run_stage,
    sample,
    write_labels,
    write_row,
)
from task import gold, label_pairs

from polm.evals.claims import build_claim
from polm.recipe import RewardModelSettings
from polm.rewards.base import RewardItem
from polm.rewards.reward_model import RewardModel, load_reward_model
from polm.rollout.generate import Completion
from polm.stages.common import Base
from polm.tokens import Array

PART = "reward_model"
MY_SEEDS = SEEDS
SIZES = (50, 200, 800, 3200)
UPDATES: Mapping[int, int] = {50: 10, 200: 25, 800: 50, 3200: 100}
TRAIN_SAMPLES, TEST_SAMPLES = 21, 22  # draws of their own
RATE = 1e-3
TUNING_RATES, TUNING_SEED = (3e-4, 1e-3), 2


def train(world: World, num_pairs: int, rate: float = RATE) -> str:
    """The reward model of a seed from so many noisy pairs, over the SFT model; a smaller set heads a larger one."""
    folder = world.folder / "reward_models"
    if not (folder / "pairs" / "preferences.jsonl").is_file():
        write_labels(
            folder / "pairs",
            load(world.sft),
            read_questions(world.data, max(SIZES)),
            seed=world.seed,
            draw=TRAIN_SAMPLES,
        )
    data = folder / f"pairs-{num_pairs}" / "preferences.jsonl"
    lines = (folder / "pairs" / "preferences.jsonl").read_text().splitlines(keepends=True)
    data.parent.mkdir(exist_ok=True)
    data.write_text("".join(lines[:num_pairs]))
    settings = RewardModelSettings.model_validate(
        {
            "seed": world.seed,
            "updates": UPDATES[num_pairs],
            "bin_tokens": 1536,
            "too_long": "drop",
            "holdout_share": 0.0,
            "head_spread": 0.0,
            "optimizer": {"kind": "adamw", "learning_rate": rate, "beta2": 0.99},
            "schedule": {"kind": "linear", "warmup_updates": 3},
        }
    )
    return str(
        run_stage("reward_model", folder / f"{num_pairs}-{rate:g}", settings, base=world.sft, data=data) / "model"
    )


def score(model: RewardModel, policy: Base, prompts: Sequence[str], completions: Sequence[Completion]) -> Array:
    """The reward of each completion, [completions]."""
    encoded = encode_prompts(policy, prompts)
    items = [
        RewardItem([{"role": "user", "content": prompts[c.prompt_index]}], c.text, encoded[c.prompt_index], c.tokens)
        for c in completions
    ]
    return np.array([reward.value for reward in model(items)], dtype=np.float64)


def evaluate(model: RewardModel, sft: Base, world: World) -> dict[str, float]:
    """On two answers to each held-out prompt: accuracy against noisy labels and against gold, correlation with gold."""
    prompts = read_questions(world.data / "held_out")
    completions = sample(sft, prompts, seed=world.seed, draw=TEST_SAMPLES, samples=2)
    rewards = score(model, sft, prompts, completions)
    golds = np.array([gold(prompts[c.prompt_index], c.text).score for c in completions])
    margin, truth = rewards[0::2] - rewards[1::2], golds[0::2] - golds[1::2]
    by_text = {(prompts[c.prompt_index], c.text): r for c, r in zip(completions, rewards, strict=True)}
    noisy = label_pairs(group_texts(prompts, completions), 1.0, world.seed)
    right = [by_text[p["prompt"], p["chosen"]] > by_text[p["prompt"], p["rejected"]] for p in noisy]
    best = [gold(p["prompt"], p["chosen"]).score > gold(p["prompt"], p["rejected"]).score for p in noisy]
    told = truth != 0
    return {
        "accuracy": float(np.mean(right)),
        "gold_accuracy": float(np.mean((margin * truth)[told] > 0)),
        "correlation": float(np.corrcoef(rewards, golds)[0, 1]),
        "ceiling": float(np.mean(best)),  # of the accuracy on noisy labels: what gold itself reaches
    }


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    world = prepare(seed)
    sft = load(world.sft)
    for size in SIZES:
        if str(size) not in row["arms"]:
            model = load_reward_model(train(world, size), sft.tokenizer)
            row["arms"][str(size)] = evaluate(model, sft, world)
            write_row(path, row)
            print(f"{PART} seed {seed}, {size} pairs: {row['arms'][str(size)]}", flush=True)


def tune(seed: int = TUNING_SEED) -> None:
    """The rate, on a seed that is not reported."""
    world = prepare(seed)
    sft = load(world.sft)
    for size in SIZES:
        for rate in TUNING_RATES:
            found = evaluate(load_reward_model(train(world, size, rate), sft.tokenizer), sft, world)
            print(f"{size} pairs, rate {rate:g}: { {k: round(v, 3) for k, v in found.items()} }", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """Each size against the next smaller one, and the smallest against chance."""
    rows = read_rows(PART)
    claims = []
    for size, smaller in zip(SIZES, (None, *SIZES), strict=False):
        pairs = [row["arms"] for row in rows if str(size) in row["arms"]]
        if len(pairs) < 2:
            continue
        control = f"{smaller} pairs" if smaller else "chance"
        for metric, words, chance in (("accuracy", "held-out accuracy", 0.5), ("correlation", "correlation", 0.0)):
            scale = 100.0 if metric == "accuracy" else 1.0
            unit = "points" if metric == "accuracy" else "of 1"
            claims.append(
                build_claim(
                    f"a reward model from {size} pairs has a higher {words} than {control}",
                    metric=f"reward_model/{metric} ({unit})",
                    arm=f"{size} pairs",
                    control=control,
                    differences=[
                        scale * (arms[str(size)][metric] - (arms[str(smaller)][metric] if smaller else chance))
                        for arms in pairs
                    ],
                    better="higher",
                )
            )
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = read_rows(PART)
    lines = ["| pairs | held-out accuracy, % | against gold, % | correlation with gold |", "|---" * 4 + "|"]
    for size in SIZES:
        mine = [row["arms"][str(size)] for row in rows if str(size) in row["arms"]]
        cells = [
            f"{100 * np.mean([m['accuracy'] for m in mine]):.1f}",
            f"{100 * np.mean([m['gold_accuracy'] for m in mine]):.1f}",
            f"{np.mean([m['correlation'] for m in mine]):.2f}",
        ]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    best = 100 * np.mean([arm["ceiling"] for row in rows for arm in row["arms"].values()])
    return "\n".join([*lines, f"| gold itself | {best:.1f} | 100 | 1 |"]) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy and correlation against the number of pairs, a line a seed."""
    del claims
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for row in read_rows(PART):
        for axis, metric in zip(axes, ("accuracy", "correlation"), strict=True):
            sizes = [size for size in SIZES if str(size) in row["arms"]]
            axis.plot(sizes, [row["arms"][str(size)][metric] for size in sizes], "o-", color="C0", alpha=0.5)
    for axis, words in zip(axes, ("accuracy on held-out noisy pairs", "correlation with gold"), strict=True):
        axis.set_xscale("log")
        axis.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axis.minorticks_off()
        axis.set_xlabel("pairs trained on")
        axis.set_ylabel(words)
    axes[0].axhline(0.5, color="0.5", linewidth=1, label="chance")
    ceilings = [arm["ceiling"] for row in read_rows(PART) for arm in row["arms"].values()]
    axes[0].axhline(float(np.mean(ceilings)), color="0.5", linewidth=1, linestyle="--", label="gold itself")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "reward_model.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(*map(int, sys.argv[1:]))
