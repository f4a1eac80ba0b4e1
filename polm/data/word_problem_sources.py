"""Arithmetic word problems from four published collections, each with an equation over its masked numbers.

ASDiv and SVAMP state their equations, GSM8K states its calculations (<<48/2=24>>), and for MAWPS, which gives only
the answer, the equation is searched for. Whatever cannot be used is counted in a ledger under its reason.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polm.data.benchmarks import extract_marked, join_sentences, parse_plain_number
from polm.data.files import read_jsonl
from polm.data.normalise import require_columns
from polm.data.records import Row
from polm.errors import DataError
from polm.text.arithmetic import (
    ArithmeticSyntaxError,
    Node,
    evaluate,
    evaluate_tree,
    extract_numbers,
    format_expression,
    list_leaves,
    parse_expression,
)

Ledger = Counter[str]

MAX_NUMBERS = 6  # N0 ... N5
MAX_OPERATORS = 6
# Literals that an equation may hold although the question does not: what "half", "dozen", "week" or "percent" mean.
LITERALS = frozenset([0.01, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 20, 24, 30, 50, 52, 60, 100, 365, 1000])
# The collections inside MAWPS differ in what their problems need: (operators, numbers of steps, most likely first).
MAWPS_SEARCH = {"addsub": ("+-", (1, 2)), "multiarith": ("+-*/", (2, 1)), "singleop": ("+-*/", (1,))}
MAWPS_DEFAULT_SEARCH = ("+-*/", (1, 2))
# Two equations are one and the same function if they agree at these values.
_PROBES = [[math.sqrt(prime) * factor for prime in (2, 3, 5, 7, 11, 13)] for factor in (1.0, 2.3, 5.7)]
_CALCULATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_NUMERIC_ANSWER = re.compile(r"(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*(?:\([^()]*\))?")


@dataclass(frozen=True)
class Problem:
    """One question; `masked` is the question with its `numbers` replaced by N0, N1, ... in order of appearance.

    `equations` are the different functions of the numbers that give the answer, the preferred one first; more than
    one only where they were searched for. `part` is "train" or "test" as published.
    """

    source: str
    id: str
    question: str
    masked: str
    numbers: tuple[float, ...]
    answer: float
    equations: tuple[Node, ...]
    part: str = "train"

    @property
    def equation(self) -> Node:
        return self.equations[0]

    @property
    def num_operators(self) -> int:
        return count_operators(self.equation)


def read_problems(data: Path) -> tuple[list[Problem], Ledger]:
    """Reads asdiv, svamp, mawps and gsm8k (train and test) below `data`.

    Returns:
        The usable problems, and the ledger: "SOURCE/read", "SOURCE/used" and "SOURCE/dropped: REASON".
    """
    ledger: Ledger = Counter()
    readers = [
        ("asdiv", "word_problems/asdiv.jsonl", _read_asdiv, "train"),
        ("svamp", "word_problems/svamp.jsonl", _read_svamp, "train"),
        ("mawps", "word_problems/mawps.jsonl", _read_mawps, "train"),
        ("gsm8k", "gsm8k/train.jsonl", _read_gsm8k, "train"),
        ("gsm8k", "gsm8k/test.jsonl", _read_gsm8k, "test"),
    ]
    problems = []
    for source, file, read, part in readers:
        name = source if part == "train" else f"{source}_{part}"
        for line, row in read_jsonl(data / file):
            ledger[f"{name}/read"] += 1
            try:
                problem = read(data / file, line, row)
            except _Unusable as reason:
                ledger[f"{name}/dropped: {reason}"] += 1
                continue
            ledger[f"{name}/used"] += 1
            ledger[f"{name}/ambiguous"] += len(problem.equations) > 1
            problems.append(replace(problem, id=f"{name}-{line}", part=part))
    return problems, +ledger


def count_operators(tree: Node) -> int:
    return len(list_leaves(tree)) - 1


def compute_value(tree: Node, numbers: Sequence[float]) -> float:
    """The value of a tree; nan where it has none."""
    try:
        return evaluate_tree(tree, numbers)
    except ArithmeticSyntaxError:
        return math.nan


def is_close(value: float, target: float) -> bool:
    return abs(value - target) <= 1e-6 * max(1.0, abs(target))


def find_equations(numbers: Sequence[float], answer: float, operators: str, num_steps: int) -> tuple[Node, ...]:
    """All different functions with one or two operators, each number used at most once, that give the answer.

    Of the ways to write one function, the one with fewest brackets is kept.
    """
    variables = [f"N{index}" for index in range(len(numbers))]
    trees: list[Node] = [
        tree for left, right in itertools.combinations(variables, 2) for tree in _combine(left, right, operators)
    ]
    if num_steps == 2:
        trees = [
            tree
            for inner in trees
            for variable in variables
            if variable not in list_leaves(inner)
            for tree in _combine(inner, variable, operators)
        ]
    fitting = [tree for tree in trees if is_close(compute_value(tree, numbers), answer)]
    fitting.sort(key=lambda tree: (format_expression(tree).count("("), format_expression(tree)))
    functions: dict[tuple[str, ...], Node] = {}
    for tree in fitting:
        functions.setdefault(tuple(f"{compute_value(tree, probe):.6g}" for probe in _PROBES), tree)
    return tuple(functions.values())


def reduce_calculations(calculations: Iterable[tuple[str, str]], numbers: Sequence[float], answer: float) -> Node:
    """One expression over the numbers from a chain of calculations such as ("48/2", "24"), ("48+24", "72").

    An operand is an earlier result, a number of the question or a literal of LITERALS, in this order, those not used
    yet before the others.

    Raises:
        ValueError: with the reason in a few words, if the chain does not reduce or does not give the answer.
    """
    known: list[tuple[float, Node]] = [(value, f"N{index}") for index, value in enumerate(numbers)]
    used: set[Node] = set()
    found: Node | None = None
    for written, result in calculations:
        try:
            tree, value = parse_expression(written), evaluate(result)
        except ArithmeticSyntaxError:
            raise _Unusable("a calculation that is no expression") from None
        reduced = _bind(tree, known, used)
        if count_operators(reduced) > MAX_OPERATORS:
            raise _Unusable(f"more than {MAX_OPERATORS} operators")
        if not is_close(compute_value(reduced, numbers), value):
            raise _Unusable("a calculation with another result")
        known.insert(0, (value, reduced))  # later results are preferred
        found = reduced if is_close(value, answer) else found
    if found is None or not isinstance(found, tuple):
        raise _Unusable("no calculation gives the answer")
    return found


class _Unusable(ValueError):
    """A row that holds no problem of the kind that is wanted; the text is the ledger's reason."""


def _combine(left: Node, right: Node, operators: str) -> Iterator[Node]:
    for operator in operators:
        yield (operator, left, right)
        if operator in "-/":
            yield (operator, right, left)


def _bind(tree: Node, known: Sequence[tuple[float, Node]], used: set[Node]) -> Node:
    """Replaces the literals of a tree by what is known to have their value."""
    if isinstance(tree, tuple):
        left = _bind(tree[1], known, used)
        return (tree[0], left, _bind(tree[2], known, used))
    if isinstance(tree, str):
        raise _Unusable("a calculation that is no expression")
    candidates = [node for value, node in known if is_close(value, tree)]
    if candidates:
        node = next((node for node in candidates if node not in used), candidates[0])
        used.add(node)
        return node
    if tree in LITERALS:
        return tree
    raise _Unusable("an operand that is not in the question")


def _build_problem(source: str, question: str, tree: Node, answer: float) -> Problem:
    """Binds the literals of a stated equation to the numbers of the question and checks its value."""
    masked, numbers = _mask(question)
    bound = _bind(tree, [(value, f"N{index}") for index, value in enumerate(numbers)], set())
    if not isinstance(bound, tuple):
        raise _Unusable("no operator in the equation")
    if count_operators(bound) > MAX_OPERATORS:
        raise _Unusable(f"more than {MAX_OPERATORS} operators")
    if not is_close(compute_value(bound, numbers), answer):
        raise _Unusable("an equation with another value")
    return Problem(source, "", question, masked, tuple(numbers), answer, (bound,))


def _mask(question: str) -> tuple[str, list[float]]:
    masked, numbers = extract_numbers(question)
    if not 1 <= len(numbers) <= MAX_NUMBERS:
        raise _Unusable(f"no number or more than {MAX_NUMBERS} in the question")
    return masked, numbers


def _read_asdiv(path: Path, line: int, row: Row) -> Problem:
    """ASDiv: formula such as "7+2=9", answer such as "9 (apples)"; answers that are no number are left out."""
    require_columns(f"{path}:{line}", row, ["body", "question", "formula", "answer"])
    match = _NUMERIC_ANSWER.fullmatch(str(row["answer"]).strip())
    if match is None:
        raise _Unusable("an answer that is no number")
    left, _, right = str(row["formula"]).partition("=")
    if "=" in right:
        raise _Unusable("a formula of several parts")
    tree = _parse(left)
    return _build_problem("asdiv", join_sentences(row["body"], row["question"]), tree, float(match[1].replace(",", "")))


def _read_svamp(path: Path, line: int, row: Row) -> Problem:
    """SVAMP: Equation such as "( 290.0 / 2.0 )", Answer as a number."""
    require_columns(f"{path}:{line}", row, ["Body", "Question", "Equation", "Answer"])
    question = join_sentences(row["Body"], row["Question"])
    return _build_problem("svamp", question, _parse(str(row["Equation"])), _get_number(path, line, row, "Answer"))


def _read_mawps(path: Path, line: int, row: Row) -> Problem:
    """MAWPS: input, target and the collection (type); the equation is searched for, the fewest steps first."""
    require_columns(f"{path}:{line}", row, ["input", "target"])
    question, answer = str(row["input"]), _get_number(path, line, row, "target")
    masked, numbers = _mask(question)
    operators, all_steps = MAWPS_SEARCH.get(str(row.get("type")), MAWPS_DEFAULT_SEARCH)
    for num_steps in all_steps:
        if equations := find_equations(numbers, answer, operators, num_steps):
            return Problem("mawps", "", question, masked, tuple(numbers), answer, equations)
    raise _Unusable("no equation of one or two steps found")


def _read_gsm8k(path: Path, line: int, row: Row) -> Problem:
    """GSM8K: the calculations between << and >> in the worked answer, reduced to one expression."""
    require_columns(f"{path}:{line}", row, ["question", "answer"])
    worked = str(row["answer"])
    answer = parse_plain_number(extract_marked(worked) or "")
    if answer is None:
        raise DataError(f"{path}:{line}: expected a number after #### at the end of answer")
    masked, numbers = _mask(str(row["question"]))
    tree = reduce_calculations(_CALCULATION.findall(worked), numbers, answer)
    return Problem("gsm8k", "", str(row["question"]), masked, tuple(numbers), answer, (tree,))


def _parse(expression: str) -> Node:
    try:
        return parse_expression(expression)
    except ArithmeticSyntaxError:
        raise _Unusable("a formula that is no expression") from None


def _get_number(path: Path, line: int, row: Row, column: str) -> float:
    if type(row[column]) not in (int, float):
        raise DataError(f"{path}:{line}: {column} must be a number, found {row[column]!r:.40}")
    return float(row[column])
