"""Headlines of what is no flywheel: one stage that was run on its own, and runs without a control."""

from __future__ import annotations

from polm.report.compare import METRICS, Row
from polm.report.escape import esc
from polm.report.load import Node, Run
from polm.report.markup import Cell, build_details, build_grid, build_table, format_count, text_cell
from polm.report.plots import Line, build_line_plot
from polm.report.rounds import NO_CONTROL, Rounds, describe_rounds, name_place
from polm.report.sections_results import build_difference_cell, build_score_cell
from polm.report.stage_words import describe_stage
from polm.report.tables import compute_core_seconds, format_memory, format_seconds


def build_statements(sentences: list[str]) -> str:
    """The first sentence in large type, the others as a list."""
    claim, *more = sentences
    listed = "".join(f"<li>{esc(sentence)}</li>" for sentence in more)
    return f'<p class="claim">{esc(claim)}</p>' + (f"<ul class=statements>{listed}</ul>" if listed else "")


def _build_tiles(node: Node) -> str:
    manifest = node.manifest
    assert manifest is not None
    core = compute_core_seconds(node)
    tiles = [
        ("stage", node.spec.stage),
        ("time", format_seconds(manifest.seconds)),
        ("core-seconds", "–" if core is None else format_count(core)),
        ("peak memory", format_memory(manifest.peak_rss_mb)),
    ]
    if isinstance(tokens := manifest.summary.get("tokens"), int):
        tiles.append(("tokens trained on", format_count(tokens)))
    cells = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def section_stage(run: Run) -> str:
    """What one stage did in a few sentences, what it cost, and all numbers of its summary."""
    node = run.nodes[0]
    assert node.manifest is not None
    rows = [[text_cell(name), text_cell(_show(value), "num")] for name, value in node.manifest.summary.items()]
    table = build_table(["name", ">value"], rows, classes="slim") if rows else ""
    numbers = build_details(f"All {len(rows)} numbers of its summary", table) if rows else ""
    return build_statements(describe_stage(run)) + _build_tiles(node) + numbers


def _show(value: object) -> str:
    return f"{value:.6g}".replace("-", "\u2212") if isinstance(value, float) else str(value)


def _build_round_cell(row: Row | None) -> Cell:
    """A score, and below it the difference to the first round's."""
    cell = build_score_cell(row)
    if row is None or row.comparison is None:
        return cell
    change = build_difference_cell(row)
    return Cell(f'{cell.html}<span class="change {row.verdict}">Δ {change.html}</span>', "num")


def build_rounds_table(rounds: Rounds) -> str:
    """A row an evaluation in the order of the run, with its difference to the first one."""
    metrics = rounds.list_metrics()
    headings = [f">{METRICS[key].title.replace('pass@k', f'pass@{rounds.k}')}, {METRICS[key].unit}" for key in metrics]
    body = [
        [text_cell(name_place(place)), *(_build_round_cell(rounds.rows.get((place, key))) for key in metrics)]
        for place in rounds.places
    ]
    caption = "Average of the benchmarks; Δ: paired difference to the first row"
    return build_table(["model", *headings], body, caption=caption, classes="measures")


def _build_rounds_plot(rounds: Rounds, metric: str) -> str:
    found = [(float(x), rounds.rows.get((place, metric))) for x, place in enumerate(rounds.places)]
    there = [(x, row.score) for x, row in found if row is not None]
    if not there:
        return ""
    kind = METRICS[metric]
    line = Line(
        kind.title,
        [x for x, _ in there],
        [score.mean * kind.scale for _, score in there],
        0,
        0,
        [score.low95 * kind.scale for _, score in there],
        [score.high95 * kind.scale for _, score in there],
    )
    return build_line_plot(
        [line],
        title=f"Round by round: {kind.title}",
        x_label="evaluation (point in the pipeline and cycle)",
        y_label=f"average over benchmarks, {kind.unit}",
        x_names=[f"{point} {arm.cycle}" for point, arm in rounds.places],
        how_to_read=(
            "Each point is one evaluated model, in the order of the run; bars are 95 % intervals of its score. "
            "Neighbours answer the same items, so bars may overlap although they differ: see Δ in the table."
        ),
    )


def build_rounds_headline(rounds: Rounds) -> str:
    """The last model against the first one, in words, and the table of all."""
    sampled = [describe_rounds(rounds, "pass@1")] if "pass@1" in rounds.list_metrics() else []
    words = build_statements([describe_rounds(rounds), *sampled, NO_CONTROL])
    plots = [plot for key in ("greedy", "pass@1") if (plot := _build_rounds_plot(rounds, key))]
    return words + build_rounds_table(rounds) + build_grid(plots)
