"""What one stage did, in sentences: the headline of its report, in the page and in the terminal.

A number is said with what it does not show: a reward on training prompts is no test, and an interval that holds the
value of guessing is a null result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from polm.report.compare import compute_rows, format_number, format_percent, start_sentence
from polm.report.load import Node, Run
from polm.report.made import ROLLOUT_STAGES, Holdout
from polm.report.metric_words import describe_metric_words
from polm.report.sections_rollouts import UNJUDGED
from polm.report.tables import format_seconds

MINUS = "\u2212"


def describe_stage(run: Run) -> list[str]:
    """Sentences about the one stage of `run`, the most important one first."""
    node = run.nodes[0]
    describe = WORDS.get(node.spec.stage)
    if node.spec.stage == "eval":
        found = _describe_eval(run)
    elif describe is not None:
        found = describe(node)
    else:
        found = _describe_training(node)
    if found:
        return found
    seconds = format_seconds(node.manifest.seconds if node.manifest else None)
    return [f"The stage {node.spec.stage} is done ({seconds})."]


def _summary(node: Node) -> Mapping[str, Any]:
    return node.manifest.summary if node.manifest is not None else {}


def _ledger(node: Node, name: str) -> float:
    return node.manifest.ledger.get(name, 0) if node.manifest is not None else 0


def _count(number: float, what: str) -> str:
    """ "1 pair", "12 pairs"."""
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def _format(value: float) -> str:
    return f"{value:.4g}".replace("-", MINUS)


# ---- training ------------------------------------------------------------------------------------------------------


def compute_ends(node: Node, name: str) -> tuple[float, float, int] | None:
    """(mean of the first tenth of the log, mean of the last tenth, lines in a tenth) of a metric."""
    values = [
        float(value)
        for line in node.metrics
        if isinstance(value := line.get(name), int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]
    if len(values) < 2:
        return None
    size = max(1, len(values) // 10)
    return sum(values[:size]) / size, sum(values[-size:]) / size, size


def _describe_ends(node: Node, name: str, words: str) -> str:
    ends = compute_ends(node, name)
    if ends is None:
        return ""
    first, last, size = ends
    unit = describe_metric_words(node.spec.stage, name)[0]
    place = "the first and the last tenth of the log" if size > 1 else "the first and the last line of the log"
    return f"{words} {_format(first)} → {_format(last)} ({unit}; {place})."


def _describe_training(node: Node) -> list[str]:
    summary = _summary(node)
    if "updates" not in summary:
        return []
    size = f"{_count(summary['updates'], 'update')} on {summary.get('tokens', 0):,} tokens"
    loss = _describe_ends(node, "loss", "Loss")
    return [f"{size}. {loss}".strip(), "A training loss is no test: polm eval says what the model is worth."]


def _describe_rl(node: Node) -> list[str]:
    reward = _describe_ends(node, "rl/reward", "Reward of the model's own answers:")
    kl = next((name for name in ("rl/kl", "rl/kl_start") if compute_ends(node, name)), None)
    win = _describe_ends(node, "online/win_rate", "Won against the other side's answers:")
    asked = sum(_ledger(node, name) for name in ("samples",)) or 1
    unjudged = sum(_ledger(node, f"samples_{status}") for status in UNJUDGED) + _ledger(node, "unparsed_unjudged")
    found = [
        reward or f"{_count(_summary(node).get('updates', 0), 'update')}, too few to say how the reward went.",
        "That is the reward on training prompts, and no test: polm eval says what the model is worth. A reward that "
        "rises while benchmarks do not is being gamed.",
        win,
        _describe_ends(node, kl, "Distance from where it started:") if kl else "",
        f"{_count(unjudged, 'answer')} of {asked:,.0f} could not be judged." if unjudged else "",
        _describe_calls(node),
    ]
    return [sentence for sentence in found if sentence]


def _describe_calls(node: Node) -> str:
    calls = _ledger(node, "calls_error") + _ledger(node, "calls_timeout")
    return (
        f"The reward function failed on {_count(calls, 'whole call')}, whose answers were judged one by one: a reward "
        "that depends on the other answers is then another one."
        if calls
        else ""
    )


# ---- reward models -------------------------------------------------------------------------------------------------


def _describe_guess(holdout: Holdout) -> list[str]:
    """How the accuracy stands to what a rule without understanding reaches."""
    if holdout.pairs:
        rules = [("chance", 0.5)]
        if holdout.length_accuracy is not None and holdout.length_direction:
            which = "longer" if holdout.length_direction > 0 else "shorter"
            rules.append((f"always preferring the {which} answer", holdout.length_accuracy))
    else:
        rules = [("always saying the commoner label", holdout.majority_accuracy or 0.5)]
    found = []
    for name, value in rules:
        if holdout.accuracy_low95 > value:
            verdict = "better than"
        elif holdout.accuracy_high95 < value:
            verdict = "worse than"
        else:
            verdict = "not shown to differ from"
        found.append(f"That is {verdict} {name} ({format_percent(value)} %).")
    return found


def _describe_reward_model(node: Node) -> list[str]:
    holdout = node.made.holdout
    if holdout is None:
        return [
            "Trained without held-out data, so nothing says what the reward model is worth; set holdout_share.",
            *_describe_training(node)[:1],
        ]
    what = "pairs as they are labelled" if holdout.pairs else "steps as they are labelled"
    low, high = format_percent(holdout.accuracy_low95), format_percent(holdout.accuracy_high95)
    first, *more = _describe_guess(holdout)
    verb = "Ranks" if holdout.pairs else "Calls"
    return [
        f"{verb} {format_percent(holdout.accuracy)} % of {holdout.pairs or holdout.steps:,} held-out {what} "
        f"(95 % interval {low} to {high}). {first}",
        *more,
        f"Calibration error {holdout.calibration_error:.3f} (0: as often right as it says), Brier score "
        f"{holdout.brier:.3f}. One model, one split: another seed of training is not in the interval.",
    ]


# ---- data from models ----------------------------------------------------------------------------------------------


def _describe_pairs(node: Node) -> list[str]:
    prompts, without = _ledger(node, "prompts"), _ledger(node, "prompts_without")
    pairs = _count(_summary(node).get("pairs", 0), "preference pair")
    return [
        f"{pairs} from {_count(_ledger(node, 'samples'), 'answer')} to {_count(prompts, 'prompt')}.",
        f"{_count(without, 'prompt')} had no better and worse answer." if without else "",
        _describe_calls(node),
    ]


def _describe_rejection(node: Node) -> list[str]:
    summary = _summary(node)
    rewards = ""
    if "sampled_reward" in summary and "kept_reward" in summary:
        sampled, kept = _format(summary["sampled_reward"]), _format(summary["kept_reward"])
        rewards = f" Mean reward {sampled} of all, {kept} of the kept ones."
    return [
        f"{_count(summary.get('kept', 0), 'answer')} of {_ledger(node, 'samples'):,.0f} kept, to "
        f"{summary.get('prompts_kept', 0):,} of {_count(_ledger(node, 'prompts'), 'prompt')}.{rewards}",
        "The kept ones were chosen by that very reward, so theirs is high by construction.",
        _describe_calls(node),
    ]


def _describe_judge(node: Node) -> list[str]:
    summary = _summary(node)
    labels = summary.get("pairs", summary.get("answers", 0))
    failed = sum(_ledger(node, name) for name in ("timeout", "error", "unparsed", "inconsistent"))
    found = [f"The judge gave {_count(labels, 'label')}; {_count(failed, 'question')} stayed without a verdict."]
    if lost := sum(_ledger(node, f"votes_{status}") for status in ("timeout", "error", "unparsed")):
        found.append(f"{lost:,.0f} of {_count(_ledger(node, 'votes'), 'vote')} said nothing; the others decided.")
    if (bias := _share(summary, "first_position")) is not None:
        mean, low, high = bias
        verdict = "no position bias was shown" if low <= 50 <= high else "the judge leans to one place"
        found.append(f"It chose the answer shown first in {mean:.1f} % ({low:.1f} to {high:.1f}): {verdict}.")
    if (contradictory := _share(summary, "inconsistent")) is not None:
        found.append(f"The two orders contradict each other in {contradictory[0]:.1f} % of the pairs.")
    if (agreement := _share(summary, "agreement")) is not None:
        found.append(
            f"It agrees with the given labels in {agreement[0]:.1f} % ({agreement[1]:.1f} to {agreement[2]:.1f})."
        )
    return found


def _share(summary: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    values = [summary.get(key) for key in (name, f"{name}/low95", f"{name}/high95")]
    if not all(isinstance(value, int | float) for value in values):
        return None
    mean, low, high = (100.0 * float(value) for value in values if value is not None)
    return mean, low, high


def _describe_constitution(node: Node) -> list[str]:
    summary = _summary(node)
    share = summary.get("revised_share")
    changed = f"; {format_percent(share)} % of the answers were changed" if isinstance(share, int | float) else ""
    return [
        f"{_count(summary.get('conversations', 0), 'conversation')} from {_count(_ledger(node, 'prompts'), 'prompt')}"
        f"{changed}.",
        "A changed answer is not yet a better one: that is for a judge, a gold reward or a reader.",
    ]


def _describe_eval(run: Run) -> list[str]:
    rows = compute_rows(run)
    found = []
    for row in rows.rows:
        if row.benchmark is None:
            low, high = format_number(row.score.low95, row.metric), format_number(row.score.high95, row.metric)
            interval = f" (95 % interval over items {low} to {high})" if math.isfinite(row.score.low95) else ""
            score = f"{format_number(row.score.mean, row.metric)} {row.metric.unit}{interval}"
            title = start_sentence(row.metric.title.replace("pass@k", f"pass@{rows.k}"))
            found.append(f"{title}, average of {len(rows.benchmarks)} benchmarks: {score}.")
    return found


WORDS: dict[str, Callable[[Node], list[str]]] = {
    "reward_model": _describe_reward_model,
    "process_reward_model": _describe_reward_model,
    "pairs": lambda node: [sentence for sentence in _describe_pairs(node) if sentence],
    "rejection": lambda node: [sentence for sentence in _describe_rejection(node) if sentence],
    "judge": _describe_judge,
    "constitution": _describe_constitution,
    **dict.fromkeys(ROLLOUT_STAGES, _describe_rl),
}
