"""What judges said in a run: how many labels, how sure, with which bias; a table for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from polm.report.escape import clean_text
from polm.report.load import Node, Run
from polm.report.markup import build_paragraph, build_table, code_cell, text_cell
from polm.report.sections_made import build_verdicts

STAGES = ("judge", "constitution")
NOTHING = "–"
WITHOUT = ("inconsistent", "unparsed", "timeout", "error")
# (heading, how to read it)
COLUMNS = (
    ("labels", "pairs (or answers, or revised conversations) that the stage wrote"),
    ("questions", "pairs or answers that the judge was asked about"),
    (
        "no verdict, %",
        "questions without a verdict: unparsed, timed out, failed, or two orders that must agree and do not",
    ),
    ("mean grade", "on the judge's own scale"),
    ("first place, %", "verdicts for the answer that was shown first; 50 without a bias"),
    ("contradictory, %", "pairs whose two orders prefer different answers"),
    ("agreement, %", "with the labels that were given before"),
)


def list_judges(run: Run) -> list[Node]:
    """The finished stages in which a judge spoke."""
    return [node for node in run.nodes if node.spec.stage in STAGES and node.manifest is not None]


def build_row(node: Node) -> list[str]:
    """The cells of COLUMNS in words; a dash for what the stage does not have."""
    assert node.manifest is not None
    summary, ledger = node.manifest.summary, node.manifest.ledger
    labels = next((summary[name] for name in ("pairs", "conversations", "answers") if name in summary), None)
    if node.spec.stage == "constitution":
        asked = sum(n for name, n in ledger.items() if name.startswith(("critiques_", "revisions_")))
        failed = sum(ledger.get(f"{what}_{s}", 0) for what in ("critiques", "revisions") for s in ("timeout", "error"))
    else:
        failed = sum(ledger.get(name, 0) for name in WITHOUT)
        asked = failed + sum(ledger.get(name, 0) for name in ("preferred", "tied", "graded"))
    return [
        _format(labels, "{:,.0f}"),
        _format(asked, "{:,.0f}"),
        _format(100 * failed / asked if asked else None, "{:.1f}"),
        _format(summary.get("grade"), "{:.2f}"),
        *(_share(summary, name) for name in ("first_position", "inconsistent", "agreement")),
    ]


def list_used(rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns that say something in at least one row."""
    return [i for i in range(len(COLUMNS)) if any(row[i] != NOTHING for row in rows)]


def _format(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else NOTHING


def _share(summary: Mapping[str, Any], name: str) -> str:
    """A share in percent with its interval."""
    values = [summary.get(key) for key in (name, f"{name}/low95", f"{name}/high95")]
    if not all(isinstance(value, int | float) for value in values):
        return NOTHING
    mean, low, high = (100.0 * float(value) for value in values if value is not None)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def section_judges(run: Run) -> str:
    """The judges of a run; empty where there is none."""
    nodes = list_judges(run)
    if not nodes:
        return ""
    rows = [build_row(node) for node in nodes]
    used = list_used(rows)
    words = "; ".join(f"{COLUMNS[i][0]}: {COLUMNS[i][1]}" for i in used)
    lead = f"How to read: {words}. Intervals are Wilson's, 95 %."
    table = build_table(
        ["node", *(f">{COLUMNS[i][0]}" for i in used)],
        [
            [code_cell(node.id), *(text_cell(row[i], "num") for i in used)]
            for node, row in zip(nodes, rows, strict=True)
        ],
    )
    return build_paragraph(lead, "quiet") + table + build_verdicts(run)


def build_judges_table(run: Run) -> Table | None:
    """The same for the terminal, without columns that say nothing; None where no judge has spoken."""
    nodes = list_judges(run)
    if not nodes:
        return None
    table = Table(title="judges", caption="95 % intervals (Wilson)")
    table.add_column("node")
    rows = [build_row(node) for node in nodes]
    used = list_used(rows)
    for i in used:
        table.add_column(COLUMNS[i][0], justify="right")
    for node, row in zip(nodes, rows, strict=True):
        table.add_row(Text(clean_text(node.id)), *(row[i] for i in used))
    return table
