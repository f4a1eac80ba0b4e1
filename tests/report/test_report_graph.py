"""The picture of the stages: every node once, evaluations below what they measure, arrows that miss the boxes."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from polm.report.graph import NODE_WIDTH, build_graph
from polm.report.load import load_run


def get_boxes(picture: str) -> dict[str, tuple[float, float, float, float]]:
    """x, y, width and height of every box by node id."""
    match = re.search(r"<svg.*</svg>", picture, flags=re.S)
    assert match is not None
    boxes = {}
    for group in ElementTree.fromstring(match.group(0)).iter("g"):
        title, rect = group.find("title"), group.find("rect")
        assert title is not None
        assert title.text is not None
        assert rect is not None
        x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        boxes[title.text.split(": ")[0]] = (x, y, width, height)
    return boxes


def test_every_node_has_its_own_place(small_run: Path) -> None:
    run = load_run(small_run)
    boxes = get_boxes(build_graph(run, 0))
    assert set(boxes) == {node.id for node in run.nodes if node.spec.seed == 0}
    assert len({(x, y) for x, y, _, _ in boxes.values()}) == len(boxes)
    # Steps of all arms stand in one column, in the order of the pipeline.
    assert boxes["s0/c0/ntp/sft"][0] == boxes["s0/c1/remit/sft"][0] == boxes["s0/c1/rho1/sft"][0]
    columns = [boxes[f"s0/c1/remit/{step}"][0] for step in ("annotate", "midtrain", "sft", "pairs", "dpo", "grpo")]
    assert columns == sorted(columns)
    # The control reads as one line from data to RL.
    assert boxes["s0/data"][1] == boxes["s0/pretrain"][1] == boxes["s0/c0/ntp/grpo"][1]
    # An evaluation hangs below its stage.
    assert boxes["s0/c1/remit/eval_dpo"][0] == boxes["s0/c1/remit/dpo"][0]
    assert boxes["s0/c1/remit/eval_dpo"][1] > boxes["s0/c1/remit/dpo"][1]


def get_segments(path: str) -> list[tuple[float, float, float, float]]:
    """The straight parts of a path of M, H, V and q commands."""
    x = y = 0.0
    segments = []
    for command, numbers in re.findall(r"([MHVq])([^MHVq]*)", path):
        values = [float(value) for value in numbers.split()]
        before = (x, y)
        if command == "M":
            x, y = values
            continue
        if command == "H":
            x = values[0]
        elif command == "V":
            y = values[0]
        else:
            x, y = x + values[2], y + values[3]
        segments.append((*before, x, y))
    return segments


def count_crossings(picture: str) -> tuple[int, int]:
    """Number of arrows, and of arrows that run through the inside of a box."""
    boxes = get_boxes(picture).values()
    arrows = re.findall(r'<path d="([^"]*)" fill="none" stroke="var\(--edge', picture)
    num_crossing = 0
    for arrow in arrows:
        num_crossing += any(
            max(x1, x2) > x + 1 and min(x1, x2) < x + width - 1 and max(y1, y2) > y + 1 and min(y1, y2) < y + height - 1
            for x1, y1, x2, y2 in get_segments(arrow)
            for x, y, width, height in boxes
        )
    return len(arrows), num_crossing


def test_arrows_follow_the_inputs_and_cross_no_box(build_run: Callable[..., Path]) -> None:
    run_dir = build_run(cycles=2)
    num_arrows, num_crossing = count_crossings(build_graph(load_run(run_dir), 0))
    # data-tokenizer, data-pretrain, tokenizer-pretrain; control: 6; each of 4 other passes: 6 + reference and annotate.
    assert num_arrows == 3 + 6 + 4 * 8
    assert num_crossing == 0


def test_a_reference_from_the_middle_of_the_pipeline_goes_around(build_run: Callable[..., Path]) -> None:
    run_dir = build_run()
    content = json.loads((run_dir / "run.json").read_text())
    for node in content["nodes"]:
        if node["id"] == "s0/c1/rho1/annotate":
            node["inputs"]["reference"] = "s0/c0/ntp/sft"
    (run_dir / "run.json").write_text(json.dumps(content))
    assert count_crossings(build_graph(load_run(run_dir), 0))[1] == 0


def test_status_is_shown_in_words_and_form(build_run: Callable[..., Path]) -> None:
    picture = build_graph(load_run(build_run(until="midtrain")), 0)
    assert "s0/c1/remit/sft: pending, pending" in picture
    assert 'stroke-dasharray="4 3"' in picture
    assert "20 of 34 done" in picture


def test_unknown_steps_and_names_are_drawn_as_text(build_run: Callable[..., Path], hostile: str) -> None:
    run_dir = build_run()
    content = json.loads((run_dir / "run.json").read_text())
    sft = next(node for node in content["nodes"] if node["id"] == "s0/c0/ntp/sft")
    content["nodes"].append({**sft, "id": f"s0/c0/ntp/{hostile.replace('/', '')}", "stage": "x", "inputs": {}})
    (run_dir / "run.json").write_text(json.dumps(content))
    picture = build_graph(load_run(run_dir), 0)
    assert "<img" not in picture
    assert len(get_boxes(picture)) == 35
    assert all(width == NODE_WIDTH for _, _, width, _ in get_boxes(picture).values())


def test_a_seed_without_nodes_is_empty(small_run: Path) -> None:
    assert build_graph(load_run(small_run), 7) == ""
