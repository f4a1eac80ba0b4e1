"""Part `judged`: a model's own answers, graded by a model, without a reward model between: direct RLAIF (arXiv
2309.00267) and self-rewarding iterations (arXiv 2401.10020).

The outside judge is the grading model of part `rlaif`. `direct` is GRPO on its grades; `labels` asks it about as many
answers of the SFT model and trains once by DPO on the best over the worst. The self-rewarding model `m0` is fine-tuned
on demonstrations and on graded stories, so that it can answer and grade; `polm run` on a recipe of kind self_rewarding
makes `m1` to `m3` of it. `coin` is m1 with the pairs of its iteration turned by a coin: what DPO does without grades.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import losses
import matplotlib.pyplot as plt
import numpy as np
import rlaif
from common import (
    HERE,
    MAX_NEW_TOKENS,
    SEEDS,
    SFT,
    TUNING_SEEDS,
    Measured,
    World,
    compare,
    describe,
    describe_against,
    load,
    measure,
    read_questions,
    read_row,
    read_rows,
    run_stage,
    silent,
    write_row,
)
from own_answers import ANSWERS, PER_ROLLOUT, SAMPLES, build_optimizer
from task import ASK_GRADE

from polm.data.readers import write_jsonl
from polm.evals.claims import build_claim
from polm.flywheel.kinds import build_any_graph
from polm.flywheel.runner import build_plan, run_graph
from polm.recipe_rounds import SelfRewardingRecipe

PART = "judged"
MY_SEEDS = SEEDS
JUDGING = {
    "verdict": "logprobs",
    "rubric": "plain",
    "scale": [1, 5],
    "score_prompt": f"{{question}} {{answer}} {ASK_GRADE}",
}
ITERATIONS = 3
NUM_GRADED, STARTED_EPOCHS = rlaif.NUM_GRADED, 1  # of m0, beside the demonstrations
RATES = (1e-4, 3e-4, 1e-3)
CHOSEN: Mapping[str, float] = {"direct": 3e-4, "labels": 3e-4, "self": 1e-4}  # evidence/LOG.md
STEPS = ("m0", *(f"m{i}" for i in range(1, ITERATIONS + 1)))
ARMS = ("direct", "labels", *STEPS, "coin")


def train_direct(world: World, rate: float) -> Path:
    """GRPO on the judge's grades of fresh answers."""
    settings = {
        "seed": world.seed,
        "reward": "judge",
        "judging": {**JUDGING, "grade_range": "signed"},
        "samples": SAMPLES,
        "prompts_per_rollout": PER_ROLLOUT // SAMPLES,
        "updates": ANSWERS // PER_ROLLOUT,
        "max_new_tokens": MAX_NEW_TOKENS,
        "kl_beta": 0.05,
        "bin_tokens": 4096,
        **build_optimizer(rate),
    }
    folder = world.folder / PART / f"direct-{rate:g}"
    return run_stage("grpo", folder, settings, base=world.sft, data=world.data, judge=rlaif.train_judge(world))


def build_judge() -> dict[str, Any]:
    """The settings of grading a model's own answers, as many as `direct` asks about."""
    counts = {"num_prompts": ANSWERS // SAMPLES, "samples": SAMPLES, "max_new_tokens": MAX_NEW_TOKENS}
    return {"mode": "sample", "by": "scores", "judging": JUDGING, **counts}


def train_labels(world: World, rate: float) -> Path:
    """DPO on the best over the worst of the SFT model's answers, by the judge's grades."""
    folder = world.folder / PART
    inputs = {"base": world.sft, "data": world.data, "judge": rlaif.train_judge(world)}
    made = run_stage("judge", folder / "graded", {"seed": world.seed, **build_judge()}, **inputs)
    settings = losses.build_settings("dpo", rate, world.seed)
    return run_stage("dpo", folder / f"labels-{rate:g}", settings, base=world.sft, data=made)


def start_self(world: World) -> Path:
    """m0: the base, fine-tuned on demonstrations and on stories with their grades."""
    rlaif.train_judge(world)  # writes the graded stories
    parts = (world.data / "sft.jsonl", world.folder / rlaif.PART / "graded" / "sft.jsonl")
    lines = [line for part in parts for line in part.read_text().splitlines(keepends=True)]
    Random(f"{world.seed}/m0").shuffle(lines)
    file = world.folder / PART / "start" / "sft.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))
    settings = {"seed": world.seed, **SFT, "epochs": STARTED_EPOCHS}
    return run_stage("sft", world.folder / PART / "m0", settings, base=world.base, data=file)


def iterate(world: World, rate: float) -> dict[str, tuple[Path, Path]]:
    """Run the recipe: for m1, m2, … the model and the pairs that it was trained on."""
    start = start_self(world)
    recipe = SelfRewardingRecipe.model_validate(
        {
            "kind": "self_rewarding",
            "name": "self_rewarding",
            "seeds": [world.seed],
            "iterations": ITERATIONS,
            "base": str(start),
            "data": {"source": "folder", "path": str(world.data)},
            "judge": build_judge(),
            "dpo": losses.build_settings("dpo", rate, world.seed).model_dump(exclude={"updates", "seed"}),
            "workers": 1,
        }
    )
    plan = build_plan(recipe, build_any_graph(recipe), world.folder / PART / f"rounds-{rate:g}")
    run_graph(plan, workers=1, watch=silent)
    node = f"s{world.seed}/c{{}}/self/{{}}".format
    return {f"m{i}": (plan.folder(node(i, "dpo")), plan.folder(node(i, "judge"))) for i in range(1, ITERATIONS + 1)}


def train_coin(world: World, pairs: Path, rate: float) -> Path:
    """m0 after DPO on the pairs of the first iteration, each turned with probability one half."""
    rng, file = Random(f"{world.seed}/coin"), world.folder / PART / "coin" / "preferences.jsonl"
    turned = []
    for prompt, *answers in rlaif.read_pairs(pairs / "preferences.jsonl"):
        chosen, rejected = rng.sample(answers, 2)
        turned.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_jsonl(file, turned)
    settings = losses.build_settings("dpo", rate, world.seed)
    folder = world.folder / PART / f"coin-{rate:g}"
    return run_stage("dpo", folder, settings, base=start_self(world), data=file)


def train(world: World, family: str, rate: float) -> dict[str, tuple[Path, Path | None]]:
    """The models of `direct`, `labels` or `self`, by arm, each with the pairs that a judge made for it."""
    if family == "direct":
        return {"direct": (train_direct(world, rate), None)}
    if family == "labels":
        return {"labels": (train_labels(world, rate), world.folder / PART / "graded")}
    rounds = iterate(world, rate)
    coin = train_coin(world, rounds["m1"][1], rate)
    return {"m0": (start_self(world), None), **rounds, "coin": (coin, None)}


def compute_judging(world: World, arm: str, model: Path) -> float:
    """Agreement with gold of a model's grades of the 600 pairs that the other parts have noisy people label."""
    settings = {"seed": world.seed, "mode": "relabel", "by": "scores", "judging": JUDGING}
    pairs = world.folder / "pairs" / "preferences.jsonl"
    labels = run_stage("judge", world.folder / PART / f"judging-{arm}", settings, data=pairs, judge=model)
    return rlaif.compute_agreement(labels / "preferences.jsonl")


def describe_family(world: World, family: str, rate: float) -> dict[str, dict[str, float]]:
    """Every arm against the SFT model (`direct`, `labels`) or m0 (the others), and what the judge's pairs are worth."""
    prompts = read_questions(world.data / "held_out")
    start = load(start_self(world) if family == "self" else world.sft)
    control: Measured = measure(start, world, prompts)
    previous, found = control, {}
    for arm, (folder, pairs) in train(world, family, rate).items():
        mine = control if arm == "m0" else measure(load(folder), world, prompts)
        found[arm] = describe_against(mine, control, start, prompts)
        if arm in STEPS:
            found[arm]["win_rate_previous"] = compare(mine, previous)
            found[arm]["judging"] = compute_judging(world, arm, folder)
            previous = mine
        if pairs is not None:
            found[arm]["agreement"] = rlaif.compute_agreement(pairs / "preferences.jsonl")
    return found


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    world, *_ = losses.prepare_pairs(seed)
    for family, rate in CHOSEN.items():
        wanted = [arm for arm in ARMS if (arm == family if family != "self" else arm not in CHOSEN)]
        if all(arm in row["arms"] for arm in wanted):
            continue
        row["arms"] |= describe_family(world, family, rate)
        row.setdefault("sft", describe(measure(load(world.sft), world, read_questions(world.data / "held_out"))))
        write_row(path, row)
        print(f"{PART} seed {seed}: { {arm: round(row['arms'][arm]['win_rate'], 3) for arm in wanted} }", flush=True)


def tune(wanted: Sequence[str]) -> None:
    """Families at rates, each FAMILY or FAMILY:RATE, on the tuning seeds."""
    parts = [name.partition(":") for name in wanted]
    pairs = [(family, float(rate)) for family, _, given in parts for rate in ((given,) if given else RATES)]
    for seed in TUNING_SEEDS:
        world, *_ = losses.prepare_pairs(seed)
        for family, rate in pairs:
            for arm, found in describe_family(world, family, rate).items():
                cells = [f"{found.get(key, float('nan')):.3f}" for key in ("win_rate", "gold", "kl", "agreement")]
                print(f"| {arm} | {rate:g} | {seed} | " + " | ".join(cells) + " |", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """`direct` against the SFT model and `labels`; each self-rewarding model against m0 and the one before; coin."""
    rows = [row for row in read_rows(PART, MY_SEEDS) if all(arm in row["arms"] for arm in ARMS)]
    if len(rows) < 2:
        return []
    arms = [row["arms"] for row in rows]
    claims = []

    def claim(words: str, metric: str, arm: str, control: str, differences: Sequence[float]) -> None:
        claims.append(
            build_claim(
                words, metric=f"{PART}/{metric}", arm=arm, control=control, differences=differences, better="higher"
            )
        )

    wins, golds = "win rate less 50 % (points)", "gold (points of 10)"
    for arm, words in (("direct", "GRPO on a judge's grades"), ("labels", "DPO on a judge's labels")):
        claim(
            f"{words} wins against the SFT model more often than half, by gold reward",
            wins, arm, "sft", [100 * (a[arm]["win_rate"] - 0.5) for a in arms],
        )  # fmt: skip
    claim(
        "GRPO on a judge's grades has a higher gold reward than DPO on its labels of as many answers",
        golds, "direct", "labels", [a["direct"]["gold"] - a["labels"]["gold"] for a in arms],
    )  # fmt: skip
    for before, arm in pairwise(STEPS):
        claim(
            f"self-rewarding: {arm} wins against m0 more often than half, by gold reward",
            wins, arm, "m0", [100 * (a[arm]["win_rate"] - 0.5) for a in arms],
        )  # fmt: skip
        if before != "m0":
            claim(
                f"self-rewarding: {arm} has a higher gold reward than {before}",
                golds, arm, before, [a[arm]["gold"] - a[before]["gold"] for a in arms],
            )  # fmt: skip
            claim(
                f"self-rewarding: {arm} wins against {before} more often than half, by gold reward",
                wins, arm, before, [100 * (a[arm]["win_rate_previous"] - 0.5) for a in arms],
            )  # fmt: skip
    claim(
        "self-rewarding: m1 has a higher gold reward than m0 after DPO on the same pairs turned by a coin",
        golds, "m1", "coin", [a["m1"]["gold"] - a["coin"]["gold"] for a in arms],
    )  # fmt: skip
    claim(
        f"self-rewarding: the pairs of m{ITERATIONS} agree with gold more than those of m1",
        "agreement with gold (points)", f"m{ITERATIONS}", "m1",
        [100 * (a[STEPS[-1]]["agreement"] - a["m1"]["agreement"]) for a in arms],
    )  # fmt: skip
    claim(
        f"self-rewarding: of the same given pairs m{ITERATIONS - 1}, the last judge, judges more as gold does than m0",
        "agreement with gold on given pairs (points)", STEPS[-2], "m0",
        [100 * (a[STEPS[-2]]["judging"] - a["m0"]["judging"]) for a in arms],
    )  # fmt: skip
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = read_rows(PART, MY_SEEDS)
    heads = "its pairs agree with gold, % | judges given pairs as gold, % | against | win rate, %"
    heads += " | gold | violations | KL, nats"
    lines = [f"| | {heads} |", "|---" * 8 + "|"]
    lines.append(f"| SFT | | | | | {np.mean([r['sft']['gold'] for r in rows]):.2f} | | |")
    for arm in ARMS:
        found = [row["arms"][arm] for row in rows if arm in row["arms"]]
        mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        cells = [f"{100 * mean[key]:.1f}" if key in mean else "" for key in ("agreement", "judging")]
        cells += ["SFT" if arm in CHOSEN else "m0", "" if arm == "m0" else f"{100 * mean['win_rate']:.1f}"]
        cells += [f"{mean['gold']:.2f}", f"{100 * mean['violations']:.0f} %"]
        cells.append("" if arm == "m0" else f"{mean['kl']:.1f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Gold of the outside judge's arms and over the self-rewarding iterations, a line a seed."""
    del claims
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for row in read_rows(PART, MY_SEEDS):
        outside = {"sft": row["sft"], **row["arms"]}
        for axis, arms in zip(axes, (("labels", "sft", "direct"), ("coin", *STEPS)), strict=True):
            axis.plot(arms, [outside[arm]["gold"] for arm in arms], "o-", color="C0", alpha=0.5)
    axes[0].set_title("an outside judge", fontsize=9)
    axes[1].set_title("self-rewarding", fontsize=9)
    axes[0].set_ylabel("gold, points of 10")
    figure.tight_layout()
    figure.savefig(HERE / f"{PART}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(sys.argv[1:] or tuple(CHOSEN))
