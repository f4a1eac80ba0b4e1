"""Part `principles`: preferences by a constitution (RL-CAI, arXiv 2212.08073), then DPO.

Two principles: no rude sentence, and the story ends with somebody going home. The judge is a model of its own, taught
on comparisons that the task's program wrote: two stories, a principle, which of the two keeps it better. `polm judge
principles=true` has it compare two answers of the SFT model to each prompt, by a principle drawn for each pair. DPO on
these pairs, alone and beside the pairs that noisy people have labelled, stands against DPO on people's pairs alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import losses
import matplotlib.pyplot as plt
import numpy as np
import rlaif
import yaml
from common import (
    HERE,
    PRETRAIN,
    SEEDS,
    SFT,
    SHAPE,
    TUNING_SEEDS,
    World,
    describe,
    describe_against,
    load,
    measure,
    read_row,
    read_rows,
    run_stage,
    write_row,
)
from task import draw_asked, gold, write_story

from polm.data.readers import write_jsonl
from polm.demo.corpus import is_held_out
from polm.evals.claims import build_claim
from polm.recipe import PretrainSettings

PART = "principles"
MY_SEEDS = SEEDS
PRINCIPLES = {"rude": "which story is not rude ?", "home": "which story ends at home ?"}
NUM_READ, NUM_COMPARED, JUDGE_EPOCHS = 8000, 6000, 2
NUM_PROMPTS, MARGIN = 1500, 0.2
ARMS = {
    "people": "noisy people's pairs",
    "principles": "pairs by the principles",
    "both": "both sets",
}
CHOSEN = {"people": losses.CHOSEN["dpo"], "principles": 1e-4, "both": 3e-4}  # evidence/LOG.md
RATES = (1e-4, 3e-4)
ALLOWED_LOSS = 0.25  # points of helpfulness of 10
QUESTION = "{question} A {answer_a} B {answer_b} {criterion}"


def keep(principle: str, prompt: str, text: str) -> float:
    """How well a story keeps a principle, by the program."""
    found = gold(prompt, text)
    return -float(found.violations) if principle == "rude" else float(found.parts["ending"] > 0)


def write_comparison(rng: Random) -> tuple[str, str]:
    """A judge's question and its reply; two of three are drawn until the stories differ."""
    principle, must_differ = rng.choice(list(PRINCIPLES)), rng.random() < 2 / 3
    while True:
        asked = draw_asked(rng)
        stories = write_story(asked, rng), write_story(asked, rng)
        first, second = (keep(principle, asked.prompt, story) for story in stories)
        if not is_held_out(asked.prompt) and (first != second or not must_differ):
            break
    better = "AB"[first < second] if first != second else rng.choice("AB")
    values = {"question": asked.prompt, "answer_a": stories[0], "answer_b": stories[1]}
    return QUESTION.format(**values, criterion=PRINCIPLES[principle]), better


def train_judge(world: World) -> Path:
    """A model that has read stories and comparisons, and was fine-tuned to reply A or B."""
    folder = world.folder / PART
    if not (folder / "data" / "sft.jsonl").is_file():
        rng = Random(f"{world.seed}/comparisons")
        rows = [write_comparison(rng) for _ in range(NUM_COMPARED)]
        read = (world.data / "pretrain.jsonl").read_text().splitlines()[:NUM_READ]
        documents = [*(json.loads(line) for line in read), *({"text": f"{q} {a}"} for q, a in rows)]
        write_jsonl(folder / "data" / "pretrain.jsonl", documents)
        talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
        write_jsonl(folder / "data" / "sft.jsonl", ({"messages": talk} for talk in talks))
    data = folder / "data"
    tokenizer = run_stage("tokenizer", folder / "tokenizer", {"kind": "word", "vocab_size": 220}, data=data)
    settings = PretrainSettings.model_validate({"seed": world.seed, "model": SHAPE, **PRETRAIN})
    base = run_stage("pretrain", folder / "pretrain", settings, data=data, tokenizer=tokenizer)
    tuning = {"seed": world.seed, **SFT, "epochs": JUDGE_EPOCHS}
    return run_stage("sft", folder / "judge", tuning, data=data, base=base)


def compare_by_principles(world: World) -> Path:
    """The artifact of the stage: preferences.jsonl and verdicts.jsonl."""
    file = world.folder / PART / "constitution.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    rules = [{"name": n, "critique": w, "revision": w, "compare": w} for n, w in PRINCIPLES.items()]
    file.write_text(yaml.safe_dump({"name": "stories", "principles": rules}))
    settings = {
        "seed": world.seed,
        "mode": "sample",
        "samples": 2,
        "num_prompts": NUM_PROMPTS,
        "principles": True,
        "margin": MARGIN,
        "max_new_tokens": 80,
        "judging": {"verdict": "logprobs", "orders": "mean", "pair_prompt": QUESTION},
    }
    inputs = {"base": world.sft, "data": world.data, "judge": train_judge(world), "constitution": file}
    return run_stage("judge", world.folder / PART / "compared", settings, **inputs)


def describe_labels(file: Path) -> dict[str, float]:
    """Pairs, and of those that differ by a principle the share whose chosen answer keeps it better, whichever of the
    two was drawn for the pair."""
    pairs = rlaif.read_pairs(file)
    found: dict[str, float] = {"pairs": len(pairs)}
    for name in PRINCIPLES:
        differences = [keep(name, prompt, a) - keep(name, prompt, b) for prompt, a, b in pairs]
        found[f"{name}_right"] = float(np.mean([d > 0 for d in differences if d]))
        found[f"{name}_differ"] = float(np.mean([d != 0 for d in differences]))
    return found


def build_files(world: World) -> dict[str, Path]:
    """The pairs of each arm."""
    files = {
        "people": world.folder / "pairs" / "preferences.jsonl",
        "principles": compare_by_principles(world) / "preferences.jsonl",
        "both": world.folder / PART / "both" / "preferences.jsonl",
    }
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for arm in ("people", "principles")
        for prompt, chosen, rejected in rlaif.read_pairs(files[arm])
    ]
    write_jsonl(files["both"], rows)
    return files


def train(world: World, arm: str, file: Path, rate: float) -> Path:
    settings = losses.build_settings("dpo", rate, world.seed)
    return run_stage("dpo", world.folder / PART / f"dpo-{arm}-{rate:g}", settings, base=world.sft, data=file)


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    if all(arm in row["arms"] for arm in ARMS):
        return
    world, sft, prompts, control = losses.prepare_pairs(seed)
    row["sft"] = describe(control)
    for arm, file in build_files(world).items():
        model = load(train(world, arm, file, CHOSEN[arm]))
        found = describe_against(measure(model, world, prompts), control, sft, prompts)
        row["arms"][arm] = {**found, **describe_labels(file)}
        write_row(path, row)
        print(f"{PART} seed {seed} {arm}: {row['arms'][arm]['violations']:.3f}", flush=True)


def tune(seeds: Sequence[int]) -> None:
    """The arms at all rates, on seeds that are not reported."""
    for seed in seeds:
        world, sft, prompts, control = losses.prepare_pairs(seed)
        print(f"seed {seed} sft { {k: round(v, 3) for k, v in describe(control).items()} }", flush=True)
        for arm, file in build_files(world).items():
            print(f"seed {seed} {arm} { {k: round(v, 3) for k, v in describe_labels(file).items()} }", flush=True)
            for rate in RATES:
                model = load(train(world, arm, file, rate))
                found = describe_against(measure(model, world, prompts), control, sft, prompts)
                keys = ("violations", "part/ending", "helpfulness", "words", "win_rate", "kl")
                cells = [f"{found[key]:.3f}" for key in keys]
                print(f"| {arm} | {rate:g} | {seed} | " + " | ".join(cells) + " |", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """What the principles forbid gets rarer, with and without people's pairs, and how much help that costs."""
    rows = [row for row in read_rows(PART, MY_SEEDS) if all(arm in row["arms"] for arm in ARMS)]
    if len(rows) < 2:
        return []
    asked = {
        ("principles", "sft"): [(row["arms"]["principles"], row["sft"]) for row in rows],
        ("both", "people"): [(row["arms"]["both"], row["arms"]["people"]) for row in rows],
    }
    claims = []
    for (arm, control), pairs in asked.items():
        words = f"DPO on {ARMS[arm]} against {'the SFT model' if control == 'sft' else f'DPO on {ARMS[control]}'}"
        for metric, key, claim, scale, better, shift in (
            ("violations (% of stories)", "violations", "fewer stories with a rude sentence", 100.0, "lower", 0.0),
            ("ending (points of 2)", "part/ending", "more points for the ending", 1.0, "higher", 0.0),
            (
                "helpfulness (points of 10)",
                "helpfulness",
                f"less than {ALLOWED_LOSS} points of helpfulness lost (difference plus {ALLOWED_LOSS})",
                1.0,
                "higher",
                ALLOWED_LOSS,
            ),
        ):
            claims.append(
                build_claim(
                    f"{words}: {claim}",
                    metric=f"{PART}/{metric}",
                    arm=arm,
                    control=control,
                    differences=[scale * (a[key] - b[key]) + shift for a, b in pairs],
                    better=better,  # type: ignore[arg-type]
                )
            )
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = read_rows(PART, MY_SEEDS)
    groups = {"SFT model": [row["sft"] for row in rows]}
    groups |= {f"DPO on {words}": [r["arms"][arm] for r in rows if arm in r["arms"]] for arm, words in ARMS.items()}
    heads = "pairs | violations, % | ending, of 2 | helpfulness | win rate, % | KL, nats"
    lines = [f"| | {heads} |", "|---" * 7 + "|"]
    for name, found in groups.items():
        mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        cells = [f"{mean['pairs']:.0f}" if "pairs" in mean else ""]
        cells += [f"{100 * mean['violations']:.1f}", f"{mean['part/ending']:.2f}", f"{mean['helpfulness']:.2f}"]
        cells += [f"{100 * mean['win_rate']:.1f}", f"{mean['kl']:.1f}"] if "kl" in mean else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Helpfulness over violations of every model, a point a seed; the means are large."""
    del claims
    figure, axis = plt.subplots(figsize=(5.4, 3.8))
    rows = read_rows(PART, MY_SEEDS)
    groups = {"SFT": [row["sft"] for row in rows], **{arm: [row["arms"][arm] for row in rows] for arm in ARMS}}
    for color, (name, found) in zip(("0.5", "C1", "C0", "C2"), groups.items(), strict=True):
        x, y = [100 * f["violations"] for f in found], [f["helpfulness"] for f in found]
        axis.plot(x, y, "o", color=color, markersize=3, alpha=0.6)
        axis.plot(np.mean(x), np.mean(y), "o", color=color, markersize=9, label=name)
    axis.set_xlabel("stories with a rude sentence, %")
    axis.set_ylabel("helpfulness, points of 10")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / f"{PART}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tune(tuple(map(int, sys.argv[1:])) or TUNING_SEEDS)
