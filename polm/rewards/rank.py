"""Which of two answers is better: one protocol for judges, reward models and whatever else compares.

A pair that could not be judged has no preference: it counts for neither answer, and whoever reads rankings leaves it
out and counts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from polm.rewards.base import Reward, Rewarder, RewardItem, RewardStatus
from polm.tokens import Array

RankStatus = Literal["ranked", "inconsistent", "unparsed", "timeout", "error"]
# A missing reward as a missing ranking; and a missing ranking, or verdict, as a missing reward.
FAILURES: Mapping[RewardStatus, RankStatus] = {
    **{"timeout": "timeout", "error": "error", "inconsistent": "inconsistent"},
    **{"nonsense": "unparsed", "unparsed": "unparsed"},
}
REWARD_STATUSES: Mapping[RankStatus, RewardStatus] = {
    **{"timeout": "timeout", "error": "error", "inconsistent": "inconsistent"},
    "unparsed": "nonsense",
}
NO_TOKENS: Array = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class PairItem:
    """Two answers to the same messages. `fields` is the prompt's row; tokens, int64 [n], are what a policy read and
    wrote, for rankers that need them. `criterion` replaces the judge's own for this pair."""

    messages: Sequence[Mapping[str, Any]]
    answer_a: str
    answer_b: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    prompt_tokens: Array = field(default_factory=lambda: NO_TOKENS)
    tokens_a: Array = field(default_factory=lambda: NO_TOKENS)
    tokens_b: Array = field(default_factory=lambda: NO_TOKENS)
    criterion: str = ""


@dataclass(frozen=True)
class Ranking:
    """`preference` in [0, 1] is how probable it is that answer_a is better (0.5: a tie); None unless the status is
    `ranked`. `first` says, for (a, b) and for (b, a), how strongly the answer shown first was preferred; None where
    an order has no verdict. `said` is what a judge wrote in each order, `mass` the probability that it gave to all
    verdicts together (None where rewards were compared)."""

    preference: float | None
    status: RankStatus
    note: str = ""
    first: tuple[float | None, float | None] = (None, None)
    said: tuple[str, ...] = ()
    mass: float | None = None

    def __post_init__(self) -> None:
        assert (self.preference is None) == (self.status != "ranked"), self


class Ranker(Protocol):
    """Rankings of many pairs at once, in the order of `items`; never raises for what a model wrote."""

    def __call__(self, items: Sequence[PairItem]) -> list[Ranking]: ...


@dataclass(frozen=True)
class PositionBias:
    """How a judge treats the answer that it is shown first, over the pairs with verdicts in both orders.

    verdicts       verdicts that prefer one answer, of both orders
    first          of these, those that prefer the answer shown first; half of them for a judge without a bias
    pairs          pairs with verdicts in both orders
    inconsistent   of these, those whose two verdicts prefer different answers
    """

    verdicts: int
    first: int
    pairs: int
    inconsistent: int


def compute_position_bias(rankings: Sequence[Ranking]) -> PositionBias:
    """Counts over rankings whose two orders both have a verdict."""
    both = [(p, q) for p, q in (ranking.first for ranking in rankings) if p is not None and q is not None]
    shares = [value for pair in both for value in pair if value != 0.5]
    # In both orders the same place won: the two verdicts prefer different answers.
    inconsistent = sum((p - 0.5) * (q - 0.5) > 0 for p, q in both)
    return PositionBias(len(shares), sum(value > 0.5 for value in shares), len(both), inconsistent)


def rank_by_reward(rewarder: Rewarder, *, temperature: float = 0.0) -> Ranker:
    """A ranker that compares rewards: the higher one wins, equal ones tie. With a temperature above 0 the preference
    is sigma((reward_a - reward_b) / temperature) (Bradley and Terry 1952)."""

    def rank(items: Sequence[PairItem]) -> list[Ranking]:
        sides = [_side(item, is_a) for item in items for is_a in (True, False)]
        rewards = rewarder(sides)
        out = []
        for a, b in zip(rewards[::2], rewards[1::2], strict=True):
            if a.value is None or b.value is None:
                failed = a if a.value is None else b
                out.append(Ranking(None, FAILURES[failed.status], failed.note))
            else:
                out.append(Ranking(compute_preference(a.value - b.value, temperature), "ranked"))
        return out

    return rank


def reward_by_rank(ranker: Ranker, size: int) -> Rewarder:
    """Rewards from comparisons, for answers that come in groups of `size` (even): in each, answer i meets answer
    i + size / 2. The preference for it is its reward, the rest up to 1 the other's; without one both are unjudged."""
    half = size // 2

    def judge(items: Sequence[RewardItem]) -> list[Reward]:
        places = [start + i for start in range(0, len(items), size) for i in range(half)]
        pairs = [(items[i], items[i + half]) for i in places]
        rankings = ranker([_meet(one, other) for one, other in pairs])
        rewards: dict[int, Reward] = {}
        for i, ranking in zip(places, rankings, strict=True):
            if ranking.preference is None:
                failed = Reward(None, REWARD_STATUSES[ranking.status], ranking.note or ranking.status)
                rewards[i] = rewards[i + half] = failed
            else:
                rewards[i] = Reward(ranking.preference, "scored", ranking.note)
                rewards[i + half] = Reward(1.0 - ranking.preference, "scored", ranking.note)
        return [rewards[i] for i in range(len(items))]

    return judge


def _meet(one: RewardItem, other: RewardItem) -> PairItem:
    return PairItem(
        one.messages,
        one.completion,
        other.completion,
        one.fields,
        one.prompt_tokens,
        one.completion_tokens,
        other.completion_tokens,
    )


def compute_preference(difference: float, temperature: float) -> float:
    """Probability that the first of two rewards is the better one, from their difference."""
    if temperature > 0:
        return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, difference / temperature))))
    return 0.5 if difference == 0 else float(difference > 0)


def _side(item: PairItem, is_a: bool) -> RewardItem:
    text, tokens = (item.answer_a, item.tokens_a) if is_a else (item.answer_b, item.tokens_b)
    return RewardItem(item.messages, text, item.prompt_tokens, tokens, item.fields)
