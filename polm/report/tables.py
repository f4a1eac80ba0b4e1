"""Tables for the terminal: benchmarks by arm and cycle at each point of the pipeline, and the cost of the stages."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polm.report.compare import (
    CONTROL_NAME,
    METRICS,
    Arm,
    Row,
    Rows,
    compute_rows,
    describe_point,
    format_interval,
    format_number,
)
from polm.report.escape import clean_text
from polm.report.load import Node, Run
from polm.report.losses import list_losses
from polm.report.rounds import Rounds, describe_rounds, name_place


def _build_text(value: object, style: str = "") -> Text:
    """Names come from files: no markup is read in them, and control characters are made visible."""
    return Text(clean_text(str(value)), style=style)


def build_score_text(row: Row | None) -> Text:
    return Text("–" if row is None else format_number(row.score.mean, row.metric))


def _build_difference_cell(row: Row | None) -> Text:
    if row is None or row.comparison is None:
        return Text("control" if row is not None and row.arm.is_control else "–", style="dim")
    style = {"better": "bold green", "worse": "bold red", "undecided": ""}[row.verdict]
    mean = format_number(row.comparison.interval.mean_difference, row.metric, signed=True)
    sign = {"better": "▲ ", "worse": "▼ ", "undecided": ""}[
        row.verdict
    ]  # as on the page; not every terminal has colours
    return Text(f"{sign}{mean} ({format_interval(row)})", style=style)


def describe_metric(key: str, rows: Rows) -> str:
    return METRICS[key].title.replace("pass@k", f"pass@{rows.k}")


def list_metrics(rows: Rows) -> list[str]:
    return [key for key in METRICS if any(row.metric.key == key for row in rows.rows)]


def list_arms(rows: Rows, point: str) -> list[Arm]:
    present = {row.arm for row in rows.rows if row.point == point}
    return [arm for arm in rows.arms if arm in present]


def describe_basis(rows: Rows) -> str:
    """What the intervals rest on, in one line."""
    bases = {row.comparison.basis: row.comparison.label for row in rows.rows if row.comparison is not None}
    if not bases:
        return "there is no arm that can be compared with the control"
    labels = sorted({row.comparison.label for row in rows.rows if row.comparison is not None})
    return f"difference to {CONTROL_NAME} of cycle 0, paired, 95 % interval; " + "; ".join(labels)


def build_average_table(rows: Rows, point: str) -> Table:
    """One row an arm, one column a metric: the plain average over benchmarks, and below it the difference to ntp."""
    table = Table(
        title=_build_text(f"{describe_point(point)}: average of {len(rows.benchmarks)} benchmarks"),
        caption=_build_text(describe_basis(rows)),
    )
    table.add_column("arm")
    metrics = list_metrics(rows)
    for key in metrics:
        table.add_column(f"{describe_metric(key, rows)}, {METRICS[key].unit}", justify="right")
    for arm in list_arms(rows, point):
        cells = []
        for key in metrics:
            row = rows.get(point, arm, None, key)
            cells.append(build_score_text(row).append("\n").append_text(_build_difference_cell(row)))
        table.add_row(_build_text(arm.label), *cells)
    return table


def build_summary_table(rows: Rows) -> Table:
    """The run on one screen: one row an arm, one column a point, greedy accuracy with its difference to ntp."""
    table = Table(
        title=_build_text(f"greedy accuracy, %, average of {len(rows.benchmarks)} benchmarks"),
        caption=_build_text(describe_basis(rows)),
    )
    table.add_column("arm")
    for point in rows.points:
        table.add_column(_build_text(describe_point(point)), justify="right")
    for arm in rows.arms:
        cells = []
        for point in rows.points:
            row = rows.get(point, arm, None, "greedy")
            cells.append(build_score_text(row).append("\n").append_text(_build_difference_cell(row)))
        table.add_row(_build_text(arm.label), *cells)
    return table


def build_rounds_summary(rounds: Rounds) -> Table:
    """A run without a control: one row an evaluation, with its difference to the first one."""
    caption = _build_text(describe_rounds(rounds))
    table = Table(title="average of the benchmarks, difference to the first", caption=caption)
    table.add_column("model")
    metrics = rounds.list_metrics()
    for key in metrics:
        title = METRICS[key].title.replace("pass@k", f"pass@{rounds.k}")
        table.add_column(f"{title}, {METRICS[key].unit}", justify="right")
    for place in rounds.places:
        cells = []
        for key in metrics:
            row = rounds.rows.get((place, key))
            cell = build_score_text(row)
            if place != rounds.places[0]:
                cell.append("\n").append_text(_build_difference_cell(row))
            cells.append(cell)
        table.add_row(_build_text(name_place(place)), *cells)
    return table


def build_problems_table(run: Run) -> Table | None:
    """What was dropped, cut or not judged; None where nothing was."""
    losses = list_losses(run)
    if not losses:
        return None
    table = Table(title="what was left out")
    for heading in ("stage", "count"):
        table.add_column(heading)
    table.add_column("number", justify="right")
    table.add_column("what it means")
    for loss in losses:
        table.add_row(_build_text(loss.leaf), _build_text(loss.name), f"{loss.count:,.0f}", _build_text(loss.meaning))
    return table


def build_benchmark_table(rows: Rows, point: str, metric: str) -> Table:
    """One row a benchmark, one column an arm, one metric."""
    title = f"{describe_point(point)}: {describe_metric(metric, rows)}, {METRICS[metric].unit}"
    table = Table(title=_build_text(title))
    table.add_column("benchmark")
    arms = list_arms(rows, point)
    for arm in arms:
        table.add_column(_build_text(arm.label), justify="right")
    for benchmark in rows.benchmarks:
        cells = []
        for arm in arms:
            row = rows.get(point, arm, benchmark, metric)
            cell = build_score_text(row)
            if row is not None and row.comparison is not None:
                cell.append("  ").append_text(_build_difference_cell(row))
            cells.append(cell)
        table.add_row(_build_text(benchmark), *cells)
    return table


def format_seconds(seconds: float | None) -> str:
    """ "0.8 s", "12 s", "4 min 10 s", "2 h 05 min"; "–" for what is not known."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_memory(megabytes: float | None) -> str:
    if megabytes is None:
        return "–"
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def compute_core_seconds(node: Node) -> float | None:
    """Seconds times threads: an upper bound of the processor time; None if the threads are not known (0: all)."""
    manifest = node.manifest
    if manifest is None or manifest.seconds is None or not manifest.threads:
        return None
    return manifest.seconds * manifest.threads


def build_stage_table(run: Run) -> Table:
    """One row a node: its status and what it cost."""
    table = Table(title=_build_text(f"stages of {run.name}"))
    table.add_column("node")
    table.add_column("status")
    for heading in ("time", "core-seconds", "peak memory"):
        table.add_column(heading, justify="right")
    for node in run.nodes:
        style = {"done": "green", "shared": "dim", "pending": "yellow"}[node.status]
        cost = compute_core_seconds(node)
        table.add_row(
            _build_text(node.id),
            Text(node.status, style=style),
            format_seconds(node.manifest.seconds if node.manifest else None),
            "–" if cost is None else f"{cost:,.0f}",
            format_memory(node.manifest.peak_rss_mb if node.manifest else None),
        )
    return table


def build_tables(run: Run) -> list[Table]:
    """All benchmark tables: for every point the average of each metric, then greedy scores by benchmark."""
    rows = compute_rows(run)
    tables: list[Table] = []
    for point in rows.points:
        tables.append(build_average_table(rows, point))
        tables.append(build_benchmark_table(rows, point, "greedy"))
    return tables


def render_tables(run: Run, *, width: int = 120) -> str:
    """The tables as plain text without colours, for a file or a pipe."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    for table in build_tables(run):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
