"""Column arithmetic: add, sub, mul.

The columns are worked from the right, each as one small sum, so that no step needs more than a table of
one-digit facts. A carry is not announced: it is the extra `+ 1` (or `- 1`) of the next column.
"""

from __future__ import annotations

from random import Random

from polm.demo.pen import Pen


def read_numbers(prompt: str) -> list[int]:
    """Return all numbers of a prompt in reading order."""
    return [int(word) for word in prompt.split() if word.isdigit()]


def _digits(number: int) -> list[int]:
    """Return the decimal digits, units first."""
    return [int(digit) for digit in reversed(str(number))]


def _join(low_digits: list[int], top: int) -> str:
    """Return the number whose highest column holds `top` above `low_digits` (units first), without leading zeros."""
    return str(int(str(top) + "".join(str(digit) for digit in reversed(low_digits))))


def ask_add(rng: Random) -> str:
    return f"add {rng.randint(100, 999)} and {rng.randint(10, 99)} ."


def work_add(prompt: str, pen: Pen) -> tuple[str, str]:
    """`add 47 and 38 .` -> `7 + 8 = 15 , 4 + 3 + 1 = 8`, `85`."""
    upper, lower = (_digits(number) for number in read_numbers(prompt))
    steps: list[str] = []
    low_digits: list[int] = []
    carry, result = 0, 0
    num_columns = max(len(upper), len(lower))
    for column in range(num_columns):
        terms = [number[column] for number in (upper, lower) if column < len(number)] + [carry] * (carry > 0)
        result = pen.number(sum(terms))
        steps.append(" + ".join(str(term) for term in terms) + f" = {result}" if len(terms) > 1 else str(result))
        if column < num_columns - 1:
            low_digits.append(result % 10)
            # Forgetting a carry is the classic slip; without one there is nothing to forget.
            carry = pen.choose(result // 10, [0] if result >= 10 else [])
    return " , ".join(steps), _join(low_digits, result)


def ask_sub(rng: Random) -> str:
    return f"subtract {rng.randint(10, 99)} from {rng.randint(100, 999)} ."


def work_sub(prompt: str, pen: Pen) -> tuple[str, str]:
    """`subtract 85 from 342 .` -> `12 - 5 = 7 , 14 - 8 - 1 = 5 , 3 - 1 = 2`, `257`."""
    small, large = read_numbers(prompt)
    lower, upper = _digits(small), _digits(large)
    steps: list[str] = []
    low_digits: list[int] = []
    borrow = 0
    for top, bottom in zip(upper, lower, strict=False):
        next_borrow = int(top < bottom + borrow)
        top += 10 * next_borrow
        low_digits.append(pen.number(top - bottom - borrow, high=9))
        steps.append(f"{top} - {bottom}{' - 1' * borrow} = {low_digits[-1]}")
        borrow = pen.choose(next_borrow, [0] if next_borrow else [])
    top = large // 10 ** len(lower)
    rest = pen.number(top - borrow)
    steps.append(f"{top}{f' - 1 = {rest}' * borrow}" if borrow else str(rest))
    return " , ".join(steps), _join(low_digits, rest)


def ask_mul(rng: Random) -> str:
    return f"multiply {rng.randint(1000, 9999)} by {rng.randint(2, 4)} ."


def work_mul(prompt: str, pen: Pen) -> tuple[str, str]:
    """`multiply 4375 by 3 .` -> `5 * 3 = 15 , 7 * 3 + 1 = 22 , 3 * 3 + 2 = 11 , 4 * 3 + 1 = 13`, `13125`."""
    large, factor = read_numbers(prompt)
    columns = _digits(large)
    steps: list[str] = []
    low_digits: list[int] = []
    carry, result = 0, 0
    for index, digit in enumerate(columns):
        result = pen.number(digit * factor + carry)
        steps.append(f"{digit} * {factor}{f' + {carry}' if carry else ''} = {result}")
        if index < len(columns) - 1:
            low_digits.append(result % 10)
            carry = pen.choose(result // 10, [0] if result >= 10 else [])
    return " , ".join(steps), _join(low_digits, result)
