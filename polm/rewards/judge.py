"""An AI judge: comparisons in both orders (a `Ranker`), and grades on a rubric (a `Rewarder`).

Whoever answers (`rewards/backends.py`), a verdict is read strictly. A reply without one is `unparsed`; a server that
fails is `error`, one that is too slow `timeout`. None of them says anything about an answer.

With `verdict: logprobs` nothing is written. A comparison is p(A) / (p(A) + p(B)); a grade is the expected value over
the grades' likelihoods, sum_i i p(i) / sum_i p(i) (Lee et al. 2023, arXiv 2309.00267, sections on AI preference labels
and on direct RLAIF, whose rewards are normalised to [-1, 1]: `grade_range: signed`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from polm.recipe_judge import JudgeSettings
from polm.rewards.backends import Backend, Reply, Request
from polm.rewards.base import Reward, Rewarder, RewardItem, Tally
from polm.rewards.judge_prompts import build_question, read_grade, read_preference
from polm.rewards.rank import REWARD_STATUSES, PairItem, Ranker, Ranking

VerdictStatus = Literal["read", "unparsed", "timeout", "error"]
MAX_NOTE = 200
# From a reply to a value (None: no verdict in it) and the probability of all verdicts.
Read = Callable[[Reply], tuple[float | None, float]]


@dataclass(frozen=True)
class Verdict:
    """What the votes on one question say on average: a preference for the first answer, or a grade. `mass` is the
    probability that all verdicts together have (1 for a written one): near 0, the judge meant to say something else.
    `said` is the text of the first vote, `note` says which votes could not be read."""

    value: float | None
    status: VerdictStatus
    note: str = ""
    mass: float = 1.0
    said: str = ""


@dataclass(frozen=True)
class Judge:
    """A backend with the questions that it is asked. With several votes on each, `tally` counts them: `votes`, and of
    these `votes_unparsed`, `votes_timeout` and `votes_error`, which are in no mean."""

    settings: JudgeSettings
    backend: Backend
    tally: Tally = field(default_factory=Tally, compare=False)

    def rank(self, items: Sequence[PairItem]) -> list[Ranking]:
        """Each pair in both orders."""
        return [combine_orders(*pair, self.settings.orders) for pair in self.compare(items)]

    def compare(self, items: Sequence[PairItem]) -> list[tuple[Verdict, Verdict]]:
        """The verdicts on (a, b) and on (b, a); each value is the preference for the answer that was shown first."""
        questions = [self._pair_question(item, swapped) for item in items for swapped in (False, True)]
        verdicts = self._ask(questions, ("A", "B"), _read_pair)
        return list(zip(verdicts[::2], verdicts[1::2], strict=True))

    def grade(self, items: Sequence[RewardItem]) -> list[Verdict]:
        """A grade of the scale for each answer."""
        low, high = self.settings.scale
        questions = [self._score_question(item) for item in items]
        options = tuple(str(grade) for grade in range(low, high + 1))
        return self._ask(questions, options, self._read_score)

    def _pair_question(self, item: PairItem, swapped: bool) -> str:
        first, second = (item.answer_b, item.answer_a) if swapped else (item.answer_a, item.answer_b)
        s = self.settings
        texts = {"answer_a": first, "answer_b": second}
        criterion = item.criterion or s.criterion
        return build_question(s.pair_prompt or "", item.messages, texts, criterion=criterion, scale=s.scale)

    def _score_question(self, item: RewardItem) -> str:
        s = self.settings
        texts = {"answer": item.completion}
        return build_question(s.score_prompt or "", item.messages, texts, criterion=s.criterion, scale=s.scale)

    def _ask(self, questions: Sequence[str], options: tuple[str, ...], read: Read) -> list[Verdict]:
        s = self.settings
        requests = [
            Request(
                messages=({"role": "user", "content": question},),
                max_new_tokens=s.max_new_tokens,
                temperature=s.temperature,
                seed=vote,
                options=options if s.verdict == "logprobs" else (),
            )
            for question in questions
            for vote in range(s.votes)
        ]
        votes = [_read_reply(reply, read) for reply in self.backend.ask(requests)]
        if s.votes > 1:
            self._count_votes(votes)
        return [average_votes(votes[i : i + s.votes]) for i in range(0, len(votes), s.votes)]

    def _count_votes(self, votes: Sequence[Verdict]) -> None:
        self.tally.add("votes", len(votes))
        lost: dict[str, list[str]] = {}
        for vote in votes:
            if vote.value is None:
                lost.setdefault(vote.status, []).append(vote.note)
        for status, notes in sorted(lost.items()):
            self.tally.add(f"votes_{status}", len(notes))
            self.tally.problems.append((status, f"{len(notes)} of {len(votes)} votes, the first: {notes[0]}"))

    def _read_score(self, reply: Reply) -> tuple[float | None, float]:
        if reply.logprobs:
            low, high = self.settings.scale
            return compute_expected(reply.logprobs, range(low, high + 1))
        return read_grade(reply.text, self.settings.scale), 1.0


def _read_pair(reply: Reply) -> tuple[float | None, float]:
    if reply.logprobs:
        return compute_expected(reply.logprobs, (1.0, 0.0))
    return read_preference(reply.text), 1.0


def compute_expected(logprobs: Sequence[float], values: Sequence[float]) -> tuple[float | None, float]:
    """(sum_i v_i p_i / sum_i p_i, sum_i p_i); None where no value has a likelihood."""
    top = max(logprobs)
    if not top > -math.inf:
        return None, 0.0
    shares = [math.exp(logprob - top) for logprob in logprobs]
    mean = sum(v * p for v, p in zip(values, shares, strict=True)) / sum(shares)
    return mean, math.exp(top) * sum(shares)


def _read_reply(reply: Reply, read: Read) -> Verdict:
    if reply.status != "answered":
        return Verdict(None, reply.status, reply.note[:MAX_NOTE])
    value, mass = read(reply)
    if value is None:
        return Verdict(None, "unparsed", f"no verdict in: {reply.text.strip()[-MAX_NOTE:]}", mass, reply.text)
    return Verdict(value, "read", mass=mass, said=reply.text)


def average_votes(votes: Sequence[Verdict]) -> Verdict:
    """The mean of the votes that could be read; without any, the first failure."""
    values = [(vote.value, vote.mass) for vote in votes if vote.value is not None]
    if not values:
        return votes[0]
    mean, mass = (sum(part) / len(values) for part in zip(*values, strict=True))
    lost = Counter(vote.status for vote in votes if vote.value is None)
    words = ", ".join(f"{number} {status}" for status, number in sorted(lost.items()))
    note = f"of {len(votes)} votes {words}" if lost else ""
    return Verdict(mean, "read", note, mass, votes[0].said)


def combine_orders(shown: Verdict, swapped: Verdict, orders: Literal["mean", "agree"]) -> Ranking:
    """From the preference for the answer shown first, in both orders, to the preference for answer_a.

    `mean`: the mean of both. `agree`: the same where both prefer the same answer (or both tie), else `inconsistent`.
    An order without a verdict leaves the pair without one.
    """
    first = (shown.value, swapped.value)
    said = (shown.said, swapped.said)
    if shown.value is None or swapped.value is None:
        failed = shown if shown.value is None else swapped
        assert failed.status != "read"
        return Ranking(None, failed.status, failed.note, first, said)
    a_first, a_second = shown.value, 1.0 - swapped.value
    same = (a_first - 0.5) * (a_second - 0.5) > 0 or a_first == a_second == 0.5
    if orders == "agree" and not same:
        return Ranking(None, "inconsistent", f"{a_first:.3f} shown first, {a_second:.3f} shown second", first, said)
    mass = (shown.mass + swapped.mass) / 2
    note = "; ".join(filter(None, (shown.note, swapped.note)))
    return Ranking((a_first + a_second) / 2, "ranked", note, first, said, mass)


def scale_grade(grade: float, scale: tuple[int, int], grade_range: Literal["unit", "signed", "raw"]) -> float:
    """A grade as a reward: raw, from 0 to 1, or from -1 to 1."""
    if grade_range == "raw":
        return grade
    share = (grade - scale[0]) / (scale[1] - scale[0])
    return share if grade_range == "unit" else 2.0 * share - 1.0


def build_ranker(settings: JudgeSettings, backend: Backend) -> Ranker:
    """A ranker of pairs, each judged in both orders."""
    return Judge(settings, backend).rank


def build_judge_rewarder(settings: JudgeSettings, backend: Backend, tally: Tally | None = None) -> Rewarder:
    """A rewarder whose values are grades. An answer without one has no value: the judge failed, not the answer. `tally`
    takes up its votes."""
    judge = Judge(settings, backend, Tally() if tally is None else tally)

    def reward(items: Sequence[RewardItem]) -> list[Reward]:
        out = []
        for verdict in judge.grade(items):
            if verdict.value is not None:
                value = scale_grade(verdict.value, settings.scale, settings.grade_range)
                words = f"{verdict.value:.3g} of {settings.scale[1]}"
                out.append(Reward(value, "scored", f"{words} ({verdict.note})" if verdict.note else words))
            else:
                assert verdict.status != "read"
                out.append(Reward(None, REWARD_STATUSES[verdict.status], verdict.note))
        return out

    return reward
