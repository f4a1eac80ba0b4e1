from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path

import pytest

from polm.text.arithmetic import (
    ArithmeticSyntaxError,
    evaluate,
    extract_numbers,
    format_expression,
    list_leaves,
    parse_expression,
)

REAL_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        (" 1 + 2 * 3 ", 7),
        ("( 1 + 2 ) * 3", 9),
        ("10 - 4 - 3", 3),
        ("24 / 4 / 3", 2),
        ("-2 * -3", 6),
        ("2 - -3", 5),
        ("--4", 4),
        ("-(1+2)", -3),
        ("1,200.5 + .5", 1201),
        ("20% * 50", 10),
        ("(10 + 40)% * 8", 4),
        ("-50%", -0.5),
        ("N0 + N1", 5),
        ("N1*N2-N0", 10),
        ("3.", 3),
    ],
)
def test_values(expression: str, value: float) -> None:
    assert evaluate(expression, [2, 3, 4]) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "expected a number, a variable or '\\('"),
        ("1 +", "found 'the end'"),
        ("1 2", "expected an operator at position 2, found '2'"),
        ("+ 1", "position 0, found '\\+'"),
        ("(1", "expected '\\)' at position 2"),
        ("1)", "found '\\)'"),
        ("7 % 2", "expected an operator"),
        ("N3", "N3 stands for nothing: 3 numbers are given"),
        ("N12", "cannot read 'N12'"),
        ("N0x", "cannot read"),
        ("n0", "cannot read"),
        ("2 ** 3", "found '\\*'"),
        ("2 ^ 3", "cannot read"),
        ("1e5", "cannot read 'e5'"),
        ("1,20", "cannot read ',20'"),
        ("__import__('os')", "cannot read"),
        ("1 / 0", "division by zero"),
        ("1 / (N0 - 2)", "division by zero"),
        ("1+" * 100 + "1", "201 characters; at most 200"),
        ("(" * 25 + "1" + ")" * 25, "more than 20 levels"),
        ("-" * 150 + "1", "more than 20 levels"),
        ("९", "cannot read"),
    ],
)
def test_refusals(expression: str, message: str) -> None:
    with pytest.raises(ArithmeticSyntaxError, match=message):
        evaluate(expression, [2, 3, 4])


def test_overflow_is_refused() -> None:
    assert evaluate("9" * 190 + "*" + "9" * 9) == pytest.approx(1e199)
    with pytest.raises(ArithmeticSyntaxError, match="not finite"):
        evaluate("N0 * N0", [1e200])
    with pytest.raises(ArithmeticSyntaxError, match="not finite"):
        evaluate("N0 - N0", [float("inf")])


def test_random_expressions_agree_with_python() -> None:
    """Expressions of our own making, so Python itself may serve as the reference here."""
    rng = random.Random(0)

    def grow(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(1, 9))
        inner = f"{grow(depth - 1)} {rng.choice('+-*/')} {grow(depth - 1)}"
        return f"({inner})" if rng.random() < 0.5 else f"-({inner})" if rng.random() < 0.2 else inner

    checked = 0
    for _ in range(300):
        expression = grow(4)
        if len(expression) > 200:
            continue
        exact = expression
        for digit in "123456789":
            exact = exact.replace(digit, f"Fraction({digit})")
        try:
            expected = float(eval(exact, {"Fraction": Fraction}))
        except ZeroDivisionError:
            continue
        try:
            value = evaluate(expression)
        except ArithmeticSyntaxError:  # floats may meet a zero that exact fractions do not
            continue
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9), expression
        checked += 1
    assert checked > 200


@pytest.mark.parametrize(
    ("expression", "written"),
    [
        ("((1+2))*3", "( 1 + 2 ) * 3"),
        ("(1*2)+(3/4)", "1 * 2 + 3 / 4"),
        ("1-(2-3)", "1 - ( 2 - 3 )"),
        ("(1-2)-3", "1 - 2 - 3"),
        ("N0/(N1*2)", "N0 / ( N1 * 2 )"),
        ("N0*(N1/2)", "N0 * N1 / 2"),
        ("1+(2-3)", "1 + 2 - 3"),
        ("-N0", "0 - N0"),
        ("25% * N0", "25 / 100 * N0"),
        ("2.50", "2.5"),
    ],
)
def test_writing_keeps_the_value(expression: str, written: str) -> None:
    tree = parse_expression(expression)
    assert format_expression(tree) == written
    assert evaluate(written, [3, 5]) == pytest.approx(evaluate(expression, [3, 5]))


def test_leaves() -> None:
    assert list_leaves(parse_expression("(N1 + 2) * N0")) == ["N1", 2.0, "N0"]


@pytest.mark.parametrize(
    ("question", "masked", "numbers"),
    [
        ("Tom has 3 apples and 1,200 pears.", "Tom has N0 apples and N1 pears.", [3, 1200]),
        ("It costs $45, or $3.50 each; $.5 off.", "It costs $N0, or $N1 each; $N2 off.", [45, 3.5, 0.5]),
        ("a 120-page book, 25% read", "a N0-page book, N1% read", [120, 25]),
        ("Seven red and two green", "N0 red and N1 green", [7, 2]),
        ("twenty-five, thirty one and forty", "N0, N1 and N2", [25, 31, 40]),
        ("a hundred and five; three hundred; one thousand", "N0; N1; N2", [105, 300, 1000]),
        ("the 3rd floor, the 21st, an A4 page, mp3", "the 3rd floor, the 21st, an A4 page, mp3", []),
        ("one of them, each one, no one", "one of them, each one, no one", []),
        ("half, twice, a dozen, a hundredth", "half, twice, a dozen, a hundredth", []),
        ("often, someone, attends", "often, someone, attends", []),
        ("1/4 of 5kg at 3:30", "N0/N1 of N2kg at N3:N4", [1, 4, 5, 3, 30]),
        ("2.5.", "N0.", [2.5]),
        ("200 and 1,2", "N0 and N1,N2", [200, 1, 2]),
        ("ninety five thousand", "N0", [95000]),
        ("", "", []),
    ],
)
def test_extract_numbers(question: str, masked: str, numbers: list[float]) -> None:
    assert extract_numbers(question) == (masked, numbers)


def test_masked_question_holds_no_further_numbers() -> None:
    masked, _ = extract_numbers("Ann had 12 eggs, ate two and sold 5 dozen for $1,000.25")
    assert extract_numbers(masked) == (masked, [])


def test_real_questions_evaluate() -> None:
    path = REAL_DATA / "word_problems" / "svamp.jsonl"
    if not path.exists():
        pytest.skip("the real data files are not beside the project (../shared/data)")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = sum(evaluate(row["Equation"]) == pytest.approx(row["Answer"]) for row in rows)
    assert right / len(rows) > 0.99
    found = 0
    for row in rows:
        _, numbers = extract_numbers(f"{row['Body']} {row['Question']}")
        used = {float(token) for token in row["Equation"].split() if token[0].isdigit()}
        found += used <= set(numbers)
    assert found / len(rows) > 0.97
