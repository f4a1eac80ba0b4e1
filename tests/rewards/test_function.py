"""Reward functions of users: called as TRL calls them, in a process of their own, and no answer drags others along."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from polm.errors import UserError
from polm.rewards.base import RewardItem, Tally
from polm.rewards.function import build_function_rewarder
from polm.rewards.function_worker import describe_value, select_columns

Told = list[tuple[float | None, str]]

SOURCE = """
import os, time
import helper  # a file beside this one

def length(prompts, completions, **columns):
    print("not a reply")
    assert set(columns) == {"answer", "completion_ids"}, columns
    assert columns["completion_ids"] == [[len(c)] for c in completions]
    assert prompts == ["p"] * len(completions)
    return [helper.SCALE * len(c) for c in completions]

def named(completions, prompts, answer):
    return [float(c == a) for c, a in zip(completions, answer)]

def odd(prompts, completions, **columns):
    values = {"nan": float("nan"), "inf": -float("inf"), "none": None, "text": "1.0", "list": [1], "true": True}
    return [values.get(c, 0.5) for c in completions]

async def later(prompts, completions):
    return [2.0] * len(completions)

def asks(prompts, completions):
    return [float(input())] * len(completions)

def raises(prompts, completions, **columns):
    return [1 / len(c.replace("x", "")) for c in completions]

def short(prompts, completions, **columns):
    return [1.0] * (len(completions) - ("x" in completions))

def hangs(prompts, completions, **columns):
    while "x" in completions:
        pass
    return [1.0] * len(completions)

def dies(prompts, completions, **columns):
    if "x" in completions:
        os._exit(3)
    return [1.0] * len(completions)
"""


def build_items(completions: Sequence[str], answer: str = "a") -> list[RewardItem]:
    fields = {"prompt": "p", "answer": answer}
    return [RewardItem([], c, np.arange(2), np.array([len(c)]), fields) for c in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Told]:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "mine.py").write_text(SOURCE)
    (folder / "helper.py").write_text("SCALE = 0.5\n")

    def judge(name: str, *completions: str) -> Told:
        rewarder = build_function_rewarder(f"{folder / 'mine.py'}:{name}", seconds=1.0, batch_seconds=2.0)
        return [(r.value, f"{r.status} {r.note}".strip()) for r in rewarder(build_items(completions))]

    return judge


def test_a_whole_batch_in_one_call(run: Callable[..., Told]) -> None:
    assert run("length", "ab", "", "abc") == [(1.0, "scored"), (0.0, "scored"), (1.5, "scored")]
    assert run("named", "a", "b") == [(1.0, "scored"), (0.0, "scored")]
    assert run("length") == []
    assert run("later", "a") == [(2.0, "scored")]
    assert run("asks", "a") == [(None, "error EOFError: EOF when reading a line")]  # requests are not its to read


def test_values_that_are_no_numbers(run: Callable[..., Told]) -> None:
    assert run("odd", "nan", "inf", "none", "text", "list", "true", "else") == [
        (None, "error the reward function returned nan"),
        (None, "error the reward function returned -inf"),
        (None, "unparsed the reward function returned None"),  # neither right nor wrong
        (None, "error the reward function returned '1.0', expected a number"),
        (None, "error the reward function returned a list, expected a number (TypeError)"),
        (1.0, "scored"),
        (0.5, "scored"),
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "error ZeroDivisionError: division by zero"),
        ("short", "error the reward function returned 0 rewards for 1 completions"),
        ("hangs", "timeout the reward function took longer than 1 s"),
        ("dies", "error the reward function's process ended (a crash, or out of memory)"),
    ],
)
def test_one_bad_answer_does_not_touch_the_others(run: Callable[..., Told], name: str, told: str) -> None:
    begin = time.monotonic()
    assert run(name, "a", "x", "b") == [(1.0, "scored"), (None, told), (1.0, "scored")]
    assert time.monotonic() - begin < 40  # a few starts of a child on a busy machine


MEAN = """
def mean(prompts, completions, **columns):
    return [sum(map(len, completions)) / len(completions)]
"""


@pytest.mark.parametrize(
    ("name", "word", "why"),
    [
        ("mean", "calls_error", "the reward function returned 1 rewards for 3 completions"),
        ("raises", "calls_error", "ZeroDivisionError: division by zero"),
        ("hangs", "calls_timeout", "the reward function took longer than 2 s"),
        ("dies", "calls_error", "the reward function's process ended (a crash, or out of memory)"),
        ("later", "", ""),
    ],
)
def test_a_whole_call_that_fails_is_counted(tmp_path: Path, name: str, word: str, why: str) -> None:
    """Also where every answer can be judged on its own: these rewards are not what the function says of the batch."""
    (tmp_path / "mine.py").write_text(SOURCE.replace("import helper", "") + MEAN)
    tally = Tally()
    place = f"{tmp_path / 'mine.py'}:{name}"
    rewarder = build_function_rewarder(place, seconds=1.0, batch_seconds=2.0, tally=tally)
    rewards = rewarder(build_items(["a", "x", "b"]))
    if name == "mean":
        assert [reward.value for reward in rewards] == [1.0, 1.0, 1.0]
    note = f"a call for 3 answers failed, and each was judged on its own: {why}"
    assert tally.problems == ([(word.removeprefix("calls_"), note)] if word else [])
    taken = tally.take()
    assert taken.counts == ({word: 1} if word else {})
    assert not tally.counts
    assert not tally.problems


def test_the_process_goes_with_the_rewarder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(prompts, completions): return [1.0] * len(completions)")
    rewarder = build_function_rewarder(f"{tmp_path / 'mine.py'}:f", seconds=1.0, batch_seconds=2.0)
    assert [r.value for r in rewarder(build_items(["a"]))] == [1.0]
    process = rewarder.args[0]._child  # type: ignore[attr-defined]
    assert process.poll() is None
    del rewarder
    gc.collect()
    assert process.wait(10) != 0


def test_what_the_function_started_goes_too(tmp_path: Path) -> None:
    """A hanging program that it waits for is killed with it."""
    (tmp_path / "mine.py").write_text(
        "import subprocess, sys\n"
        "def f(prompts, completions):\n"
        f"    program = subprocess.Popen(['sleep', '60'])\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(program.pid))\n"
        "    program.wait()\n"
    )
    rewarder = build_function_rewarder(f"{tmp_path / 'mine.py'}:f", seconds=0.5, batch_seconds=0.5)
    assert [r.status for r in rewarder(build_items(["a"]))] == ["timeout"]
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # a zombie waits for whoever inherits it


def test_mistakes_show_before_training(run: Callable[..., Told], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none\.py; expected FILE\.py:NAME"):
        build_function_rewarder(f"{tmp_path / 'none.py'}:f", seconds=1.0, batch_seconds=1.0)
    with pytest.raises(UserError, match=r"did not start: it has no function 'f' \(found: asks, dies, .*short\)"):
        run("f", "a")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="did not start: ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        build_function_rewarder(f"{tmp_path / 'broken.py'}:f", seconds=1.0, batch_seconds=1.0)


def test_numbers_of_other_libraries_are_numbers() -> None:
    import torch

    assert describe_value(np.float32(0.5)) == 0.5
    assert describe_value(torch.tensor(2)) == 2.0
    assert describe_value(np.array([0.25])[0]) == 0.25


def test_columns_are_those_that_a_function_takes() -> None:
    columns = {"a": [1], "b": [2]}
    assert select_columns(lambda prompts, completions, b: 0, columns) == {"b": [2]}  # noqa: ARG005
    assert select_columns(lambda prompts, completions, **c: 0, columns) == columns  # noqa: ARG005
