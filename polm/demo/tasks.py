"""The ten tasks of the demo: what is asked, how it is solved, and how a solution goes wrong.

An item is one line of text. Its prompt says the task in words, its solution is a short chain of steps that
ends in `#### ANSWER`:

    add 47 and 38 .   steps 7 + 8 = 15 , 4 + 3 + 1 = 8 #### 85

Tokens are separated by single spaces, and two numbers never stand side by side, so that a tokenizer may
split numbers into digits and still be reversible. The answer is computed from the prompt alone: a prompt has
exactly one answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from polm.demo.pen import ANSWER_MARK, Pen, write_solution
from polm.demo.tasks_code import ask_bits, ask_code, work_bits, work_code
from polm.demo.tasks_math import ask_add, ask_mul, ask_sub, work_add, work_mul, work_sub
from polm.demo.tasks_reason import (
    ask_clock,
    ask_count,
    ask_max,
    ask_sort,
    ask_word,
    work_clock,
    work_count,
    work_max,
    work_sort,
    work_word,
)

MAX_CORRUPT_TRIES = 1000


@dataclass(frozen=True)
class Item:
    """One question with its worked solution. `solution` ends in `#### answer`."""

    task: str
    prompt: str
    solution: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A benchmark: `ask` draws a prompt, `work` solves it with a pen and returns (steps, answer)."""

    name: str
    group: str
    ask: Callable[[Random], str]
    work: Callable[[str, Pen], tuple[str, str]]

    def generate(self, rng: Random) -> Item:
        """Draw a prompt and solve it."""
        prompt = self.ask(rng)
        steps, answer = self.work(prompt, Pen())
        return Item(self.name, prompt, write_solution(steps, answer), answer)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add", "math", ask_add, work_add),
        Task("sub", "math", ask_sub, work_sub),
        Task("mul", "math", ask_mul, work_mul),
        Task("max", "reasoning", ask_max, work_max),
        Task("sort", "reasoning", ask_sort, work_sort),
        Task("count", "reasoning", ask_count, work_count),
        Task("clock", "reasoning", ask_clock, work_clock),
        Task("word", "reasoning", ask_word, work_word),
        Task("bits", "code", ask_bits, work_bits),
        Task("code", "code", ask_code, work_code),
    )
}


def build_direct_solution(solution: str) -> str:
    """Return a solution without its steps: `#### ANSWER`."""
    return solution[solution.rindex(ANSWER_MARK) :]


def corrupt(item: Item, rng: Random) -> str:
    """Return a solution of `item` with one slip in it that leads to a wrong final answer.

    The item is solved again with a pen that slips at a random place. Slips that heal (a wrong number in a
    line of code that is never used) or that leave the natural numbers are drawn anew.
    """
    task = TASKS[item.task]
    dry = Pen()
    task.work(item.prompt, dry)
    for _ in range(MAX_CORRUPT_TRIES):
        steps, answer = task.work(item.prompt, Pen(rng.randrange(dry.num_choices), rng))
        if answer != item.answer and not re.search(r"-\d", f"{steps} {answer}"):
            return write_solution(steps, answer)
    raise AssertionError(f"no slip changes the answer of {item.prompt!r}: the task {item.task!r} is at fault")
