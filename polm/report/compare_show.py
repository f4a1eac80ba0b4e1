"""A comparison of two runs, shown in the terminal and as a page."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from polm.evals.statistics import Estimate
from polm.report.compare import METRICS, Metric, Row, describe_point, format_interval, format_number, start_sentence
from polm.report.compare_runs import Cost, Differences, RunDifference
from polm.report.escape import clean_text, esc, shorten
from polm.report.html import build_page
from polm.report.markup import Cell, build_details, build_paragraph, build_table, code_cell, number_cell, text_cell
from polm.report.tables import format_memory, format_seconds

SIGNS = {"better": "▲ ", "worse": "▼ ", "undecided": ""}
ABSENT = "not set"
MAX_VALUE = 60  # characters of a recipe's value in the terminal; the page has all


def _text(value: object, style: str = "") -> Text:
    """Names come from files: no markup is read in them, and control characters are made visible."""
    return Text(clean_text(str(value)), style=style)


def describe_differences_metric(metric: Metric, k: int) -> str:
    return f"{metric.title.replace('pass@k', f'pass@{k}')}, {metric.unit}"


def format_difference(row: Row) -> str:
    """ "▲ +1.2"; the mark only where an interval over seeds excludes zero."""
    assert row.comparison is not None
    mean = format_number(row.comparison.interval.mean_difference, row.metric, signed=True)
    return f"{SIGNS[row.verdict]}{mean}"


def describe_basis(found: Differences) -> str:
    """What the intervals rest on, in the words of the report."""
    labels = sorted({d.row.comparison.label for d in found.differences if d.row.comparison is not None})
    return f"{found.second} minus {found.first}, paired, 95 % interval; " + "; ".join(labels)


def describe_verdict(found: Differences) -> str:
    """How many of the averages differ; a null result reads as one."""
    averages = [d.row for d in found.differences if d.row.benchmark is None]
    counts = {verdict: sum(row.verdict == verdict for row in averages) for verdict in SIGNS}
    if all(row.comparison is not None and row.comparison.basis == "items" for row in averages):
        return "One common seed, so nothing is shown: another seed may turn the sign of any difference below."
    if not counts["better"] and not counts["worse"]:
        return f"No difference was shown in any of {len(averages)} averages over benchmarks."
    return (
        f"Of {len(averages)} averages over benchmarks, {found.second} is better in {counts['better']} and worse in "
        f"{counts['worse']}; the others show no difference. At 95 % about one in twenty excludes zero by chance."
    )


# ---- terminal ------------------------------------------------------------------------------------------------------


def build_comparison_tables(found: Differences) -> list[Table]:
    """Recipes, benchmarks, averages and costs, narrow enough for 80 columns."""
    tables = [_build_changes_table(found), _build_matches_table(found)]
    for arm in found.arms:
        table = Table(title=_text(f"{arm.label}: plain average of {_count_benchmarks(found)} benchmarks"))
        for heading in ("point", "metric", found.first, found.second, "difference"):
            is_number = heading not in ("point", "metric")
            table.add_column(_text(heading), justify="right" if is_number else "left")
        for one in found.differences:
            if one.row.arm == arm and one.row.benchmark is None:
                table.add_row(*_build_line(one, found.k))
        if table.row_count:
            tables.append(table)
    tables[-1].caption = _text(describe_basis(found))
    return [*tables, _build_costs_table(found)]


def _count_benchmarks(found: Differences) -> int:
    return sum(match.num_common > 0 for match in found.matches)


def _build_line(one: RunDifference, k: int) -> list[Text]:
    row = one.row
    style = {"better": "bold green", "worse": "bold red", "undecided": ""}[row.verdict]
    return [
        _text(row.point),
        _text(describe_differences_metric(row.metric, k)),
        _text(format_number(one.first.mean, row.metric)),
        _text(format_number(row.score.mean, row.metric)),
        _text(f"{format_difference(row)}\n({format_interval(row)})", style),
    ]


def _build_changes_table(found: Differences) -> Table:
    title = "fields of the recipe that differ" if found.changes else "the recipes do not differ"
    table = Table(title=_text(title), show_header=bool(found.changes))
    for heading in ("field", found.first, found.second):
        table.add_column(_text(heading), overflow="fold")
    for change in found.changes:
        values = (shorten(ABSENT if v is None else v, MAX_VALUE) for v in (change.first, change.second))
        table.add_row(_text(change.field), *map(_text, values))
    return table


def _build_matches_table(found: Differences) -> Table:
    table = Table(title=_text(f"benchmarks, items over {len(found.seeds)} common seeds"))
    table.add_column("benchmark")
    for heading in (found.first, found.second, "common"):
        table.add_column(_text(heading), justify="right")
    table.add_column("data")
    for m in found.matches:
        table.add_row(_text(m.name), f"{m.num_first:,}", f"{m.num_second:,}", f"{m.num_common:,}", _text(m.source))
    return table


def _format_cost(cost: Cost | None) -> tuple[str, str, str]:
    if cost is None:
        return "–", "–", "–"
    return f"{cost.num_stages}", format_seconds(cost.seconds), format_memory(cost.peak_mb)


def _build_costs_table(found: Differences) -> Table:
    table = Table(title="cost by stage: how many, wall time in all, largest process")
    table.add_column("stage")
    for label in (found.first, found.second):
        for what in ("n", "time", "memory"):
            table.add_column(_text(f"{label}\n{what}"), justify="right")
    for kind, (first, second) in found.costs.items():
        table.add_row(_text(kind), *_format_cost(first), *_format_cost(second))
    return table


# ---- page ----------------------------------------------------------------------------------------------------------


def build_comparison_page(found: Differences) -> str:
    """The same as one self-contained page, with every benchmark and all intervals."""
    sections = [
        ("verdict", "What is shown", _section_verdict(found)),
        ("differences", "Differences", _section_differences(found)),
        ("recipe", "Recipes", _section_changes(found)),
        ("benchmarks", "What was compared", _section_matches(found)),
        ("costs", "Costs", _section_costs(found)),
    ]
    lead = f"{len(found.arms)} common arms, {len(found.seeds)} common seeds; a difference is the second minus the first"
    return build_page("polm comparison", f"{found.second} against {found.first}", lead, sections)


def _section_verdict(found: Differences) -> str:
    notes = "".join(build_paragraph(note, "callout") for note in found.notes)
    return f'<p class="claim">{esc(describe_verdict(found))}</p>{notes}'


def _build_score_cell(score: Estimate, metric: Metric) -> Cell:
    bounds = ""
    if math.isfinite(score.low95):
        bounds = f"{format_number(score.low95, metric)} to {format_number(score.high95, metric)}"
    return Cell(f"{esc(format_number(score.mean, metric))}<small>{esc(bounds)}</small>", "num")


def _section_differences(found: Differences) -> str:
    parts = [
        build_paragraph(
            f"Δ is {describe_basis(found)}. ▲ and ▼ mark intervals over seeds that exclude zero; a difference without "
            "a mark shows nothing. Scores are over the common items and seeds; small print is a 95 % interval.",
            "quiet",
        )
    ]
    for point in found.points:
        parts.append(f"<h3>{esc(start_sentence(describe_point(point)))}</h3>")
        here = [one for one in found.differences if one.row.point == point]
        caption = f"Plain average of {_count_benchmarks(found)} benchmarks"
        parts.append(_build_page_table(found, [one for one in here if one.row.benchmark is None], caption))
        for key in METRICS:
            single = [one for one in here if one.row.benchmark is not None and one.row.metric.key == key]
            if single:
                title = f"By benchmark: {describe_differences_metric(METRICS[key], found.k)}"
                parts.append(build_details(title, _build_page_table(found, single, "")))
    return "".join(parts)


def _build_page_table(found: Differences, lines: list[RunDifference], caption: str) -> str:
    body = []
    for one in lines:
        row = one.row
        what = row.benchmark if row.benchmark is not None else describe_differences_metric(row.metric, found.k)
        difference = f"{esc(format_difference(row))}<small>{esc(format_interval(row))}</small>"
        body.append(
            [
                text_cell(row.arm.label),
                text_cell(what),
                _build_score_cell(one.first, row.metric),
                _build_score_cell(row.score, row.metric),
                Cell(difference, f"num {row.verdict}"),
                number_cell(row.num_seeds),
            ]
        )
    headings = ["arm", "what", f">{found.first}", f">{found.second}", ">Δ", ">seeds"]
    return build_table(headings, body, caption=caption)


def _section_changes(found: Differences) -> str:
    if not found.changes:
        return build_paragraph("The recipes do not differ.")
    body = [
        [code_cell(c.field), *(text_cell(ABSENT, "quiet") if v is None else code_cell(v) for v in (c.first, c.second))]
        for c in found.changes
    ]
    return build_table(["field", found.first, found.second], body)


def _section_matches(found: Differences) -> str:
    body = [
        [
            text_cell(match.name),
            number_cell(match.num_first),
            number_cell(match.num_second),
            number_cell(match.num_common),
            text_cell(match.source),
        ]
        for match in found.matches
    ]
    words = (
        f"Items over the common seeds ({', '.join(map(str, found.seeds))}). Two items are the same if benchmark, id, "
        "question and answer are; the last column is what the manifests of the data say."
    )
    headings = ["benchmark", f">{found.first}", f">{found.second}", ">common", "data"]
    return build_paragraph(words, "quiet") + build_table(headings, body)


def _section_costs(found: Differences) -> str:
    body = [
        [text_cell(kind), *(Cell(esc(text), "num") for cost in costs for text in _format_cost(cost))]
        for kind, costs in found.costs.items()
    ]
    headings = [f">{label}: {what}" for label in (found.first, found.second) for what in ("stages", "time", "memory")]
    words = (
        "Wall time of all finished stages of a kind, and the largest process among them; a shared artifact counts once."
    )
    return build_paragraph(words, "quiet") + build_table(["stage", *headings], body)
