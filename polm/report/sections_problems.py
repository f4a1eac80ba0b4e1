"""The section of what went wrong: samples that nobody could judge, and what was dropped or cut, each with its reason.

The counts are the ledgers'; the answers that could not be judged are the first ones that a stage noted.
"""

from __future__ import annotations

from collections.abc import Sequence

from polm.report.compare import compute_arm
from polm.report.escape import esc
from polm.report.load import Node, Run
from polm.report.losses import Loss, list_losses
from polm.report.made import Problem
from polm.report.markup import Cell, build_details, build_paragraph, build_table, code_cell, number_cell
from polm.report.sections_samples import build_text

MAX_SHOWN = 6
MAX_ROWS = 10  # a stage with more reasons than this has a fold of its own
MAX_PROBLEM_TEXT = 600


def _build_problem(problem: Problem) -> str:
    note = f": {problem.note}" if problem.note else ""
    place = f" (update {problem.update})" if problem.update is not None else ""
    texts = (("prompt", problem.prompt), ("answer", problem.text)) if problem.prompt else ()
    return (
        f'<article class="item"><p class="verdict wrong">? {esc(problem.status)}{esc(note)}{place}</p>'
        f"{''.join(f'<h5>{name}</h5>{build_text(text, MAX_PROBLEM_TEXT)}' for name, text in texts)}</article>"
    )


def _build_unjudged(nodes: Sequence[Node]) -> str:
    """The first answers that could not be judged, and calls and votes that failed, of each stage that noted any."""
    parts = []
    for node in nodes:
        problems = node.made.problems
        if problems:
            shown = problems[:MAX_SHOWN]
            title = f"{compute_arm(node).label}, {node.leaf}: what could not be judged (the first {len(shown)})"
            parts.append(build_details(title, "".join(map(_build_problem, shown))))
    return "".join(parts)


def _describe_loss(loss: Loss) -> str:
    stages = f" (in {loss.num_stages} stages)" if loss.num_stages > 1 else ""
    return f"{esc(loss.name.replace('_', ' '))}{stages}<small>{esc(loss.meaning)}</small>"


def _build_losses(losses: Sequence[Loss]) -> str:
    body = [[code_cell(loss.leaf), number_cell(loss.count), Cell(_describe_loss(loss), "reason")] for loss in losses]
    return build_table(["stage", ">number", "what, and what it means"], body)


def section_problems(run: Run) -> str:
    """What was left out on the way, why, and how often."""
    if not any(node.status == "done" for node in run.nodes):
        return ""
    if not list_losses(run):
        return build_paragraph("Nothing: no finished stage has dropped, cut or failed to judge anything.")
    lead = build_paragraph(
        "How to read: a row is one reason for which samples, examples or tokens were left out or not judged, summed "
        "over all stages of that name. What is not listed here was zero; the ledger has all counts. What could not be "
        "judged counts neither as right nor as wrong.",
        "quiet",
    )
    by_leaf: dict[str, list[Loss]] = {}
    for loss in list_losses(run):
        by_leaf.setdefault(loss.leaf, []).append(loss)
    short = [loss for losses in by_leaf.values() if len(losses) <= MAX_ROWS for loss in losses]
    folds = [
        build_details(f"{leaf}: {len(losses)} reasons", _build_losses(losses))
        for leaf, losses in by_leaf.items()
        if len(losses) > MAX_ROWS
    ]
    return lead + (_build_losses(short) if short else "") + "".join(folds) + _build_unjudged(run.nodes)
