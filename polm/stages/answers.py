"""Answers that a model writes to prompts, with their rewards: what the stages that make data of them share."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polm.data.packing import epoch_order, mix_seed
from polm.data.readers import Message, Prompt, read_back, read_prompts, write_json, write_jsonl
from polm.recipe import AnswerSettings
from polm.recipe_judge import ConstitutionStage, JudgeStage
from polm.rewards.base import Reward, Rewarder, Tally
from polm.rewards.selection import Answer
from polm.rollout.answers import sample_answers
from polm.stages.common import Base, Context, input_file
from polm.stages.rollouts import describe_problem, judge_completions, load_rewarder, require_room
from polm.text.chat import render_prompt

PART_ANSWERS = 2048  # answers drawn and judged at a time; a killed stage draws only the part anew that it was in
ROW = ("prompt", "answers")  # the columns of a part


def choose_prompts(settings: AnswerSettings, context: Context, seed: int) -> list[Prompt]:
    """`num_prompts` of prompts.jsonl (0 = all) in the order that `seed` gives.

    Answers and verifiers are asked of the prompts where the verifier is a source of the reward.
    """
    prompts = read_prompts(input_file(context, "data", "prompts.jsonl"), judged="verifier" in settings.reward)
    order = epoch_order(len(prompts), seed, 0)
    return [prompts[int(i)] for i in order[: settings.num_prompts or len(prompts)]]


def draw_answers(
    settings: AnswerSettings, context: Context, base: Base, prompts: Sequence[Prompt], seed: int
) -> tuple[list[Answer], Tally]:
    """`samples` judged answers of `base` to each prompt, in order; a function of the seed, if the rewarder is one. And
    what failed beside single answers.

    They are drawn in parts, each kept in the folder `answers` until `finish_answers`: a killed stage goes on there.
    """
    tally, total = Tally(), Tally()
    rewarder = load_rewarder(settings, context, base, tally)
    encoded = [render_prompt(base.tokenizer, [{"role": "user", "content": p.prompt}]) for p in prompts]
    require_room(encoded, base.max_positions)
    size = max(1, PART_ANSWERS // settings.samples)
    answers: list[Answer] = []
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        file = _folder(context) / f"{first:08d}.jsonl"
        if not file.is_file():
            report = _Progress(context, len(answers), len(prompts) * settings.samples)
            rows = _draw_part(settings, base, rewarder, prompts[part], encoded[part], mix_seed(seed, first), report)
            _write_tally(file, tally.take())  # before the rows: they say that the part is done
            write_jsonl(file, rows)
        answers += _read_part(file, first)
        total.merge(_read_tally(file))
    return answers, total


class _Progress:
    """Progress within a part as progress of the whole."""

    def __init__(self, context: Context, before: int, total: int):
        self.context, self.before, self.total = context, before, total

    def __call__(self, done: int, total: int) -> None:
        del total
        self.context.report({"update": self.before + done, "num_updates": self.total})


def _draw_part(
    settings: AnswerSettings,
    base: Base,
    rewarder: Rewarder,
    prompts: Sequence[Prompt],
    encoded: Sequence[Any],
    seed: int,
    report: _Progress,
) -> list[dict[str, Any]]:
    """One row a prompt, with all of its answers."""
    completions = sample_answers(
        base.model,
        base.tokenizer,
        encoded,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        samples=settings.samples,
        seed=seed,
        precision=settings.precision,
        progress=report,
    )
    rewards = judge_completions(rewarder, prompts, encoded, completions)
    rows: list[dict[str, Any]] = [{"prompt": p.prompt, "answers": []} for p in prompts]
    for completion, reward in zip(completions, rewards, strict=True):
        row = {"text": completion.text, "cut_off": completion.finish == "length"}
        row |= {"status": reward.status, "reward": reward.value} | ({"note": reward.note} if reward.note else {})
        rows[completion.prompt_index]["answers"].append(row)
    return rows


def _read_part(file: Path, first: int) -> Iterator[Answer]:
    for number, row in enumerate(read_back(file, ROW), start=first):
        for answer in row["answers"]:
            reward = Reward(answer["reward"], answer["status"], answer.get("note", ""))
            yield Answer(number, answer["text"], answer["cut_off"], reward)


def _write_tally(file: Path, tally: Tally) -> None:
    """Beside a part; no file where nothing failed."""
    beside = file.with_suffix(".json")
    if tally.counts or tally.problems:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside, {"counts": dict(tally.counts), "problems": tally.problems})
    else:
        beside.unlink(missing_ok=True)  # of a part that was killed


def _read_tally(file: Path) -> Tally:
    beside = file.with_suffix(".json")
    if not beside.is_file():
        return Tally()
    found = json.loads(beside.read_text(encoding="utf-8"))
    return Tally(Counter(found["counts"]), [(status, note) for status, note in found["problems"]])


def finish_answers(context: Context, tally: Tally) -> None:
    """All parts as one file, answers.jsonl, and what failed beside single answers, problems.jsonl; called when what is
    made of them has been written."""
    parts = sorted(_folder(context).glob("*.jsonl"))
    write_jsonl(context.workdir / "answers.jsonl", (row for part in parts for row in read_back(part, ROW)))
    if tally.problems:
        rows = (describe_problem(status, note) for status, note in tally.problems)
        write_jsonl(context.workdir / "problems.jsonl", rows)
    shutil.rmtree(_folder(context))


def _folder(context: Context) -> Path:
    return context.workdir / "answers"


def answer_messages(
    settings: JudgeStage | ConstitutionStage,
    context: Context,
    base: Base,
    prompts: Sequence[list[Message]],
    *,
    samples: int,
    seed: int,
    what: str,
) -> list[tuple[list[Message], list[str]]]:
    """(messages, the texts of so many answers) for every prompt that leaves room in the model's context."""
    encoded = [render_prompt(base.tokenizer, messages) for messages in prompts]
    fitting = [i for i, ids in enumerate(encoded) if len(ids) < base.max_positions]
    completions = sample_answers(
        base.model,
        base.tokenizer,
        [encoded[i] for i in fitting],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        samples=samples,
        seed=seed,
        precision=settings.precision,
        progress=lambda done, total: context.report({"update": done, "num_updates": total, "what": what}),
    )
    found: list[tuple[list[Message], list[str]]] = [(prompts[i], []) for i in fitting]
    for completion in completions:
        found[completion.prompt_index][1].append(completion.text)
    return found
