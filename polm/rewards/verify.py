"""Verifiers: is the answer in a completion right? Rewards of RL and scores of benchmarks both come from here.

Nothing that a model wrote is ever evaluated by Python: numbers and expressions are read by our own parsers, and
symbolic mathematics runs in a process that can be killed (`math_worker`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from polm.data.benchmarks import ANSWER_MARKER, extract_boxed, extract_marked, parse_plain_number
from polm.errors import UserError
from polm.rewards.base import UNJUDGED
from polm.rewards.math_worker import MathWorker
from polm.text.arithmetic import ArithmeticSyntaxError, evaluate

Status = Literal["right", "wrong", "unparsed", "timeout", "error"]

TIME_LIMIT_SECONDS = 3.0
TOLERANCE = 1e-6  # relative to the answer, absolute below one
# math-verify looks for the answer near the end; longer text only costs time.
MAX_MATH_CHARACTERS = 4000

# A minus sign belongs to a number unless something stands directly before it, as in 3-2.
_NUMBER = re.compile(r"(?<![\w.])-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_WORKER = MathWorker()


@dataclass(frozen=True)
class Verdict:
    """`extracted` is the part of the completion that was judged; empty if there was none."""

    status: Status
    extracted: str

    @property
    def is_right(self) -> bool:
        return self.status == "right"

    @property
    def value(self) -> float | None:
        """As a reward: 1 for right, 0 for wrong and unparsed; none where there is no verdict."""
        return None if self.status in UNJUDGED else float(self.is_right)


@dataclass(frozen=True)
class VerifyItem:
    """One completion to judge; `numbers` fills N0, N1, ... for the verifier "expression"."""

    verifier: str
    completion: str
    answer: str
    numbers: Sequence[float] | None = None


def verify(
    verifier: str,
    completion: str,
    answer: str,
    numbers: Sequence[float] | None = None,
    *,
    seconds: float = TIME_LIMIT_SECONDS,
) -> Verdict:
    """Judges one completion.

    Verifiers:
        exact: the rest of the line after the last `####` equals the answer, up to white space.
        number: the last number (after the last `####`, if there is one) equals the answer.
        math: the content of the last `\\\\boxed{}` or what follows the last `####`, whichever comes later, or else
            the whole text, is mathematically equal to the answer, as math-verify judges.
        expression: the arithmetic expression after the last `####`, with N0, N1, ... filled in, has the answer's value.

    `seconds` limits the verifier "math"; beyond it the status is "timeout".

    Raises:
        UserError: an unknown verifier, or an answer that is no number where one is needed.
    """
    if verifier not in VERIFIERS:
        raise UserError(f"unknown verifier {verifier!r}; allowed are {', '.join(VERIFIERS)}")
    return VERIFIERS[verifier](VerifyItem(verifier, completion, answer, numbers), seconds)


def verify_many(items: Iterable[VerifyItem], *, seconds: float = TIME_LIMIT_SECONDS) -> list[Verdict]:
    """Judges many completions; the verdicts are in the order of the items. Raises as `verify` does."""
    return [verify(item.verifier, item.completion, item.answer, item.numbers, seconds=seconds) for item in items]


def _verify_exact(item: VerifyItem, _seconds: float) -> Verdict:
    marked = extract_marked(item.completion)
    if not marked:
        return Verdict("unparsed", "")
    return Verdict("right" if marked.split() == item.answer.split() else "wrong", marked)


def _verify_number(item: VerifyItem, _seconds: float) -> Verdict:
    marked = extract_marked(item.completion)
    found = _NUMBER.findall(item.completion if marked is None else marked)
    if not found:
        return Verdict("unparsed", marked or "")
    value = float(found[-1].replace(",", ""))
    return Verdict("right" if _equal(value, _read_answer(item)) else "wrong", found[-1])


def _verify_expression(item: VerifyItem, _seconds: float) -> Verdict:
    answer = _read_answer(item)
    marked = extract_marked(item.completion)
    if not marked:
        return Verdict("unparsed", "")
    try:
        value = evaluate(marked, item.numbers or ())
    except ArithmeticSyntaxError:
        return Verdict("unparsed", marked)
    return Verdict("right" if _equal(value, answer) else "wrong", marked)


def _verify_math(item: VerifyItem, seconds: float) -> Verdict:
    candidate = _extract_candidate(item.completion)
    if candidate is None:
        status, extracted = _WORKER.judge(item.completion[-MAX_MATH_CHARACTERS:], _box(item.answer), seconds)
        return Verdict(status, extracted)
    if not candidate or len(candidate) > MAX_MATH_CHARACTERS:
        return Verdict("unparsed", candidate[:MAX_MATH_CHARACTERS])
    if candidate.split() == item.answer.split():
        return Verdict("right", candidate)
    value, answer = parse_plain_number(candidate), parse_plain_number(item.answer)
    if value is not None and answer is not None:
        return Verdict("right" if _equal(value, answer) else "wrong", candidate)
    status, _ = _WORKER.judge(_box(candidate), _box(item.answer), seconds)
    return Verdict(status, candidate)


def _extract_candidate(completion: str) -> str | None:
    """The last boxed or marked answer, whichever stands later; None if the completion has neither."""
    begin = completion.rfind(ANSWER_MARKER)
    if begin < 0:
        return extract_boxed(completion)
    boxed = extract_boxed(completion[begin:])
    return boxed if boxed is not None else extract_marked(completion)


def _box(text: str) -> str:
    """Text as math-verify reads it best; without the box it would see only the 5 of 5\\\\sqrt{2}."""
    return f"\\boxed{{{text.strip().strip('$')}}}"


def _read_answer(item: VerifyItem) -> float:
    value = parse_plain_number(item.answer)
    if value is None:
        raise UserError(f'the verifier "{item.verifier}" needs a number as the answer, found {item.answer!r:.80}')
    return value


def _equal(value: float, answer: float) -> bool:
    return abs(value - answer) <= TOLERANCE * max(1.0, abs(answer))


VERIFIERS: dict[str, Callable[[VerifyItem, float], Verdict]] = {
    "exact": _verify_exact,
    "expression": _verify_expression,
    "math": _verify_math,
    "number": _verify_number,
}
