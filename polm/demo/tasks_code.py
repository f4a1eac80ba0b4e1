"""Code-like tasks: bits and code."""

from __future__ import annotations

import operator
from random import Random

from polm.demo.pen import Pen, write_list

BIT_OPERATORS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NUM_BITS = 6
VARIABLES = ("x", "y", "z")
MAX_VALUE = 20


def ask_bits(rng: Random) -> str:
    left, right = (f"{rng.randrange(2**NUM_BITS):0{NUM_BITS}b}" for _ in range(2))
    return f"bits {left} {rng.choice(list(BIT_OPERATORS))} {right} in decimal ."


def work_bits(prompt: str, pen: Pen) -> tuple[str, str]:
    """`bits 1011 xor 0110 in decimal .` -> `1101 : 1 , 3 , 6 , 13`, `13`: the bits, then their value from the left."""
    _, left, name, right, *_ = prompt.split()
    name = pen.choose(name, [other for other in BIT_OPERATORS if other != name])
    bits: list[int] = []
    for left_bit, right_bit in zip(left, right, strict=True):
        bit = BIT_OPERATORS[name](int(left_bit), int(right_bit))
        bits.append(pen.choose(bit, [1 - bit]))
    value = 0
    values: list[int] = []
    for bit in bits:
        value = pen.number(2 * value + bit)
        values.append(value)
    return f"{''.join(map(str, bits))} : {write_list(values)}", str(value)


def ask_code(rng: Random) -> str:
    """Two variables are set, one or two statements compute, and one of the computed variables is printed."""
    values = {name: rng.randint(2, 9) for name in rng.sample(VARIABLES, 2)}
    lines = [f"{name} = {value}" for name, value in values.items()]
    num_lines = len(lines) + rng.randint(1, 2)
    targets: list[str] = []
    while len(lines) < num_lines:
        target, left, sign = rng.choice(VARIABLES), rng.choice(list(values)), rng.choice(list(ARITHMETIC))
        # Only constants are subtracted, so a value that slips upwards can never make a later one negative.
        right = rng.choice(list(values)) if sign == "+" and rng.random() < 0.5 else str(rng.randint(2, 9))
        value = ARITHMETIC[sign](values[left], _read_operand(right, values))
        if 0 <= value <= MAX_VALUE:
            values[target] = value
            targets.append(target)
            lines.append(f"{target} = {left} {sign} {right}")
    return f"code {' ; '.join(lines)} ; print {rng.choice(targets)} ."


def work_code(prompt: str, pen: Pen) -> tuple[str, str]:
    """`code x = 4 ; y = 2 ; y = x + 3 ; print y .` -> `y = 4 + 3 = 7`, `7`: what is computed, with values put in."""
    *lines, last_line = prompt.removeprefix("code ").removesuffix(" .").split(" ; ")
    values: dict[str, int] = {}
    steps: list[str] = []
    for line in lines:
        target, _, left, *rest = line.split()
        if not rest:
            values[target] = int(left)
            continue
        sign, right = rest
        left_value, right_value = values[left], _read_operand(right, values)
        sign = pen.choose(sign, [other for other in ARITHMETIC if other != sign])
        values[target] = pen.number(ARITHMETIC[sign](left_value, right_value))
        steps.append(f"{target} = {left_value} {sign} {right_value} = {values[target]}")
    return " ; ".join(steps), str(values[last_line.removeprefix("print ")])


def _read_operand(word: str, values: dict[str, int]) -> int:
    return values[word] if word in values else int(word)
