"""Sections of what the stages of alignment made: held-out accuracy of reward models, answers that were kept and
dropped, judges' verdicts, answers before and after their revision.

Texts are the first of their files, picked by nobody; all of them come from models or data and are escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polm.evals.statistics import compute_wilson_interval
from polm.report.compare import compute_arm, format_percent
from polm.report.escape import esc
from polm.report.load import Node, Run
from polm.report.made import AnswerGroup, Bin, DrawnAnswer, Holdout, JudgedPair, Round, Transcript
from polm.report.markup import Cell, build_details, build_grid, build_paragraph, build_table, code_cell, text_cell
from polm.report.plots import Line, build_line_plot
from polm.report.sections_samples import build_text

MAX_NODES = 3
MAX_ITEMS = 6  # groups, verdicts or transcripts of a stage
MAX_UNUSED = 2  # of these, prompts that gave nothing
MAX_GROUP_ANSWERS = 8
MAX_MADE_TEXT = 600
ROLE_WORDS = {"kept": "✓ kept", "chosen": "✓ chosen", "rejected": "✗ rejected", "": "· not used"}
ROLE_CLASSES = {"kept": "right", "chosen": "right", "rejected": "wrong", "": ""}


def choose_nodes(run: Run, has: Callable[[Node], Any]) -> tuple[list[Node], int]:
    """The first stages with something to show and the last one, and how many are left out."""
    found = [node for node in run.nodes if node.status == "done" and has(node)]
    shown = found if len(found) <= MAX_NODES else [*found[: MAX_NODES - 1], found[-1]]
    return shown, len(found) - len(shown)


def _name_node(run: Run, node: Node) -> str:
    return compute_arm(node).label if run.is_stage else node.id


def _build_folds(run: Run, has: Callable[[Node], Any], build: Callable[[Node], tuple[str, str]]) -> str:
    """One fold a stage, the first one open; `build` gives what its heading adds, and its body."""
    nodes, num_left = choose_nodes(run, has)
    parts = []
    for index, node in enumerate(nodes):
        words, body = build(node)
        parts.append(build_details(f"{_name_node(run, node)}: {words}", body, is_open=index == 0))
    if num_left:
        parts.append(build_paragraph(f"{num_left} more stages are not shown, to keep the page small.", "quiet"))
    return "".join(parts)


# ---- reward models -------------------------------------------------------------------------------------------------


def describe_length_rule(holdout: Holdout) -> str:
    which = {1: "longer", -1: "shorter"}.get(holdout.length_direction, "")
    if not which or holdout.length_accuracy is None:
        return "length says nothing"
    return f"preferring the {which} answer: {format_percent(holdout.length_accuracy)} %"


def _build_reliability(table: Sequence[Bin]) -> str:
    intervals = [compute_wilson_interval(round(one.accuracy * one.count), one.count) for one in table]
    what = "pairs" if table[0].pairs else "steps"
    x = [float(index) for index in range(len(table))]
    lines = [
        Line(
            "how often it was right",
            x,
            [100 * one.accuracy for one in table],
            0,
            0,
            [100 * one.low95 for one in intervals],
            [100 * one.high95 for one in intervals],
        ),
        Line("how sure it was", x, [100 * one.confidence for one in table], 1, 1),
    ]
    sizes = ", ".join(f"{one.count}" for one in table)
    said = "of its preference" if what == "pairs" else "that a step is right"
    return build_line_plot(
        lines,
        title=f"Calibration on held-out {what}",
        x_label=f"how sure the model is {said}, % (from)",
        y_label=f"{what}, %",
        x_names=[f"{100 * one.low:.0f}" for one in table],
        how_to_read=(
            f"Held-out {what} by how sure the model is. Where both lines lie on each other, it is as often right as it "
            f"says; bars are 95 % intervals (Wilson). Numbers of {what} from left to right: {sizes}."
        ),
    )


def _list_holdout_rows(holdout: Holdout) -> list[tuple[str, str, str]]:
    """(name, value, how to read it) of what is there."""
    low, high = format_percent(holdout.accuracy_low95), format_percent(holdout.accuracy_high95)
    accuracy = f"{format_percent(holdout.accuracy)} ({low} to {high})"
    rows: list[tuple[str, float | None, str, str]] = [
        ("Brier score", holdout.brier, "{:.3f}", "0 is perfect, 0.25 is always saying one half"),
        ("calibration error", holdout.calibration_error, "{:.3f}", "how far sureness and accuracy differ; 0 is best"),
        ("mean margin", holdout.mean_margin, "{:+.3f}", "chosen minus rejected, in rewards"),
        ("reward with length", holdout.length_correlation, "{:+.3f}", "correlation; far from 0, length is rewarded"),
        ("majority rule, %", _percent(holdout.majority_accuracy), "{:.1f}", "calling all steps by the commoner label"),
        ("first error found, %", _percent(holdout.first_error_accuracy), "{:.1f}", "answers whose first error is"),
        ("first error, F1, %", _percent(holdout.first_error_f1), "{:.1f}", "over answers with and without an error"),
    ]
    plain = [
        (name, form.format(value).replace("-", "\u2212"), words)
        for name, value, form, words in rows
        if value is not None
    ]
    chance = "ranked as people did; chance is 50" if holdout.pairs else "called as they are labelled"
    first = [("accuracy, %", accuracy, f"{chance}; 95 % interval")]
    if holdout.pairs:
        first.append(("length alone, %", describe_length_rule(holdout), "a rule that reads no text"))
    return [*first, *plain]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def section_reward_models(run: Run) -> str:
    """What reward models are worth on what they have not seen; empty where there is none."""

    def build(node: Node) -> tuple[str, str]:
        holdout = node.made.holdout
        assert holdout is not None
        count = f"{holdout.pairs} pairs" if holdout.pairs else f"{holdout.steps} steps of {holdout.answers} answers"
        rows = [
            [Cell(f"{esc(name)}<small>{esc(words)}</small>"), text_cell(value, "num")]
            for name, value, words in _list_holdout_rows(holdout)
        ]
        table = build_table(["measure, and how to read it", ">value"], rows, classes="measures")
        plot = build_grid([_build_reliability(holdout.reliability)]) if holdout.reliability else ""
        return f"{format_percent(holdout.accuracy)} % of {count} held out", table + plot

    return _build_folds(run, lambda node: node.made.holdout, build)


# ---- answers that were kept ----------------------------------------------------------------------------------------


def describe_answer(answer: DrawnAnswer) -> str:
    """ "right, reward 1", "timeout: …, no reward", and whether it was cut off."""
    reward = "no reward" if answer.reward is None else f"reward {answer.reward:.4g}".replace("-", "\u2212")
    note = f": {answer.note}" if answer.note else ""
    return f"{answer.status}{note}, {reward}{', cut off' if answer.cut_off else ''}"


def _build_group(group: AnswerGroup) -> str:
    roles = group.roles or ("",) * len(group.answers)
    # What was used comes first; within it the order in which the answers were drawn.
    order = sorted(range(len(roles)), key=lambda i: list(ROLE_WORDS).index(roles[i]))[:MAX_GROUP_ANSWERS]
    answers = "".join(
        f'<div class="answer"><p class="verdict {ROLE_CLASSES[roles[i]]}">{ROLE_WORDS[roles[i]]}</p>'
        f'<p class="quiet">{esc(describe_answer(group.answers[i]))}</p>'
        f"{build_text(group.answers[i].text, MAX_MADE_TEXT)}</div>"
        for i in order
    )
    rest = len(roles) - len(order)
    more = build_paragraph(f"{rest} more answers are not shown.", "quiet") if rest else ""
    return (
        f'<article class="item"><h5>prompt</h5>{build_text(group.prompt, MAX_MADE_TEXT)}'
        f'<div class="answers">{answers}</div>{more}</article>'
    )


def choose_groups(groups: Sequence[AnswerGroup]) -> list[AnswerGroup]:
    """The first prompts with an answer that was used, and then the first ones without."""
    unused = [group for group in groups if not any(group.roles)][:MAX_UNUSED]
    used = [group for group in groups if any(group.roles)]
    return used[: MAX_ITEMS - len(unused)] + unused


def section_answers(run: Run) -> str:
    """Which of a model's own answers became data, and which did not; empty where no stage draws any."""

    def build(node: Node) -> tuple[str, str]:
        assert node.manifest is not None
        ledger = node.manifest.ledger
        made = node.manifest.summary.get("pairs", node.manifest.summary.get("kept", 0))
        what = "pairs" if node.spec.stage == "pairs" else "kept"
        words = f"{ledger.get('samples', 0):,.0f} answers to {ledger.get('prompts', 0):,.0f} prompts, {made:,} {what}"
        return words, "".join(map(_build_group, choose_groups(node.made.answers)))

    folds = _build_folds(run, lambda node: node.made.answers, build)
    if not folds:
        return ""
    lead = build_paragraph(
        f"The first prompts of each stage that gave something, and the first {MAX_UNUSED} that gave nothing; of each "
        "prompt the answers that were used come first. The others were dropped (reasons and counts stand under What "
        f"was left out), or better ones were there. Texts are cut at {MAX_MADE_TEXT} characters.",
        "quiet",
    )
    return lead + folds


# ---- judges --------------------------------------------------------------------------------------------------------


def describe_verdict(verdict: JudgedPair) -> str:
    """What the judge found, in words; how it failed where it did."""
    note = f": {verdict.note}" if verdict.note else ""
    if verdict.grade is not None:
        return f"grade {verdict.grade:.3g}{note}"
    if verdict.preference is None:
        return f"no verdict ({verdict.status}{note})"
    share = f"{100 * verdict.preference:.0f} % for the first answer"
    if verdict.preference == 0.5:
        return f"a tie{note}"
    return f"the {'first' if verdict.preference > 0.5 else 'second'} answer is better ({share}){note}"


def _build_talk(messages: Sequence[dict[str, Any]]) -> str:
    """A prompt: the text of a single turn, or all turns with their roles."""
    if len(messages) == 1:
        return build_text(str(messages[0].get("content", "")), MAX_MADE_TEXT)
    text = "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in messages)
    return build_text(text, MAX_MADE_TEXT)


def _build_verdict(verdict: JudgedPair) -> str:
    """A pair or an answer with what the judge said about it."""
    if verdict.answer_a or verdict.answer_b:
        sides = (("first answer", verdict.answer_a, 1), ("second answer", verdict.answer_b, -1))
        lean = 0.0 if verdict.preference is None else verdict.preference - 0.5
        answers = "".join(
            f'<div class="answer"><h5>{name}{" ✓" if lean * side > 0 else ""}</h5>'
            f"{build_text(text, MAX_MADE_TEXT)}</div>"
            for name, text, side in sides
        )
    else:
        answers = f'<div class="answer"><h5>answer</h5>{build_text(verdict.answer, MAX_MADE_TEXT)}</div>'
    replies = [text for text in verdict.replies if text]
    said = "".join(build_text(text, MAX_MADE_TEXT) for text in replies)
    principle = f'<p class="quiet">judged by: {esc(verdict.principle)}</p>' if verdict.principle else ""
    is_open = verdict.grade is None and verdict.preference is None
    return (
        f'<article class="item"><p class="verdict {"wrong" if is_open else ""}">{esc(describe_verdict(verdict))}</p>'
        f'{principle}<h5>prompt</h5>{_build_talk(verdict.prompt)}<div class="answers">{answers}</div>'
        f"{build_details('What the judge wrote', said) if said else ''}</article>"
    )


def choose_verdicts(verdicts: Sequence[JudgedPair]) -> list[JudgedPair]:
    """The first of each status, so that what failed is seen, then the first ones."""
    first = {verdict.status: index for index, verdict in reversed(list(enumerate(verdicts)))}
    chosen = [*sorted(first.values()), *(i for i in range(len(verdicts)) if i not in first.values())]
    return [verdicts[i] for i in sorted(chosen[:MAX_ITEMS])]


def build_verdicts(run: Run) -> str:
    """Verdicts to look at, for the section of judges."""

    def build(node: Node) -> tuple[str, str]:
        chosen = choose_verdicts(node.made.verdicts)
        return f"{len(chosen)} verdicts to look at", "".join(map(_build_verdict, chosen))

    return _build_folds(run, lambda node: node.made.verdicts, build)


# ---- constitution --------------------------------------------------------------------------------------------------


def _build_round(number: int, one: Round) -> str:
    note = f": {one.note}" if one.note else ""
    parts = [f'<p class="quiet">round {number}, principle <code>{esc(one.principle)}</code>{esc(note)}</p>']
    if one.critique or one.critique_outcome:
        parts.append(f"<h5>critique ({esc(one.critique_outcome)})</h5>{build_text(one.critique, MAX_MADE_TEXT)}")
    if one.revision or one.revision_outcome:
        parts.append(f"<h5>revision ({esc(one.revision_outcome)})</h5>{build_text(one.revision, MAX_MADE_TEXT)}")
    return "".join(parts)


def _build_transcript(transcript: Transcript) -> str:
    is_same = transcript.answer.split() == transcript.final.split()
    rounds = "".join(_build_round(number, one) for number, one in enumerate(transcript.rounds, 1))
    return (
        f'<article class="item"><h5>prompt</h5>{_build_talk(transcript.prompt)}<div class="answers">'
        f'<div class="answer"><h5>before</h5>{build_text(transcript.answer, MAX_MADE_TEXT)}</div>'
        f'<div class="answer"><h5>after{" (as before)" if is_same else ""}</h5>'
        f"{build_text(transcript.final, MAX_MADE_TEXT)}</div></div>"
        f"{build_details(f'Critique and revision (rounds: {len(transcript.rounds)})', rounds)}</article>"
    )


def section_revisions(run: Run) -> str:
    """Answers before and after their revision by the principles; empty where no stage revises."""

    def build(node: Node) -> tuple[str, str]:
        assert node.manifest is not None
        share = node.manifest.summary.get("revised_share")
        words = f"{format_percent(share)} % of the answers changed" if isinstance(share, int | float) else "answers"
        body = "".join(map(_build_transcript, node.made.transcripts[:MAX_ITEMS]))
        principles = {
            name.partition("/")[2]: number
            for name, number in node.manifest.summary.items()
            if name.startswith("principle/")
        }
        rows = [[code_cell(name), text_cell(number, "num")] for name, number in principles.items()]
        table = build_details(
            f"How often each of {len(rows)} principles was drawn", build_table(["principle", ">drawn"], rows)
        )
        return words, body + table

    folds = _build_folds(run, lambda node: node.made.transcripts, build)
    if not folds:
        return ""
    lead = f"The first {MAX_ITEMS} answers of each stage, before and after. A revision that failed leaves the answer."
    return build_paragraph(lead, "quiet") + folds
