"""Runs in a process of its own, so that it can be killed. ORDER is set by the test that starts it (see conftest.py).

ORDER["stage"]: run one stage as a worker of the runner does, and die at ORDER["die"] = (moment, number).
ORDER["run"]: run a recipe as `polm run` does, and write what came of it to ORDER["report"].
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from polm.config import validate
from polm.engine import checkpoint, fit
from polm.errors import UserError
from polm.flywheel import runner, store
from polm.flywheel.kinds import build_any_graph, find_kind
from polm.models import loading
from polm.rewards import sources
from polm.rewards.verify import Verdict
from polm.stages import common, pairs

ORDER: dict[str, Any] = globals()["ORDER"]  # put there by runpy


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def judge_by_length(items: Any, *, seconds: float = 3.0) -> list[Verdict]:
    """As in the tests' conftest: an even number of characters is right."""
    del seconds
    return [Verdict("right" if len(item.completion) % 2 == 0 else "wrong", item.completion) for item in items]


def arm(moment: str, number: int) -> None:
    """Arrange that the process dies at the `number`-th occurrence of a moment, leaving what a kill leaves then."""
    calls: list[int] = []

    def on_call(
        owner: Any,
        name: str,
        last_act: Callable[..., object] | None = None,
        after: bool = False,
        counts: Callable[..., bool] = lambda *_: True,
    ) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.extend([1] * counts(*args))
            if len(calls) < number:
                return real(*args, **kwargs)
            if after:
                real(*args, **kwargs)
            if last_act is not None:
                last_act(*args)
            return die()

        setattr(owner, name, counted)

    def write_half_a_line(log: Any, line: Any) -> None:
        text = json.dumps(line)
        log._handle.write(text[: len(text) // 2])
        log._handle.flush()

    def write_half_a_file(tensors: Any, path: Path) -> None:
        del tensors
        path.write_bytes(b"\x00" * 40)

    moments: dict[str, Callable[[], None]] = {
        "in a line of the log": lambda: on_call(fit.MetricsLog, "write", write_half_a_line),
        "in a file of a checkpoint": lambda: on_call(checkpoint, "save_file", write_half_a_file),
        "before a checkpoint's rename": lambda: on_call(
            Path, "replace", counts=lambda path, *_: path.name.startswith(f".{checkpoint.PREFIX}")
        ),
        "before the older checkpoint goes": lambda: on_call(checkpoint, "list_checkpoints"),
        "in the scores of the reference": lambda: on_call(common, "save_file", write_half_a_file),
        "before the model's rename": lambda: on_call(loading, "_forget_attention"),
        "before the checkpoints go": lambda: on_call(common, "remove_checkpoints"),
        "after the checkpoints went": lambda: on_call(common, "remove_checkpoints", after=True),
        "before the manifest": lambda: on_call(store, "write_manifest"),
        "in the claim": lambda: on_call(store, "_claim", lambda folder, _: make_empty_claim(folder)),
    }
    moments[moment]()


def make_empty_claim(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / store.CLAIM).touch()


def run_recipe() -> None:
    recipe = validate(find_kind(ORDER["run"], "the test"), ORDER["run"], "the test")
    plan = runner.build_plan(recipe, build_any_graph(recipe), Path(ORDER["run_dir"]))
    if ORDER["fork"]:  # workers start at once; torch is here already
        real = multiprocessing.get_context
        runner.multiprocessing = types.SimpleNamespace(get_context=lambda _: real("fork"))  # type: ignore[assignment]
    events: list[list[str]] = []
    told: dict[str, Any] = {"error": "", "events": events}
    failed = 0.0
    try:
        runner.run_graph(plan, workers=2, watch=lambda e: events.append([e.kind, e.node.id]))
    except (UserError, KeyboardInterrupt) as error:
        failed = time.monotonic()
        told["error"] = f"{type(error).__name__}: {error}"
    told["seconds_after_failure"] = time.monotonic() - failed
    told["alive"] = [p.pid for p in multiprocessing.active_children()]
    Path(ORDER["report"]).write_text(json.dumps(told))


torch.set_num_threads(1)
if "stage" in ORDER:
    for module in (pairs, sources):
        module.verify_many = judge_by_length  # type: ignore[assignment]
    if ORDER.get("die"):
        arm(*ORDER["die"])
    runner.run_node(*ORDER["stage"])
else:
    run_recipe()
