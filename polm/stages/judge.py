"""`polm judge`: a judge's labels on given pairs or answers, or on a model's own samples (RLAIF, arXiv 2309.00267)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from polm.data.examples import drop_bad_record
from polm.data.packing import epoch_order, mix_seed
from polm.data.readers import (
    Message,
    is_feedback,
    read_back,
    read_feedback,
    read_preferences,
    read_prompt_messages,
    write_jsonl,
)
from polm.data.records import Feedback
from polm.errors import DataError, RecipeError, UserError
from polm.evals.statistics import compute_wilson_interval
from polm.recipe_judge import BESIDE, JudgeStage
from polm.rewards.base import RewardItem
from polm.rewards.constitution import load_constitution
from polm.rewards.judge import Judge, Verdict, build_judge_rewarder
from polm.rewards.label import (
    Samples,
    distinct_answers,
    draw_pairs,
    keep_preferred,
    label_answer,
    pair_extremes,
    unit_grade,
)
from polm.rewards.open_backend import Loaded, open_backend
from polm.rewards.rank import NO_TOKENS, PairItem, Ranking, compute_position_bias, rank_by_reward
from polm.stages.answers import answer_messages
from polm.stages.common import Base, Context, Stage, StageResult, input_file, load_base, new_ledger, start_stage

JUDGE = 2  # which stage draws, where stages share a seed and a file of prompts
FAILED = ("timeout", "error")


def run(settings: JudgeStage, context: Context) -> StageResult:
    """Write preferences.jsonl (or feedback.jsonl), and verdicts.jsonl with what the judge said about each."""
    start_stage(settings, context)
    _check_inputs(settings, context)
    ledger = new_ledger()
    if settings.mode == "sample":
        samples, loaded = _read_or_sample(settings, context, ledger)
        judge = _open_judge(settings, context, loaded)
        if settings.by == "scores":
            return _grade_samples(settings, context, judge, samples, ledger)
        items = draw_pairs(samples, settings.pairs_per_prompt, mix_seed(settings.seed, JUDGE), ledger)
        items = _give_principles(items, settings, context)
        return _rank_pairs(settings, context, judge, items, ledger, are_labelled=False)
    names = ("preferences.jsonl", "feedback.jsonl")
    given = Path(context.inputs["data"])
    file = input_file(context, "data", next((name for name in names if (given / name).is_file()), names[0]))
    judge = _open_judge(settings, context, None)
    on_bad = partial(drop_bad_record, settings.bad_records, ledger)
    if is_feedback(file):
        answers = _draw_kept(read_feedback(file, on_bad), settings, ledger)
        return _relabel_answers(settings, context, judge, answers, ledger)
    pairs = _draw_kept(read_preferences(file, on_bad), settings, ledger)
    items = _give_principles([PairItem(p.prompt, p.chosen, p.rejected) for p in pairs], settings, context)
    return _rank_pairs(settings, context, judge, items, ledger, are_labelled=True)


def _check_inputs(settings: JudgeStage, context: Context) -> None:
    has_base = "base" in context.inputs
    if has_base != (settings.mode == "sample"):
        wanted = "needs base=MODEL, whose answers are judged" if settings.mode == "sample" else "samples no answers"
        raise RecipeError(f"judge: mode: {settings.mode} {wanted}; found base={context.inputs.get('base')}")
    if "constitution" in context.inputs and not settings.principles:
        raise RecipeError(f"judge: constitution={context.inputs['constitution']} is read with principles=true only")


def _give_principles(items: Sequence[PairItem], settings: JudgeStage, context: Context) -> list[PairItem]:
    """Each pair with a principle of its own as what it is judged by, where the settings say so."""
    if not settings.principles:
        return list(items)
    constitution, seed = load_constitution(context.inputs.get("constitution")), mix_seed(settings.seed, JUDGE)
    return [replace(item, criterion=constitution.draw(seed, i).compare) for i, item in enumerate(items)]


def _open_judge(settings: JudgeStage, context: Context, loaded: Base | None) -> Judge:
    source = context.inputs.get("judge")
    shared: Loaded | None = (loaded.model, loaded.tokenizer) if loaded is not None else None
    backend = open_backend(
        settings.judging.endpoint,
        source,
        role="judge",
        precision=settings.precision,
        replies=settings.replies or context.workdir.parent / BESIDE,
        progress=lambda done, total: context.report({"update": done, "num_updates": total, "what": "judge"}),
        loaded=shared,
    )
    return Judge(settings.judging, backend)


def _draw(records: Sequence[Any], settings: JudgeStage) -> list[Any]:
    """All records in their order, or as many as the settings say, drawn."""
    if not settings.num_prompts or settings.num_prompts >= len(records):
        return list(records)
    order = epoch_order(len(records), mix_seed(settings.seed, JUDGE), 0)[: settings.num_prompts]
    return [records[int(i)] for i in order]


def _draw_kept(records: Sequence[Any], settings: JudgeStage, ledger: Counter[str]) -> list[Any]:
    """`_draw` of what was left of a file; those left out were counted as read when they were met."""
    if settings.bad_records == "drop":
        ledger["read"] += len(records)
    return _draw(records, settings)


# ---- samples -------------------------------------------------------------------------------------------------------


def _read_or_sample(settings: JudgeStage, context: Context, ledger: Counter[str]) -> tuple[Samples, Base | None]:
    """The answers of `base`, from samples.jsonl where a killed run left it. The model is handed on where it is the
    judge too."""
    file = context.workdir / "samples.jsonl"
    is_judge = context.inputs.get("judge") == context.inputs["base"]
    prompts = _draw(read_prompt_messages(input_file(context, "data", "prompts.jsonl")), settings)
    if file.is_file():
        rows = list(read_back(file, ("prompt", "answers")))
        base = None
    else:
        base = load_base(context.inputs["base"])
        rows = _sample(settings, context, base, prompts)
        write_jsonl(file, rows)
    ledger["prompts"] = len(prompts)
    ledger["prompts_too_long"] = len(prompts) - len(rows)
    ledger["samples"] = sum(len(row["answers"]) for row in rows)
    return [(row["prompt"], row["answers"]) for row in rows], base if is_judge else None


def _sample(
    settings: JudgeStage, context: Context, base: Base, prompts: Sequence[list[Message]]
) -> list[dict[str, Any]]:
    seed = mix_seed(settings.seed, JUDGE)
    answered = answer_messages(settings, context, base, prompts, samples=settings.samples, seed=seed, what="sample")
    return [{"prompt": messages, "answers": answers} for messages, answers in answered]


def _grade_samples(
    settings: JudgeStage, context: Context, judge: Judge, samples: Samples, ledger: Counter[str]
) -> StageResult:
    """The best answer to a prompt over the worst, and every graded answer as feedback."""
    distinct = [(messages, distinct_answers(answers, ledger)) for messages, answers in samples]
    flat = [(messages, text) for messages, texts in distinct for text in texts]
    verdicts = _grade(judge, flat)
    grades = iter([unit_grade(verdict, settings.judging, ledger) for verdict in verdicts])
    _require_answers(settings, judge, ledger, len(flat), verdicts)
    pairs, feedback = [], []
    for index, (messages, texts) in enumerate(distinct):
        mine = {text: grade for text, grade in ((text, next(grades)) for text in texts) if grade is not None}
        rng = np.random.default_rng((mix_seed(settings.seed, JUDGE), index))
        found = pair_extremes(
            messages,
            mine,
            per_prompt=settings.pairs_per_prompt,
            margin=settings.margin,
            order=rng.permutation(len(mine)).tolist(),
        )
        ledger["prompts_without_pair"] += not found
        pairs += found
        feedback += [label_answer(messages, text, grade, settings.threshold) for text, grade in mine.items()]
    write_jsonl(context.workdir / "verdicts.jsonl", _grade_rows(flat, verdicts))
    _require_some(pairs, ledger, "no two answers to a prompt have different grades")
    write_jsonl(context.workdir / "preferences.jsonl", pairs)
    write_jsonl(context.workdir / "feedback.jsonl", feedback)
    summary = {"pairs": len(pairs), "answers": len(feedback), **_summarise_grades(judge, verdicts)}
    return StageResult(summary, ledger)


# ---- labels --------------------------------------------------------------------------------------------------------


def _rank_pairs(
    settings: JudgeStage,
    context: Context,
    judge: Judge,
    items: Sequence[PairItem],
    ledger: Counter[str],
    *,
    are_labelled: bool,
) -> StageResult:
    """Rank pairs; where they carry labels (answer_a is the chosen one), say how often the judge agrees."""
    different = [item for item in items if item.answer_a != item.answer_b]
    ledger["pairs"], ledger["equal"] = len(items), len(items) - len(different)
    if settings.by == "scores":
        rankings = rank_by_reward(build_judge_rewarder(judge.settings, judge.backend, judge.tally))(different)
    else:
        rankings = judge.rank(different)
    rows = keep_preferred(different, rankings, settings.margin, ledger)
    _require_answers(settings, judge, ledger, len(different), rankings)
    write_jsonl(context.workdir / "verdicts.jsonl", map(_pair_row, different, rankings))
    _require_some(rows, ledger, "the judge preferred no answer")
    write_jsonl(context.workdir / "preferences.jsonl", rows)
    summary: dict[str, Any] = {"pairs": len(rows)}
    if settings.by == "pairs":
        summary |= _summarise_bias(rankings)
    if are_labelled:
        shares = [ranking.preference for ranking in rankings if ranking.preference is not None]
        kept = [share for share in shares if abs(share - 0.5) > settings.margin]
        summary |= _interval("agreement", sum(share > 0.5 for share in kept), len(kept))
    return StageResult(summary, ledger)


def _relabel_answers(
    settings: JudgeStage, context: Context, judge: Judge, records: Sequence[Feedback], ledger: Counter[str]
) -> StageResult:
    """Grade judged answers anew, and say how often the judge agrees with the given labels."""
    flat = [(record.prompt, record.completion) for record in records]
    verdicts = _grade(judge, flat)
    ledger["answers"] = len(records)
    grades = [unit_grade(verdict, settings.judging, ledger) for verdict in verdicts]
    _require_answers(settings, judge, ledger, len(records), verdicts)
    rows, agree = [], 0
    for record, grade in zip(records, grades, strict=True):
        if grade is not None:
            rows.append(label_answer(record.prompt, record.completion, grade, settings.threshold))
            agree += rows[-1]["label"] == record.label
    write_jsonl(context.workdir / "verdicts.jsonl", _grade_rows(flat, verdicts))
    _require_some(rows, ledger, "the judge graded no answer")
    write_jsonl(context.workdir / "feedback.jsonl", rows)
    summary = {"answers": len(rows), **_interval("agreement", agree, len(rows)), **_summarise_grades(judge, verdicts)}
    return StageResult(summary, ledger)


def _grade(judge: Judge, flat: Sequence[tuple[list[Message], str]]) -> list[Verdict]:
    return judge.grade([RewardItem(messages, text, NO_TOKENS, NO_TOKENS) for messages, text in flat])


def _require_answers(
    settings: JudgeStage, judge: Judge, ledger: Counter[str], asked: int, found: Sequence[Verdict | Ranking]
) -> None:
    """Enter the votes. Too many questions, or votes, without a reply are an error: the labels would be those of the
    ones that went through."""
    tally = judge.tally.take()
    ledger.update(tally.counts)
    told: tuple[tuple[str, int, int, Sequence[tuple[str, str]]], ...] = (
        ("questions", asked, sum(ledger[status] for status in FAILED), [(f.status, f.note) for f in found]),
        ("votes", ledger["votes"], sum(ledger[f"votes_{status}"] for status in FAILED), tally.problems),
    )
    for what, total, failed, notes in told:
        if total and failed > settings.max_failed * total:
            note = next((note for status, note in notes if status in FAILED), "")
            raise UserError(
                f"judge: {failed} of {total} {what} have no reply ({note}); max_failed is {settings.max_failed:g}. "
                "Cure that and run the same command again: replies that came are kept"
            )


def _require_some(rows: Sequence[Any], ledger: Counter[str], problem: str) -> None:
    if not rows:
        counts = ", ".join(f"{name} {number}" for name, number in ledger.items() if number)
        raise DataError(
            f"judge: {problem} ({counts}); look at verdicts.jsonl, try the other verdict, another judge, more samples "
            "or a smaller margin"
        )


# ---- what is told --------------------------------------------------------------------------------------------------


def _summarise_bias(rankings: Sequence[Ranking]) -> dict[str, float]:
    bias = compute_position_bias(rankings)
    return {
        **_interval("first_position", bias.first, bias.verdicts),
        **_interval("inconsistent", bias.inconsistent, bias.pairs),
        **_mean("verdict_mass", [ranking.mass for ranking in rankings if ranking.mass is not None]),
    }


def _summarise_grades(judge: Judge, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    read = [(verdict.value, verdict.mass) for verdict in verdicts if verdict.value is not None]
    means = _mean("grade", [value for value, _ in read]) | _mean("verdict_mass", [mass for _, mass in read])
    return {"rubric": judge.settings.rubric, **means}


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.mean(values))} if values else {}


def _interval(name: str, count: int, total: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson) and what it is a share of; nothing where there is nothing."""
    if not total:
        return {}
    found = compute_wilson_interval(count, total)
    return {name: found.mean, f"{name}/low95": found.low95, f"{name}/high95": found.high95, f"{name}/of": total}


def _pair_row(item: PairItem, ranking: Ranking) -> dict[str, Any]:
    return {
        "prompt": list(item.messages),
        "answer_a": item.answer_a,
        "answer_b": item.answer_b,
        "status": ranking.status,
        "preference": ranking.preference,
        "first": list(ranking.first),
        "note": ranking.note,
        "said": list(ranking.said),
        **({"principle": item.criterion} if item.criterion else {}),
    }


def _grade_rows(flat: Sequence[tuple[list[Message], str]], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [
        {"prompt": m, "answer": text, "status": v.status, "grade": v.value, "note": v.note, "said": v.said}
        for (m, text), v in zip(flat, verdicts, strict=True)
    ]


STAGE = Stage(
    "judge",
    "produce",
    JudgeStage,
    run,
    inputs=("data",),
    optional_inputs=("judge", "base", "constitution"),
    version=3,
    summary="an AI judge's labels on pairs, on answers, or on a model's own samples (RLAIF)",
)
