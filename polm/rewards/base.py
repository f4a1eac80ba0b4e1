"""What a reward is: one protocol for verifiers, reward functions, reward models and judges.

A sample that could not be judged (`timeout`, `error`, `nonsense`, `inconsistent`, or a function that returned None) has
no value: it is neither right nor wrong, and whoever reads rewards leaves it out and counts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from polm.tokens import Array

RewardStatus = Literal["right", "wrong", "scored", "unparsed", "timeout", "error", "nonsense", "inconsistent"]
UNJUDGED: tuple[RewardStatus, ...] = ("timeout", "error", "nonsense", "inconsistent")  # never with a value


@dataclass
class Tally:
    """What failed while rewards were made and belongs to no single answer: whole calls of a function, votes of a
    judge. `counts` are words of the ledger, `problems` (status, note) for people."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, word: str, number: int = 1) -> None:
        """Count under a word of the ledger."""
        if number:
            self.counts[word] += number

    def merge(self, other: Tally) -> None:
        """Take up what another one holds."""
        self.counts.update(other.counts)
        self.problems += other.problems

    def take(self) -> Tally:
        """What there is since the last time; nothing is left here."""
        taken = Tally(self.counts, self.problems)
        self.counts, self.problems = Counter(), []
        return taken


@dataclass(frozen=True)
class RewardItem:
    """One answer to judge. `fields` is the prompt's row (answer, verifier, numbers and whatever else it has);
    `prompt_tokens` and `completion_tokens` are what the policy read and wrote, int64 [n]."""

    messages: Sequence[Mapping[str, Any]]
    completion: str
    prompt_tokens: Array
    completion_tokens: Array
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reward:
    """`value` is None where the answer was not judged: where the status is in UNJUDGED, and where a function returned
    None (`unparsed`). An answer that a verifier cannot parse (`unparsed` too) has the value 0; a judge whose reply
    holds no verdict (`nonsense`), or whose two orders must agree and do not (`inconsistent`), says nothing about the
    answer. `note` says why, for people. `parts` are the values by source where the reward is a sum of several."""

    value: float | None
    status: RewardStatus
    note: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.status in UNJUDGED) or self.status == "unparsed", self

    @property
    def is_judged(self) -> bool:
        return self.value is not None


class Rewarder(Protocol):
    """Rewards of many answers at once, in the order of `items`; never raises for what a model wrote."""

    def __call__(self, items: Sequence[RewardItem]) -> list[Reward]: ...
