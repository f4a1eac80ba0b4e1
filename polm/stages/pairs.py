"""`polm pairs`: preference pairs from a model's own samples, judged by a reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from polm.data.packing import mix_seed
from polm.data.readers import Prompt, write_jsonl
from polm.errors import DataError
from polm.recipe import PairsSettings
from polm.rewards.selection import (
    Answer,
    Pair,
    accept_by_rejection,
    drop_unpairable,
    group_by_prompt,
    pair_best_worst,
    pair_by_rounds,
)
from polm.stages.answers import choose_prompts, draw_answers, finish_answers
from polm.stages.common import Context, Stage, StageResult, load_sampler, start_stage
from polm.stages.rollouts import REWARD_INPUTS

PAIRS = 1  # which stage draws, where stages share a seed and a file of prompts


def run(settings: PairsSettings, context: Context) -> StageResult:
    """Sample answers from `base`, and write better-over-worse pairs to preferences.jsonl."""
    start_stage(settings, context)
    base, _ = load_sampler(context.inputs["base"], settings.precision)
    # Seeds of its own: GRPO walks the same file, and should not begin with the prompts that DPO has just seen.
    seed = mix_seed(settings.seed, PAIRS)
    prompts = choose_prompts(settings, context, seed)
    answers, tally = draw_answers(settings, context, base, prompts, seed)
    statuses: Counter[str] = Counter(a.reward.status for a in answers)
    dropped: Counter[str] = Counter()
    pairs = build_pairs(settings, answers, dropped)
    if not pairs:
        raise DataError(
            f"no preference pair: among {len(answers)} samples of {len(prompts)} prompts no prompt had a better and a "
            f"worse answer ({dict(statuses)}); raise samples, num_prompts or temperature, or leave pairs and dpo out"
        )
    rows = [build_row(prompts[number], pair) for number, mine in pairs.items() for pair in mine]
    write_jsonl(context.workdir / "preferences.jsonl", rows)
    finish_answers(context, tally)
    summary = {"pairs": len(rows), "sampled_accuracy": statuses["right"] / len(answers)}
    ledger = {
        "prompts": len(prompts),
        "prompts_without": len(prompts) - len(pairs),
        "samples": len(answers),
        **statuses,
        **tally.counts,
        **{f"dropped_{reason}": count for reason, count in sorted(dropped.items())},
    }
    return StageResult(summary, ledger)


def build_pairs(settings: PairsSettings, answers: Sequence[Answer], dropped: Counter[str]) -> dict[int, list[Pair]]:
    """The pairs of each prompt that has any. `dropped` counts the samples that could stand in none, by reason, and
    those that RSO did not accept."""
    out: dict[int, list[Pair]] = {}
    for mine in group_by_prompt(answers):
        number = mine[0].prompt
        rng = np.random.default_rng((settings.seed, number))
        pairs = choose_pairs(settings, drop_unpairable(mine, dropped), rng, dropped)
        if pairs:
            out[number] = pairs
    return out


def build_row(prompt: Prompt, pair: Pair) -> dict[str, str]:
    """A row of preferences.jsonl."""
    return {"prompt": prompt.prompt, "chosen": pair[0].text, "rejected": pair[1].text}


def choose_pairs(
    settings: PairsSettings, fit: Sequence[Answer], rng: np.random.Generator, dropped: Counter[str]
) -> list[Pair]:
    """The pairs of one prompt's distinct, judged answers."""
    if settings.choose == "best_worst":
        return pair_best_worst(fit, settings.pairs_per_prompt or 1, rng)
    assert settings.rso_beta is not None
    assert settings.rso_accepted is not None
    accepted = accept_by_rejection([a.value for a in fit], settings.rso_accepted, settings.rso_beta, rng)
    if len(accepted) < len(fit):
        dropped["not_accepted"] += len(fit) - len(accepted)
    return pair_by_rounds([fit[i] for i in accepted], rng, settings.rso_rounds or "first")


STAGE = Stage(
    "pairs",
    "produce",
    PairsSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=REWARD_INPUTS,
    version=4,
    summary="preference pairs from a model's own samples",
)
