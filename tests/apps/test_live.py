"""The picture of a running graph, fed with made-up events: what it says, that it fits, and what it promises."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polm.apps.live import RunBar, build_frame, format_short
from polm.apps.progress import Board, TimeLeft, compute_durations, compute_time_left
from polm.flywheel.graph import build_graph
from polm.flywheel.runner import Event, Plan, build_plan
from polm.recipe import Recipe

LINE = {"update": 30, "num_updates": 40, "tokens_per_second": 15300.0, "eta_seconds": 12.4, "loss": 1.25}
MANIFEST = {"seconds": 8.0, "summary": {"mean/greedy": 0.574}}


def plan_of(tmp_path: Path, seeds: int = 1, **changes: Any) -> Plan:
    recipe = Recipe(name="tiny", seeds=tuple(range(seeds)), **{"microscope": None, **changes})
    return build_plan(recipe, build_graph(recipe), tmp_path / "run")


def board_of(plan: Plan, workers: int = 2) -> Board:
    return Board(plan.recipe.name, plan.graph, {n: plan.folder(n) for n in plan.graph}, workers)


def tell(board: Board, kind: str, node: str, now: float = 0.0, line: Mapping[str, Any] | None = None) -> None:
    line = line if line is not None else MANIFEST if kind in ("done", "skipped") else {}
    board.apply(Event(kind, board.graph[node], 0, len(board.graph), line), now)


def finish(board: Board, *nodes: str, kind: str = "done", **manifest: Any) -> None:
    for node in nodes:
        tell(board, kind, node, line={**MANIFEST, **manifest})


def render(board: Board, width: int = 80, height: int = 23, **options: Any) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None, record=True
    )
    console.print(build_frame(board, width=width, height=height, began=0.0, now=100.0, **options))
    return console.export_text().splitlines()


def line_of(lines: list[str], start: str) -> str:
    (found,) = (line for line in lines if line.startswith(start))
    return found


def test_lanes_cells_and_what_runs(tmp_path: Path) -> None:
    board = board_of(plan_of(tmp_path, cycles=1))
    finish(board, "s0/data", "s0/tokenizer", kind="skipped", seconds=2.4)
    finish(board, "s0/pretrain", seconds=65.1)
    finish(board, "s0/c0/ntp/midtrain", seconds=131.0)
    finish(board, "s0/c0/ntp/eval_base", seconds=9.1)
    tell(board, "started", "s0/c0/ntp/sft", now=88.0)
    tell(board, "progress", "s0/c0/ntp/sft", line=LINE)
    lines = render(board)
    assert lines[0].startswith(f"tiny: 5 of {len(board.graph)} stages · 1 running · 1 min 40 s")
    assert lines[1].split() == ["annot", "midtr", "eval", "sft", "eval", "pairs", "dpo", "eval", "grpo", "eval"]
    assert line_of(lines, "s0 ").split() == ["s0", "data", "=2.4s", "tokenizer", "=2.4s", "pretrain", "✓", "65s"]
    control = line_of(lines, "s0/c0/ntp ")
    assert control.split() == ["s0/c0/ntp", "✓2m11", "✓9.1s", "▸", "75%", *"······"]
    # Cells stand below their names, although the control has no annotation.
    assert control.index("▸") == lines[1].index("sft")
    assert line_of(lines, "▸ s0/c0/ntp/sft  ") == "▸ s0/c0/ntp/sft  75%, 15,300 tok/s, 12 s left, loss 1.25"
    assert line_of(lines, "✓ s0/c0/ntp/eval_base") == "✓ s0/c0/ntp/eval_base  9.1 s  greedy 57.4%"


def test_failed_and_stopped(tmp_path: Path) -> None:
    board = board_of(plan_of(tmp_path, cycles=1))
    tell(board, "started", "s0/data")
    tell(board, "failed", "s0/data")
    tell(board, "started", "s0/tokenizer")
    board.stop()
    row = line_of(render(board, over=True), "s0 ")
    assert row.split() == ["s0", "data", "✗", "?", "tokenizer", "‖", "?", "pretrain", "·"]
    assert "left" not in render(board, over=True)[0]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", [(80, 23), (80, 9), (40, 12), (20, 5), (8, 1), (200, 60)])
def test_it_fits(tmp_path: Path, size: tuple[int, int], plain: bool) -> None:
    """With eight seeds, two cycles and all states at once."""
    plan = plan_of(tmp_path, seeds=8, cycles=2)
    board = board_of(plan)
    for seed in range(3):
        finish(board, *(n for n in plan.graph if n.startswith(f"s{seed}/")))
    for node in ("s3/data", "s4/data", "s5/data"):
        tell(board, "started", node)
    tell(board, "progress", "s3/data", line=LINE)
    width, height = size
    lines = render(board, width, height, plain=plain)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert any(line.startswith("s3 ") for line in lines) or height < 9  # what runs is shown
    if size == (80, 23):
        assert f"{'+' if plain else '✓'} 12 rows finished" in text  # 4 rows a seed
        assert "more rows to come" in text
        assert not any(line.startswith("s0/c0") for line in lines)
    if plain:
        assert "✓" not in text
    if size == (200, 60):
        assert sum(line.startswith(("s0", "s7")) for line in lines) == 8


def test_many_stages_lose_the_times_of_evaluations_first(tmp_path: Path) -> None:
    board = board_of(plan_of(tmp_path, cycles=1))
    finish(board, *board.graph)
    wide, narrow, narrowest = (line_of(render(board, width), "s0/c1/remit ") for width in (80, 60, 40))
    assert wide.count("8.0s") == 10
    assert narrow.count("8.0s") == 6
    assert narrowest.count("8.0s") == 0
    assert [row.count("✓") for row in (wide, narrow, narrowest)] == [10, 10, 10]


def test_time_left_is_unknown_until_every_kind_was_seen(tmp_path: Path) -> None:
    board = board_of(plan_of(tmp_path, cycles=1))
    everything = list(board.graph)
    finish(board, *(n for n in everything if n.startswith("s0/") and n.count("/") == 1))
    left = compute_time_left(board, 0.0)
    assert left.seconds is None
    assert left.unknown[0] == "midtrain"
    assert "left: ? (not seen yet: midtrain, " in render(board, 120)[0]
    finish(board, *(n for n in everything if "/c0/" in n))
    assert compute_time_left(board, 0.0) == TimeLeft(None, ("annotate",))
    finish(board, "s0/c1/remit/annotate")
    # midtrain, sft, pairs, dpo, grpo, eval: one after the other; the other evaluations run beside them.
    assert compute_time_left(board, 0.0) == TimeLeft(6 * 8.0)
    assert "left: about 48 s" in render(board, 120)[0]


def test_time_left_by_workers_and_by_what_runs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, cycles=1)
    rest = ("s0/c1/remit/grpo", "s0/c1/remit/eval_dpo", "s0/c1/remit/eval_rl")
    for workers, seconds in ((1, 24.0), (2, 16.0)):
        board = board_of(plan, workers)
        finish(board, *(n for n in plan.graph if n not in rest))
        assert compute_time_left(board, 0.0).seconds == seconds
    tell(board, "started", "s0/c1/remit/grpo", now=10.0)
    assert compute_time_left(board, 13.0).seconds == 8 - 3 + 8  # its kin's time, less what has passed
    tell(board, "progress", "s0/c1/remit/grpo", line=LINE)
    assert compute_time_left(board, 13.0).seconds == pytest.approx(12.4 + 8)  # its own word


def test_the_nearest_kin_counts(tmp_path: Path) -> None:
    """A guided mid-training is not estimated by plain ones where a guided one was seen."""
    board = board_of(plan_of(tmp_path, seeds=2, cycles=1))
    finish(board, "s0/c0/ntp/midtrain", seconds=10.0)
    assert compute_durations(board)["s0/c1/remit/midtrain"] == 10.0
    finish(board, "s0/c1/remit/midtrain", seconds=30.0)
    durations = compute_durations(board)
    assert (durations["s1/c0/ntp/midtrain"], durations["s1/c1/remit/midtrain"]) == (10.0, 30.0)
    finish(board, "s0/c0/ntp/eval_base", seconds=4.0)
    assert durations.get("s0/c0/ntp/eval_rl") is None
    assert compute_durations(board)["s0/c0/ntp/eval_rl"] == 4.0


def test_a_copy_of_an_artifact_costs_nothing(tmp_path: Path) -> None:
    twins = {name: {"changes": {"weighting": "remit"}} for name in ("remit", "twin")}
    plan = plan_of(tmp_path, cycles=1, arms=twins)
    board = board_of(plan)
    finish(board, *(n for n in plan.graph if "/twin/" not in n))
    assert compute_time_left(board, 0.0) == TimeLeft(0.0)
    finish(board, "s0/c1/twin/midtrain")
    assert "=" in line_of(render(board), "s0/c1/twin ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(None, ""), (0.04, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (99.4, "99s"), (99.6, "1m40"), (599.0, "9m59")],
        *[(3599.0, "59m"), (3600.0, "1h00"), (36000.0, "10h"), (1e9, "999h")],
    ],
)
def test_short_times(seconds: float | None, text: str) -> None:
    assert format_short(seconds) == text
    assert len(text) <= 4


def run_bar(plan: Plan, console: Console, error: type[BaseException] | None = None) -> str:
    def play() -> None:
        with RunBar(console, plan, 2) as bar:
            for number, (kind, line) in enumerate([("started", {}), ("progress", LINE), ("done", MANIFEST)]):
                bar(Event(kind, plan.graph["s0/data"], number // 2, len(plan.graph), line))
            bar(Event("skipped", plan.graph["s0/tokenizer"], 2, len(plan.graph), MANIFEST))
            if error is not None:
                raise error

    if error is None:
        play()
    else:
        with pytest.raises(error):
            play()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_gets_the_picture(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, _environ={"TERM": "xterm"})
    text = run_bar(plan_of(tmp_path), console, KeyboardInterrupt)
    assert "\x1b[?25h" in text  # the cursor is shown again
    assert "s0/c0/ntp" in text
    assert text.endswith("stopped with 2 of 32 stages done; the same command goes on from here\n")


@pytest.mark.parametrize("options", [{"force_terminal": False}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}])
def test_no_terminal_gets_plain_lines(tmp_path: Path, options: dict[str, Any]) -> None:
    text = run_bar(plan_of(tmp_path), Console(file=io.StringIO(), width=80, color_system=None, **options))
    assert text.splitlines() == [
        "[  1/32] s0/data                          8.0 s  greedy 57.4%",
        "1 stages were there already",
    ]
