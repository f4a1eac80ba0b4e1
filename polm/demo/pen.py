"""What all tasks share: how a prompt is read and how a solution is written, rightly or with a slip.

Every task solves its own prompt step by step. Whatever it decides or computes on the way goes through a
`Pen`. An honest pen passes the right value on. A pen with a `slip_at` replaces exactly one value by a
plausible wrong one, and the task carries the mistake through to the end, as a pupil would. So one piece of
code writes both the correct and the corrupted solutions, and they look alike up to the slip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

# Stands between the steps and the final answer, as in GSM8K.
ANSWER_MARK = "####"

# Opens a solution that shows its steps. Without it the first token of the steps is itself a result, of which a
# young model is unsure; the answer mark then wins by default, and greedy decoding shows no steps at all.
STEPS_MARK = "steps"

# Off by one, off by two, and a lost or an extra ten: the mistakes people make.
SLIP_DISTANCES = (-10, -2, -1, 1, 2, 10)


class Pen:
    """Passes values on; the one numbered `slip_at` (from 0) is replaced by a wrong one drawn with `rng`."""

    def __init__(self, slip_at: int | None = None, rng: Random | None = None) -> None:
        self.slip_at = slip_at
        self.rng = rng if rng is not None else Random(0)
        self.num_choices = 0

    def choose(self, right: T, wrongs: Sequence[T]) -> T:
        """Return `right`, or one of `wrongs` when this is the choice to slip at. Without wrongs it is no choice."""
        if not wrongs:
            return right
        is_slip = self.num_choices == self.slip_at
        self.num_choices += 1
        return self.rng.choice(wrongs) if is_slip else right

    def number(self, right: int, low: int = 0, high: int | None = None) -> int:
        """Return the number `right`, or, when slipping, a near one within `low` to `high` (both included)."""
        near = [right + distance for distance in SLIP_DISTANCES]
        return self.choose(right, [x for x in near if x >= low and (high is None or x <= high)])


def read_numbers(prompt: str) -> list[int]:
    """Return all numbers of a prompt in reading order."""
    return [int(word) for word in prompt.split() if word.isdigit()]


def write_list(numbers: Iterable[int]) -> str:
    """Return numbers as text; the comma keeps neighbours apart when every digit becomes a token of its own."""
    return " , ".join(str(number) for number in numbers)


def write_solution(steps: str, answer: str) -> str:
    """Return the text of a step-by-step solution."""
    return f"{STEPS_MARK} {steps} {ANSWER_MARK} {answer}"
