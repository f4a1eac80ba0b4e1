"""Held-out prompts: by their hash, so that nothing but the prompt and the seed says on which side a record stands."""

from __future__ import annotations

import pytest

from polm.data.holdout import is_held_out, split_holdout
from polm.data.records import Preference
from polm.errors import DataError


def build_pairs(num: int) -> list[Preference]:
    """Two pairs for each prompt."""
    return [Preference([{"role": "user", "content": f"question {i // 2}"}], f"a{i}", f"b{i}") for i in range(num)]


def test_a_prompt_stands_on_one_side() -> None:
    pairs = build_pairs(400)
    train, held = split_holdout(pairs, 0.3, 0)
    assert {p.prompt[0]["content"] for p in train}.isdisjoint(p.prompt[0]["content"] for p in held)
    assert len(train) + len(held) == 400
    assert 80 < len(held) < 160
    assert [p for p in pairs if p in held] == held  # in the order of the file


def test_other_records_change_nothing() -> None:
    pairs = build_pairs(100)
    held = split_holdout(pairs, 0.3, 0)[1]
    assert split_holdout(pairs[::-1][:60], 0.3, 0)[1] == [p for p in pairs[::-1][:60] if p in held]


def test_the_seed_and_the_share_say_which() -> None:
    pairs = build_pairs(200)
    one, other = (split_holdout(pairs, 0.3, seed)[1] for seed in (0, 1))
    assert one != other
    small = split_holdout(pairs, 0.1, 0)[1]
    assert all(p in one for p in small)  # a larger share holds out the same and more
    assert split_holdout(pairs, 0.0, 0) == (pairs, [])
    assert not is_held_out(pairs[0].prompt, 0.0, 0)


def test_a_side_without_records() -> None:
    with pytest.raises(DataError, match=r"of 2 records, \d are held out .*both are needed"):
        split_holdout(build_pairs(2), 0.5, 0)
