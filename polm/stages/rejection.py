"""`polm rejection`: a model's own best answers as data for SFT (rejection sampling, RAFT, best-of-n distillation)."""

from __future__ import annotations

from collections import Counter

from polm.data.packing import mix_seed
from polm.data.readers import Prompt, write_jsonl
from polm.errors import DataError
from polm.recipe_online import RejectionSettings
from polm.rewards.selection import Answer, choose_best, choose_top_share, drop_unfit
from polm.stages.answers import choose_prompts, draw_answers, finish_answers
from polm.stages.common import Context, Stage, StageResult, load_sampler, start_stage
from polm.stages.rollouts import REWARD_INPUTS

REJECTION = 3  # which stage draws, where stages share a seed and a file of prompts


def run(settings: RejectionSettings, context: Context) -> StageResult:
    """Sample answers from `base`, and write those that are kept to sft.jsonl."""
    start_stage(settings, context)
    base, _ = load_sampler(context.inputs["base"], settings.precision)
    seed = mix_seed(settings.seed, REJECTION)
    prompts = choose_prompts(settings, context, seed)
    answers, tally = draw_answers(settings, context, base, prompts, seed)
    statuses: Counter[str] = Counter(a.reward.status for a in answers)
    dropped: Counter[str] = Counter()
    kept = choose(settings, answers, dropped)
    if not kept:
        raise DataError(
            f"no answer is kept: of {len(answers)} samples to {len(prompts)} prompts all were dropped "
            f"({dict(dropped)}; {dict(statuses)}); raise samples, num_prompts, temperature or max_new_tokens, or lower "
            "min_reward"
        )
    write_jsonl(context.workdir / "sft.jsonl", (build_chat(prompts[a.prompt], a) for a in kept))
    finish_answers(context, tally)
    values = [a.value for a in answers if a.reward.is_judged]
    num_with = len({a.prompt for a in kept})
    summary = {
        "kept": len(kept),
        "prompts_kept": num_with,
        "sampled_reward": sum(values) / len(values),
        "kept_reward": sum(a.value for a in kept) / len(kept),
    }
    ledger = {
        "prompts": len(prompts),
        "prompts_without": len(prompts) - num_with,
        "samples": len(answers),
        **statuses,
        **tally.counts,
        "kept": len(kept),
        **{f"dropped_{reason}": count for reason, count in sorted(dropped.items())},
    }
    return StageResult(summary, ledger)


def choose(settings: RejectionSettings, answers: list[Answer], dropped: Counter[str]) -> list[Answer]:
    """The answers that are kept; `dropped` then says why each other one is not."""
    fit = drop_unfit(answers, settings.min_reward, dropped)
    if settings.keep == "best":
        kept = choose_best(fit, settings.per_prompt or 1)
    else:
        num_judged = sum(a.reward.is_judged for a in answers)
        kept = choose_top_share(fit, settings.share or 1.0, num_judged)
    if len(fit) > len(kept):
        dropped["not_best"] += len(fit) - len(kept)
    return kept


def build_chat(prompt: Prompt, answer: Answer) -> dict[str, object]:
    """A row of sft.jsonl."""
    return {
        "messages": [
            {"role": "user", "content": prompt.prompt},
            {"role": "assistant", "content": answer.text},
        ]
    }


STAGE = Stage(
    "rejection",
    "produce",
    RejectionSettings,
    run,
    inputs=("base", "data"),
    optional_inputs=REWARD_INPUTS,
    version=3,
    summary="a model's own best answers as SFT data (rejection sampling, RAFT)",
)
