"""Best-of-n of evidence/alignment: the average over all choices of n, against a walk through all of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import polm

FOLDER = Path(polm.__file__).parent.parent / "evidence" / "alignment"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script's modules import each other by their plain names; none of them stays behind."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    before = dict(sys.modules)
    yield importlib.import_module("overoptimisation")
    for name in {path.stem for path in FOLDER.glob("*.py")} - before.keys():
        sys.modules.pop(name, None)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices(part: ModuleType, n: int) -> None:
    rng = np.random.default_rng(0)
    proxy, values = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    for row, found in enumerate(part.compute_best_of(proxy, values, n)):
        picked = [values[row, max(choice, key=lambda i: proxy[row, i])] for choice in combinations(range(5), n)]
        assert found == pytest.approx(np.mean(picked))


def test_best_of_one_is_the_mean_and_best_of_all_the_best(part: ModuleType) -> None:
    proxy = np.array([[0.1, 3.0, 2.0]])
    gold = np.array([[5.0, 1.0, 9.0]])
    assert part.compute_best_of(proxy, gold, 1)[0] == pytest.approx(5.0)
    assert part.compute_best_of(proxy, gold, 3)[0] == 1.0
