"""The section of samples: what the model said before and after RL, and what the control said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from polm.report.compare import CONTROL, POINTS, Arm, build_evaluations, compute_rows, get_lead_arm
from polm.report.escape import esc
from polm.report.load import Item, Run
from polm.report.markup import build_details, build_paragraph
from polm.report.rounds import compute_rounds, name_place

MAX_TEXT = 2_000
MAX_SAMPLES, MAX_SAMPLE_TEXT = 4, 600
OUTCOMES = ("fixed", "broken", "right", "wrong")
ALONE = ("right", "wrong")


@dataclass(frozen=True)
class Transition:
    """One item of two models; without `before` of one model alone."""

    before: Item | None
    after: Item

    @property
    def outcome(self) -> str:
        if self.before is None:
            return "right" if self.after.greedy_correct else "wrong"
        was_right, is_right = bool(self.before.greedy_correct), bool(self.after.greedy_correct)
        return {(False, True): "fixed", (True, False): "broken", (True, True): "right", (False, False): "wrong"}[
            was_right, is_right
        ]


@dataclass(frozen=True)
class Sides:
    """Whose answers are shown: the names of the model after, of the one before ("" for none), and of what lies between
    them (in "right before …, wrong after")."""

    after: str
    before: str
    between: str
    arm: Arm
    seed: int

    @property
    def outcomes(self) -> dict[str, str]:
        if not self.before:
            return {outcome: outcome for outcome in ALONE}
        return {
            "fixed": f"wrong before {self.between}, right after",
            "broken": f"right before {self.between}, wrong after",
            "right": f"right before and after {self.between}",
            "wrong": f"wrong before and after {self.between}",
        }


def _index_items(items: Sequence[Item]) -> dict[tuple[str, str], Item]:
    return {(item.benchmark, str(item.id)): item for item in items}


def build_transitions(run: Run, arm: Arm, seed: int) -> tuple[str, list[Transition]]:
    """Items of one model before and after RL: the point before, and the pairs in file order."""
    evaluations = build_evaluations(run)
    after = evaluations.get(("rl", arm), {}).get(seed)
    earlier = [point for point in reversed(POINTS) if point != "rl" and seed in evaluations.get((point, arm), {})]
    if after is None or not earlier:
        return "", []
    return earlier[0], pair_items(evaluations[earlier[0], arm][seed].items, after.items)


def pair_items(before: Sequence[Item], after: Sequence[Item]) -> list[Transition]:
    """The items that both have, in the order of `after`."""
    index = _index_items(before)
    return [Transition(index[key], item) for key, item in _index_items(after).items() if key in index]


def choose_sides(run: Run) -> tuple[Sides, list[Transition]] | None:
    """Before and after RL where the run has both; else the first and the last model of its rounds; else one alone."""
    evaluations = build_evaluations(run)
    candidates = [get_lead_arm(compute_rows(run)), CONTROL, *dict.fromkeys(arm for _, arm in evaluations)]
    for arm in (arm for arm in candidates if arm is not None):
        seeds = sorted(evaluations.get(("rl", arm), {}))
        point, found = build_transitions(run, arm, seeds[0]) if seeds else ("", [])
        if found:
            return Sides("after RL", f"before RL ({point})", "RL", arm, seeds[0]), found
    if (rounds := compute_rounds(run)) is not None:
        first, last = rounds.places[0], rounds.places[-1]
        common = sorted(evaluations[first].keys() & evaluations[last].keys())
        if common:
            pairs = pair_items(evaluations[first][common[0]].items, evaluations[last][common[0]].items)
            return Sides(name_place(last), name_place(first), "training", last[1], common[0]), pairs
    if run.is_stage and evaluations:
        (point, arm), by_seed = next(iter(evaluations.items()))
        seed, evaluation = next(iter(by_seed.items()))
        return Sides(name_place((point, arm)), "", "", arm, seed), [Transition(None, one) for one in evaluation.items]
    return None


def build_text(text: str, limit: int = MAX_TEXT) -> str:
    """A model's text as it is, cut to `limit` characters (and said so)."""
    rest = len(text) - limit
    more = f'<span class="quiet"> … {rest} more characters</span>' if rest > 0 else ""
    return f"<pre>{esc(text[:limit])}{more}</pre>" if text else '<pre class="quiet">(nothing)</pre>'


def build_answer(item: Item, heading: str) -> str:
    """One model text with its verdict, and the verdicts of the sampled answers as dots."""
    verdict, words = ("right", "✓ right") if item.greedy_correct else ("wrong", "✗ wrong")
    if item.greedy_status not in (
        "",
        "right",
        "wrong",
    ):  # nobody knows what it is worth; accuracy counts it as not right
        verdict, words = "", f"no verdict: {item.greedy_status}"
    dots = "".join("●" if correct else "○" for correct in item.samples_correct)
    num_right = sum(1 for correct in item.samples_correct if correct)
    sampled = (
        f'<p class="quiet" title="one dot for each sampled answer, filled if right">sampled: {esc(dots)} '
        f"{num_right} of {len(item.samples_correct)} right</p>"
        if item.samples_correct
        else ""
    )
    badge = f'<span class="verdict {verdict}">{esc(words)}</span>'
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


def _build_item(transition: Transition, sides: Sides, extra_html: str) -> str:
    item, outcome = transition.after, transition.outcome
    before = "" if transition.before is None else build_answer(transition.before, sides.before)
    tag = f'<span class="tag {outcome}">{esc(sides.outcomes[outcome])}</span>'
    return (
        f'<article class="item" data-outcome="{outcome}"><header><code>{esc(item.id)}</code> {tag}</header>'
        f"<h5>prompt</h5>{build_text(item.prompt)}"
        f'<p>expected answer: <code>{esc(item.answer)}</code></p><div class="answers">'
        f"{before}{build_answer(item, sides.after)}{extra_html}</div></article>"
    )


def _select(transitions: Sequence[Transition], outcomes: Iterable[str]) -> list[Transition]:
    """The first item of each outcome: a fixed rule, so nobody picked the nice ones."""
    return [
        found
        for outcome in outcomes
        if (found := next((one for one in transitions if one.outcome == outcome), None)) is not None
    ]


def _describe_counts(sides: Sides, counts: Mapping[str, int]) -> str:
    if not sides.before:
        return f"{counts['right']} right and {counts['wrong']} wrong"
    what = sides.between
    return (
        f"{counts['fixed']} fixed by {what}, {counts['broken']} broken by {what}, "
        f"{counts['right']} right and {counts['wrong']} wrong both times"
    )


def _build_benchmark(
    name: str, transitions: Sequence[Transition], sides: Sides, control: dict[tuple[str, str], Item], *, is_open: bool
) -> str:
    counts = {outcome: sum(one.outcome == outcome for one in transitions) for outcome in sides.outcomes}
    summary = f"{name}: {len(transitions)} items, {_describe_counts(sides, counts)}"
    items = []
    for one in _select(transitions, sides.outcomes):
        other = control.get((name, str(one.after.id)))
        extra = "" if other is None else build_answer(other, f"control {CONTROL.label}, after RL")
        items.append(_build_item(one, sides, extra))
    return build_details(summary, "".join(items), is_open=is_open)


def section_samples(run: Run) -> str:
    """A few items of each benchmark with prompt, model text and verdict, before and after."""
    found = choose_sides(run)
    if found is None:
        is_to_come = any(node.spec.stage == "eval" for node in run.nodes)
        words = "No model has been evaluated both before and after RL yet."
        return build_paragraph(words, "callout") if is_to_come else ""
    sides, transitions = found
    evaluations = build_evaluations(run)
    control: dict[tuple[str, str], Item] = {}
    if not sides.arm.is_control and sides.seed in evaluations.get(("rl", CONTROL), {}):
        control = _index_items(evaluations["rl", CONTROL][sides.seed].items)
    by_benchmark: dict[str, list[Transition]] = {}
    for one in transitions:
        by_benchmark.setdefault(one.after.benchmark, []).append(one)
    buttons = "".join(
        f'<button type="button" data-filter="{outcome}" aria-pressed="false">{esc(words)}</button>'
        for outcome, words in {"all": "all outcomes", **sides.outcomes}.items()
    )
    parts = [
        build_paragraph(
            f"Greedy answers of {sides.arm.label}, seed {sides.seed}. Of each benchmark the first item in file order "
            "of each outcome is shown: not a fair sample (the counts are in the headings), but nobody picked it by "
            f"hand. Texts are cut at {MAX_TEXT} characters, sampled answers at {MAX_SAMPLE_TEXT}.",
            "quiet",
        ),
        f'<div class="filters" hidden>{buttons}</div>',
    ]
    for index, (name, group) in enumerate(by_benchmark.items()):
        parts.append(_build_benchmark(name, group, sides, control, is_open=index == 0))
    return "".join(parts)
