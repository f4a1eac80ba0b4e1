"""Part `overoptimisation`: gold and proxy reward against the distance from the SFT model, as Gao et al. (2210.10760).

The proxy is a reward model from few noisy pairs. PPO, RLOO, REINFORCE++ and GRPO climb it without a KL penalty, and
are looked at along the way; best-of-n picks by it, at a distance of log n - (n - 1) / n nats.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb, log
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import reward_model
import torch
from common import (
    HERE,
    MEASURE,
    SEEDS,
    World,
    compute_logprobs,
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

from polm.engine.checkpoint import list_checkpoints
from polm.evals.claims import build_claim
from polm.rewards.reward_model import RewardModel, load_reward_model
from polm.stages.common import Base
from polm.tokens import Array

PART = "overoptimisation"
MY_SEEDS = (*SEEDS, 105, 106, 107)
SEEN = SEEDS[:3]  # when the second question was asked: they do not answer it
PROXY_PAIRS = 200
BEST_OF, BEST_OF_DRAW, NUM_BEST_OF = (1, 2, 4, 8, 16, 32, 64), 31, 150
ROLLOUTS, LOOK_EVERY, NUM_LOOK = 40, 5, 200
SHOWN = (5, 10, 20, 30, 40)  # rollouts in the table; those of 0 are the SFT model, as is n = 1
RL = {
    "prompts_per_rollout": 16,
    "samples": 4,
    "max_new_tokens": 80,
    "bin_tokens": 4096,
    "kl_beta": 0.0,
    "kl_groups": 0,
    "reward": "model",
    "schedule": {"kind": "constant", "warmup_updates": 3},
}
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "ppo": {
        "samples": 1,
        "prompts_per_rollout": 64,
        "epochs_per_rollout": 2,
        "value_clip": None,
        "critic_optimizer": {"kind": "adamw", "learning_rate": 1e-3, "beta2": 0.99},
    },
    "rloo": {},
    "reinforce_pp": {"samples": 1, "prompts_per_rollout": 64},
    "grpo": {},
}
UPDATES_PER_ROLLOUT = {"ppo": 2, "rloo": 1, "reinforce_pp": 1, "grpo": 1}
RATES: Mapping[str, float] = {"ppo": 3e-4, "rloo": 6e-4, "reinforce_pp": 6e-4, "grpo": 6e-4}
TUNING_RATES, TUNING_SEED = (3e-4, 1e-3), 2


# ---- best of n -------------------------------------------------------------------------------------------------------


def compute_best_of(proxy: Array, values: Array, n: int) -> Array:
    """The mean of `values` at the answer of the highest proxy among n, over all choices of n of the N answers, [P].

    proxy, values [P, N]. The answer of rank r (from 0, lowest proxy) is the best of C(r, n - 1) of the C(N, n) choices.
    """
    total = proxy.shape[1]
    weights = np.array([comb(rank, n - 1) for rank in range(total)], dtype=np.float64) / comb(total, n)
    ranked: Array = np.take_along_axis(values, np.argsort(proxy, axis=1, kind="stable"), axis=1) @ weights
    return ranked


def run_best_of(sft: Base, proxy: RewardModel, world: World) -> list[dict[str, float]]:
    """A point for each n."""
    prompts = read_questions(world.data / "held_out", NUM_BEST_OF)
    completions = sample(sft, prompts, seed=world.seed, draw=BEST_OF_DRAW, samples=max(BEST_OF))
    shape = (len(prompts), max(BEST_OF))
    rewards = reward_model.score(proxy, sft, prompts, completions).reshape(shape)
    found = [gold(prompts[c.prompt_index], c.text) for c in completions]
    golds = np.array([g.score for g in found]).reshape(shape)
    rude = np.array([float(g.violations > 0) for g in found]).reshape(shape)
    words = np.array([float(len(c.text.replace(".", " ").split())) for c in completions]).reshape(shape)
    return [
        {
            "n": n,
            "kl": log(n) - (n - 1) / n,
            "proxy": float(compute_best_of(rewards, rewards, n).mean()),
            "gold": float(compute_best_of(rewards, golds, n).mean()),
            "violations": float(compute_best_of(rewards, rude, n).mean()),
            "words": float(compute_best_of(rewards, words, n).mean()),
        }
        for n in BEST_OF
    ]


# ---- reinforcement learning ------------------------------------------------------------------------------------------


def look(model: Base, sft: Base, proxy: RewardModel, world: World, rollouts: int) -> dict[str, float]:
    """Proxy, gold and KL of a model, from one answer to each of some held-out prompts."""
    prompts = read_questions(world.data / "held_out", NUM_LOOK)
    completions = sample(model, prompts, seed=world.seed, draw=MEASURE)
    golds = [gold(prompts[c.prompt_index], c.text) for c in completions]
    kl = np.array([c.logprobs.sum() for c in completions]) - compute_logprobs(sft, prompts, completions)
    return {
        "rollouts": rollouts,
        "kl": float(kl.mean()),
        "proxy": float(reward_model.score(proxy, sft, prompts, completions).mean()),
        "gold": float(np.mean([g.score for g in golds])),
        "violations": float(np.mean([g.violations > 0 for g in golds])),
        "words": float(np.mean([len(c.text.replace(".", " ").split()) for c in completions])),
    }


def climb(world: World, name: str, proxy: str, rate: float) -> dict[int, Path]:
    """Run an algorithm; returns the weights along the way, by rollouts. A checkpoint is copied before the next one."""
    folder = world.folder / PART / f"{name}-{rate:g}"
    looks = folder.with_name(f"{folder.name}-looks")
    looks.mkdir(parents=True, exist_ok=True)

    def keep(line: Mapping[str, Any]) -> None:
        del line
        for checkpoint in list_checkpoints(folder):
            copy = looks / f"{checkpoint.name}.safetensors"
            if not copy.is_file():
                shutil.copyfile(checkpoint / "weights.safetensors", copy)

    optimizer = {"kind": "adamw", "learning_rate": rate, "beta2": 0.99}
    each = UPDATES_PER_ROLLOUT[name]
    lengths = {"updates": ROLLOUTS * each, "checkpoint_every": LOOK_EVERY * each}
    settings = {"seed": world.seed, **RL, **lengths, **ALGORITHMS[name], "optimizer": optimizer}
    run_stage(name, folder, settings, keep, base=world.sft, data=world.data, reward_model=Path(proxy))
    found = {int(path.stem.rpartition("-")[2]) // each: path for path in looks.glob("*.safetensors")}
    return {**dict(sorted(found.items())), ROLLOUTS: folder / "model"}


def load_look(sft: Base, weights: Path) -> Base:
    """The model of a look: an artifact's own, or the SFT model's with other weights."""
    if weights.is_dir():
        return load(weights)
    model = load(Path(sft.name)).model
    tensors = load_file(weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name] if name in tensors else tensors[f"policy.{name}"])  # PPO keeps a critic too
    return replace(sft, model=model)


def run_algorithm(world: World, sft: Base, proxy: RewardModel, name: str, rate: float) -> list[dict[str, float]]:
    points = [look(sft, sft, proxy, world, 0)]
    for rollouts, weights in climb(world, name, proxy.name, rate).items():
        points.append(look(load_look(sft, weights), sft, proxy, world, rollouts))
    return points


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    world = prepare(seed)
    sft = load(world.sft)
    proxy = load_reward_model(reward_model.train(world, PROXY_PAIRS), sft.tokenizer)
    for name in ("best_of_n", *ALGORITHMS):
        if name in row["arms"]:
            continue
        if name == "best_of_n":
            row["arms"][name] = run_best_of(sft, proxy, world)
        else:
            row["arms"][name] = run_algorithm(world, sft, proxy, name, RATES[name])
        write_row(path, row)
        print(f"{PART} seed {seed} {name}: {row['arms'][name][-1]}", flush=True)


def tune(names: Sequence[str]) -> None:
    """The rate of each algorithm, and how many pairs the proxy has, on a seed that is not reported."""
    world = prepare(TUNING_SEED)
    sft = load(world.sft)
    proxy = load_reward_model(reward_model.train(world, PROXY_PAIRS), sft.tokenizer)
    for wanted in names:
        name, _, rate_given = wanted.partition(":")
        if name == "best_of_n":
            for point in run_best_of(sft, proxy, world):
                print(name, {k: round(v, 2) for k, v in point.items()}, flush=True)
            continue
        for rate in (float(rate_given),) if rate_given else TUNING_RATES:
            for point in run_algorithm(world, sft, proxy, name, rate):
                print(name, f"{rate:g}", {k: round(v, 2) for k, v in point.items()}, flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """Whether the proxy rises to the end, whether gold is above the SFT model's, and whether gold falls in the second
    half of the run: from the look at half of the updates to the last (of best-of-n: from n = 8 to 64).

    On the first three seeds gold was highest after 5 to 10 rollouts. So the fall from 10 rollouts on became a question
    of its own, which only the seeds after them answer.
    """
    rows = read_rows(PART, MY_SEEDS)
    later = [row for row in rows if row["seed"] not in SEEN]
    claims = []
    for name in ("best_of_n", *ALGORITHMS):
        is_best = name == "best_of_n"
        half = BEST_OF.index(8) if is_best else ROLLOUTS // LOOK_EVERY // 2
        first, last = ("n = 8", "n = 64") if is_best else ("half of the run", "its end")
        asked = [
            (rows, f"{name}: gold at {first} is above the SFT model's", "gold", half, 0, "higher"),
            (rows, f"{name}: gold at {last} is above the SFT model's", "gold", -1, 0, "higher"),
            (rows, f"{name}: the proxy still rises from {first} to {last}", "proxy", -1, half, "higher"),
            (rows, f"{name}: gold falls from {first} to {last}", "gold", -1, half, "lower"),
        ]
        if not is_best:
            early, words = 10 // LOOK_EVERY, "from 10 rollouts to the end, seeds not seen before"
            asked += [
                (later, f"{name}: the proxy rises {words}", "proxy", -1, early, "higher"),
                (later, f"{name}: gold falls {words}", "gold", -1, early, "lower"),
            ]
        for chosen, words, metric, a, b, better in asked:
            found = [row["arms"][name] for row in chosen if name in row["arms"]]
            if len(found) > 1:
                claims.append(
                    build_claim(
                        words,
                        metric=f"overoptimisation/{metric} (points)",
                        arm=name,
                        control="sft" if b == 0 else f"{name}, earlier",
                        differences=[points[a][metric] - points[b][metric] for points in found],
                        better=better,  # type: ignore[arg-type]
                    )
                )
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = read_rows(PART, MY_SEEDS)
    lines = ["| | KL, nats | proxy | gold | violations | words |", "|---" * 6 + "|"]
    for name in ("best_of_n", *ALGORITHMS):
        found = [row["arms"][name] for row in rows if name in row["arms"]]
        for place in range(len(found[0]) if found else 0):
            points = [points[place] for points in found]
            if points[0].get("rollouts") not in (None, *SHOWN) or points[0].get("n") in (2, 8, 32):
                continue
            where = f"n = {points[0]['n']}" if name == "best_of_n" else f"{points[0]['rollouts']} rollouts"
            mean = {key: float(np.mean([p[key] for p in points])) for key in points[0]}
            cells = [f"{mean['kl']:.1f}", f"{mean['proxy']:+.2f}", f"{mean['gold']:.2f}"]
            cells += [f"{100 * mean['violations']:.0f} %", f"{mean['words']:.1f}"]
            lines.append(f"| {name}, {where} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Gold (above) and proxy (below) over the root of KL, a column a method; thin lines are seeds, thick ones means."""
    del claims
    names = ("best_of_n", *ALGORITHMS)
    figure, axes = plt.subplots(2, len(names), figsize=(13, 5.4), sharex=True, sharey="row")
    for name, column in zip(names, axes.T, strict=True):
        found = [row["arms"][name] for row in read_rows(PART, MY_SEEDS) if name in row["arms"]]
        column[0].set_title(name, fontsize=10)
        for axis, metric in zip(column, ("gold", "proxy"), strict=True):
            for points in found:
                roots = [max(p["kl"], 0.0) ** 0.5 for p in points]
                axis.plot(roots, [p[metric] for p in points], color="C0", alpha=0.35, linewidth=1)
            if found:
                roots = [np.mean([max(p[i]["kl"], 0.0) ** 0.5 for p in found]) for i in range(len(found[0]))]
                means = [np.mean([p[i][metric] for p in found]) for i in range(len(found[0]))]
                axis.plot(roots, means, "o-", color="C3", markersize=3)
                axis.axhline(means[0], color="0.5", linewidth=1, linestyle="--")
    axes[0, 0].set_ylabel("gold reward, points")
    axes[1, 0].set_ylabel("proxy: the reward model's score")
    figure.supxlabel("root of the KL from the SFT model (nats an answer); dashed: the SFT model", fontsize=10)
    figure.tight_layout()
    figure.savefig(HERE / "overoptimisation.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(sys.argv[1:] or ("best_of_n", *ALGORITHMS))
