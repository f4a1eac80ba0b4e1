"""The parts of evidence/alignment: best-of-n against a walk through all choices, and results that are what the files
of the seeds say."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import polm

FOLDER = Path(polm.__file__).parent.parent / "evidence" / "alignment"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("alignment")


@pytest.fixture
def part(script: ModuleType) -> ModuleType:
    found: ModuleType = script.PARTS["overoptimisation"]
    return found


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


def test_the_result_is_what_the_seeds_say(script: ModuleType) -> None:
    """If this fails: `python evidence/alignment/run.py table`."""
    if not (FOLDER / "result.json").is_file():
        pytest.skip("not run yet")
    claims = [claim for part in script.PARTS.values() for claim in part.build_claims()]
    assert json.loads((FOLDER / "result.json").read_text()) == claims
    text = (FOLDER / "README.md").read_text()
    for part in script.PARTS.values():
        mine = part.build_claims()
        assert not mine or part.write_table(mine).strip() in text


def test_degrees_belong_to_the_verdicts_of_the_same_labeller(script: ModuleType) -> None:
    """The verdict of `label_pairs` is the sign of the difference that the degree is read from; 0 where it is small."""
    kinds = script.PARTS["reward_kinds"]
    noise = kinds.NOISE
    for difference, draw in ((2.0, 0.3), (2.0, 0.95), (-1.0, 0.1), (0.0, 0.5), (4.0, 0.5)):
        seen = difference - noise * np.log(draw / (1 - draw))
        assert (draw < 1 / (1 + np.exp(-difference / noise))) == (seen > 0)
        assert kinds.read_degree(difference, draw) == int(np.searchsorted(kinds.CUTS, abs(seen), side="right"))
    assert kinds.read_degree(0.0, 0.5) == 0
    assert kinds.read_degree(4.0, 0.5) == 3


def test_steps_are_right_up_to_the_first_that_is_not(script: ModuleType) -> None:
    steps = script.PARTS["steps"]
    solution = "steps 7 + 8 = 15 , 4 + 3 + 1 = 8 #### 85"
    assert steps.split_solution(solution) == ["steps 7 + 8 = 15", "4 + 3 + 1 = 8", "#### 85"]
    wrong = steps.split_solution("steps 7 + 8 = 16 , 4 + 3 + 1 = 8 #### 85 , 9")
    assert steps.label_steps(wrong, solution) == [False, False, False, False]
    late = steps.split_solution("steps 7 + 8 = 15 , 4 + 3 + 1 = 8 #### 86")
    assert steps.label_steps(late, solution) == [True, True, False]


def test_votes_weigh_final_answers(script: ModuleType) -> None:
    steps = script.PARTS["steps"]
    item = steps.Item("add", "add 1 and 2 .", "1 + 2 = 3 #### 3", "3")
    answers = steps.Answers([item], [["a #### 3", "b #### 4", "c #### 4", "d"]])
    assert steps.vote(answers, np.ones((1, 4)), 4) == 0.0
    assert steps.vote(answers, np.array([[0.9, 0.4, 0.4, 0.0]]), 4) == 1.0
    assert steps.vote(answers, np.ones((1, 4)), 2) == pytest.approx(0.25)  # one of two drawn; then 4 or nothing


def test_rounded_weights_are_levels_and_come_back(script: ModuleType) -> None:
    importance = script.PARTS["importance"]
    rows = torch.tensor([[0.9, -0.31, 0.1], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(importance.round_rows(rows, 3), torch.tensor([[0.9, -0.3, 0.0], [0.0, 0.0, 0.0]]))
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    before = layer[0].weight.detach().clone()
    with importance.rounded_weights(layer, 2):
        assert len(layer[0].weight[0].unique()) <= 3
    assert torch.equal(layer[0].weight, before)
