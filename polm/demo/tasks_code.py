"""Code-like tasks: bits and code."""

from __future__ import annotations

from random import Random

from polm.demo.pen import Pen

BIT_OPERATORS = {
    "and": lambda left, right: left & right,
    "or": lambda left, right: left | right,
    "xor": lambda left, right: left ^ right,
}
VARIABLES = ("x", "y", "z")
MAX_VALUE = 20


def ask_bits(rng: Random) -> str:
    left, right = (f"{rng.randrange(2**6):06b}" for _ in range(2))
    return f"bits {left} {rng.choice(list(BIT_OPERATORS))} {right} in decimal ."


def work_bits(prompt: str, pen: Pen) -> tuple[str, str]:
    """`bits 1011 xor 0110 in decimal .` -> `1101 : 1 , 3 , 6 , 13`, `13`: the bits, then their value from the left."""
    _, left, operator, right, *_ = prompt.split()
    operator = pen.choose(operator, [other for other in BIT_OPERATORS if other != operator])
    bits: list[int] = []
    for left_bit, right_bit in zip(left, right, strict=True):
        bit = BIT_OPERATORS[operator](int(left_bit), int(right_bit))
        bits.append(pen.choose(bit, [1 - bit]))
    value = 0
    values: list[int] = []
    for bit in bits:
        value = pen.number(2 * value + bit)
        values.append(value)
    steps = f"{''.join(str(bit) for bit in bits)} : {' , '.join(str(value) for value in values)}"
    return steps, str(value)


def _calculate(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def ask_code(rng: Random) -> str:
    """Two variables are set, then two or three statements compute; one of the computed variables is printed."""
    names = rng.sample(VARIABLES, 2)
    values = {name: rng.randint(2, 9) for name in names}
    lines = [f"{name} = {value}" for name, value in values.items()]
    num_lines = len(lines) + rng.randint(1, 2)
    targets: list[str] = []
    while len(lines) < num_lines:
        target = rng.choice(VARIABLES)
        left, operator = rng.choice(list(values)), rng.choice("+-*")
        # Only constants are subtracted, so a value that slips upwards can never make a later one negative.
        right = rng.choice(list(values)) if operator == "+" and rng.random() < 0.5 else str(rng.randint(2, 9))
        value = _calculate(values[left], operator, values[right] if right in values else int(right))
        if 0 <= value <= MAX_VALUE:
            values[target] = value
            targets.append(target)
            lines.append(f"{target} = {left} {operator} {right}")
    return f"code {' ; '.join(lines)} ; print {rng.choice(targets)} ."


def work_code(prompt: str, pen: Pen) -> tuple[str, str]:
    """`code x = 4 ; y = x + 3 ; print y .` -> `y = 4 + 3 = 7`, `7`: the trace of what is computed, with values put in."""
    *lines, last_line = prompt.removeprefix("code ").removesuffix(" .").split(" ; ")
    values: dict[str, int] = {}
    steps: list[str] = []
    for line in lines:
        target, _, left, *rest = line.split()
        if not rest:
            values[target] = int(left)
            continue
        operator, right = rest
        left_value = values[left]
        right_value = values[right] if right in values else int(right)
        operator = pen.choose(operator, [other for other in "+-*" if other != operator])
        values[target] = pen.number(_calculate(left_value, operator, right_value))
        steps.append(f"{target} = {left_value} {operator} {right_value} = {values[target]}")
    return " ; ".join(steps), str(values[last_line.split()[1]])
