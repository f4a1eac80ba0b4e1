"""Constitutions: the shipped one, files of one's own, how principles are drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from polm.data.fingerprint import fingerprint_bytes
from polm.errors import RecipeError
from polm.rewards.constitution import SHIPPED, load_constitution
from polm.stages.table import STAGES

ONE = "name: mine\nprinciples:\n  - {name: a, critique: c, revision: r, compare: d}\n"


def test_the_shipped_one() -> None:
    shipped = load_constitution(None)
    assert len(shipped.principles) >= 10
    for principle in shipped.principles:
        assert all(len(text) > 40 for text in (principle.critique, principle.revision, principle.compare))
        assert principle.compare.startswith("the better answer is")
        assert "{" not in principle.critique + principle.revision + principle.compare


def test_another_constitution_is_another_version() -> None:
    """It is a part of no key: whoever changes the file raises the versions of the stages that read it."""
    versions = (STAGES["constitution"].version, STAGES["judge"].version)
    assert {fingerprint_bytes(SHIPPED)[:12]: versions} == {"8f599492fc67": (2, 3)}


def test_draws_belong_to_seed_record_and_round() -> None:
    shipped = load_constitution(None)
    drawn = [shipped.draw(0, index, number).name for index in range(300) for number in range(2)]
    assert drawn == [shipped.draw(0, index, number).name for index in range(300) for number in range(2)]
    assert drawn != [shipped.draw(1, index, number).name for index in range(300) for number in range(2)]
    counts = Counter(drawn)
    assert set(counts) == {principle.name for principle in shipped.principles}
    assert max(counts.values()) < 2.5 * min(counts.values())
    assert any(drawn[i] != drawn[i + 1] for i in range(0, 20, 2))


def test_one_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(ONE)
    mine = load_constitution(tmp_path / "mine.yaml")
    assert (mine.name, mine.draw(3, 4).compare) == ("mine", "d")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("compare: d", "compares: d", r"mine.yaml:3: unknown key 'principles.0.compares'; did you mean 'compare'"),
        (", compare: d", "", r"mine.yaml.*principles.0.compare is missing"),
        ("critique: c", "critique: ''", r"principles.0.critique: found ''"),
        ("principles:\n  - {name: a, critique: c, revision: r, compare: d}\n", "principles: []", "at least 1 item"),
        ("compare: d}\n", "compare: d}\n  - {name: a, critique: c, revision: r, compare: d}\n", "'a' is there twice"),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ONE
    (tmp_path / "mine.yaml").write_text(ONE.replace(old, new))
    with pytest.raises(RecipeError, match=message):
        load_constitution(tmp_path / "mine.yaml")
