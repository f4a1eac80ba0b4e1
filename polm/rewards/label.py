"""From verdicts to training data: pairs among sampled answers, the better answer of a pair, labels of single answers.

What is dropped on the way is counted in the ledger by its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import numpy as np

from polm.data.records import Feedback, Message, Preference, Row, build_row
from polm.recipe_judge import JudgeSettings
from polm.rewards.judge import Verdict, scale_grade
from polm.rewards.rank import PairItem, Ranking

Ledger = MutableMapping[str, int]
Samples = Sequence[tuple[list[Message], Sequence[str]]]  # prompts with their answers


def distinct_answers(answers: Sequence[str], ledger: Ledger) -> list[str]:
    """Each text once, in the order of their first coming; blank ones are no answers."""
    kept = list(dict.fromkeys(text for text in answers if text.strip()))
    blank = sum(not text.strip() for text in answers)
    ledger["answers_empty"] = ledger.get("answers_empty", 0) + blank
    ledger["answers_equal"] = ledger.get("answers_equal", 0) + len(answers) - blank - len(kept)
    return kept


def draw_pairs(samples: Samples, per_prompt: int, seed: int, ledger: Ledger) -> list[PairItem]:
    """Up to `per_prompt` pairs of distinct answers to each prompt; no answer stands in two of them."""
    items = []
    for index, (messages, answers) in enumerate(samples):
        texts = distinct_answers(answers, ledger)
        order = np.random.default_rng((seed, index)).permutation(len(texts))
        mine = [texts[i] for i in order]
        pairs = list(zip(mine[::2], mine[1::2], strict=False))[:per_prompt]
        ledger["prompts_without_pair"] = ledger.get("prompts_without_pair", 0) + (not pairs)
        items += [PairItem(messages, a, b) for a, b in pairs]
    return items


def keep_preferred(items: Sequence[PairItem], rankings: Sequence[Ranking], margin: float, ledger: Ledger) -> list[Row]:
    """Rows of preferences.jsonl, with the judge's `probability` that the chosen answer is the better one.

    A preference within `margin` of 0.5 is a tie. Counts `preferred`, `tied` and the statuses without a preference.
    """
    rows = []
    for item, ranking in zip(items, rankings, strict=True):
        if ranking.preference is None:
            _count(ledger, ranking.status)
            continue
        if abs(ranking.preference - 0.5) <= margin:
            _count(ledger, "tied")
            continue
        _count(ledger, "preferred")
        is_a = ranking.preference > 0.5
        chosen, rejected = (item.answer_a, item.answer_b) if is_a else (item.answer_b, item.answer_a)
        probability = ranking.preference if is_a else 1.0 - ranking.preference
        row = build_row(Preference(list(map(dict, item.messages)), chosen, rejected))
        rows.append({**row, "probability": round(probability, 6)})
    return rows


def pair_extremes(
    messages: list[Message],
    grades: Mapping[str, float],
    *,
    per_prompt: int,
    margin: float,
    order: Sequence[int],
) -> list[Row]:
    """The best answer over the worst, the second best over the second worst, and so on, where the grades (0 to 1)
    differ by more than `margin`. `order` is a permutation: which one comes first among equal grades."""
    texts = list(grades)
    ranked = sorted((texts[i] for i in order), key=lambda text: -grades[text])
    rows = []
    for best, worst in list(zip(ranked, reversed(ranked), strict=True))[: min(per_prompt, len(ranked) // 2)]:
        if grades[best] - grades[worst] > margin:
            row = build_row(Preference(messages, best, worst))
            rows.append({**row, "grades": [round(grades[best], 6), round(grades[worst], 6)]})
    return rows


def label_answer(messages: list[Message], answer: str, grade: float, threshold: float) -> Row:
    """A row of feedback.jsonl: an answer whose grade (0 to 1) is above the threshold is a good one."""
    return {**build_row(Feedback(messages, answer, grade > threshold)), "grade": round(grade, 6)}


def unit_grade(verdict: Verdict, settings: JudgeSettings, ledger: Ledger) -> float | None:
    """A grade from 0 to 1, or None; counts `graded` and the statuses without a grade."""
    _count(ledger, "graded" if verdict.value is not None else verdict.status)
    return None if verdict.value is None else scale_grade(verdict.value, settings.scale, "unit")


def _count(ledger: Ledger, name: str) -> None:
    ledger[name] = ledger.get(name, 0) + 1
