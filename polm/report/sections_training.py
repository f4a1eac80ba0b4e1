"""The section of training curves: one plot a metric, one line an arm, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polm.report.annealing import Crossing, compute_crossing, describe_crossing
from polm.report.compare import CONTROL, CONTROL_NAME, Arm, compute_arm, describe_seeds
from polm.report.escape import esc
from polm.report.load import Metrics, Node, Run
from polm.report.made import ROLLOUT_STAGES
from polm.report.markup import build_details, build_grid, build_paragraph, compute_arm_styles
from polm.report.metric_words import COUNTERS, FOLDED, PLAIN_NLL, describe_metric_words
from polm.report.plots import Bar, Line, Mark, build_bar_plot, build_line_plot, compute_histogram_edges

# The stages in the order of the question that a reader asks; others follow in run order.
STAGE_ORDER = ("midtrain", "grpo", "sft", "dpo", "pretrain")

STAGE_TITLES = {
    "pretrain": "Pre-training",
    "midtrain": "Mid-training",
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimisation",
    "online": "Online preference optimisation",
    "reward_model": "Reward model",
    "process_reward_model": "Process reward model",
    "grpo": "RL with verifiable rewards",
    "rloo": "RL by RLOO",
    "reinforce_pp": "RL by REINFORCE++",
    "remax": "RL by ReMax",
    "ppo": "RL by PPO",
}

# What a stage is about comes first.
FIRST = (PLAIN_NLL, "rl/reward", "rl/length", "rl/entropy", "rl/kl", "rl/kl_start")
# More bands than this hide the lines.
MAX_BANDS = 4
# Weights are 2 * sigmoid(...), so their histogram spans 0 to 2.
WEIGHT_RANGE = (0.0, 2.0)


@dataclass(frozen=True)
class Curve:
    """A metric of one arm, averaged over `num_seeds` seeds at the updates that all of them logged."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    num_seeds: int


def _get_number(metrics: Metrics, name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _get_numbers(metrics: Metrics, name: str) -> list[float] | None:
    value = metrics.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(one, (int, float)) for one in value):
        return None
    return [float(one) for one in value]


def compute_curve(logs: Sequence[Sequence[Metrics]], name: str, x_name: str) -> Curve | None:
    """Average of metric `name` over the logs of several seeds, against the average of `x_name` at the same update."""
    by_update: list[dict[float, tuple[float, float]]] = []
    for log in logs:
        points = {}
        for line in log:
            update, value = _get_number(line, "update"), _get_number(line, name)
            if update is not None and value is not None:
                x = _get_number(line, x_name)
                points[update] = (update if x is None else x, value)
        if points:
            by_update.append(points)
    if not by_update:
        return None
    common = sorted(set(by_update[0]).intersection(*by_update[1:]))
    if not common:
        return None
    x_SU = np.array([[points[update][0] for update in common] for points in by_update])
    y_SU = np.array([[points[update][1] for update in common] for points in by_update])
    return Curve(
        x_SU.mean(axis=0).tolist(),
        y_SU.mean(axis=0).tolist(),
        y_SU.min(axis=0).tolist(),
        y_SU.max(axis=0).tolist(),
        len(by_update),
    )


def _list_trained(run: Run) -> dict[str, dict[Arm, list[Node]]]:
    """Nodes with metrics, by step and arm. Where a seed is finished, unfinished ones do not cut the average short."""
    found: dict[str, dict[Arm, list[Node]]] = {}
    for node in run.nodes:
        arm = compute_arm(node)
        is_copy = node.status == "shared" and arm.cycle > 0
        if node.metrics and not is_copy:
            found.setdefault(node.leaf, {}).setdefault(arm, []).append(node)
    for by_arm in found.values():
        for arm, nodes in by_arm.items():
            by_arm[arm] = [node for node in nodes if node.status != "pending"] or nodes
    known = [step for step in STAGE_ORDER if step in found]
    return {step: found[step] for step in (*known, *(step for step in found if step not in known))}


def _list_metric_names(by_arm: dict[Arm, list[Node]]) -> list[str]:
    names = dict.fromkeys(
        name
        for nodes in by_arm.values()
        for node in nodes
        for line in (node.metrics[0], node.metrics[-1])
        for name in line
    )
    return [name for name in names if name not in COUNTERS]


def compute_difference_log(log: Sequence[Metrics], control: Sequence[Metrics], name: str) -> list[Metrics]:
    """Metric `name` minus the control's at the same update; both read the same text there, so much noise cancels."""
    baseline = {line.get("update"): _get_number(line, name) for line in control}
    differences: list[Metrics] = []
    for line in log:
        value, base = _get_number(line, name), baseline.get(line.get("update"))
        if value is not None and base is not None:
            differences.append({"update": line.get("update"), "tokens": line.get("tokens"), name: value - base})
    return differences


def _build_lines(run: Run, name: str, x_name: str, logs: dict[Arm, list[Sequence[Metrics]]]) -> tuple[list[Line], str]:
    """One line an arm, and the words that say what lines and bands are."""
    styles = compute_arm_styles(run)
    with_bands = len(logs) <= MAX_BANDS
    lines: list[Line] = []
    counts: list[int] = []
    for arm, of_seeds in logs.items():
        curve = compute_curve(of_seeds, name, x_name)
        if curve is None:
            continue
        series, dash = styles.get(arm, (5, 0))
        band = (curve.low, curve.high) if with_bands and curve.num_seeds > 1 else (None, None)
        lines.append(Line(arm.label, curve.x, curve.mean, series, dash, *band))
        counts.append(curve.num_seeds)
    if max(counts, default=1) == 1:
        return lines, ""
    bands = ", bands their full range" if with_bands else ""
    return lines, f" Lines are means over {describe_seeds(counts)}{bands}."


def build_crossings(by_arm: dict[Arm, list[Node]]) -> dict[Arm, Crossing]:
    """Each arm of mid-training against the control, over the updates that both logged in the seeds that both have."""
    control = {node.spec.seed: node.metrics for node in by_arm.get(CONTROL, ())}
    found = {}
    for arm, nodes in by_arm.items():
        mine = {node.spec.seed: node.metrics for node in nodes if node.spec.seed in control}
        curve = compute_curve(list(mine.values()), PLAIN_NLL, "update")
        base = compute_curve([control[seed] for seed in mine], PLAIN_NLL, "update")
        if arm.is_control or curve is None or base is None:
            continue
        values = dict(zip(base.x, base.mean, strict=True))
        common = [(x, y, values[x]) for x, y in zip(curve.x, curve.mean, strict=True) if x in values]
        crossing = compute_crossing(arm.label, *map(list, zip(*common, strict=True))) if common else None
        if crossing is not None:
            found[arm] = crossing
    return found


def _build_marks(run: Run, crossings: dict[Arm, Crossing]) -> list[Mark]:
    """A, B, ... in the order of the sentences, for the arms that do pass the control."""
    styles = compute_arm_styles(run)
    return [
        Mark(
            one.update,
            one.value,
            letter_of(number),
            f"{one.label} passes {CONTROL_NAME} at update {one.update:g}",
            styles.get(arm, (5, 0))[0],
        )
        for number, (arm, one) in enumerate(crossings.items())
        if one.update is not None
    ]


def letter_of(number: int) -> str:
    return chr(ord("A") + number % 26)


def _build_crossing_words(crossings: dict[Arm, Crossing]) -> str:
    """Who passes whom, arm by arm."""
    if not crossings:
        return ""
    items = "".join(
        f"<li><b>{letter_of(number)}</b> {esc(describe_crossing(one))}</li>"
        for number, one in enumerate(crossings.values())
    )
    window = max(one.window for one in crossings.values())
    averaged = f"averaged over {window} logged points (each point and those before it)" if window > 1 else "as logged"
    note = build_paragraph(
        f"Curves that pass each other, by {PLAIN_NLL} {averaged}; means over the seeds that both have. "
        "It is the likelihood of the training text, noise included: "
        "an arm that lies above may still be the better base, which the benchmarks decide. Rings in the first plot "
        "mark the places.",
        "quiet",
    )
    return f'{note}<ul class="statements">{items}</ul>'


def _build_curve_plot(run: Run, step: str, name: str, by_arm: dict[Arm, list[Node]], marks: Sequence[Mark] = ()) -> str:
    x_name = "update" if step == "midtrain" or step in ROLLOUT_STAGES else "tokens"
    logs: dict[Arm, list[Sequence[Metrics]]] = {arm: [node.metrics for node in nodes] for arm, nodes in by_arm.items()}
    lines, seeds = _build_lines(run, name, x_name, logs)
    if not lines:
        return ""
    is_running = any(node.status == "pending" for nodes in by_arm.values() for node in nodes)
    unit, reading = describe_metric_words(step, name)
    return build_line_plot(
        lines,
        title=f"{step}: {name}",
        x_label="update" if x_name == "update" else "tokens read in this stage",
        y_label=unit,
        how_to_read=reading + seeds + (" At least one arm is still running." if is_running else ""),
        marks=marks,
    )


def _build_difference_plot(run: Run, step: str, by_arm: dict[Arm, list[Node]]) -> str:
    """The plain likelihood of each arm minus the control's, seed by seed: what the curves themselves hide."""
    control = {node.spec.seed: node.metrics for node in by_arm.get(CONTROL, ())}
    logs: dict[Arm, list[Sequence[Metrics]]] = {
        arm: [
            compute_difference_log(node.metrics, control[node.spec.seed], PLAIN_NLL)
            for node in nodes
            if node.spec.seed in control
        ]
        for arm, nodes in by_arm.items()
        if not arm.is_control
    }
    lines, seeds = _build_lines(run, PLAIN_NLL, "update", logs)
    if not lines:
        return ""
    return build_line_plot(
        lines,
        title=f"{step}: {PLAIN_NLL}, difference to {CONTROL_NAME}",
        x_label="update",
        y_label="difference, nats per token",
        how_to_read=(
            "Arm minus control at the same update, on the same text. Below zero the arm predicts the training text "
            f"better than next-token prediction does; an arm that looks away from noisy tokens may lie above.{seeds}"
        ),
    )


def _build_histogram(run: Run, step: str, name: str, arm: Arm, nodes: Sequence[Node]) -> str:
    """The last tenth of the updates, averaged over updates and seeds, as shares."""
    rows = [
        numbers
        for node in nodes
        for line in node.metrics[-math.ceil(len(node.metrics) / 10) :]
        if (numbers := _get_numbers(line, name)) is not None
    ]
    if not rows or len({len(row) for row in rows}) > 1 or len(rows[0]) < 2:
        return ""
    mean = np.array(rows).mean(axis=0)
    total = float(mean.sum())
    if not math.isfinite(total) or total <= 0:
        return ""
    is_weight = "weight" in name
    edges = compute_histogram_edges(*WEIGHT_RANGE, len(rows[0])) if is_weight else None
    series = compute_arm_styles(run).get(arm, (5, 0))[0]
    bars = [
        Bar(f"bin {i + 1}" if edges is None else f"{edges[i]:.3g} to {edges[i + 1]:.3g}", float(share), series)
        for i, share in enumerate(mean / total)
    ]
    return build_bar_plot(
        bars,
        title=f"{arm.label}, {step}: {name}",
        x_label="token weight" if is_weight else "bin, from low to high",
        y_label="share of tokens",
        edges=edges,
        how_to_read=(
            f"How the values are spread over the last tenth of the updates (log lines: {len(rows)}). "
            "Weights piled up at both ends are clipped; one peak in the middle is plain next-token prediction."
        ),
    )


def _build_step(run: Run, step: str, by_arm: dict[Arm, list[Node]]) -> str:
    names = _list_metric_names(by_arm)
    crossings = build_crossings(by_arm) if step == "midtrain" else {}
    marks = {PLAIN_NLL: _build_marks(run, crossings)}
    plots = {name: _build_curve_plot(run, step, name, by_arm, marks.get(name, ())) for name in names}
    histograms = [
        plot
        for name in names
        if not plots[name]
        for arm, nodes in by_arm.items()
        if (plot := _build_histogram(run, step, name, arm, nodes))
    ]
    # Outside of mid-training the plain likelihood is the loss once more.
    folded = FOLDED if step == "midtrain" else (*FOLDED, PLAIN_NLL)
    # What the stage is about comes first: the reward of RL, the likelihood of mid-training.
    first = sorted(
        (name for name in names if name not in folded),
        key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST),
    )
    shown = [plots[name] for name in first if plots[name]]
    if step == "midtrain" and (difference := _build_difference_plot(run, step, by_arm)):
        shown.insert(1, difference)
    more = [plots[name] for name in names if name in folded and plots[name]]
    words = _build_crossing_words(crossings)
    parts = [f"<h3>{esc(STAGE_TITLES.get(step, step))}</h3>", words, build_grid(shown + histograms)]
    if more:
        parts.append(build_details(f"{step}: {len(more)} more metrics", build_grid(more)))
    return "".join(parts)


def section_training(run: Run) -> str:
    """Curves of every metric that a training stage logged, one plot a metric, one line an arm."""
    trained = _list_trained(run)
    if not trained:
        is_to_come = any(node.status == "pending" for node in run.nodes)
        return build_paragraph("No stage has logged metrics yet.", "callout") if is_to_come else ""
    return "".join(_build_step(run, step, by_arm) for step, by_arm in trained.items())
