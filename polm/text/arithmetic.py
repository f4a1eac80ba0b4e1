"""Arithmetic expressions as models write them, and the numbers of a question as variables N0, N1, ...

The parser is written by hand so that text which a model wrote never reaches `eval`. Its grammar:

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/") signed)*
    signed  = "-" signed | atom "%"*
    atom    = number | variable | "(" sum ")"

A percent sign after an atom divides it by a hundred; it is no remainder.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

MAX_CHARACTERS = 200
MAX_DEPTH = 20

_TOKEN = re.compile(
    r"\s*(?:([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|N([0-9])(?!\w)|([-+*/()%]))"
)

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: value for value, word in enumerate([*_UNITS, *_TEENS])}
_SMALL |= {word: 10 * index for index, word in enumerate(_TENS, start=2)}
_SCALES = {"hundred": 100, "thousand": 1000}

# Words that count as numbers alone. "one" does not (mostly "each one", "no one"), nor does "zero"; both count within
# "twenty one" and "one hundred". "half", "twice", "double" and "dozen" stay words: they say what to compute.
_ALONE = "|".join([*_UNITS[2:], *_TEENS, *_TENS])
_DIGIT_WORD = "|".join(_UNITS[1:])
_BELOW_HUNDRED = rf"(?:(?:{'|'.join(_TENS)})[\s-](?:{_DIGIT_WORD})|{_ALONE})"
_NUMBER_WORDS = (
    rf"(?:(?:an?|one|{_BELOW_HUNDRED})\s(?:hundred|thousand)(?:(?:\sand)?\s(?:one|{_BELOW_HUNDRED}))?|{_BELOW_HUNDRED})"
)
# Digits that follow a letter (A4) or that make an ordinal (3rd) are names, not quantities.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?![0-9])(?!(?:st|nd|rd|th)\b)|\.[0-9]+"
_QUANTITY = re.compile(rf"(?<![\w.])(?:{_DIGITS}|{_NUMBER_WORDS}(?![\w]))", re.IGNORECASE)


_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class ArithmeticSyntaxError(ValueError):
    """Text that is not an arithmetic expression, or one without a finite value."""


@dataclass(frozen=True)
class _Token:
    kind: Literal["number", "variable", "symbol", "end"]
    text: str
    position: int


# A literal, a variable such as "N0", or (operator, left, right); a leading minus is (0 - x).
Node = float | str | tuple[str, "Node", "Node"]


def evaluate(expression: str, numbers: Sequence[float] = ()) -> float:
    """The value of an arithmetic expression; N0, N1, ... stand for `numbers`.

    Understood are numbers (also 1,200 and .5), N0 to N9, + - * / ( ), a minus sign and a percent sign after a value.

    Raises:
        ArithmeticSyntaxError: anything else, a variable without a number, a division by zero, a value that is not
            finite, more than 200 characters, or more than 20 levels of brackets and signs.
    """
    value = evaluate_tree(parse_expression(expression), numbers)
    if not math.isfinite(value):
        raise ArithmeticSyntaxError(f"the value of {expression!r} is not finite")
    return value


def parse_expression(expression: str) -> Node:
    """The tree of an expression; what is understood and raised is as for `evaluate`, except for values."""
    if len(expression) > MAX_CHARACTERS:
        raise ArithmeticSyntaxError(f"expression of {len(expression)} characters; at most {MAX_CHARACTERS} are read")
    return _Parser(_tokenize(expression)).parse()


def evaluate_tree(node: Node, numbers: Sequence[float] = ()) -> float:
    """The value of a tree. Raises ArithmeticSyntaxError for a variable without a number or a division by zero."""
    if isinstance(node, float):
        return node
    if isinstance(node, str):
        if int(node[1:]) >= len(numbers):
            raise ArithmeticSyntaxError(f"{node} stands for nothing: {len(numbers)} numbers are given")
        return float(numbers[int(node[1:])])
    symbol, left, right = node[0], evaluate_tree(node[1], numbers), evaluate_tree(node[2], numbers)
    if symbol == "/" and right == 0:
        raise ArithmeticSyntaxError("division by zero")
    return _OPERATIONS[symbol](left, right)


def format_expression(node: Node) -> str:
    """Writes a tree with single spaces and no more brackets than needed: `( N0 + N1 ) / 2`."""
    return _format(node, 0)


def list_leaves(node: Node) -> list[float | str]:
    """The literals and variables of a tree from left to right; one fewer than leaves is the number of operators."""
    if isinstance(node, tuple):
        return list_leaves(node[1]) + list_leaves(node[2])
    return [node]


def _format(node: Node, outer: int) -> str:
    if isinstance(node, str):
        return node
    if isinstance(node, float):
        return str(int(node)) if node.is_integer() else f"{node:.12g}"
    symbol, left, right = node
    strength = 2 if symbol in "*/" else 1
    # On its right side, a minus or a division needs brackets around its equals: a - (b - c).
    text = f"{_format(left, strength)} {symbol} {_format(right, strength + (symbol in '-/'))}"
    return f"( {text} )" if strength < outer else text


def _tokenize(expression: str) -> list[_Token]:
    tokens: list[_Token] = []
    position, text = 0, expression.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ArithmeticSyntaxError(f"cannot read {text[position:][:20]!r} at position {position}")
        number, variable, symbol = match.groups()
        if number is not None:
            tokens.append(_Token("number", number, match.start(1)))
        elif variable is not None:
            tokens.append(_Token("variable", variable, match.start(2)))
        else:
            tokens.append(_Token("symbol", symbol, match.start(3)))
        position = match.end()
    return [*tokens, _Token("end", "the end", len(text))]


class _Parser:
    """Recursive descent over the grammar at the top of this file."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.index = 0
        self.depth = 0

    def parse(self) -> Node:
        value = self._sum()
        if self._peek().kind != "end":
            raise self._unexpected("an operator")
        return value

    def _peek(self) -> _Token:
        return self.tokens[self.index]

    def _take(self, *symbols: str) -> str | None:
        """The next symbol if it is one of `symbols`, which is then consumed."""
        token = self._peek()
        if token.kind != "symbol" or token.text not in symbols:
            return None
        self.index += 1
        return token.text

    def _unexpected(self, expected: str) -> ArithmeticSyntaxError:
        token = self._peek()
        return ArithmeticSyntaxError(f"expected {expected} at position {token.position}, found {token.text!r}")

    def _sum(self) -> Node:
        node = self._product()
        while symbol := self._take("+", "-"):
            node = (symbol, node, self._product())
        return node

    def _product(self) -> Node:
        node = self._signed()
        while symbol := self._take("*", "/"):
            node = (symbol, node, self._signed())
        return node

    def _signed(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ArithmeticSyntaxError(f"more than {MAX_DEPTH} levels of brackets and signs")
        node: Node
        if self._take("-"):
            node = ("-", 0.0, self._signed())
        else:
            node = self._atom()
            while self._take("%"):
                node = ("/", node, 100.0)
        self.depth -= 1
        return node

    def _atom(self) -> Node:
        token = self._peek()
        if token.kind == "number":
            self.index += 1
            return float(token.text.replace(",", ""))
        if token.kind == "variable":
            self.index += 1
            return f"N{token.text}"
        if self._take("("):
            node = self._sum()
            if not self._take(")"):
                raise self._unexpected("')'")
            return node
        raise self._unexpected("a number, a variable or '('")


def extract_numbers(question: str) -> tuple[str, list[float]]:
    """Replaces the quantities of a question by N0, N1, ... in the order of their appearance.

    Digits ("1,200", "3.5", ".5", "$45" which becomes "$N0", "20%" which becomes "N0%") and number words ("seven",
    "twenty-five", "three hundred", "a hundred and five") count. Ordinals (3rd), digits inside names (A4, N0), "one"
    alone and words such as "half", "twice" or "dozen" stay as they are.

    Returns:
        The masked question and the values; the i-th value is what Ni stands for.
    """
    numbers: list[float] = []

    def mask(match: re.Match[str]) -> str:
        numbers.append(_parse_quantity(match[0]))
        return f"N{len(numbers) - 1}"

    return _QUANTITY.sub(mask, question), numbers


def _parse_quantity(text: str) -> float:
    if any(character.isdigit() for character in text):
        return float(text.replace(",", ""))
    total = 0
    for word in re.split(r"[\s-]+", text.lower()):
        if word in _SCALES:
            total *= _SCALES[word]
        elif word in ("a", "an"):
            total = 1
        elif word != "and":
            total += _SMALL[word]
    return float(total)
