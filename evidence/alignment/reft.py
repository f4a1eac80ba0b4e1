"""Part `reft`: SFT, then PPO on the same questions with a verifier (ReFT, arXiv 2401.08967), against SFT alone.

The questions are the demo's column arithmetic (add, subtract, multiply): few, many, or many of whose solutions a share
is wrong. All arms of a case start from one SFT model of few epochs (`warm`) and have the same questions: `sft` goes on
with SFT, `rft` with SFT on the warm model's own right answers (arXiv 2308.01825), `grpo` and `reft` with RL.
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
    SFT,
    SHAPE,
    claim_difference,
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
from polm.recipe import PretrainSettings
from polm.rewards.verify import VerifyItem, verify_many
from polm.rollout.generate import SamplingParams, generate
from polm.stages.common import Base
from polm.text.chat import stop_token_ids

PART = "reft"
MY_SEEDS = (105, 106, 107, 108, 109)  # 100 to 104 were spent on settings that were never tuned (evidence/LOG.md)
NAMES = ("add", "sub", "mul")
NUM_DOCUMENTS, CORRUPTED_SHARE, NUM_ITEMS = 12_000, 0.12, 150


@dataclass(frozen=True)
class Case:
    """So many questions, of whose solutions a share is wrong. The lengths were chosen on the tuning seeds: epochs of
    the warm start, further epochs of SFT and of SFT on right answers of the model's own, updates of RL."""

    questions: int
    wrong: float
    warm: int
    sft: int
    rft: int
    updates: int


CASES: Mapping[str, Case] = {
    "few": Case(100, 0.0, warm=8, sft=4, rft=4, updates=60),
    "many": Case(800, 0.0, warm=4, sft=8, rft=8, updates=120),
    "noisy": Case(800, 0.3, warm=4, sft=4, rft=8, updates=120),
}
SAMPLING = {"max_new_tokens": 64, "reward": "verifier"}
RFT = {**SAMPLING, "keep": "best", "per_prompt": 4, "samples": 16}
RL = {
    **SAMPLING,
    "prompts_per_rollout": 32,
    "samples": 8,
    "bin_tokens": 4096,
    "partial_reward": 0.1,
    "schedule": {"kind": "linear"},
    "checkpoint_every": 0,
}
OPTIMIZER = {"kind": "muon", "learning_rate": 1e-3, "embedding_learning_rate": 2.5e-4}
GRPO = {**RL, "optimizer": OPTIMIZER}
PPO = {
    **RL,
    "epochs_per_rollout": 1,
    "kl_beta": 0.01,
    "value_clip": None,
    "optimizer": OPTIMIZER,
    "critic_optimizer": {"kind": "adamw", "learning_rate": 1e-3, "beta2": 0.99},
}
MEASURE_DRAW = 41
ARMS = ("warm", "sft", "rft", "grpo", "reft")
TUNING_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Sums:
    """Where the things of a seed and a case lie."""

    seed: int
    case: str

    @property
    def folder(self) -> Path:
        return RUNS / f"seed-{self.seed}" / PART / self.case


def draw_items(rng: Random, count: int) -> Iterator[Item]:
    """Questions that no benchmark holds, with their solutions."""
    while count:
        item = TASKS[rng.choice(NAMES)].generate(rng)
        if not is_held_out(item.prompt):
            count -= 1
            yield item


def build_data(sums: Sums) -> Path:
    """pretrain, sft and prompts.jsonl; the last two hold the same questions. Of a smaller case they head a larger's."""
    case = CASES[sums.case]
    out = sums.folder / "data"
    if (out / "prompts.jsonl").is_file():  # written last
        return out
    rng = Random(f"{sums.seed}/reft/pretrain")
    documents = (
        f"{item.prompt} {corrupt(item, rng) if rng.random() < CORRUPTED_SHARE else item.solution}"
        for item in draw_items(rng, NUM_DOCUMENTS)
    )
    write_jsonl(out / "pretrain.jsonl", ({"text": text} for text in documents))
    wrong = Random(f"{sums.seed}/reft/wrong")

    def write(item: Item) -> str:
        return corrupt(item, wrong) if wrong.random() < case.wrong else item.solution

    items = list({item.prompt: item for item in draw_items(Random(f"{sums.seed}/reft/sft"), case.questions)}.values())
    write_jsonl(
        out / "sft.jsonl",
        (
            {"messages": [{"role": "user", "content": i.prompt}, {"role": "assistant", "content": write(i)}]}
            for i in items
        ),
    )
    write_jsonl(out / "prompts.jsonl", ({"prompt": i.prompt, "answer": i.answer, "verifier": VERIFIER} for i in items))
    return out


def prepare(seed: int, name: str) -> tuple[Sums, Path, Path]:
    """(folder, data, the warm SFT model)."""
    sums = Sums(seed, name)
    data = build_data(sums)
    tokenizer = run_stage("tokenizer", sums.folder / "tokenizer", {"kind": "word", "vocab_size": 120}, data=data)
    settings = PretrainSettings.model_validate({"seed": seed, "model": SHAPE, **PRETRAIN})
    base = run_stage("pretrain", sums.folder / "pretrain", settings, data=data, tokenizer=tokenizer)
    warm = {"seed": seed, **SFT, "epochs": CASES[name].warm}
    return sums, data, run_stage("sft", sums.folder / f"warm-{CASES[name].warm}", warm, data=data, base=base)


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


def train(seed: int, name: str, arm: str, length: int = 0) -> Path:
    """The model of an arm; `length` in place of the chosen epochs or updates."""
    case = CASES[name]
    sums, data, warm = prepare(seed, name)
    chosen = {"warm": case.warm, "sft": case.sft, "rft": case.rft, "grpo": case.updates, "reft": case.updates}
    length = length or chosen[arm]
    out = sums.folder / f"{arm}-{length}"
    match arm:
        case "sft":
            return run_stage("sft", out, {"seed": seed, **SFT, "epochs": length}, data=data, base=warm)
        case "rft":
            own = run_stage("rejection", sums.folder / "own", {"seed": seed, **RFT}, data=data, base=warm)
            return run_stage("sft", out, {"seed": seed, **SFT, "epochs": length}, data=own, base=warm)
        case "grpo":
            return run_stage("grpo", out, {"seed": seed, **GRPO, "updates": length}, data=data, base=warm)
        case "reft":
            return run_stage("ppo", out, {"seed": seed, **PPO, "updates": length}, data=data, base=warm)
    return warm


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    for name in CASES:
        for arm in ARMS:
            if f"{arm}/{name}" not in row["arms"]:
                row["arms"][f"{arm}/{name}"] = measure(load(train(seed, name, arm)), seed)
                write_row(path, row)
                print(f"{PART} seed {seed} {name} {arm}: {row['arms'][f'{arm}/{name}']}", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """ReFT against every other arm, and the two others that learn from their own answers against SFT, by case."""
    rows = [row["arms"] for row in read_rows(PART, MY_SEEDS)]
    names = {
        "sft": "SFT on the same questions",
        "warm": "the SFT model that it starts from",
        "rft": "SFT on its own right answers",
        "grpo": "GRPO",
    }
    asked = [("reft", "ReFT", control) for control in names]
    asked += [("grpo", "GRPO", "sft"), ("rft", "SFT on the model's own right answers", "sft")]
    claims: list[dict[str, Any]] = []
    for case in CASES:
        for arm, words, control in asked:
            for metric in ("greedy", "sampled"):
                claims += claim_difference(
                    f"{case} questions: {words} is better than {names[control]}, {metric}",
                    rows,
                    key=metric,
                    arm=f"{arm}/{case}",
                    control=f"{control}/{case}",
                    metric=f"reft/{metric} (points)",
                    scale=100.0,
                )
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = [row["arms"] for row in read_rows(PART, MY_SEEDS)]
    heads = " | ".join(f"{case} questions: greedy, % | sampled, %" for case in CASES)
    lines = [f"| | {heads} |", "|---" * (2 * len(CASES) + 1) + "|"]
    for arm in ARMS:
        cells = []
        for case in CASES:
            mine = [arms[f"{arm}/{case}"] for arms in rows if f"{arm}/{case}" in arms]
            cells += [f"{100 * float(np.mean([m[key] for m in mine])):.1f}" for key in ("greedy", "sampled")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy of the models of a case, a line a seed, and their mean."""
    del claims
    figure, axes = plt.subplots(len(CASES), 2, figsize=(8, 7.6), sharex=True, sharey=True)
    rows = [row["arms"] for row in read_rows(PART, MY_SEEDS)]
    for case, line in zip(CASES, axes, strict=True):
        for axis, metric in zip(line, ("greedy", "sampled"), strict=True):
            found = [[100 * arms[f"{arm}/{case}"][metric] for arm in ARMS] for arms in rows]
            for values in found:
                axis.plot(ARMS, values, "-", color="C0", alpha=0.4, linewidth=1)
            axis.plot(ARMS, np.mean(found, axis=0), "o-", color="C3")
            axis.set_title(f"{case} questions, {metric}", fontsize=9)
    figure.supylabel("right answers on held-out questions, %", fontsize=9)
    figure.tight_layout()
    figure.savefig(HERE / "reft.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":  # SEED/CASE/ARM or SEED/CASE/ARM/LENGTH
    for wanted in sys.argv[1:] or [f"{s}/{case}/{arm}" for s in TUNING_SEEDS for case in CASES for arm in ARMS]:
        seed_given, name_given, arm_given, *length_given = wanted.split("/")
        made = train(int(seed_given), name_given, arm_given, *map(int, length_given))
        print(wanted, measure(load(made), int(seed_given)), flush=True)
