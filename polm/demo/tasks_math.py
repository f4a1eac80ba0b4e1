"""Column arithmetic: add, sub, mul.

The columns are worked from the right, each as one small sum, so that no step needs more than a table of
one-digit facts. A carry is not announced: it is the extra `+ 1` (or `- 1`) of the next column.
"""

from __future__ import annotations

from random import Random

from polm.demo.pen import Pen, read_numbers


def _split(number: int) -> list[int]:
    """Return the decimal digits, units first."""
    return [int(digit) for digit in reversed(str(number))]


def _join(low_digits: list[int], top: int) -> str:
    """Return the number with `top` in and above its highest column and `low_digits`, units first, below it."""
    return str(int(str(top) + "".join(str(digit) for digit in reversed(low_digits))))


def _carry(result: int, pen: Pen) -> int:
    """Return what a column hands to the next one. The slip is to forget it; without a carry nothing is forgotten."""
    return pen.choose(result // 10, [0] if result >= 10 else [])


def ask_add(rng: Random) -> str:
    return f"add {rng.randint(100, 999)} and {rng.randint(10, 99)} ."


def work_add(prompt: str, pen: Pen) -> tuple[str, str]:
    """`add 147 and 85 .` -> `7 + 5 = 12 , 4 + 8 + 1 = 13 , 1 + 1 = 2`, `232`."""
    upper, lower = (_split(number) for number in read_numbers(prompt))
    steps: list[str] = []
    results: list[int] = []
    carry = 0
    for column, digit in enumerate(upper):
        terms = [digit, *lower[column : column + 1], *([carry] if carry else [])]
        result = pen.number(sum(terms))
        results.append(result)
        steps.append(" + ".join(map(str, terms)) + f" = {result}" if len(terms) > 1 else f"{result}")
        if column < len(upper) - 1:
            carry = _carry(result, pen)
    return " , ".join(steps), _join([result % 10 for result in results[:-1]], results[-1])


def ask_sub(rng: Random) -> str:
    return f"subtract {rng.randint(10, 99)} from {rng.randint(100, 999)} ."


def work_sub(prompt: str, pen: Pen) -> tuple[str, str]:
    """`subtract 85 from 342 .` -> `12 - 5 = 7 , 14 - 8 - 1 = 5 , 3 - 1 = 2`, `257`."""
    lower, upper = (_split(number) for number in read_numbers(prompt))
    *upper, hundreds = upper
    steps: list[str] = []
    low_digits: list[int] = []
    borrow = 0
    for top, bottom in zip(upper, lower, strict=True):
        has_to_borrow = top < bottom + borrow
        column = f"{top + 10 * has_to_borrow} - {bottom}" + " - 1" * borrow
        low_digits.append(pen.number(top + 10 * has_to_borrow - bottom - borrow, high=9))
        steps.append(f"{column} = {low_digits[-1]}")
        borrow = pen.choose(int(has_to_borrow), [0] if has_to_borrow else [])
    rest = pen.number(hundreds - borrow)
    steps.append(f"{hundreds} - 1 = {rest}" if borrow else f"{rest}")
    return " , ".join(steps), _join(low_digits, rest)


def ask_mul(rng: Random) -> str:
    return f"multiply {rng.randint(1000, 9999)} by {rng.randint(2, 4)} ."


def work_mul(prompt: str, pen: Pen) -> tuple[str, str]:
    """`multiply 4375 by 3 .` -> `5 * 3 = 15 , 7 * 3 + 1 = 22 , 3 * 3 + 2 = 11 , 4 * 3 + 1 = 13`, `13125`."""
    large, factor = read_numbers(prompt)
    digits = _split(large)
    steps: list[str] = []
    results: list[int] = []
    carry = 0
    for column, digit in enumerate(digits):
        result = pen.number(digit * factor + carry)
        results.append(result)
        steps.append(f"{digit} * {factor}{f' + {carry}' if carry else ''} = {result}")
        if column < len(digits) - 1:
            carry = _carry(result, pen)
    return " , ".join(steps), _join([result % 10 for result in results[:-1]], results[-1])
