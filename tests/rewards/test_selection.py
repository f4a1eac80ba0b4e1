"""What is kept of sampled answers, by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from polm.rewards.base import Reward
from polm.rewards.selection import (
    Answer,
    accept_by_rejection,
    choose_best,
    choose_top_share,
    drop_unfit,
    drop_unpairable,
    pair_best_worst,
    pair_by_rounds,
)


def answer(prompt: int, text: str, reward: float | str, *, is_cut: bool = False) -> Answer:
    """A number is a score; a word is a status."""
    values = {"right": 1.0, "wrong": 0.0, "unparsed": 0.0}
    if isinstance(reward, str):
        return Answer(prompt, text, is_cut, Reward(values.get(reward), reward))  # type: ignore[arg-type]
    return Answer(prompt, text, is_cut, Reward(reward, "scored"))


def texts(answers: list[Answer]) -> str:
    return "".join(a.text for a in answers)


def test_every_answer_that_is_not_kept_has_one_reason() -> None:
    answers = [
        answer(0, "a", "right"),
        answer(0, "a", "right"),  # duplicate
        answer(0, "b", "wrong"),
        answer(0, "c", "unparsed"),
        Answer(0, "i", False, Reward(None, "unparsed")),  # a function returned None
        answer(0, "d", "timeout"),
        answer(0, "e", "error"),
        answer(0, "f", "right", is_cut=True),
        answer(0, " ", "right"),
        answer(1, "a", "right"),  # the same text to another prompt is no duplicate
        answer(1, "g", 0.4),
        answer(1, "h", 0.5),
    ]
    dropped: Counter[str] = Counter()
    fit = drop_unfit(answers, 0.5, dropped)
    assert [(a.prompt, a.text) for a in fit] == [(0, "a"), (1, "a"), (1, "h")]
    assert dropped == {
        **{"duplicate": 1, "wrong": 1, "unparsed": 1, "unjudged": 3, "cut_off": 1, "empty": 1},
        "below_min_reward": 1,
    }
    assert len(fit) + dropped.total() == len(answers)
    assert texts(drop_unfit(answers, None, Counter())) == "aagh"


def test_best_of_n() -> None:
    fit = [answer(0, "a", 0.2), answer(0, "b", 0.9), answer(0, "c", 0.9), answer(1, "d", -3.0)]
    assert texts(choose_best(fit, 1)) == "bd"  # of equal ones the earlier; low, but the best of its prompt
    assert texts(choose_best(fit, 2)) == "bcd"
    assert texts(choose_best(fit, 9)) == "bcad"
    assert choose_best([], 1) == []


def test_top_share_is_over_all_prompts() -> None:
    fit = [answer(0, "a", 0.2), answer(0, "b", 0.9), answer(1, "c", 0.2), answer(1, "d", 0.3)]
    assert texts(choose_top_share(fit, 0.25, 4)) == "b"
    assert texts(choose_top_share(fit, 0.26, 4)) == "bd"  # rounded up
    assert texts(choose_top_share(fit, 0.75, 4)) == "abd"  # of equal ones the earlier; in their own order
    assert texts(choose_top_share(fit, 0.5, 8)) == "abcd"  # of 8 judged ones 4 were fit
    assert texts(choose_top_share(fit, 0.3, 10)) == "abd"  # 0.3 * 10 is 3, also in binary


class Dice:
    """Numbers in a given order in place of random ones."""

    def __init__(self, *numbers: float):
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def accept(rewards: list[float], num: int, beta: float, *numbers: float) -> list[int]:
    dice = Dice(*numbers)
    found = accept_by_rejection(rewards, num, beta, dice)  # type: ignore[arg-type]
    assert dice.numbers == []  # every number was asked for
    return found


def test_rejection_sampling_by_hand() -> None:
    """Rewards 0, ln 2, ln 4 at beta 1: probabilities ¼, ½, 1 in the first round. Once the best is out, ½ and 1."""
    rewards = [0.0, math.log(2.0), math.log(4.0)]
    assert accept(rewards, 1, 1.0, 0.24) == [0]
    assert accept(rewards, 1, 1.0, 0.26, 0.49) == [1]
    assert accept(rewards, 1, 1.0, 0.26, 0.51, 0.99) == [2]
    assert accept(rewards, 2, 1.0, 0.26, 0.51, 0.99, 0.49) == [2, 0]
    assert accept(rewards, 2, 1.0, 0.26, 0.51, 0.99, 0.51, 0.99) == [2, 1]
    # beta 2 is the square root of each probability: ½ and 0.707.
    assert accept(rewards, 1, 2.0, 0.49) == [0]
    assert accept(rewards, 1, 2.0, 0.51, 0.70) == [1]
    # Fewer candidates than wanted: all of them, and an end.
    assert accept(rewards, 5, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9) == [2, 1, 0]
    assert accept_by_rejection([], 3, 1.0, np.random.default_rng(0)) == []


def test_rejection_sampling_draws_from_the_tilted_policy() -> None:
    """Many equal draws of two kinds of answer: the accepted ones have the odds exp(reward / beta), the law of the
    policy times exp(r / beta). 3000 of 12000 candidates, half of them with e^1 times the odds."""
    rng = np.random.default_rng(0)
    rewards = (rng.random(12000) < 0.5).astype(float)
    taken = [rewards[i] for i in accept_by_rejection(rewards.tolist(), 3000, 1.0, rng)]
    assert np.mean(taken) == pytest.approx(math.e / (1.0 + math.e), abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_ends_of_beta(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=20).tolist()
    best = sorted(range(20), key=lambda i: -rewards[i])[:4]
    assert accept_by_rejection(rewards, 4, 1e-6, rng) == best
    assert accept_by_rejection(rewards, 4, 1e9, rng) == [0, 1, 2, 3]


def test_who_may_stand_in_a_pair() -> None:
    dropped: Counter[str] = Counter()
    answers = [answer(0, "a", "right"), answer(0, "a", "right"), answer(0, "", "wrong"), answer(0, "b", "timeout")]
    assert texts(drop_unpairable([*answers, answer(0, "c", "unparsed")], dropped)) == "ac"
    assert dropped == {"duplicate": 1, "empty": 1, "unjudged": 1}


def test_best_over_worst() -> None:
    rng = np.random.default_rng(0)
    graded = [answer(0, text, value) for text, value in zip("abcde", (0.3, 0.9, 0.1, 0.5, 0.5), strict=True)]
    assert [texts(list(pair)) for pair in pair_best_worst(graded, 9, rng)][:1] == ["bc"]
    pairs = pair_best_worst(graded, 9, rng)
    assert [p[0].value > p[1].value for p in pairs] == [True] * 2
    assert (pairs[1][0].value, pairs[1][1].text) == (0.5, "a")
    assert len(pair_best_worst(graded, 1, rng)) == 1
    assert pair_best_worst([answer(0, "a", 0.5), answer(0, "b", 0.5)], 1, rng) == []


def test_first_round_and_tournament() -> None:
    players = [answer(0, text, value) for text, value in zip("abcde", (0.3, 0.9, 0.1, 0.5, 0.5), strict=True)]
    for seed in range(20):
        first = pair_by_rounds(players, np.random.default_rng(seed), "first")
        assert len(first) in (1, 2)  # one fewer where the two equal ones met
        assert len({a.text for pair in first for a in pair}) == 2 * len(first)
        whole = pair_by_rounds(players, np.random.default_rng(seed), "all")
        assert whole[: len(first)] == first
        assert len(whole) in (3, 4)
        assert all(a.value > b.value for a, b in whole)
        assert whole[-1][0].text == "b"  # the best answer wins the tournament
        losers = [loser.text for _, loser in whole]
        assert len(set(losers)) == len(losers)  # each answer loses once at most
    assert len({str(pair_by_rounds(players, np.random.default_rng(s), "first")) for s in range(9)}) > 1
    assert pair_by_rounds(players[3:], np.random.default_rng(0), "all") == []  # a tie alone
