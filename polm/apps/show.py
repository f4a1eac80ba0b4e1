"""What the terminal shows while a stage runs, plain lines where it is no terminal; numbers in words; a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from polm.flywheel.estimate import estimate_node, estimate_peak, sum_known
from polm.flywheel.runner import Plan
from polm.flywheel.store import is_finished

PLAIN_SECONDS = 10.0  # between two plain progress lines of a stage


def describe_line(line: Mapping[str, Any]) -> str:
    """The moving numbers of a metrics line in words."""
    parts = []
    for name, form in (("loss", "loss {:.4g}"), ("rl/reward", "reward {:.3f}"), ("tokens_per_second", "{:,.0f} tok/s")):
        if isinstance(line.get(name), int | float):
            parts.append(form.format(line[name]))
    if isinstance(line.get("eta_seconds"), int | float):
        parts.append(f"{line['eta_seconds']:.0f} s left")
    return ", ".join(parts)


class StageBar:
    """Progress of a single stage: a callable for `Context.report`. Use as a context manager."""

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[words]}"), console=console, transient=True)
        self.task: TaskID | None = None
        self.last = time.monotonic()

    def __enter__(self) -> StageBar:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, line: Mapping[str, Any]) -> None:
        done, total = int(line["update"]), int(line["num_updates"])
        words = describe_line(line)
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task(self.name, total=total, words="")
            self.bar.update(self.task, completed=done, total=total, words=words)
        elif time.monotonic() - self.last > PLAIN_SECONDS or done == total:
            self.last = time.monotonic()
            self.console.print(f"{self.name} {done}/{total} {words}", markup=False, highlight=False, soft_wrap=True)


def describe_summary(summary: Mapping[str, Any]) -> str:
    """The one or two numbers of a manifest that people look for."""
    shown = {
        "mean/greedy": "greedy {:.1%}",
        "mean/pass@1": "sampled {:.1%}",
        "last/loss": "loss {:.4g}",
        "last/rl/reward": "reward {:.3f}",
        "last/dpo/accuracy": "accuracy {:.1%}",
        "pairs": "{} pairs",
        "agreement": "agreement {:.1%}",
        "conversations": "{} conversations",
        "vocabulary": "{} tokens",
        "mean_logprob": "mean log p {:.3f}",
        "mean_weight": "mean weight {:.3f}",
        "mean_delta": "mean delta {:+.3f}",
    }
    values = [form.format(summary[name]) for name, form in shown.items() if isinstance(summary.get(name), int | float)]
    return ", ".join(values)


def print_plan(console: Console, plan: Plan, workers: int) -> None:
    """The graph with its arithmetic."""
    table = Table(title=f"{plan.recipe.name}: {len(plan.graph)} stages")
    for name in ("stage", "from", "updates", "tokens", "samples", "memory", "status"):
        table.add_column(name, justify="right" if name in ("updates", "tokens", "samples", "memory") else "left")
    estimates = {node.id: estimate_node(node, plan.recipe) for node in plan.graph.values()}
    for node in plan.graph.values():
        e = estimates[node.id]
        sources = ", ".join(f"{role}={source}" for role, source in {**node.inputs, **node.external}.items())
        numbers = [f"{v:,}" if v is not None else "·" for v in (e.updates, e.tokens, e.samples)]
        memory = f"{e.memory_bytes / 1e6:,.0f} MB" if e.memory_bytes is not None else "·"
        done = "done" if is_finished(plan.folder(node.id)) else "to do"
        table.add_row(escape(node.id), escape(sources), *numbers, memory, done)
    console.print(table)
    updates, tokens = (sum_known(getattr(e, name) for e in estimates.values()) for name in ("updates", "tokens"))
    samples = sum_known(e.samples for e in estimates.values())
    peak = estimate_peak(plan.graph, plan.recipe, workers)
    memory = f"about {peak / 1e9:.1f} GB with {workers} workers" if peak is not None else "unknown (base from outside)"
    console.print(
        f"in all: {updates:,} updates, at most {tokens:,} training tokens, {samples:,} RL and pair samples; "
        f"memory {memory}; a dot: depends on the length of the data",
        soft_wrap=True,
    )
