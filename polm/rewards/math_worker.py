"""Runs math-verify in a process of its own, so that hostile mathematics can be stopped.

Symbolic algebra on text that a model wrote may run for ever, eat memory or crash: the child is killed and restarted
(see `child`). math-verify's own alarms are off: they do not reach into long C calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from polm.rewards.child import Child, ChildEndedError, serve

MathStatus = Literal["right", "wrong", "unparsed", "timeout", "error"]

MEMORY_BYTES = 4 * 2**30


@dataclass
class MathWorker(Child):
    """The child that compares answers."""

    module: str = "polm.rewards.math_worker"
    what: str = "the math verifier"
    cure: str = "Is math-verify installed?"

    def judge(self, text: str, answer: str, seconds: float) -> tuple[MathStatus, str]:
        """Compares the mathematics in `text` with `answer`, both as math-verify reads them.

        Returns:
            (status, the part of the text that was compared). "timeout" after `seconds` of wall-clock time, "error" if
            the child crashed (out of memory, say) or if `answer` itself cannot be read.

        Raises:
            UserError: the child cannot be started.
        """
        try:
            reply = self.ask({"text": text, "answer": answer}, seconds)
        except TimeoutError:
            return "timeout", ""
        except ChildEndedError:
            return "error", ""
        return reply["status"], reply["extracted"]


def prepare() -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    """Limits the child's memory and loads math-verify; returns what judges a request."""
    _limit_memory()
    logging.disable(logging.CRITICAL)  # math-verify warns that its own time limits are off
    from math_verify import parse, verify

    parse("1", parsing_timeout=None)  # compiles its patterns now rather than within the first item's limit
    return lambda request: _judge(request["text"], request["answer"], parse, verify)


def _judge(text: str, answer: str, parse: Any, verify: Any) -> dict[str, str]:
    try:
        gold = parse(answer, parsing_timeout=None)
        found = parse(text, parsing_timeout=None)
        extracted = next((part for part in reversed(found) if isinstance(part, str)), "")
        if not found or not gold:
            return {"status": "unparsed" if gold else "error", "extracted": extracted}
        right = verify(gold, found, timeout_seconds=None)
        return {"status": "right" if right else "wrong", "extracted": extracted}
    except Exception as error:  # noqa: BLE001 - any failure inside symbolic algebra is this item's, not ours
        return {"status": "error", "extracted": f"{type(error).__name__}"}


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, OSError, ValueError):  # not every system has such limits; the time limit remains
        return


if __name__ == "__main__":
    serve(prepare)
