"""Part `reward_kinds`: what margins, centring and LoRA make of a reward model, at the same 800 pairs.

The pairs and their labels are those of part `reward_model`; a fresh head begins as the stage's default has it. The
noisy people tell a degree besides, as in Llama 2 (arXiv 2307.09288): how large the difference was that they saw, noise
and all, in four steps with the margins 0 to 1. `margins` learns from these, `margins_coin` from the same
margins dealt out anew by chance, `centred` keeps rewards near 0 (arXiv 2312.09244), `lora` trains an adapter and the
head. `bradley_terry` is the control.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import reward_model
from common import (
    HERE,
    NOISE,
    TUNING_SEEDS,
    World,
    group_texts,
    load,
    prepare,
    read_questions,
    read_row,
    read_rows,
    run_stage,
    sample,
    write_row,
)
from safetensors.torch import load_file
from task import gold

from polm.data.readers import write_jsonl
from polm.evals.claims import build_claim
from polm.rewards.reward_model import load_reward_model
from polm.stages.common import Base

PART = "reward_kinds"
MY_SEEDS = tuple(range(105, 115))  # 100 to 104 left centring and LoRA open (evidence/LOG.md)
NUM_PAIRS = 800
CUTS = (1.0, 2.0, 3.5)  # of the difference that a labeller sees, in points of gold: degrees 0 to 3
LORA = {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.05, "targets": "all-linear"}


def plain(rate: float = reward_model.RATE, **changes: Any) -> dict[str, Any]:
    return {"rate": rate, **changes}


# What each arm changes, and its rate; the factor of the margins too was chosen on the tuning seeds (evidence/LOG.md).
ARMS: Mapping[str, Mapping[str, Any]] = {
    "bradley_terry": plain(),
    "margins": plain(margin=1 / 3),
    "margins_coin": plain(margin=1 / 3, by_chance=True),
    "centred": plain(center_coefficient=0.01),
    "lora": plain(1e-2, adapter=LORA),
}
TUNED: Mapping[str, Mapping[str, Any]] = {
    **{f"bradley_terry {rate:g}": plain(rate) for rate in (3e-4, 1e-3)},
    **{f"margins {factor:g}": plain(margin=factor) for factor in (1 / 3, 1.0, 2.0)},
    **{f"centred {weight:g}": plain(center_coefficient=weight) for weight in (0.01, 0.1)},
    **{f"lora {rate:g}": plain(rate, adapter=LORA) for rate in (1e-3, 3e-3, 1e-2)},
}


def read_degree(difference: float, draw: float) -> int:
    """0 to 3: how much better the labeller found the answer that won. `draw` is the uniform number of `label_pairs`,
    whose verdict "the first wins" is draw < sigmoid(difference / noise), that is difference - noise logit(draw) > 0."""
    seen = abs(difference - NOISE * math.log(draw / (1.0 - draw)))
    return sum(seen >= cut for cut in CUTS)


def write_pairs(world: World, sft: Base, factor: float, *, by_chance: bool) -> Path:
    """The first pairs of part `reward_model`, each with its degree times `factor` as its margin."""
    reward_model.train(world, NUM_PAIRS)  # writes them
    file = world.folder / "reward_models" / f"pairs-{NUM_PAIRS}" / "preferences.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = read_questions(world.data, max(reward_model.SIZES))
    samples = group_texts(prompts, sample(sft, prompts, seed=world.seed, draw=reward_model.TRAIN_SAMPLES, samples=2))
    rng, degrees = Random(f"{world.seed}/pairs"), {}  # as in label_pairs
    for prompt, texts in samples:
        distinct, draw = list(dict.fromkeys(texts)), rng.random()
        if len(distinct) > 1:
            first, second = distinct[:2]
            difference = gold(prompt, first).score - gold(prompt, second).score
            degrees[prompt] = read_degree(difference, draw)
    margins = [factor * degrees[row["prompt"]] for row in rows]
    if by_chance:
        Random(f"{world.seed}/margins").shuffle(margins)
    out = world.folder / PART / f"pairs-{factor:g}-{by_chance}" / "preferences.jsonl"
    write_jsonl(out, [{**row, "margin": margin} for row, margin in zip(rows, margins, strict=True)])
    return out


def train(world: World, sft: Base, name: str, arm: Mapping[str, Any]) -> Path:
    """The reward model of an arm."""
    changes = {key: value for key, value in arm.items() if key not in ("rate", "margin", "by_chance")}
    file = world.folder / "reward_models" / f"pairs-{NUM_PAIRS}" / "preferences.jsonl"
    if "margin" in arm:
        file = write_pairs(world, sft, arm["margin"], by_chance=arm.get("by_chance", False))
    elif not file.is_file():
        reward_model.train(world, NUM_PAIRS)
    settings = {
        "seed": world.seed,
        "updates": reward_model.UPDATES[NUM_PAIRS],
        "bin_tokens": 1536,
        "too_long": "drop",
        "holdout_share": 0.0,
        "optimizer": {"kind": "adamw", "learning_rate": arm["rate"], "beta2": 0.99},
        "schedule": {"kind": "linear", "warmup_updates": 3},
        **changes,
    }
    folder = world.folder / PART / name.replace(" ", "-")
    return run_stage("reward_model", folder, settings, base=world.sft, data=file) / "model"


def evaluate(world: World, sft: Base, folder: Path) -> dict[str, float]:
    """Accuracy and correlation as in part `reward_model`; mean and spread of the rewards, and the correlation of
    differences of rewards with those of gold, on two answers to each held-out prompt; trained parameters."""
    model = load_reward_model(folder, sft.tokenizer)
    found = reward_model.evaluate(model, sft, world)
    prompts = read_questions(world.data / "held_out")
    completions = sample(sft, prompts, seed=world.seed, draw=reward_model.TEST_SAMPLES, samples=2)
    rewards = reward_model.score(model, sft, prompts, completions)
    golds = np.array([gold(prompts[c.prompt_index], c.text).score for c in completions])
    margins, truth = rewards[0::2] - rewards[1::2], golds[0::2] - golds[1::2]
    files = [path for path in folder.glob("*.safetensors") if "adapter" in path.name] or folder.glob("*.safetensors")
    return {
        **found,
        "mean": float(rewards.mean()),
        "spread": float(rewards.std()),
        "margin_correlation": float(np.corrcoef(margins, truth)[0, 1]),
        "trained": float(sum(tensor.numel() for path in files for tensor in load_file(path).values())),
    }


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    world = prepare(seed)
    sft = load(world.sft)
    for name, arm in ARMS.items():
        if name not in row["arms"]:
            row["arms"][name] = evaluate(world, sft, train(world, sft, name, arm))
            write_row(path, row)
            print(f"{PART} seed {seed} {name}: {row['arms'][name]['gold_accuracy']:.3f}", flush=True)


def tune(wanted: Sequence[str]) -> None:
    """The arms of TUNED on the tuning seeds."""
    for seed in TUNING_SEEDS:
        world = prepare(seed)
        sft = load(world.sft)
        for name in wanted:
            found = evaluate(world, sft, train(world, sft, f"tuning {name}", TUNED[name]))
            keys = ("accuracy", "gold_accuracy", "correlation", "margin_correlation", "mean", "spread", "trained")
            cells = [f"{found[key]:.3f}" for key in keys]
            print(f"| {name} | {seed} | " + " | ".join(cells) + " |", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------

ALLOWED_LOSS = 2.0  # points of accuracy


def get_offset(arm: Mapping[str, float]) -> float:
    """How far from 0 the rewards of the SFT model's answers lie, in spreads."""
    return abs(arm["mean"]) / arm["spread"]


def build_claims() -> list[dict[str, Any]]:
    """Each kind against Bradley-Terry by what it is for, and what it costs."""
    rows = [row["arms"] for row in read_rows(PART, MY_SEEDS) if all(arm in row["arms"] for arm in ARMS)]
    if len(rows) < 2:
        return []
    claims = []

    def claim(words: str, metric: str, arm: str, control: str, differences: Sequence[float], better: str) -> None:
        claims.append(
            build_claim(
                words,
                metric=f"{PART}/{metric}",
                arm=arm,
                control=control,
                differences=differences,
                better=better,  # type: ignore[arg-type]
            )
        )

    def subtract(key: str, arm: str, control: str, scale: float = 1.0) -> list[float]:
        return [scale * (arms[arm][key] - arms[control][key]) for arms in rows]

    accuracy = "held-out accuracy against gold (points)"
    for control, words in (("bradley_terry", "without margins"), ("margins_coin", "with the same margins by chance")):
        claim(
            f"margins: held-out accuracy is higher than {words}",
            accuracy, "margins", control, subtract("gold_accuracy", "margins", control, 100.0), "higher",
        )  # fmt: skip
        claim(
            f"margins: differences of rewards go more with those of gold than {words}",
            "correlation of differences with gold's (of 1)", "margins", control,
            subtract("margin_correlation", "margins", control), "higher",
        )  # fmt: skip
    claim(
        "centred: the mean reward of the SFT model's answers lies nearer to 0",
        "distance of the mean reward from 0 (spreads)", "centred", "bradley_terry",
        [get_offset(arms["centred"]) - get_offset(arms["bradley_terry"]) for arms in rows], "lower",
    )  # fmt: skip
    for arm in ("centred", "lora"):
        claim(
            f"{arm}: less than {ALLOWED_LOSS:g} points of accuracy lost (difference plus {ALLOWED_LOSS:g})",
            accuracy, arm, "bradley_terry",
            [d + ALLOWED_LOSS for d in subtract("gold_accuracy", arm, "bradley_terry", 100.0)], "higher",
        )  # fmt: skip
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = [row["arms"] for row in read_rows(PART, MY_SEEDS)]
    heads = (
        "rate | accuracy, % | against gold, % | correlation with gold | of differences | mean reward "
        "| spread | distance of the mean from 0, spreads | trained"
    )
    lines = [f"| | {heads} |", "|---" * 10 + "|"]
    for arm in ARMS:
        found = [arms[arm] for arms in rows if arm in arms]
        mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        cells = [f"{ARMS[arm]['rate']:g}", f"{100 * mean['accuracy']:.1f}", f"{100 * mean['gold_accuracy']:.1f}"]
        cells += [f"{mean['correlation']:.2f}", f"{mean['margin_correlation']:.2f}", f"{mean['mean']:+.2f}"]
        cells += [f"{mean['spread']:.2f}", f"{np.mean([get_offset(f) for f in found]):.2f}", f"{mean['trained']:,.0f}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy against gold, and the distance of the mean reward from 0, a line a seed."""
    del claims
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for row in read_rows(PART, MY_SEEDS):
        arms = [arm for arm in ARMS if arm in row["arms"]]
        axes[0].plot(arms, [100 * row["arms"][arm]["gold_accuracy"] for arm in arms], "o-", color="C0", alpha=0.5)
        axes[1].plot(arms, [get_offset(row["arms"][arm]) for arm in arms], "o-", color="C0", alpha=0.5)
    axes[0].set_ylabel("held-out accuracy against gold, %")
    axes[1].set_ylabel("distance of the mean reward from 0, spreads")
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
    figure.tight_layout()
    figure.savefig(HERE / f"{PART}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(sys.argv[1:] or tuple(TUNED))
