"""Part `reft`: SFT, then PPO on the same questions with a verifier (ReFT, arXiv 2401.08967), against SFT alone.

The questions are the demo's column arithmetic (add, subtract, multiply). Both arms start from one SFT model of few
epochs and see the same questions with their solutions and answers; the control goes on with SFT.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import (
    HERE,
    PRETRAIN,
    RUNS,
    SEEDS,
    SFT,
    SHAPE,
    encode_prompts,
    load,
    read_row,
    read_rows,
    run_stage,
    write_row,
)

from polm.data.packing import mix_seed
from polm.data.readers import write_jsonl
from polm.demo.corpus import VERIFIER, build_benchmark, is_held_out
from polm.demo.tasks import TASKS, Item, corrupt
from polm.evals.claims import build_claim
from polm.recipe import PretrainSettings
from polm.rewards.verify import VerifyItem, verify_many
from polm.rollout.generate import SamplingParams, generate
from polm.stages.common import Base
from polm.text.chat import stop_token_ids

PART = "reft"
MY_SEEDS = SEEDS
NAMES = ("add", "sub", "mul")
NUM_DOCUMENTS, CORRUPTED_SHARE = 12_000, 0.12
NUM_QUESTIONS, NUM_ITEMS = 800, 150
WARM_EPOCHS, MORE_EPOCHS = 1, 8
PPO = {
    "updates": 100,
    "prompts_per_rollout": 64,
    "samples": 1,
    "epochs_per_rollout": 2,
    "value_clip": None,
    "critic_optimizer": {"kind": "adamw", "learning_rate": 1e-3, "beta2": 0.99},
    "max_new_tokens": 64,
    "bin_tokens": 4096,
    "kl_beta": 0.01,
    "reward": "verifier",
    "partial_reward": 0.1,
    "optimizer": {"kind": "adamw", "learning_rate": 3e-4, "beta2": 0.99},
    "schedule": {"kind": "constant", "warmup_updates": 3},
}
MEASURE_DRAW = 41
ARMS = ("warm", "sft", "reft")
TUNING_SEED = 2


@dataclass(frozen=True)
class Sums:
    """Where the things of a seed lie."""

    seed: int

    @property
    def folder(self) -> Path:
        return RUNS / f"seed-{self.seed}" / PART


def draw_items(rng: Random, count: int) -> Iterator[Item]:
    """Questions that no benchmark holds, with their solutions."""
    while count:
        item = TASKS[rng.choice(NAMES)].generate(rng)
        if not is_held_out(item.prompt):
            count -= 1
            yield item


def build_data(sums: Sums) -> Path:
    """pretrain, sft and prompts.jsonl; the last two hold the same questions."""
    out = sums.folder / "data"
    if (out / "prompts.jsonl").is_file():  # written last
        return out
    rng = Random(f"{sums.seed}/reft/pretrain")
    documents = (
        f"{item.prompt} {corrupt(item, rng) if rng.random() < CORRUPTED_SHARE else item.solution}"
        for item in draw_items(rng, NUM_DOCUMENTS)
    )
    write_jsonl(out / "pretrain.jsonl", ({"text": text} for text in documents))
    items = list({item.prompt: item for item in draw_items(Random(f"{sums.seed}/reft/sft"), NUM_QUESTIONS)}.values())
    write_jsonl(
        out / "sft.jsonl",
        (
            {"messages": [{"role": "user", "content": i.prompt}, {"role": "assistant", "content": i.solution}]}
            for i in items
        ),
    )
    write_jsonl(out / "prompts.jsonl", ({"prompt": i.prompt, "answer": i.answer, "verifier": VERIFIER} for i in items))
    return out


def prepare(seed: int) -> tuple[Sums, Path, Path]:
    """(folder of the seed, data, the warm SFT model)."""
    sums = Sums(seed)
    data = build_data(sums)
    tokenizer = run_stage("tokenizer", sums.folder / "tokenizer", {"kind": "word", "vocab_size": 120}, data=data)
    settings = PretrainSettings.model_validate({"seed": seed, "model": SHAPE, **PRETRAIN})
    base = run_stage("pretrain", sums.folder / "pretrain", settings, data=data, tokenizer=tokenizer)
    warm = {"seed": seed, **SFT, "epochs": WARM_EPOCHS}
    return sums, data, run_stage("sft", sums.folder / "warm", warm, data=data, base=base)


def measure(base: Base, seed: int) -> dict[str, float]:
    """Accuracy on held-out questions, greedy and sampled at temperature 1."""
    torch.set_num_threads(1)
    items = [item for name in NAMES for item in build_benchmark(name, NUM_ITEMS)]
    found = {}
    for words, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        completions = generate(
            base.model,
            base.tokenizer,
            encode_prompts(base, [item.prompt for item in items]),
            SamplingParams(
                max_new_tokens=64,
                temperature=temperature,
                seed=mix_seed(seed, MEASURE_DRAW),
                stop_token_ids=stop_token_ids(base.tokenizer),
            ),
        )
        verdicts = verify_many([VerifyItem(VERIFIER, c.text, items[c.prompt_index].answer) for c in completions])
        found[words] = float(np.mean([verdict.status == "right" for verdict in verdicts]))
    return found


def train(seed: int, arm: str, more_epochs: int = MORE_EPOCHS) -> Path:
    """The model of an arm."""
    sums, data, warm = prepare(seed)
    if arm == "sft":
        settings = {"seed": seed, **SFT, "epochs": more_epochs}
        return run_stage("sft", sums.folder / f"sft-{more_epochs}", settings, data=data, base=warm)
    if arm == "reft":
        return run_stage("ppo", sums.folder / "reft", {"seed": seed, **PPO}, data=data, base=warm)
    return warm


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    for arm in ARMS:
        if arm not in row["arms"]:
            row["arms"][arm] = measure(load(train(seed, arm)), seed)
            write_row(path, row)
            print(f"{PART} seed {seed} {arm}: {row['arms'][arm]}", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    rows = [row["arms"] for row in read_rows(PART) if all(arm in row["arms"] for arm in ARMS)]
    if len(rows) < 2:
        return []
    return [
        build_claim(
            f"ReFT is better than {words}, {metric}",
            metric=f"reft/{metric} (points)",
            arm="reft",
            control=control,
            differences=[100 * (arms["reft"][metric] - arms[control][metric]) for arms in rows],
            better="higher",
        )
        for control, words in (("sft", "SFT on the same questions"), ("warm", "the SFT model that it starts from"))
        for metric in ("greedy", "sampled")
    ]


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = [row["arms"] for row in read_rows(PART)]
    lines = ["| | greedy, % | sampled, % |", "|---|---|---|"]
    for arm in ARMS:
        mine = [arms[arm] for arms in rows if arm in arms]
        greedy, sampled = (100 * float(np.mean([m[key] for m in mine])) for key in ("greedy", "sampled"))
        lines.append(f"| {arm} | {greedy:.1f} | {sampled:.1f} |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy of the three models, a line a seed."""
    del claims
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    for row in read_rows(PART):
        arms = [arm for arm in ARMS if arm in row["arms"]]
        for axis, metric in zip(axes, ("greedy", "sampled"), strict=True):
            axis.plot(arms, [100 * row["arms"][arm][metric] for arm in arms], "o-", color="C0", alpha=0.5)
            axis.set_title(metric, fontsize=9)
    axes[0].set_ylabel("right answers on held-out questions, %")
    figure.tight_layout()
    figure.savefig(HERE / "reft.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tuning = int(sys.argv[1]) if sys.argv[1:] else TUNING_SEED
    print("warm", measure(load(train(tuning, "warm")), tuning), flush=True)
    for number in (4, MORE_EPOCHS):
        print("sft", number, measure(load(train(tuning, "sft", number)), tuning), flush=True)
    print("reft", measure(load(train(tuning, "reft")), tuning), flush=True)
