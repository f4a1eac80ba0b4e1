"""Part `constitution`: critique and revision by a principle ("no rude sentences"), then SFT on the revised answers.

The critic is the SFT model, fine-tuned on talks that the task's program wrote: a story, which of its sentences are
rude, the story without them. `polm constitution` has it criticise and revise the own answers of the SFT model; SFT on
these is the arm, and SFT on the same answers as they were before is the control.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import yaml
from common import (
    HERE,
    SEEDS,
    SFT,
    World,
    describe,
    load,
    measure,
    prepare,
    read_questions,
    read_row,
    read_rows,
    run_stage,
    write_row,
)
from task import ASK_CRITIQUE, ASK_REVISION, draw_asked, gold, revise, write_critique, write_story

from polm.data.readers import write_jsonl
from polm.demo.corpus import is_held_out
from polm.evals.claims import build_claim

PART = "constitution"
MY_SEEDS = SEEDS
NUM_TALKS, CRITIC_EPOCHS, NUM_PROMPTS = 2500, 1, 1500
ALLOWED_LOSS = 0.25  # points of helpfulness of 10
TUNING_SEED = 2


def train_critic(world: World) -> Path:
    """The SFT model, fine-tuned on critiques and revisions; the stories in them are not trained on."""
    file = world.folder / PART / "talks" / "sft.jsonl"
    if not file.is_file():
        rng = Random(f"{world.seed}/talks")
        rows = []
        while len(rows) < NUM_TALKS:
            asked = draw_asked(rng)
            if is_held_out(asked.prompt):
                continue
            story = write_story(asked, rng)
            said = [asked.prompt, story, ASK_CRITIQUE, write_critique(story), ASK_REVISION, revise(asked.prompt, story)]
            turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
            turns[1] = {**turns[1], "weight": 0}
            rows.append({"messages": turns})
        write_jsonl(file, rows)
    settings = {"seed": world.seed, **SFT, "epochs": CRITIC_EPOCHS}
    return run_stage("sft", world.folder / PART / "critic", settings, base=world.sft, data=file)


def write_revisions(world: World) -> Path:
    """The artifact of the stage: sft.jsonl and transcript.jsonl."""
    principle = {
        "name": "rude",
        "critique": ASK_CRITIQUE,
        "revision": ASK_REVISION,
        "compare": "the better story has no rude sentence.",
    }
    file = world.folder / PART / "constitution.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"name": "stories", "principles": [principle]}))
    settings = {
        "seed": world.seed,
        "num_prompts": NUM_PROMPTS,
        "revision_prompt": "{request}",
        "max_new_tokens": 80,
        "max_critique_tokens": 40,
    }
    return run_stage(
        "constitution",
        world.folder / PART / "revisions",
        settings,
        base=world.sft,
        data=world.data,
        critic=train_critic(world),
        constitution=file,
    )


def read_transcript(revisions: Path) -> list[tuple[str, str, str]]:
    """(prompt, first answer, final answer)."""
    rows = [json.loads(line) for line in (revisions / "transcript.jsonl").read_text().splitlines()]
    return [(str(row["prompt"][0]["content"]), row["answer"], row["final"]) for row in rows]


def describe_texts(answers: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Violations and helpfulness of (prompt, text)."""
    golds = [gold(prompt, text) for prompt, text in answers]
    return {
        "violations": float(np.mean([g.violations > 0 for g in golds])),
        "helpfulness": float(np.mean([g.helpfulness for g in golds])),
    }


def fine_tune(world: World, revisions: Path) -> dict[str, Path]:
    """SFT on the answers as they were, and on the revised ones: `unrevised`, `revised`."""
    before = world.folder / PART / "unrevised" / "sft.jsonl"
    talks = [(p, first) for p, first, _ in read_transcript(revisions)]
    write_jsonl(
        before,
        ({"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a in talks),
    )
    files = {"unrevised": before, "revised": revisions / "sft.jsonl"}
    settings = {"seed": world.seed, **SFT}
    return {
        arm: run_stage("sft", world.folder / PART / f"sft-{arm}", settings, base=world.sft, data=file)
        for arm, file in files.items()
    }


def run(seed: int, path: Path) -> None:
    row = {"seed": seed, **read_row(path)}
    if "revised" in row["arms"]:
        return
    world = prepare(seed)
    prompts = read_questions(world.data / "held_out")
    row["sft"] = describe(measure(load(world.sft), world, prompts))
    revisions = write_revisions(world)
    said = read_transcript(revisions)
    row["texts"] = {
        "before": describe_texts([(p, first) for p, first, _ in said]),
        "after": describe_texts([(p, final) for p, _, final in said]),
    }
    for arm, folder in fine_tune(world, revisions).items():
        row["arms"][arm] = describe(measure(load(folder), world, prompts))
    write_row(path, row)
    print(f"{PART} seed {seed}: {row['texts']} {row['arms']}", flush=True)


# ---- results ---------------------------------------------------------------------------------------------------------


def build_claims() -> list[dict[str, Any]]:
    """Of the texts, and of the models trained on them: fewer violations, and no loss of helpfulness above a margin."""
    rows = [row for row in read_rows(PART) if "revised" in row["arms"]]
    if len(rows) < 2:
        return []
    pairs = {
        "answers after revision": [(row["texts"]["after"], row["texts"]["before"]) for row in rows],
        "the model trained on revised answers": [(row["arms"]["revised"], row["arms"]["unrevised"]) for row in rows],
    }
    claims = []
    for words, found in pairs.items():
        arm, control = ("revised", "unrevised") if "model" in words else ("after", "before")
        claims += [
            build_claim(
                f"{words}: fewer stories with a rude sentence than without the revision",
                metric="constitution/violations (% of stories)",
                arm=arm,
                control=control,
                differences=[100 * (a["violations"] - b["violations"]) for a, b in found],
                better="lower",
            ),
            build_claim(
                f"{words}: less than {ALLOWED_LOSS} points of helpfulness lost (difference plus {ALLOWED_LOSS})",
                metric="constitution/helpfulness (points of 10)",
                arm=arm,
                control=control,
                differences=[a["helpfulness"] - b["helpfulness"] + ALLOWED_LOSS for a, b in found],
                better="higher",
            ),
        ]
    return claims


def write_table(claims: Sequence[Mapping[str, Any]]) -> str:
    del claims
    rows = [row for row in read_rows(PART) if "revised" in row["arms"]]
    groups = {
        "answers before": [row["texts"]["before"] for row in rows],
        "answers after revision": [row["texts"]["after"] for row in rows],
        "SFT model": [row["sft"] for row in rows],
        "trained on its answers": [row["arms"]["unrevised"] for row in rows],
        "trained on its revised answers": [row["arms"]["revised"] for row in rows],
    }
    lines = ["| | violations, % | helpfulness |", "|---|---|---|"]
    for name, found in groups.items():
        violations = 100 * float(np.mean([f["violations"] for f in found]))
        lines.append(f"| {name} | {violations:.1f} | {np.mean([f['helpfulness'] for f in found]):.2f} |")
    return "\n".join(lines) + "\n"


def draw(claims: Sequence[Mapping[str, Any]]) -> None:
    """Helpfulness over violations: an arrow a seed, from unrevised to revised, of texts and of models."""
    del claims
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True)
    for row in read_rows(PART):
        if "revised" not in row["arms"]:
            continue
        both = (row["texts"]["before"], row["texts"]["after"]), (row["arms"]["unrevised"], row["arms"]["revised"])
        for axis, (before, after) in zip(axes, both, strict=True):
            x, y = ([100 * p["violations"] for p in (before, after)], [p["helpfulness"] for p in (before, after)])
            axis.annotate("", (x[1], y[1]), (x[0], y[0]), arrowprops={"arrowstyle": "->", "color": "C0"})
            axis.plot(x, y, "o", color="C0", markersize=3)
    titles = "the answers, before and after revision", "models trained on the answers before, after"
    for axis, words in zip(axes, titles, strict=True):
        axis.set_title(words, fontsize=9)
        axis.set_xlabel("stories with a rude sentence, %")
    axes[0].set_ylabel("helpfulness, points of 10")
    figure.tight_layout()
    figure.savefig(HERE / "constitution.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tuned = write_revisions(prepare(int(sys.argv[1]) if sys.argv[1:] else TUNING_SEED))
    spoken = read_transcript(tuned)
    print(describe_texts([(p, a) for p, a, _ in spoken]), describe_texts([(p, b) for p, _, b in spoken]))
    for line in spoken[:5]:
        print(line)
