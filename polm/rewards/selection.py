"""Which of a prompt's sampled answers are kept, and which are set against each other: pure functions over rewards.

An answer that could not be judged (it has no value) is never chosen, for either side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from polm.rewards.base import Reward


@dataclass(frozen=True)
class Answer:
    """One sampled answer to prompt number `prompt`. `is_cut`: it hit the length limit, so it has no end of its own."""

    prompt: int
    text: str
    is_cut: bool
    reward: Reward

    @property
    def value(self) -> float:
        """The reward of an answer that was judged."""
        assert self.reward.value is not None
        return self.reward.value


# ---- answers to learn from -----------------------------------------------------------------------------------------


def drop_unfit(answers: Iterable[Answer], min_reward: float | None, dropped: Counter[str]) -> list[Answer]:
    """The distinct answers worth imitating, in order; each other one is counted under its first reason."""
    seen: set[tuple[int, str]] = set()
    fit = []
    for answer in answers:
        if not answer.reward.is_judged:
            reason = "unjudged"
        elif answer.reward.status in ("wrong", "unparsed"):
            reason = answer.reward.status
        elif answer.is_cut:  # to train on it would teach that an answer ends there
            reason = "cut_off"
        elif not answer.text.strip():
            reason = "empty"
        elif (answer.prompt, answer.text) in seen:
            reason = "duplicate"
        elif min_reward is not None and answer.value < min_reward:
            reason = "below_min_reward"
        else:
            seen.add((answer.prompt, answer.text))
            fit.append(answer)
            continue
        dropped[reason] += 1
    return fit


def choose_best(fit: Sequence[Answer], per_prompt: int) -> list[Answer]:
    """The `per_prompt` answers of highest reward to each prompt, of equal ones the earlier; best of n is 1 of n.

    With rewards of right and wrong these are right answers, up to so many (RFT, arXiv 2308.01825); with a
    reward model and 1 it is RAFT's step (arXiv 2304.06767, algorithm 1).
    """
    kept = []
    for mine in group_by_prompt(fit):
        kept += sorted(mine, key=lambda answer: -answer.value)[:per_prompt]
    return kept


def choose_top_share(fit: Sequence[Answer], share: float, num_judged: int) -> list[Answer]:
    """The answers of highest reward over all prompts: `share` of the `num_judged` answers, rounded up; of equal ones
    the earlier. They come back in their order."""
    places = sorted(range(len(fit)), key=lambda i: -fit[i].value)[: math.ceil(share * num_judged - 1e-9)]
    return [fit[i] for i in sorted(places)]


def group_by_prompt(answers: Iterable[Answer]) -> Iterator[list[Answer]]:
    """The answers of one prompt after the other."""
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    yield from groups.values()


# ---- pairs ---------------------------------------------------------------------------------------------------------

Pair = tuple[Answer, Answer]  # (chosen, rejected), both to one prompt


def drop_unpairable(answers: Iterable[Answer], dropped: Counter[str]) -> list[Answer]:
    """The distinct answers that may stand in a pair, in order: judged, and not empty unless that is right."""
    seen: set[str] = set()
    fit = []
    for answer in answers:
        if not answer.reward.is_judged:
            dropped["unjudged"] += 1
        elif not answer.text.strip() and answer.reward.status != "right":
            dropped["empty"] += 1
        elif answer.text in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(answer.text)
            fit.append(answer)
    return fit


def pair_best_worst(answers: Sequence[Answer], num: int, rng: np.random.Generator) -> list[Pair]:
    """Up to `num` pairs of one prompt's distinct answers: the best over the worst, the next over the next, and so on
    while the rewards differ. `rng` says who comes first among equals."""
    levels = []
    for value in sorted({answer.value for answer in answers}, reverse=True):
        level = sorted((a for a in answers if a.value == value), key=lambda answer: answer.text)
        rng.shuffle(level)
        levels.append(level)
    down = [answer for level in levels for answer in level]
    up = [answer for level in reversed(levels) for answer in level]
    return [(a, b) for a, b in zip(down, up, strict=True) if a.value > b.value][:num]


def accept_by_rejection(rewards: Sequence[float], num: int, beta: float, rng: np.random.Generator) -> list[int]:
    """Statistical rejection sampling (RSO, arXiv 2309.06657, algorithm 1): indices of accepted candidates, in order.

    Candidates drawn from the policy become, approximately, draws from the policy times exp(reward / beta): each is
    accepted with probability exp((r - r_max) / beta), r_max the highest reward among those not accepted yet, in rounds
    over the rest until `num` are accepted or none is left. beta -> 0 takes the best, a large beta any.
    """
    accepted: list[int] = []
    rest = list(range(len(rewards)))
    while rest and len(accepted) < num:
        highest = max(rewards[i] for i in rest)
        left = []
        for i in rest:
            if len(accepted) < num and rng.random() < math.exp((rewards[i] - highest) / beta):
                accepted.append(i)
            else:
                left.append(i)
        rest = left
    return accepted


def pair_by_rounds(answers: Sequence[Answer], rng: np.random.Generator, ranking: Literal["first", "all"]) -> list[Pair]:
    """RSO's ranking (arXiv 2309.06657): answers are paired at random, the higher reward is chosen.

    `first` stops after one round (n // 2 pairs); `all` is the tournament, in which winners go on (n - 1 pairs). An odd
    answer goes on without a pair. Equal rewards give no pair; the first of the two goes on.
    """
    pairs: list[Pair] = []
    players = [answers[i] for i in rng.permutation(len(answers))]
    while len(players) > 1:
        winners = []
        for one, other in zip(players[::2], players[1::2], strict=False):
            winner, loser = (one, other) if one.value >= other.value else (other, one)
            if winner.value > loser.value:
                pairs.append((winner, loser))
            winners.append(winner)
        if len(players) % 2:
            winners.append(players[-1])
        if ranking == "first":
            break
        players = winners
    return pairs
