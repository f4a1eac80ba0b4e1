"""The terminal's tables: the numbers in them, the basis of the intervals, and names that try to be markup."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from polm.report.compare import Arm, compute_rows, describe_point, format_interval, format_number, start_sentence
from polm.report.load import load_run
from polm.report.sections_results import section_benchmarks
from polm.report.tables import (
    build_stage_table,
    build_summary_table,
    build_tables,
    format_memory,
    format_seconds,
    render_tables,
)


def test_tables_hold_every_point_and_its_numbers(small_run: Path) -> None:
    run = load_run(small_run)
    text = render_tables(run, width=200)
    for title in ("base model, after mid-training", "after SFT", "after preference optimisation", "after RL"):
        assert f"{title}: average of 2 benchmarks" in text
    row = compute_rows(run).get("rl", Arm(1, "remit"), None, "greedy")
    assert row is not None
    assert row.comparison is not None
    mean = format_number(row.comparison.interval.mean_difference, row.metric, signed=True)
    assert f"{mean} ({format_interval(row)})" in text
    assert "t interval over 2 seeds" in text
    assert "sampled, pass@4, %" in text
    assert "\x1b" not in text


def test_the_terminal_says_what_the_page_says(build_run: Callable[..., Path]) -> None:
    """Every score, difference, interval and mark of the summary stands in the page's table of that point and arm."""
    run = load_run(build_run(seeds=3, arms=(("remit", 0.2), ("rho1", -0.2), ("same", 0.0))))
    rows = compute_rows(run)
    page = section_benchmarks(run)
    table = build_summary_table(rows)
    num_marked = 0
    for point, column in zip(rows.points, table.columns[1:], strict=True):
        part = page[page.index(f"<h3>{start_sentence(describe_point(point))}</h3>") :]
        average = part[: part.index("</table>")]
        assert str(column.header) == describe_point(point)
        for arm, cell in zip(rows.arms, column.cells, strict=True):
            score, difference = str(cell).split("\n")
            start = average.index(f">{arm.label}</th>")
            shown = average[start : average.index("</tr>", start)]
            assert f'<td class="num">{score}<small>' in shown
            num_marked += difference.startswith(("▲", "▼"))
            mean, _, interval = difference.partition(" (")
            expected = "<i>control</i>" if arm.is_control else f">{mean}<small>{interval.removesuffix(')')}</small>"
            assert expected in shown
    assert num_marked >= 4
    assert str(table.caption) in page


def test_one_seed_is_called_one_seed(build_run: Callable[..., Path]) -> None:
    text = render_tables(load_run(build_run()), width=200)
    assert text.count("items only: one seed proves nothing about training noise") == 4  # below every average


def test_names_are_neither_markup_nor_escape_sequences(build_run: Callable[..., Path]) -> None:
    run = load_run(build_run(benchmarks=("[red]add[/red]", "sort\x1b[31m"), arms=(("[bold]x", 0.0),)))
    text = render_tables(run, width=200)
    assert "[red]add[/red]" in text
    assert "sort⟨U+001B⟩[31m" in text
    assert "[bold]x · cycle 1" in text
    assert "\x1b" not in text


def test_stage_table_shows_status_and_cost(build_run: Callable[..., Path]) -> None:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(build_stage_table(load_run(build_run(until="midtrain"))))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    (done,) = (line for line in lines if "s0/c1/remit/midtrain" in line)
    (pending,) = (line for line in lines if "s0/c1/remit/sft" in line)
    assert re.search(r"done +│ +[\d.]+ (s|min \d+ s) +│ +\d+ +│ +[\d.]+ [MG]B", done)
    assert re.search(r"pending +│ +– +│ +– +│ +– +│", pending)


def test_a_run_without_evaluations_has_no_tables(build_run: Callable[..., Path]) -> None:
    run_dir = build_run(seeds=0)
    assert build_tables(load_run(run_dir)) == []
    assert render_tables(load_run(run_dir)) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.84, "0.8 s"), (12.4, "12 s"), (250, "4 min 10 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_seconds_in_words(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_memory_in_words() -> None:
    assert [format_memory(value) for value in (None, 512.4, 1536.0)] == ["–", "512 MB", "1.5 GB"]
