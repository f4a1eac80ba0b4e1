"""Part `rlaif`: DPO on pairs that a model has labelled against DPO on the same pairs with noisy labels of the gold.

"People" are the noisy labellers of the other parts. The AI judge is the SFT model, fine-tuned to grade: it has read
other stories with their grades (1 to 5, from gold), and grades each answer of the 600 pairs by the likelihoods of the
five grades; `polm judge` turns these into pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import losses
import matplotlib.pyplot as plt
import numpy as np
from common import (
    HERE,
    SEEDS,
    SFT,
    World,
    describe_against,
    load,
    measure,
    read_row,
    read_rows,
    run_stage,
    write_row,
)
from task import ASK_GRADE, compute_grade, draw_asked, gold, write_story

from polm.data.readers import read_preferences, write_jsonl
from polm.demo.corpus import is_held_out
from polm.evals.claims import build_claim

PART = "rlaif"
MY_SEEDS = SEEDS
NUM_GRADED, JUDGE_EPOCHS = 3000, 1
ARMS = ("people", "judge", "gold")
TUNING_SEED = 2


def train_judge(world: World) -> Path:
    """The SFT model, fine-tuned on stories with their grades."""
    file = world.folder / PART / "graded" / "sft.jsonl"
    if not file.is_file():
        rng = Random(f"{world.seed}/graded")
        rows = []
        while len(rows) < NUM_GRADED:
            asked = draw_asked(rng)
            if is_held_out(asked.prompt):
                continue
            story = write_story(asked, rng)
            grade = str(compute_grade(gold(asked.prompt, story).score))
            question = f"{asked.prompt} {story} {ASK_GRADE}"
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": grade}]})
        write_jsonl(file, rows)
    settings = {"seed": world.seed, **SFT, "epochs": JUDGE_EPOCHS}
    return run_stage("sft", world.folder / PART / "judge", settings, base=world.sft, data=file)


def label(world: World) -> dict[str, Path]:
    """The three sets of labels of the same pairs, by arm."""
    people = world.folder / "pairs" / "preferences.jsonl"
    settings = {
        "mode": "relabel",
        "by": "scores",
        "seed": world.seed,
        "judging": {"verdict": "logprobs", "scale": [1, 5], "score_prompt": f"{{question}} {{answer}} {ASK_GRADE}"},
    }
    judged = run_stage("judge", world.folder / PART / "labels", settings, data=people, judge=train_judge(world))
    best = world.folder / PART / "gold" / "preferences.jsonl"
    rows = []
    for prompt, chosen, rejected in read_pairs(people):
        turned = gold(prompt, chosen).score < gold(prompt, rejected).score
        rows.append(
            {"prompt": prompt, "chosen": rejected if turned else chosen, "rejected": chosen if turned else rejected}
        )
    write_jsonl(best, rows)
    return {"people": people, "judge": judged / "preferences.jsonl", "gold": best}


def read_pairs(file: Path) -> list[tuple[str, str, str]]:
    return [(str(p.prompt[0]["content"]), p.chosen, p.rejected) for p in read_preferences(file)]


def compute_agreement(file: Path) -> float:
    """Share of pairs whose chosen answer has the higher gold; equal ones count half."""
    differences = [gold(q, a).score - gold(q, b).score for q, a, b in read_pairs(file)]
    return float(np.mean([(d > 0) + 0.5 * (d == 0) for d in differences]))


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    world, sft, prompts, control = losses.prepare_pairs(seed)
    labels = label(world)
    for arm in ARMS:
        if arm in row["arms"]:
            continue
        folder = world.folder / PART / f"dpo-{arm}"
        settings = losses.build_settings("dpo", losses.CHOSEN["dpo"], seed)
        model = load(run_stage("dpo", folder, settings, base=world.sft, data=labels[arm]))
        found = describe_against(measure(model, world, prompts), control, sft, prompts)
        row["arms"][arm] = {**found, "agreement": compute_agreement(labels[arm]), "pairs": len(read_pairs(labels[arm]))}
        write_row(path, row)
        print(f"{PART} seed {seed} {arm}: {found['win_rate']:.3f} {row['arms'][arm]['agreement']:.3f}", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """Each arm against the SFT model, and the judge's labels against people's."""
    rows = [row["arms"] for row in read_rows(PART) if all(arm in row["arms"] for arm in ARMS)]
    if len(rows) < 2:
        return []
    claims = [
        build_claim(
            f"DPO on labels of {words} wins against the SFT model more often than half, by gold reward",
            metric="rlaif/win rate less 50 % (points)",
            arm=arm,
            control="sft",
            differences=[100 * (r[arm]["win_rate"] - 0.5) for r in rows],
            better="higher",
        )
        for arm, words in (("people", "the noisy people"), ("judge", "the AI judge"))
    ]
    for metric, words, unit, scale in (
        ("win_rate", "win rate", "points", 100.0),
        ("gold", "gold reward", "points of 10", 1.0),
    ):
        claims.append(
            build_claim(
                f"the AI judge's labels give another {words} than the noisy people's, at equal pairs",
                metric=f"rlaif/{words} ({unit})",
                arm="judge",
                control="people",
                differences=[scale * (r["judge"][metric] - r["people"][metric]) for r in rows],
                better="either",
            )
        )
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = [row["arms"] for row in read_rows(PART)]
    lines = [
        "| labels of | agree with gold, % | pairs | win rate, % | gold | violations | KL, nats |",
        "|---" * 7 + "|",
    ]
    for arm in ARMS:
        mean = {key: float(np.mean([r[arm][key] for r in rows if arm in r])) for key in rows[0][arm]}
        cells = [f"{100 * mean['agreement']:.1f}", f"{mean['pairs']:.0f}", f"{100 * mean['win_rate']:.1f}"]
        cells += [f"{mean['gold']:.2f}", f"{100 * mean['violations']:.0f} %", f"{mean['kl']:.1f}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Win rate by who has labelled, a point a seed."""
    del claims
    figure, axis = plt.subplots(figsize=(5, 3.4))
    for row in read_rows(PART):
        arms = [arm for arm in ARMS if arm in row["arms"]]
        axis.plot(arms, [100 * row["arms"][arm]["win_rate"] for arm in arms], "o-", color="C0", alpha=0.5)
    axis.axhline(50, color="0.5", linewidth=1)
    axis.set_ylabel("win rate against the SFT model, %")
    axis.set_xlabel("who has labelled the pairs")
    figure.tight_layout()
    figure.savefig(HERE / "rlaif.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tuning_world, *_ = losses.prepare_pairs(int(sys.argv[1]) if sys.argv[1:] else TUNING_SEED)
    for name, labels_file in label(tuning_world).items():
        print(name, compute_agreement(labels_file))
