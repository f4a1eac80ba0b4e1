"""Sections about how it went: training curves, and samples before and after RL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polm.report.compare import (
    CONTROL,
    POINTS,
    Arm,
    build_evaluations,
    compute_arm,
    compute_rows,
    describe_point,
    get_lead_arm,
)
from polm.report.escape import esc
from polm.report.load import Item, Metrics, Node, Run
from polm.report.markup import build_details, build_grid, build_paragraph, compute_arm_styles
from polm.report.plots import (
    Bar,
    Line,
    build_bar_plot,
    build_line_plot,
    compute_histogram_edges,
    is_increasing,
)

# Columns of metrics.jsonl that count and are no measurement.
COUNTERS = ("update", "num_updates", "tokens", "targets", "seconds", "eta_seconds")
# Measurements that say how the machine and the optimizer did; they fold away.
MACHINE = ("lr", "grad_norm", "tokens_per_second")
# The stages in the order of the question that a reader asks; others follow in run order.
STAGE_ORDER = ("midtrain", "grpo", "sft", "dpo", "pretrain")

# Stages whose loss is a (weighted) negative log-likelihood; elsewhere a loss has no unit.
LIKELIHOOD_STAGES = ("pretrain", "midtrain", "sft")
STAGE_TITLES = {
    "pretrain": "Pre-training",
    "midtrain": "Mid-training",
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimisation",
    "grpo": "RL with verifiable rewards",
}

# How to read a metric: the first entry whose word is in the metric's name.
READINGS = (
    ("reward", "The average reward of the sampled answers. It should rise; a reward that rises while the benchmarks "
     "do not is a reward that is being gamed."),
    ("clip", "The share of tokens at the bounds of the clipping range. Near one, the weights are all or nothing."),
    ("delta", "How far the reference and the learner disagree, in nats. Near zero the weights are all one, and the "
     "stage is plain next-token prediction."),
    ("entropy", "How undecided the model is, in nats. A fall to zero means that it always gives the same answer."),
    ("kl", "How far the model has moved from where it started, in nats."),
    ("lr", "The learning rate of each update."),
    ("grad_norm", "The norm of the gradient before clipping. Spikes are unstable updates."),
    ("tokens_per_second", "Speed of training; it changes nothing in the result."),
    ("loss", "The loss that the stage minimises. Arms with different objectives (weighted, selected, distilled tokens) "
     "have different losses: compare the shapes, and the scores in the benchmarks."),
)  # fmt: skip
UNITS = (
    ("reward", "reward"),
    ("fraction", "share of tokens"),
    ("share", "share"),
    ("delta", "nats per token"),
    ("entropy", "nats per token"),
    ("kl", "nats per token"),
    ("grad_norm", "norm of the gradient"),
    ("tokens_per_second", "tokens per second"),
    ("lr", "learning rate"),
)

MAX_TEXT = 2_000
OUTCOMES = {
    "fixed": "wrong before RL, right after",
    "broken": "right before RL, wrong after",
    "right": "right before and after RL",
    "wrong": "wrong before and after RL",
}


# ---- training curves -----------------------------------------------------------------------------------------------


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


def _find_words(name: str, table: Sequence[tuple[str, str]], default: str) -> str:
    return next((words for part, words in table if part in name), default)


def _describe_unit(step: str, name: str) -> str:
    if name == "loss" and step in LIKELIHOOD_STAGES:
        return "loss, nats per token"
    return _find_words(name, UNITS, name.rsplit("/", 1)[-1])


def _build_curve_plot(run: Run, step: str, name: str, by_arm: dict[Arm, list[Node]]) -> str:
    styles = compute_arm_styles(run)
    x_name = "update" if step == "grpo" else "tokens"
    lines, num_seeds, is_cut = [], 0, False
    for arm, nodes in by_arm.items():
        curve = compute_curve([node.metrics for node in nodes], name, x_name)
        if curve is None:
            continue
        series, dash = styles.get(arm, (5, 0))
        band = (curve.low, curve.high) if curve.num_seeds > 1 else (None, None)
        lines.append(Line(arm.label, curve.x, curve.mean, series, dash, *band))
        num_seeds = max(num_seeds, curve.num_seeds)
        is_cut = is_cut or any(node.status == "pending" for node in nodes)
    if not lines:
        return ""
    reading = _find_words(name, READINGS, "One line an arm.")
    seeds = f" Lines are means over {num_seeds} seeds, bands their full range." if num_seeds > 1 else ""
    running = " At least one arm is still running." if is_cut else ""
    return build_line_plot(
        lines,
        title=f"{step}: {name}",
        x_label="update" if x_name == "update" else "tokens read in this stage",
        y_label=_describe_unit(step, name),
        how_to_read=reading + seeds + running,
    )


def _get_edges(node: Node, name: str, num_bins: int) -> tuple[list[float] | None, str]:
    """Edges of a histogram's bins: as logged under NAME_edges, else the clipping range for weights, else none."""
    logged = _get_numbers(node.metrics[-1], f"{name}_edges")
    if logged and len(logged) == num_bins + 1 and is_increasing(logged):
        return logged, "value"
    eps = node.spec.config.get("eps")
    if "weight" in name and isinstance(eps, (int, float)) and 0 < eps <= 1:
        return list(compute_histogram_edges(1 - eps, 1 + eps, num_bins)), "token weight"
    return None, "bin, from low to high"


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
    edges, x_label = _get_edges(nodes[0], name, len(rows[0]))
    series = compute_arm_styles(run).get(arm, (5, 0))[0]
    bars = [
        Bar(f"bin {i + 1}" if edges is None else f"{edges[i]:.3g} to {edges[i + 1]:.3g}", float(share), series)
        for i, share in enumerate(mean / total)
    ]
    return build_bar_plot(
        bars,
        title=f"{arm.label}, {step}: {name}",
        x_label=x_label,
        y_label="share of tokens",
        edges=edges,
        how_to_read=(
            f"How the values are spread over the last tenth of the updates ({len(rows)} log lines). "
            "Weights piled up at both ends are clipped; one peak in the middle is plain next-token prediction."
        ),
    )


def _build_step(run: Run, step: str, by_arm: dict[Arm, list[Node]]) -> str:
    names = _list_metric_names(by_arm)
    plots = {name: _build_curve_plot(run, step, name, by_arm) for name in names}
    histograms = [
        plot
        for name in names
        if not plots[name] and not name.endswith("_edges")
        for arm, nodes in by_arm.items()
        if (plot := _build_histogram(run, step, name, arm, nodes))
    ]
    first = sorted((name for name in names if name not in MACHINE), key=lambda name: "reward" not in name)
    shown = [plots[name] for name in first if plots[name]]
    machine = [plots[name] for name in MACHINE if plots.get(name)]
    parts = [f"<h3>{esc(STAGE_TITLES.get(step, step))}</h3>", build_grid(shown + histograms)]
    if machine:
        parts.append(build_details(f"{step}: learning rate, gradient norm, speed", build_grid(machine)))
    return "".join(parts)


def section_training(run: Run) -> str:
    """Curves of every metric that a training stage logged, one plot a metric, one line an arm."""
    trained = _list_trained(run)
    if not trained:
        return build_paragraph("No stage has logged metrics yet.", "callout")
    return "".join(_build_step(run, step, by_arm) for step, by_arm in trained.items())


# ---- samples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transition:
    """One item at two points of the pipeline."""

    before: Item
    after: Item

    @property
    def outcome(self) -> str:
        was_right, is_right = bool(self.before.greedy_correct), bool(self.after.greedy_correct)
        return {(False, True): "fixed", (True, False): "broken", (True, True): "right", (False, False): "wrong"}[
            was_right, is_right
        ]


def _index_items(items: Sequence[Item]) -> dict[tuple[str, str], Item]:
    return {(item.benchmark, str(item.id)): item for item in items}


def build_transitions(run: Run, arm: Arm, seed: int) -> tuple[str, list[Transition]]:
    """Items of one model before and after RL: the point before, and the pairs in file order."""
    evaluations = build_evaluations(run)
    after = evaluations.get(("rl", arm), {}).get(seed)
    earlier = [point for point in reversed(POINTS) if point != "rl" and seed in evaluations.get((point, arm), {})]
    if after is None or not earlier:
        return "", []
    before = _index_items(evaluations[earlier[0], arm][seed].items)
    pairs = [Transition(before[key], item) for key, item in _index_items(after.items).items() if key in before]
    return earlier[0], pairs


def _build_text(text: str) -> str:
    rest = len(text) - MAX_TEXT
    more = f'<span class="quiet"> … {rest} more characters</span>' if rest > 0 else ""
    return f"<pre>{esc(text[:MAX_TEXT])}{more}</pre>" if text else '<pre class="quiet">(nothing)</pre>'


def _build_answer(item: Item, heading: str) -> str:
    """One model text with its verdict, and the verdicts of the sampled answers as dots."""
    verdict = "right" if item.greedy_correct else "wrong"
    sign = "✓" if item.greedy_correct else "✗"
    status = f" ({item.greedy_status})" if item.greedy_status else ""
    dots = "".join("●" if correct else "○" for correct in item.samples_correct)
    num_right = sum(1 for correct in item.samples_correct if correct)
    sampled = (
        f'<p class="quiet" title="one dot for each sampled answer, filled if right">sampled: {esc(dots)} '
        f"{num_right} of {len(item.samples_correct)} right</p>"
        if item.samples_correct
        else ""
    )
    badge = f'<span class="verdict {verdict}">{sign} {verdict}{esc(status)}</span>'
    return f'<div class="answer"><h5>{esc(heading)} {badge}</h5>{_build_text(item.greedy_text)}{sampled}</div>'


def _build_item(transition: Transition, point: str, extra_html: str) -> str:
    item, outcome = transition.after, transition.outcome
    before = _build_answer(transition.before, f"before RL ({point})")
    return (
        f'<article class="item" data-outcome="{outcome}"><header><code>{esc(item.id)}</code> '
        f'<span class="tag {outcome}">{esc(OUTCOMES[outcome])}</span></header>'
        f"<h5>prompt</h5>{_build_text(item.prompt)}"
        f'<p>expected answer: <code>{esc(item.answer)}</code></p><div class="answers">'
        f"{before}{_build_answer(item, 'after RL')}{extra_html}</div></article>"
    )


def _select(transitions: Sequence[Transition]) -> list[Transition]:
    """The first item of each outcome: a fixed rule, so nobody picked the nice ones."""
    return [
        found
        for outcome in OUTCOMES
        if (found := next((one for one in transitions if one.outcome == outcome), None)) is not None
    ]


def _build_benchmark(
    name: str, transitions: Sequence[Transition], point: str, control: dict[tuple[str, str], Item], *, is_open: bool
) -> str:
    counts = {outcome: sum(one.outcome == outcome for one in transitions) for outcome in OUTCOMES}
    summary = (
        f"{name}: {len(transitions)} items, {counts['fixed']} fixed by RL, {counts['broken']} broken by RL, "
        f"{counts['right']} right and {counts['wrong']} wrong both times"
    )
    items = []
    for one in _select(transitions):
        other = control.get((name, str(one.after.id)))
        extra = "" if other is None else _build_answer(other, f"control {CONTROL.label}, after RL")
        items.append(_build_item(one, describe_point(point), extra))
    return build_details(summary, "".join(items), is_open=is_open)


def section_samples(run: Run) -> str:
    """A few items of each benchmark with prompt, model text and verdict, before and after RL."""
    evaluations = build_evaluations(run)
    candidates = [get_lead_arm(compute_rows(run)), CONTROL, *dict.fromkeys(arm for _, arm in evaluations)]
    for arm in (arm for arm in candidates if arm is not None):
        seeds = sorted(evaluations.get(("rl", arm), {}))
        point, transitions = build_transitions(run, arm, seeds[0]) if seeds else ("", [])
        if transitions:
            break
    else:
        return build_paragraph("No model has been evaluated both before and after RL yet.", "callout")
    control: dict[tuple[str, str], Item] = {}
    if not arm.is_control and seeds[0] in evaluations.get(("rl", CONTROL), {}):
        control = _index_items(evaluations["rl", CONTROL][seeds[0]].items)
    by_benchmark: dict[str, list[Transition]] = {}
    for one in transitions:
        by_benchmark.setdefault(one.after.benchmark, []).append(one)
    buttons = "".join(
        f'<button type="button" data-filter="{outcome}" aria-pressed="false">{esc(words)}</button>'
        for outcome, words in {"all": "all outcomes", **OUTCOMES}.items()
    )
    parts = [
        build_paragraph(
            f"Greedy answers of {arm.label}, seed {seeds[0]}. Of each benchmark the first item in file order of each "
            "outcome is shown: not a fair sample (the counts are in the headings), but nobody picked it by hand.",
            "quiet",
        ),
        f'<div class="filters" hidden>{buttons}</div>',
    ]
    for index, (name, group) in enumerate(by_benchmark.items()):
        parts.append(_build_benchmark(name, group, point, control, is_open=index == 0))
    return "".join(parts)
