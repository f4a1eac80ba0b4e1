"""The section of samples: what the model said before and after RL, and what the control said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polm.report.compare import CONTROL, POINTS, Arm, build_evaluations, compute_rows, get_lead_arm
from polm.report.escape import esc
from polm.report.load import Item, Run
from polm.report.markup import build_details, build_paragraph

MAX_TEXT = 2_000
MAX_SAMPLES, MAX_SAMPLE_TEXT = 4, 600
OUTCOMES = {
    "fixed": "wrong before RL, right after",
    "broken": "right before RL, wrong after",
    "right": "right before and after RL",
    "wrong": "wrong before and after RL",
}


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


def build_text(text: str, limit: int = MAX_TEXT) -> str:
    """A model's text as it is, cut to `limit` characters (and said so)."""
    rest = len(text) - limit
    more = f'<span class="quiet"> … {rest} more characters</span>' if rest > 0 else ""
    return f"<pre>{esc(text[:limit])}{more}</pre>" if text else '<pre class="quiet">(nothing)</pre>'


def _build_answer(item: Item, heading: str) -> str:
    """One model text with its verdict, and the verdicts of the sampled answers as dots."""
    verdict = "right" if item.greedy_correct else "wrong"
    sign = "✓" if item.greedy_correct else "✗"
    status = f" ({item.greedy_status})" if item.greedy_status not in ("", "right", "wrong") else ""
    dots = "".join("●" if correct else "○" for correct in item.samples_correct)
    num_right = sum(1 for correct in item.samples_correct if correct)
    sampled = (
        f'<p class="quiet" title="one dot for each sampled answer, filled if right">sampled: {esc(dots)} '
        f"{num_right} of {len(item.samples_correct)} right</p>"
        if item.samples_correct
        else ""
    )
    badge = f'<span class="verdict {verdict}">{sign} {verdict}{esc(status)}</span>'
    texts = _build_samples(item)
    return f'<div class="answer"><h5>{esc(heading)} {badge}</h5>{build_text(item.greedy_text)}{sampled}{texts}</div>'


def _build_samples(item: Item) -> str:
    """The first sampled answers, folded, each with its verdict."""
    pairs = list(zip(item.samples_text, item.samples_correct, strict=False))[:MAX_SAMPLES]
    if not pairs:
        return ""
    body = "".join(
        f'<p class="verdict {"right" if correct else "wrong"}">{"✓ right" if correct else "✗ wrong"}</p>'
        f"{build_text(text, MAX_SAMPLE_TEXT)}"
        for text, correct in pairs
    )
    more = f" (the first {MAX_SAMPLES} of {len(item.samples_text)})" if len(item.samples_text) > MAX_SAMPLES else ""
    return build_details(f"{len(pairs)} sampled answers{more}", body)


def _build_item(transition: Transition, point: str, extra_html: str) -> str:
    item, outcome = transition.after, transition.outcome
    before = _build_answer(transition.before, f"before RL ({point})")
    return (
        f'<article class="item" data-outcome="{outcome}"><header><code>{esc(item.id)}</code> '
        f'<span class="tag {outcome}">{esc(OUTCOMES[outcome])}</span></header>'
        f"<h5>prompt</h5>{build_text(item.prompt)}"
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
        items.append(_build_item(one, point, extra))
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
            "outcome is shown: not a fair sample (the counts are in the headings), but nobody picked it by hand. Texts "
            f"are cut at {MAX_TEXT} characters, sampled answers at {MAX_SAMPLE_TEXT}.",
            "quiet",
        ),
        f'<div class="filters" hidden>{buttons}</div>',
    ]
    for index, (name, group) in enumerate(by_benchmark.items()):
        parts.append(_build_benchmark(name, group, point, control, is_open=index == 0))
    return "".join(parts)
