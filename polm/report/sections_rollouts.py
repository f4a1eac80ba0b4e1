"""The section of RL's own rollouts: groups of the first and of the last one, with rewards, verdicts and advantages."""

from __future__ import annotations

from collections.abc import Sequence

from polm.report.compare import CONTROL, compute_arm, compute_rows, get_lead_arm
from polm.report.escape import esc, shorten
from polm.report.load import Node, RolloutGroup, RolloutSample, Run
from polm.report.made import ROLLOUT_STAGES
from polm.report.markup import build_details, build_paragraph
from polm.report.sections_samples import build_text

MAX_GROUPS = 4
MAX_GROUP_SAMPLES = 16
MAX_ROLLOUT_TEXT = 600
MAX_NOTE = 200
SIGNS = {"right": "✓", "wrong": "✗", "scored": "·"}
UNJUDGED = ("timeout", "error", "nonsense", "inconsistent")


def choose_node(run: Run) -> Node | None:
    """The first seed's RL of the lead arm in its last cycle; the control's where there is none."""
    nodes = [node for node in run.nodes if node.rollouts and node.status != "shared"]
    lead = get_lead_arm(compute_rows(run))
    for arm in (lead, CONTROL):
        found = [node for node in nodes if compute_arm(node) == arm]
        if found:
            return min(found, key=lambda node: node.spec.seed or 0)
    return nodes[0] if nodes else None


def describe_reward(sample: RolloutSample) -> str:
    """ "reward 1", "reward 0.35", or that there is none."""
    if sample.status in UNJUDGED or not sample.judged:
        return "no reward"
    reward = float(sample.status == "right") if sample.reward is None else sample.reward
    return f"reward {reward:.4g}".replace("-", "\u2212")


def describe_sample(sample: RolloutSample) -> str:
    """ "right, reward 1, advantage +0.50"; whose answer it is, where two models answered."""
    words = [sample.status, describe_reward(sample)]
    if sample.advantage is not None:
        words.append(f"advantage {sample.advantage:+.2f}".replace("-", "\u2212") if sample.advantage else "advantage 0")
    if sample.own is not None:
        words.append("the policy's" if sample.own else "the other side's")
    return ", ".join(words)


def _build_sample(sample: RolloutSample) -> str:
    verdict = sample.status if sample.status in ("right", "wrong") else ""
    note = build_paragraph(shorten(sample.note, MAX_NOTE), "quiet") if sample.note else ""
    return (
        f'<div class="answer"><p class="verdict {verdict}">{SIGNS.get(sample.status, "?")} '
        f"{esc(describe_sample(sample))}</p>{note}{build_text(sample.text, MAX_ROLLOUT_TEXT)}</div>"
    )


def _build_group(group: RolloutGroup) -> str:
    samples = group.samples[:MAX_GROUP_SAMPLES]
    num_right = sum(sample.status == "right" for sample in group.samples)
    right = f"{num_right} of {len(group.samples)} right"
    expected = (
        f"expected answer: <code>{esc(group.answer)}</code>; {right}" if group.answer != "" else "no known answer"
    )
    rest = len(group.samples) - len(samples)
    more = build_paragraph(f"{rest} more samples are not shown.", "quiet") if rest else ""
    answers = "".join(map(_build_sample, samples))
    return (
        f'<article class="item"><h5>prompt</h5>{build_text(group.prompt, MAX_ROLLOUT_TEXT)}'
        f"<p>{expected}</p>"
        f'<div class="answers">{answers}</div>{more}</article>'
    )


def _build_update(groups: Sequence[RolloutGroup], update: int, words: str, *, is_open: bool) -> str:
    mine = [group for group in groups if group.update == update]
    shown = mine[:MAX_GROUPS]
    summary = f"{words} rollout, update {update}: {len(shown)} prompt{'' if len(shown) == 1 else 's'}"
    return build_details(summary, "".join(map(_build_group, shown)), is_open=is_open)


def section_rollouts(run: Run) -> str:
    """What the model was sampled saying during RL, at its beginning and at its end."""
    node = choose_node(run)
    if node is None:
        is_to_come = any(node.spec.stage in ROLLOUT_STAGES for node in run.nodes)
        return build_paragraph("RL has written no rollouts yet.", "callout") if is_to_come else ""
    first, last = node.rollouts[0].update, node.rollouts[-1].update
    before = " The same prompts before and after RL stand under Samples." if not run.is_stage else ""
    advantage = (
        " The advantage is the reward against the group's own (or what the critic expected): a group that is all right "
        "or all wrong teaches nothing."
        if any(sample.advantage is not None for group in node.rollouts for sample in group.samples)
        else ""
    )
    parts = [
        build_paragraph(
            f"Training rollouts of {compute_arm(node).label}, seed {node.spec.seed}: the first {MAX_GROUPS} prompts of "
            f"the first and of the last rollout, whatever came out. At most {MAX_GROUP_SAMPLES} samples a prompt are "
            f"shown, cut at {MAX_ROLLOUT_TEXT} characters. The prompts of two rollouts differ.{before} Reward 1 is an "
            "answer that the verifier calls right; an answer that is scored has the reward of a judge, a model or a "
            f"function.{advantage}",
            "quiet",
        ),
        _build_update(node.rollouts, first, "First", is_open=True),
    ]
    if last != first:
        parts.append(_build_update(node.rollouts, last, "Last", is_open=False))
    return "".join(parts)
