"""Processes to be killed: forked from a server that has torch loaded, as starting from nothing takes seconds."""

from __future__ import annotations

import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

CHILD = str(Path(__file__).with_name("child.py"))


@pytest.fixture
def start_child() -> Iterator[Callable[..., ForkServerProcess]]:
    """start_child(**order) runs child.py with that ORDER; what still lives at the end of the test is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["polm.flywheel.runner"])
    children: list[ForkServerProcess] = []

    def start(**order: Any) -> ForkServerProcess:
        child = context.Process(target=runpy.run_path, args=(CHILD,), kwargs={"init_globals": {"ORDER": order}})
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()
