"""What the terminal shows while a graph runs: the graph itself, filling up; plain lines where it is no terminal.

A lane is one seed, cycle and arm; its cells are its stages in order. The picture is as wide and as high as the
terminal allows: cells lose their times, then lanes that are finished or not begun become a count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from polm.apps.progress import FINISHED, Board, NodeState, compute_durations, compute_node_left, compute_time_left
from polm.apps.show import PLAIN_SECONDS, describe_line, describe_summary
from polm.flywheel.graph import Node
from polm.flywheel.runner import Event, Plan
from polm.report.escape import clean_text
from polm.report.tables import format_seconds

REFRESH_SECONDS = 0.25
MAX_RUNNING_LINES = 8
MARKS = {"pending": "·", "running": "▸", "done": "✓", "reused": "=", "failed": "✗", "stopped": "‖"}
PLAIN_MARKS = {"pending": ".", "running": ">", "done": "+", "reused": "=", "failed": "x", "stopped": "|"}
STYLES = {"pending": "dim", "running": "bold cyan", "done": "green", "reused": "dim green"} | dict.fromkeys(
    ("failed", "stopped"), "bold red"
)
LEGEND = "{done} done  {running} running  {reused} was there  {pending} to do  {failed} failed  {stopped} stopped"


@dataclass(frozen=True)
class Lane:
    """The nodes of one seed, cycle and arm, by leaf; the roots of a seed are a lane of their own."""

    label: str
    nodes: Mapping[str, str]
    is_root: bool


@dataclass(frozen=True)
class View:
    """How cells are drawn: in which columns, how wide, with which marks. Columns of width 1 show the mark alone."""

    columns: Mapping[str, int]
    label_width: int
    marks: Mapping[str, str]


def format_short(seconds: float | None) -> str:
    """At most four characters: "0.8s", "65s", "2m05", "59m", "1h05", "30h"; empty for what is not known."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if whole < 100:
        return f"{whole}s"
    if whole < 600:
        return f"{whole // 60}m{whole % 60:02d}"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 36000:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{min(whole // 3600, 999)}h"


def build_lanes(nodes: Sequence[Node]) -> list[Lane]:
    """Nodes by what stands before the last part of their id, in the order of the graph."""
    found: dict[str, dict[str, str]] = {}
    roots = set()
    for node in nodes:
        label, _, leaf = node.id.rpartition("/")
        found.setdefault(label, {})[leaf] = node.id
        if node.arm is None:
            roots.add(label)
    return [Lane(clean_text(label), leaves, label in roots) for label, leaves in found.items()]


def order_columns(lanes: Sequence[Lane]) -> list[str]:
    """All leaves of the arms, each before those that follow it in its own lane."""
    columns: list[str] = []
    for lane in lanes:
        if lane.is_root:
            continue
        place = len(columns)
        for leaf in reversed(list(lane.nodes)):
            if leaf in columns:
                place = columns.index(leaf)
            else:
                columns.insert(place, leaf)
    return columns


def choose_view(lanes: Sequence[Lane], width: int, marks: Mapping[str, str]) -> View:
    """Times in all cells if they fit, else not in those of evaluations, else in none."""
    leaves = order_columns(lanes)
    label_width = max((cell_len(lane.label) for lane in lanes), default=0)
    is_eval = {leaf: leaf.startswith("eval") for leaf in leaves}
    widths = [dict.fromkeys(leaves, 5), {leaf: 1 if is_eval[leaf] else 5 for leaf in leaves}, dict.fromkeys(leaves, 1)]
    for columns in widths:
        if label_width + sum(1 + size for size in columns.values()) <= width:
            return View(columns, label_width, marks)
    return View(widths[-1], max(4, min(label_width, width - 2 * len(leaves))), marks)


def build_cell(state: NodeState, width: int, marks: Mapping[str, str]) -> Text:
    """ "✓2m05", "▸ 47%", "·"; of width 1 the mark alone."""
    mark = marks[state.status]
    if state.status in FINISHED:
        words = format_short(state.seconds)
    elif state.status == "pending":
        words = ""
    else:
        words = f"{state.share:.0%}" if state.share is not None else "?"
    text = mark if width == 1 or not words else f"{mark}{words:>{width - 1}}"
    return Text(set_cell_size(text, width), style=STYLES[state.status])


def build_head(view: View) -> Text:
    """The names of the stages above their columns; an evaluation stands after the stage that it evaluates."""
    head = Text(" " * view.label_width, style="dim")
    for leaf, width in view.columns.items():
        name = "eval" if leaf.startswith("eval") else clean_text(leaf)
        head.append(" " + set_cell_size(name, width))
    return head


def build_row(board: Board, lane: Lane, view: View) -> Text:
    """One lane. The roots of a seed have columns of their own, so they carry their names."""
    row = Text(set_cell_size(lane.label, view.label_width))
    if lane.is_root:
        for leaf, node_id in lane.nodes.items():
            cell = build_cell(board.states[node_id], 5, view.marks)
            cell.rstrip()
            row.append(f" {clean_text(leaf)} ").append_text(cell).append(" ")
        return row
    for leaf, width in view.columns.items():
        node = lane.nodes.get(leaf)
        cell = Text(" " * width) if node is None else build_cell(board.states[node], width, view.marks)
        row.append(" ").append_text(cell)
    return row


def build_headline(board: Board, began: float, now: float, over: bool) -> Text:
    """How far the run is and when it will end; "?" as long as a kind of stage has never been seen to finish."""
    words = [f"{clean_text(board.name)}: {board.count(*FINISHED)} of {len(board.graph)} stages"]
    running = board.count("running")
    if running:
        words.append(f"{running} running")
    words.append(format_seconds(now - began))
    if not over:
        left = compute_time_left(board, now)
        if left.seconds is None:
            words.append(f"left: ? (not seen yet: {', '.join(left.unknown)})")
        else:
            words.append(f"left: about {format_seconds(left.seconds)}")
    return Text(" · ".join(words), style="bold")


def build_running(board: Board, limit: int, now: float, marks: Mapping[str, str]) -> list[Text]:
    """A line for each running stage: share, rate, time left, and its moving numbers."""
    shown = [n for n, s in board.states.items() if s.status in ("running", "failed", "stopped")]
    durations = compute_durations(board)
    lines = []
    for node_id in shown[:limit]:
        state = board.states[node_id]
        elapsed = format_seconds(now - state.began)
        words = [f"{state.share:.0%}" if state.share is not None else f"{elapsed} so far"]
        if isinstance(rate := state.line.get("tokens_per_second"), int | float):
            words.append(f"{rate:,.0f} tok/s")
        if state.status == "running":
            left = compute_node_left(state, durations.get(node_id), now)
            words.append(f"{format_seconds(left)} left" if left is not None else "? left")
        moving = {k: v for k, v in state.line.items() if k not in ("tokens_per_second", "eta_seconds")}
        words.append(describe_line(moving))
        text = f"{marks[state.status]} {clean_text(node_id)}  {', '.join(filter(None, words))}"
        lines.append(Text(text, style=STYLES[state.status]))
    if len(shown) > limit > 0:
        lines[-1] = Text(f"… and {len(shown) - limit + 1} more running", style="dim")
    return lines


def choose_lanes(board: Board, lanes: Sequence[Lane], room: int) -> tuple[list[Lane], int, int]:
    """(lanes to show in their order, finished ones left out, others left out) for `room` lines with the counts.

    What is under way comes first, then what comes next, then what was finished last.
    """
    if len(lanes) <= room:
        return list(lanes), 0, 0
    kinds: dict[str, list[int]] = {"active": [], "waiting": [], "finished": []}
    for place, lane in enumerate(lanes):
        states = {board.states[node_id].status for node_id in lane.nodes.values()}
        kind = "finished" if states <= set(FINISHED) else "waiting" if states == {"pending"} else "active"
        kinds[kind].append(place)
    wanted = [*kinds["active"], *kinds["waiting"], *reversed(kinds["finished"])]
    for num_shown in range(max(0, room), -1, -1):
        chosen = set(wanted[:num_shown])
        num_finished = sum(place not in chosen for place in kinds["finished"])
        num_others = len(lanes) - len(chosen) - num_finished
        if num_shown + bool(num_finished) + bool(num_others) <= room:
            break
    return [lane for place, lane in enumerate(lanes) if place in chosen], num_finished, num_others


def build_frame(
    board: Board, *, width: int, height: int, began: float, now: float, plain: bool = False, over: bool = False
) -> Group:
    """The whole picture, at most `width` cells wide and `height` lines high. `plain` leaves out all but ASCII marks."""
    marks = PLAIN_MARKS if plain else MARKS
    lanes = build_lanes(list(board.graph.values()))
    view = choose_view(lanes, width, marks)
    top = [build_headline(board, began, now, over)]
    has_head = any(size > 1 for size in view.columns.values()) and height >= 8
    if has_head:
        top.append(build_head(view))
    num_busy = board.count("running", "failed", "stopped")
    running = build_running(board, max(1, min(MAX_RUNNING_LINES, num_busy, height // 3)), now, marks)
    bottom = [*running]
    if board.last_done is not None and height >= 8:
        node, manifest = board.last_done
        words = f"{clean_text(node.id)}  {format_seconds(manifest.get('seconds'))}  "
        bottom.append(Text(f"{marks['done']} {words}{describe_summary(manifest.get('summary', {}))}", style="green"))
    if height >= 16:
        bottom.append(Text(LEGEND.format(**marks), style="dim"))
    room = height - len(top) - len(bottom)
    shown, num_finished, num_others = choose_lanes(board, lanes, room)
    rows = [Text(f"{marks['done']} {num_finished} rows finished", style="dim green")] if num_finished else []
    rows += [build_row(board, lane, view) for lane in shown]
    if num_others:
        rows.append(Text(f"{marks['pending']} {num_others} more rows to come", style="dim"))
    lines = [*top, *rows, *bottom][: max(1, height)]
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(*lines)


class RunBar:
    """Progress of a graph: a callable for `run_graph`'s `watch`. Use as a context manager."""

    def __init__(self, console: Console, plan: Plan, workers: int):
        self.console = console
        self.board = Board(plan.recipe.name, plan.graph, {n: plan.folder(n) for n in plan.graph}, workers)
        self.live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self.live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self.began = time.monotonic()
        self.drawn = 0.0
        self.last: dict[str, float] = {}
        self.num_skipped = 0

    def __enter__(self) -> RunBar:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.board.stop()
        if self.live is not None:
            self._draw(over=True)
            self.live.stop()
        if self.num_skipped:
            self._print(f"{self.num_skipped} stages were there already")
        if kind is KeyboardInterrupt:
            done = self.board.count(*FINISHED)
            self._print(
                f"stopped with {done} of {len(self.board.graph)} stages done; the same command goes on from here"
            )

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _draw(self, *, over: bool = False) -> None:
        assert self.live is not None
        self.drawn = time.monotonic()
        width, height = self.console.size
        ascii_only = self.console.options.ascii_only
        # One line stays free for the cursor.
        frame = build_frame(
            self.board, width=width, height=height - 1, began=self.began, now=self.drawn, plain=ascii_only, over=over
        )
        self.live.update(frame, refresh=True)

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        self.board.apply(event, now)
        self.num_skipped += event.kind == "skipped"
        if self.live is None:
            self._tell(event, now)
        elif now - self.drawn >= REFRESH_SECONDS:
            self._draw()

    def _tell(self, event: Event, now: float) -> None:
        """The same in plain lines: what is done, and now and then how far the others are."""
        node = event.node.id
        if event.kind == "started":
            self.last[node] = now
        elif event.kind == "progress" and event.line and now - self.last[node] > PLAIN_SECONDS:
            self.last[node] = now
            words = describe_line(event.line)
            self._print(f"          {node:<28} {event.line['update']}/{event.line['num_updates']} {words}")
        elif event.kind == "done":
            summary = describe_summary(event.line.get("summary", {}))
            self._print(f"[{event.done:>3}/{event.total}] {node:<28} {event.line['seconds']:7.1f} s  {summary}")
