"""`polm pairs`: preference pairs from a model's own samples, judged by each prompt's verifier."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from polm.data.packing import epoch_order, mix_seed
from polm.data.readers import Prompt, read_prompts, write_jsonl
from polm.errors import DataError
from polm.recipe import PairsSettings
from polm.rewards.verify import Verdict, VerifyItem, verify_many
from polm.rollout.answers import sample_answers
from polm.rollout.generate import Completion
from polm.stages.common import Context, Stage, StageResult, input_file, load_base, start_stage
from polm.text.chat import render_prompt

PAIRS = 1  # which stage draws, where stages share a seed and a file of prompts


def run(settings: PairsSettings, context: Context) -> StageResult:
    """Sample answers from `base`, and write right-over-wrong pairs to preferences.jsonl."""
    start_stage(settings, context)
    base = load_base(context.inputs["base"])
    prompts = read_prompts(input_file(context, "data", "prompts.jsonl"))
    # Seeds of its own: GRPO walks the same file, and should not begin with the prompts that DPO has just seen.
    order = epoch_order(len(prompts), mix_seed(settings.seed, PAIRS), 0)[: settings.num_prompts]
    chosen = [prompts[int(i)] for i in order]
    completions = sample_answers(
        base.model,
        base.tokenizer,
        [render_prompt(base.tokenizer, [{"role": "user", "content": p.prompt}]) for p in chosen],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        samples=settings.samples,
        seed=mix_seed(settings.seed, PAIRS),
        precision=settings.precision,
        progress=lambda done, total: context.report({"update": done, "num_updates": total}),
    )
    verdicts = judge([(chosen[c.prompt_index], c.text) for c in completions], settings.time_limit)
    rows = build_pairs(chosen, completions, verdicts, settings.pairs_per_prompt, settings.seed)
    ledger: Counter[str] = Counter(v.status for v in verdicts)
    if not rows:
        raise DataError(
            f"no preference pair: among {len(completions)} samples of {len(chosen)} prompts no prompt had a right and "
            f"a wrong answer ({dict(ledger)}); raise samples, num_prompts or temperature, or leave pairs and dpo out"
        )
    write_jsonl(context.workdir / "preferences.jsonl", rows)
    right = ledger["right"] / len(completions)
    return StageResult({"pairs": len(rows), "sampled_accuracy": right}, {"samples": len(completions), **ledger})


def judge(answers: Sequence[tuple[Prompt, str]], time_limit: float) -> list[Verdict]:
    """The verdict on each (prompt, answer)."""
    return verify_many([VerifyItem(p.verifier, text, p.answer, p.numbers) for p, text in answers], seconds=time_limit)


def build_pairs(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    pairs_per_prompt: int,
    seed: int,
) -> list[dict[str, str]]:
    """Up to `pairs_per_prompt` pairs of distinct texts a prompt. Time-outs and errors are on neither side."""
    rows = []
    groups: dict[int, list[tuple[Completion, Verdict]]] = defaultdict(list)
    for completion, verdict in zip(completions, verdicts, strict=True):
        groups[completion.prompt_index].append((completion, verdict))
    for index, prompt in enumerate(prompts):
        mine = groups[index]
        good = sorted({c.text for c, v in mine if v.status == "right"})
        bad = sorted({c.text for c, v in mine if v.status in ("wrong", "unparsed") and c.text.strip()})
        rng = np.random.default_rng((seed, index))
        rng.shuffle(good)
        rng.shuffle(bad)
        for right, wrong in list(zip(good, bad, strict=False))[:pairs_per_prompt]:
            rows.append({"prompt": prompt.prompt, "chosen": right, "rejected": wrong})
    return rows


STAGE = Stage(
    "pairs",
    "produce",
    PairsSettings,
    run,
    inputs=("base", "data"),
    summary="preference pairs from a model's own samples",
)
