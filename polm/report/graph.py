"""The graph of stages as SVG: one lane for each arm of each cycle, time from left to right, cost written on each node.

The columns are the steps of the pipeline, so that all arms' SFT stand below each other. An evaluation hangs below the
node that it measures. What all arms share (data, tokenizer, pre-training) stands in the first lane, before the control.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polm.report.compare import Arm, compute_arm
from polm.report.escape import esc, shorten
from polm.report.load import Node, Run
from polm.report.plots import build_colour
from polm.report.tables import format_memory, format_seconds

# The order of the pipeline. Steps with other names are put in by the order in which the run lists them.
STEPS = ("data", "tokenizer", "pretrain", "annotate", "midtrain", "sft", "pairs", "dpo", "grpo")

# Stages that look at others and feed none: they hang below what they look at, as small boxes.
HANGING = ("eval", "microscope")
NODE_WIDTH, NODE_HEIGHT = 108, 44
EVAL_HEIGHT = 36
COLUMN_GAP, ROW_GAP, LABEL_HEIGHT = 22, 8, 26
SMALL_WIDTH = 1000  # pixels; a picture that is narrower is not stretched to the width of the page
STATUS_MARKS = {"done": "✓", "shared": "=", "pending": "…"}


@dataclass(frozen=True)
class Box:
    """A node and its place; `is_eval` boxes are drawn smaller."""

    node: Node
    x: float
    y: float
    is_eval: bool

    @property
    def height(self) -> int:
        return EVAL_HEIGHT if self.is_eval else NODE_HEIGHT


@dataclass(frozen=True)
class Lane:
    """One arm of one cycle: its steps, and below each step the evaluations that measure it."""

    arm: Arm
    steps: tuple[Node, ...]
    evals: tuple[tuple[str, Node], ...]

    @property
    def num_eval_rows(self) -> int:
        measured = [step for step, _ in self.evals]
        return max((measured.count(step) for step in measured), default=0)


def _order_steps(nodes: list[Node]) -> list[str]:
    """Names of the columns; an unknown name goes after the known one that precedes it in the run."""
    steps = [step for step in STEPS if any(node.leaf == step for node in nodes)]
    previous = ""
    for node in nodes:
        if node.spec.stage in HANGING:
            continue
        if node.leaf not in steps:
            steps.insert(steps.index(previous) + 1 if previous in steps else len(steps), node.leaf)
        previous = node.leaf
    return steps


def _get_measured_step(node: Node, by_id: dict[str, Node], steps: list[str]) -> str:
    """The column under which an evaluation hangs: that of the latest step among its inputs. A microscope looks at the
    weights of the next mid-training, so it hangs below their annotation."""
    if node.spec.stage == "microscope" and "annotate" in steps:
        return "annotate"
    leaves = [by_id[name].leaf for name in map(str, node.spec.inputs.values()) if name in by_id]
    known = [leaf for leaf in leaves if leaf in steps]
    return max(known, key=steps.index, default=steps[-1] if steps else "")


def _build_lanes(nodes: list[Node], steps: list[str]) -> list[Lane]:
    by_id = {node.id: node for node in nodes}
    by_arm: dict[Arm, list[Node]] = {}
    for node in nodes:
        by_arm.setdefault(compute_arm(node), []).append(node)
    # The shared steps go into the lane of the first arm: the run then reads as one line from data to RL.
    shared = by_arm.pop(Arm(-1, "shared"), [])
    if not by_arm:
        by_arm[Arm(-1, "shared")] = []
    lanes = []
    for arm, members in by_arm.items():
        group, shared = shared + members, []
        trained = tuple(node for node in group if node.spec.stage not in HANGING)
        evals = tuple((_get_measured_step(node, by_id, steps), node) for node in group if node.spec.stage in HANGING)
        lanes.append(Lane(arm, trained, evals))
    return lanes


def _place_boxes(lanes: list[Lane], steps: list[str]) -> tuple[dict[str, Box], list[tuple[float, str]], float]:
    """Boxes by node id, the lanes' labels with their height, and the height of the whole."""
    boxes: dict[str, Box] = {}
    labels: list[tuple[float, str]] = []
    top = 4.0
    for lane in lanes:
        labels.append((top + 14, lane.arm.label))
        top += LABEL_HEIGHT
        num_used: dict[str, int] = {}
        for node in lane.steps:
            x = 2 + steps.index(node.leaf) * (NODE_WIDTH + COLUMN_GAP)
            boxes[node.id] = Box(node, x, top, False)
        for step, node in lane.evals:
            row = num_used.get(step, 0)
            num_used[step] = row + 1
            x = 2 + (steps.index(step) if step in steps else 0) * (NODE_WIDTH + COLUMN_GAP)
            boxes[node.id] = Box(node, x, top + NODE_HEIGHT + ROW_GAP + row * (EVAL_HEIGHT + 4), True)
        top += NODE_HEIGHT + ROW_GAP + lane.num_eval_rows * (EVAL_HEIGHT + 4) + 14
    return boxes, labels, top


def _describe_cost(node: Node) -> str:
    if node.status == "pending":
        return "pending"
    if node.status == "shared":
        return "same artifact"
    seconds = node.manifest.seconds if node.manifest else None
    memory = node.manifest.peak_rss_mb if node.manifest else None
    return " · ".join(part for part in (format_seconds(seconds), format_memory(memory)) if part != "–")


def _draw_box(box: Box) -> str:
    node, manifest = box.node, box.node.manifest
    dash = ' stroke-dasharray="4 3"' if node.status == "pending" else ""
    fill = build_colour(2) if node.status == "done" else build_colour(5)
    opacity = {"done": "0.13", "shared": "0.08", "pending": "0"}[node.status]
    cost = _describe_cost(node)
    threads = f", {manifest.threads} threads" if manifest is not None and manifest.threads else ""
    middle = box.x + NODE_WIDTH / 2
    offset = 15 if box.is_eval else 18
    name = shorten(f"{STATUS_MARKS[node.status]} {node.leaf}", 17)
    return (
        f"<g><title>{esc(f'{node.id}: {node.status}, {cost}{threads}')}</title>"
        f'<rect x="{box.x}" y="{box.y}" width="{NODE_WIDTH}" height="{box.height}" rx="{4 if box.is_eval else 8}" '
        f'fill="{fill}" fill-opacity="{opacity}" stroke="currentColor" stroke-opacity="0.45"{dash}/>'
        f'<text x="{middle}" y="{box.y + offset}" text-anchor="middle" font-size="{11 if box.is_eval else 12.5}" '
        f'font-weight="600" fill="currentColor">{esc(name)}</text>'
        f'<text x="{middle}" y="{box.y + offset + 15}" text-anchor="middle" font-size="10.5" fill="currentColor" '
        f'fill-opacity="0.75">{esc(cost)}</text></g>'
    )


def _is_free(start: Box, end_x: float, boxes: Iterable[Box]) -> bool:
    """True if a straight line to the right of `start` reaches `end_x` without crossing a box."""
    return not any(box.y == start.y and start.x < box.x < end_x - 1 for box in boxes)


def _draw_edge(start: Box, end: Box, boxes: Iterable[Box], margin: float, style: str) -> str:
    """An arrow from `start` to `end`, along the gaps between the boxes so that no box is crossed.

    Forward it runs in the row of `start` (above it, if boxes are in the way) to the gap before `end`, and then down.
    Backward, as from RL to the next cycle, it runs through the right margin at x = `margin` and above the row of `end`.
    """
    if end.is_eval and end.x == start.x:
        return ""  # it hangs right below
    right, middle = start.x + NODE_WIDTH, start.y + start.height / 2
    target = end.y + end.height / 2
    if right > end.x:
        above = end.y - 15
        centre = end.x + NODE_WIDTH / 2
        track = start.y - 20
        head = (
            f"M{right} {middle}"
            if _is_free(start, margin, boxes)
            else f"M{right - 6} {start.y} V{track + 5} q0 -5 5 -5"
        )
        return (
            f'<path d="{head} H{margin - 6} q6 0 6 6 V{above - 6} q0 6 -6 6 H{centre + 6} q-6 0 -6 6 '
            f'V{end.y - 2}" {style} stroke-dasharray="5 3"/>'
        )
    gap = end.x - COLUMN_GAP / 2 - 2
    is_straight = start.y == end.y
    if _is_free(start, end.x, boxes):
        head = f"M{right} {middle}"
        if is_straight:
            return f'<path d="{head} H{end.x - 2}" {style}/>'
        return f'<path d="{head} H{gap - 6} q6 0 6 6 V{target - 6} q0 6 6 6 H{end.x - 2}" {style}/>'
    above = start.y - 8
    head = f"M{right - 14} {start.y} V{above + 5} q0 -5 5 -5"
    if is_straight:
        return f'<path d="{head} H{end.x + 9} q5 0 5 5 V{end.y - 2}" {style}/>'
    return f'<path d="{head} H{gap - 6} q6 0 6 6 V{target - 6} q0 6 6 6 H{end.x - 2}" {style}/>'


def _is_drawn_edge(start: Node, end: Node) -> bool:
    """Data and tokenizer go into nearly every stage; drawn everywhere they would hide the flow of the weights."""
    is_everywhere = start.leaf in ("data", "tokenizer") and end.leaf not in ("tokenizer", "pretrain")
    return not is_everywhere and end.spec.stage != "microscope"  # its inputs are those of the box above it


def build_graph(run: Run, seed: int | None) -> str:
    """The graph of one seed (None: of nodes without a seed) as an SVG picture; empty if it has no nodes."""
    nodes = [node for node in run.nodes if node.spec.seed == seed]
    if not nodes:
        return ""
    steps = _order_steps(nodes)
    boxes, labels, height = _place_boxes(_build_lanes(nodes, steps), steps)
    marker = f"arrow-{'none' if seed is None else seed}"  # ids are unique in the page, which holds one graph a seed
    # An opaque colour: arrows share tracks, and translucent ones would add up where they do.
    style = f'fill="none" stroke="var(--edge, #8d929b)" marker-end="url(#{marker})"'
    right = max(box.x for box in boxes.values()) + NODE_WIDTH
    pairs = [
        (boxes[name], boxes[node.id])
        for node in nodes
        for name in dict.fromkeys(map(str, node.spec.inputs.values()))
        if name in boxes and _is_drawn_edge(boxes[name].node, node)
    ]
    # Every source of a backward arrow has its own track in the right margin.
    sources = list(
        dict.fromkeys(start.node.id for start, end in pairs if start.x + NODE_WIDTH > end.x and start.x != end.x)
    )
    tracks = {source: right + 14 + 6 * index for index, source in enumerate(sources)}
    width = max(tracks.values(), default=right) + 4
    edges = [
        _draw_edge(start, end, boxes.values(), tracks.get(start.node.id, right + 14), style) for start, end in pairs
    ]
    classes = "graph small" if width < SMALL_WIDTH else "graph"
    num_done = sum(node.status != "pending" for node in nodes)
    names = "".join(
        f'<text x="2" y="{y}" font-size="12.5" font-weight="600" fill="currentColor">{esc(label)}</text>'
        for y, label in labels
    )
    return (
        '<p class="quiet narrow">If the picture is wider than this screen, move it sideways.</p>'
        f'<div class="scroll"><svg class="{classes}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="graph of stages, {num_done} of {len(nodes)} done">'
        f'<defs><marker id="{marker}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="var(--edge, #8d929b)"/></marker></defs>'
        f"{''.join(edges)}{''.join(map(_draw_box, boxes.values()))}{names}</svg></div>"
    )
