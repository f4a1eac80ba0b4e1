"""Records that are held out, chosen by a hash of their prompts: all answers to a prompt stand on one side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from polm.data.fingerprint import fingerprint_values
from polm.data.records import Message
from polm.errors import DataError


class HasPrompt(Protocol):
    @property
    def prompt(self) -> list[Message]: ...


RecordT = TypeVar("RecordT", bound=HasPrompt)


def is_held_out(prompt: Sequence[Message], share: float, seed: int) -> bool:
    """Whether a prompt falls into the held-out share: by a hash of it and the seed, whatever else is in the data."""
    return int(fingerprint_values([seed, list(prompt)])[:13], 16) < share * 16**13


def split_holdout(records: Sequence[RecordT], share: float, seed: int) -> tuple[list[RecordT], list[RecordT]]:
    """(records to train on, held-out records), both in the order of the file; share 0 holds nothing out.

    Raises DataError where a side is left empty.
    """
    if share == 0.0:
        return list(records), []
    sides: tuple[list[RecordT], list[RecordT]] = ([], [])
    for record in records:
        sides[is_held_out(record.prompt, share, seed)].append(record)
    if records and not all(sides):
        raise DataError(
            f"of {len(records)} records, {len(sides[1])} are held out by their prompts (holdout_share {share}) and "
            f"{len(sides[0])} are left to train on; both are needed: give more records, another share or seed, or "
            "holdout_share: 0"
        )
    return sides
