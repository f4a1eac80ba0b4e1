"""What a reward is: one protocol for verifiers, reward functions, reward models and judges.

A sample that could not be judged (`timeout`, `error`, `nonsense`) has no value: it is neither right nor wrong, and
whoever reads rewards leaves it out and counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from polm.tokens import Array

RewardStatus = Literal["right", "wrong", "scored", "unparsed", "timeout", "error", "nonsense"]
UNJUDGED: tuple[RewardStatus, ...] = ("timeout", "error", "nonsense")


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
    """`value` is None exactly where the status is in UNJUDGED. An answer that a verifier cannot parse (`unparsed`) has
    the value 0; a judge whose reply holds no verdict (`nonsense`) says nothing about the answer. `note` says why, for
    people. `parts` are the values by source where the reward is a sum of several."""

    value: float | None
    status: RewardStatus
    note: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.status in UNJUDGED), self


class Rewarder(Protocol):
    """Rewards of many answers at once, in the order of `items`; never raises for what a model wrote."""

    def __call__(self, items: Sequence[RewardItem]) -> list[Reward]: ...
