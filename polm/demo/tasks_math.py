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
    return f"add {rng.randint(10, 999)} and {rng.randint(10, 99)} ."


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
    small = rng.randint(10, 99)
    return f"subtract {small} from {rng.randint(small, 199)} ."


def work_sub(prompt: str, pen: Pen) -> tuple[str, str]:
    """`subtract 85 from 142 .` -> `12 - 5 = 7 , 14 - 8 - 1 = 5`, `57`."""
    small, large = read_numbers(prompt)
    borrow = int(large % 10 < small % 10)
    upper = large % 10 + 10 * borrow
    units = pen.number(upper - small % 10, high=9)
    steps = [f"{upper} - {small % 10} = {units}"]
    borrow = pen.choose(borrow, [0] if borrow else [])
    tens = pen.number(large // 10 - small // 10 - borrow)
    steps.append(f"{large // 10} - {small // 10}{' - 1' * borrow} = {tens}")
    return " , ".join(steps), _join([units], tens)


def ask_mul(rng: Random) -> str:
    return f"multiply {rng.randint(100, 999)} by {rng.randint(2, 9)} ."


def work_mul(prompt: str, pen: Pen) -> tuple[str, str]:
    """`multiply 347 by 6 .` -> `7 * 6 = 42 , 4 * 6 + 4 = 28 , 3 * 6 + 2 = 20`, `2082`."""
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
