"""Sections about what came out: the headline in words, the graph of stages, and the benchmarks."""

from __future__ import annotations

import json
import math

from polm.report.compare import (
    CONTROL,
    CONTROL_NAME,
    METRICS,
    NUM_RESAMPLES,
    Arm,
    Row,
    Rows,
    compute_rows,
    describe_point,
    describe_row,
    describe_seeds,
    format_interval,
    format_number,
    get_lead_arm,
    start_sentence,
)
from polm.report.escape import esc
from polm.report.graph import build_graph
from polm.report.load import Run
from polm.report.markup import (
    Cell,
    build_details,
    build_grid,
    build_paragraph,
    build_table,
    code_cell,
    compute_arm_styles,
    format_count,
    text_cell,
)
from polm.report.plots import IntervalMark, Line, build_interval_plot, build_line_plot
from polm.report.rounds import has_control
from polm.report.tables import (
    compute_core_seconds,
    describe_basis,
    describe_metric,
    format_memory,
    format_seconds,
    list_arms,
    list_metrics,
)

ONE_SEED = (
    "This run has one seed. One seed proves nothing about training noise: the intervals below come from the items "
    "alone, and another seed can turn the sign of any difference. Run at least three seeds before believing one."
)


# ---- headline ------------------------------------------------------------------------------------------------------


def _describe_difference(row: Row | None, where: str) -> str:
    if row is None or row.comparison is None:
        return ""
    mean = format_number(row.comparison.interval.mean_difference, row.metric, signed=True)
    return f"{mean} {row.metric.difference_unit} {where}"


def _describe_nothing(run: Run, rows: Rows) -> str:
    """Why nothing is compared: it is not there yet, the recipe has the control alone, or it evaluates nothing."""
    num_done = sum(node.status != "pending" for node in run.nodes)
    done = f"{num_done} of {len(run.nodes)} stages are done"
    if num_done < len(run.nodes):
        return f"Nothing to compare yet: {done}."
    if not any(node.spec.stage == "eval" for node in run.nodes):
        return f"{done}. The recipe evaluates nothing, so nothing says whether the model became better; set eval."
    scores = [
        f"{format_number(row.score.mean, row.metric)} % {words}"
        for point, words in (("base", "as a base model"), ("rl", "after RL"))
        if (row := rows.get(point, CONTROL, None, "greedy")) is not None
    ]
    found = f" Greedy accuracy: {' and '.join(scores)}." if scores else ""
    return f"{done}, and no arm beside {CONTROL_NAME}, so nothing is compared.{found}"


def _build_claim(run: Run, rows: Rows, lead: Arm | None) -> str:
    """The one sentence in large type."""
    if lead is None:
        return _describe_nothing(run, rows)
    shown = [
        (rows.get(point, lead, None, "greedy"), words)
        for point, words in (("base", "as a base model"), ("rl", "after RL"))
    ]
    parts = [part for part in (_describe_difference(row, words) for row, words in shown) if part]
    compared = [row for row, _ in shown if row is not None and row.comparison is not None]
    if not parts:
        return f"{lead.label} can be compared with {CONTROL_NAME} only in part so far."
    if any(row.comparison is not None and row.comparison.basis == "items" for row in compared):
        verdict = "one seed, so nothing is shown"
    elif all(row.verdict == "undecided" for row in compared):
        verdict = "no difference was shown"
    else:
        verdict = ", ".join(
            f"{ {'undecided': 'no difference shown'}.get(row.verdict, row.verdict) } {words}"
            for row, words in shown
            if row is not None and row.comparison is not None
        )
    return f"{lead.label} against {CONTROL_NAME}: {' and '.join(parts)}. {start_sentence(verdict)}."


def _build_statements(rows: Rows, lead: Arm) -> str:
    """The lead arm's comparisons as sentences: base and after RL, greedy and sampled, and the likelihood."""
    wanted = [("base", "greedy"), ("base", "nll"), ("rl", "greedy"), ("rl", "pass@1")]
    found = [rows.get(point, lead, None, metric) for point, metric in wanted]
    sentences = [describe_row(row) for row in found if row is not None and row.comparison is not None]
    return "<ul class=statements>" + "".join(f"<li>{esc(sentence)}</li>" for sentence in sentences) + "</ul>"


def build_tiles(run: Run) -> str:
    """The size and the cost of a run in a few numbers."""
    rows = compute_rows(run)
    finished = [node for node in run.nodes if node.status == "done" and node.manifest is not None]
    seconds = sum(node.manifest.seconds or 0.0 for node in finished if node.manifest)
    core = sum(compute_core_seconds(node) or 0.0 for node in finished)
    num_done = sum(node.status != "pending" for node in run.nodes)
    num_tokens = sum(float(node.metrics[-1].get("tokens", 0) or 0) for node in finished if node.metrics)
    tiles = [
        ("stages done", f"{num_done} of {len(run.nodes)}"),
        ("seeds", str(len(run.seeds)) if run.seeds else "–"),
        ("arms", str(len({arm.name for arm in compute_arm_styles(run)})) or "–"),
        ("benchmarks", str(len(rows.benchmarks))),
        ("stage time", format_seconds(seconds)),
        ("core-seconds", format_count(core)),
        ("tokens trained on", format_count(num_tokens)),
    ]
    cells = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _build_marks(run: Run, rows: Rows, point: str, metric: str) -> list[IntervalMark]:
    styles = compute_arm_styles(run)
    marks = []
    for arm in rows.arms:
        row = rows.get(point, arm, None, metric)
        if row is None or row.comparison is None:
            continue
        interval, scale = row.comparison.interval, row.metric.scale
        marks.append(
            IntervalMark(
                arm.label,
                interval.mean_difference * scale,
                interval.low95 * scale,
                interval.high95 * scale,
                styles.get(arm, (5, 0))[0],
            )
        )
    return marks


def _describe_bases(rows: Rows, point: str, metric: str) -> str:
    """What a plot's intervals rest on, where that is not the same number of seeds, more than one, for each row."""
    found = [rows.get(point, arm, None, metric) for arm in rows.arms]
    counts = [len(row.comparison.differences_by_seed) for row in found if row and row.comparison]
    if min(counts) > 1:
        return "" if min(counts) == max(counts) else f"Over {describe_seeds(counts)}."
    where = "Over items only" if max(counts) == 1 else f"Over {describe_seeds(counts)}, with one seed over items only"
    return f"{where}: one seed proves nothing about training noise."


def _build_difference_plots(run: Run, rows: Rows, wanted: list[tuple[str, str]]) -> str:
    plots = []
    for point, metric in wanted:
        marks = _build_marks(run, rows, point, metric)
        if marks:
            kind = METRICS[metric]
            plots.append(
                build_interval_plot(
                    marks,
                    title=f"{start_sentence(describe_point(point))}: {describe_metric(metric, rows)}",
                    x_label=f"difference to {CONTROL_NAME}, {kind.difference_unit}",
                    how_to_read=(
                        "A row is an arm's average over benchmarks minus the control's, with its 95 % interval; "
                        "touching the dashed line means that no difference is shown. "
                        f"{'Right' if kind.higher_is_better else 'Left'} is better. "
                        f"{_describe_bases(rows, point, metric)}"
                    ),
                )
            )
    return build_grid(plots)


def section_headline(run: Run) -> str:
    """What the run says about the arm against the control, in words; a null result reads as a null result."""
    rows = compute_rows(run)
    lead = get_lead_arm(rows)
    parts = [f'<p class="claim">{esc(_build_claim(run, rows, lead))}</p>']
    if len(run.seeds) == 1:
        parts.append(f'<p class="callout">{esc(ONE_SEED)}</p>')
    if lead is not None:
        parts.append(_build_statements(rows, lead))
        parts.append(_build_difference_plots(run, rows, [("base", "greedy"), ("rl", "greedy")]))
        num_comparisons = sum(row.comparison is not None for row in rows.rows)
        parts.append(
            build_paragraph(
                f"This page holds {num_comparisons} comparisons. At 95 % about one in twenty of them excludes zero by "
                "chance, so a single one picked out of the tables is a hint and no result.",
                "quiet",
            )
        )
    parts.append(build_tiles(run))
    if run.headline:
        recorded = run.headline if isinstance(run.headline, str) else json.dumps(run.headline, indent=2)
        parts.append(build_details("What the runner recorded as its headline", f"<pre>{esc(recorded)}</pre>"))
    return "".join(parts)


# ---- graph ---------------------------------------------------------------------------------------------------------


def _build_cost_table(run: Run) -> str:
    longest = max((node.manifest.seconds or 0.0 for node in run.nodes if node.manifest), default=0.0) or 1.0
    body = []
    for node in run.nodes:
        manifest = node.manifest
        seconds = manifest.seconds if manifest is not None and node.status == "done" else None
        share = 0.0 if seconds is None else 100 * seconds / longest
        bar = (
            '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect width="{share:.1f}" height="8" fill="currentColor"/></svg>'
        )
        cost = compute_core_seconds(node) if node.status == "done" else None
        body.append(
            [
                code_cell(node.id),
                Cell(f'<span class="status {node.status}">{esc(node.status)}</span>'),
                Cell(esc(format_seconds(seconds)), "num"),
                Cell(bar),
                Cell("–" if cost is None else format_count(cost), "num"),
                Cell(esc(format_memory(manifest.peak_rss_mb if manifest else None)), "num"),
            ]
        )
    return build_table(["node", "status", ">time", "", ">core-seconds", ">peak memory"], body)


def _describe_arrow(run: Run) -> str:
    if has_control(run):
        return "The dashed arrow is the flywheel: the RL-tuned model becomes the reference of the next mid-training."
    return "The dashed arrow leads to the next cycle, which begins with the model of the one before."


def section_graph(run: Run) -> str:
    """Every stage as a box with its status and cost, one picture a seed; one stage alone is no graph."""
    if run.is_stage:
        return ""
    seeds: list[int | None] = [*run.seeds]
    if any(node.spec.seed is None for node in run.nodes):
        seeds.append(None)
    parts = [
        build_paragraph(
            "How to read: a lane is one arm of one cycle and runs from left to right; evaluations hang below the stage "
            "that they measure, a microscope below the annotation whose weights it shows. ✓ done, = the same artifact "
            "as in an earlier lane (computed once), … pending. Each box gives wall time and the peak memory of its "
            f"process. {_describe_arrow(run)} Core-seconds are time times threads.",
            "quiet",
        )
    ]
    for index, seed in enumerate(seeds):
        picture = build_graph(run, seed)
        name = "nodes without a seed" if seed is None else f"seed {seed}"
        parts.append(picture if len(seeds) == 1 else build_details(name, picture, is_open=index == 0))
    parts.append(build_details("Time and cost of every stage", _build_cost_table(run)))
    return "".join(parts)


# ---- benchmarks ----------------------------------------------------------------------------------------------------


def build_score_cell(row: Row | None) -> Cell:
    """A score with its own interval below it."""
    if row is None:
        return Cell("–", "num")
    score, metric = row.score, row.metric
    bounds = ""
    if math.isfinite(score.low95):
        low, high = format_number(score.low95, metric), format_number(score.high95, metric)
        bounds = f"<small>{esc(low)} to {esc(high)}</small>"
    return Cell(f"{esc(format_number(score.mean, metric))}{bounds}", "num")


def build_difference_cell(row: Row | None) -> Cell:
    """A paired difference with its interval; a mark where seeds show it."""
    if row is None or row.comparison is None:
        return Cell("<i>control</i>" if row is not None and row.arm.is_control else "–", "num quiet")
    mean = format_number(row.comparison.interval.mean_difference, row.metric, signed=True)
    sign = {"better": "▲ ", "worse": "▼ ", "undecided": ""}[row.verdict]
    return Cell(f"{sign}{esc(mean)}<small>{esc(format_interval(row))}</small>", f"num {row.verdict}")


def _build_average_table(rows: Rows, point: str) -> str:
    metrics = list_metrics(rows)
    compared = any(row.comparison is not None for row in rows.rows)
    headings = ["arm"]
    for key in metrics:
        headings.append(f">{describe_metric(key, rows)}, {METRICS[key].unit}")
        headings += [f">Δ, {METRICS[key].difference_unit}"] * compared
    body = []
    for arm in list_arms(rows, point):
        cells = [text_cell(arm.label)]
        for key in metrics:
            row = rows.get(point, arm, None, key)
            cells += [build_score_cell(row), *([build_difference_cell(row)] if compared else [])]
        body.append(cells)
    return build_table(headings, body, caption=f"Plain average of {len(rows.benchmarks)} benchmarks")


def _build_benchmark_table(rows: Rows, point: str, metric: str) -> str:
    arms = list_arms(rows, point)
    body = []
    for benchmark in rows.benchmarks:
        cells = [text_cell(benchmark)]
        for arm in arms:
            row = rows.get(point, arm, benchmark, metric)
            cell = build_score_cell(row)
            if row is not None and row.comparison is not None:
                change = build_difference_cell(row)
                cell = Cell(f'{cell.html}<span class="change {row.verdict}">Δ {change.html}</span>', "num")
            cells.append(cell)
        body.append(cells)
    return build_table(["benchmark", *(f">{arm.label}" for arm in arms)], body)


def _build_pipeline_plot(run: Run, rows: Rows, metric: str) -> str:
    """The average over benchmarks at every point of the pipeline, one line an arm; nothing for runs without arms."""
    if len(rows.points) < 2 or not has_control(run):
        return ""
    styles = compute_arm_styles(run)
    scale = METRICS[metric].scale
    lines = []
    counts: set[int] = set()
    for arm in rows.arms:
        found = [(index, rows.get(point, arm, None, metric)) for index, point in enumerate(rows.points)]
        there = [(float(index), row.score) for index, row in found if row is not None]
        counts |= {row.num_seeds for _, row in found if row is not None}
        if there:
            series, dash = styles.get(arm, (5, 0))
            lines.append(
                Line(
                    arm.label,
                    [x for x, _ in there],
                    [score.mean * scale for _, score in there],
                    series,
                    dash,
                    [score.low95 * scale for _, score in there],
                    [score.high95 * scale for _, score in there],
                )
            )
    if not lines:
        return ""
    one, several = ("item", "items") if max(counts) == 1 else ("seed", describe_seeds(counts))
    if min(counts) == 1 < max(counts):
        several += " (with one seed over items)"
    together = (
        f" Scores of two arms move together from one {one} to the next, so bars may overlap although the "
        "arms differ: that is what the paired differences below are for."
    )
    return build_line_plot(
        lines,
        title=f"Along the pipeline: {describe_metric(metric, rows)}",
        x_label="point in the pipeline",
        y_label=f"average over benchmarks, {METRICS[metric].unit}",
        x_names=rows.points,
        how_to_read=(
            f"Each line follows one arm from base model to RL; bars are 95 % intervals of the score over {several}."
            + (together if len(lines) > 1 else "")
        ),
    )


def _describe_unpaired(rows: Rows, point: str) -> str:
    counts = {
        row.arm: row.num_unpaired
        for row in rows.rows
        if row.point == point and row.benchmark is None and row.metric.key == "greedy" and row.num_unpaired
    }
    named = ", ".join(f"{arm.label}: {count}" for arm, count in counts.items())
    return f"Items that only one side has, left out of the differences: {named}." if named else ""


def _build_point(run: Run, rows: Rows, point: str) -> str:
    formats = sorted(
        {
            node.evaluation.results.format
            for node in run.nodes
            if node.evaluation is not None and node.leaf.removeprefix("eval_") == point
        }
    )
    heading = f"<h3>{esc(start_sentence(describe_point(point)))}</h3>"
    parts = [heading, build_paragraph(f"Format of the questions: {', '.join(formats)}.", "quiet")]
    parts.append(_build_average_table(rows, point))
    unpaired = _describe_unpaired(rows, point)
    if unpaired:
        parts.append(build_paragraph(unpaired, "callout"))
    metrics = list_metrics(rows)
    parts.append(_build_difference_plots(run, rows, [(point, key) for key in metrics if key in ("greedy", "pass@1")]))
    for key in metrics:
        title = f"By benchmark: {describe_metric(key, rows)}, {METRICS[key].unit}"
        parts.append(build_details(title, _build_benchmark_table(rows, point, key)))
    return "".join(parts)


def _describe_marks(run: Run, rows: Rows) -> str:
    """How to read the tables, by what is there to be compared."""
    over_items = any(row.num_seeds == 1 or (row.comparison and row.comparison.basis == "items") for row in rows.rows)
    boot = f" The bootstrap draws {NUM_RESAMPLES} times." if over_items else ""
    if not any(row.comparison is not None for row in rows.rows):
        missing = " The control has not been evaluated yet." if has_control(run) and CONTROL not in rows.arms else ""
        return f"Small print below a score is its own 95 % interval.{boot}{missing}"
    return (
        f"Δ is the {describe_basis(rows)}. ▲ and ▼ mark intervals over seeds that exclude zero; a difference without a "
        f"mark shows nothing. Small print below a score is its own 95 % interval.{boot}"
    )


def section_benchmarks(run: Run) -> str:
    """Scores by point, cycle and arm, with the paired difference to the control."""
    rows = compute_rows(run)
    num_pending = sum(node.spec.stage == "eval" and node.status == "pending" for node in run.nodes)
    pending = f"{num_pending} evaluations are pending; they are missing below." if num_pending else ""
    if not rows.rows:
        return "" if run.is_stage else build_paragraph(pending or "This run has no evaluations.", "callout")
    parts = [
        build_paragraph(_describe_marks(run, rows), "quiet"),
        build_paragraph(pending, "callout") if pending else "",
        build_grid([plot for plot in (_build_pipeline_plot(run, rows, key) for key in ("greedy", "pass@1")) if plot]),
    ]
    parts += [_build_point(run, rows, point) for point in rows.points]
    return "".join(parts)
