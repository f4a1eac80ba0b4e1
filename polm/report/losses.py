"""What was left out, and why: the counts of the ledgers that a reader must not miss, with their meaning.

Zeros stay out; the ledgers hold every count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from polm.report.load import Run

# What a count of a ledger means, by a part of its name; the first that is found counts.
MEANINGS: tuple[tuple[str, str], ...] = (
    (r"columns_ignored/", "records that have this column, which nothing reads"),
    (
        r"pairs_prompts_differ",
        "pairs whose answers are to different prompts; a stage that trains on them refuses them, or drops them",
    ),
    (r"prompts_differ", "pairs whose answers are to different prompts: nothing to compare, so left out"),
    (r"^calls_", "calls of the reward function for many answers failed, and each answer was judged on its own"),
    (r"^votes_", "votes of a judge that say nothing; the other votes on the question decide"),
    (r"unparsed_unjudged", "the reward function returned None: no reward, so left out"),
    (r"timeout", "took longer than the time limit and was stopped; neither right nor wrong"),
    (r"nonsense", "the judge's reply held no verdict; neither right nor wrong"),
    (r"error", "the function, the verifier or the request failed; neither right nor wrong"),
    (r"unjudged", "without a reward (time-out, error, nonsense, contradiction or None), so left out"),
    (r"dropped_unparsed", "the verifier found no answer in it, so not imitated"),
    (r"unparsed", "nothing could be read: a verifier gives the reward 0, a function (None) or a judge gives none"),
    (r"inconsistent", "the judge's two orders prefer different answers"),
    (r"dropped_equal|^equal$|answers_equal|duplicate", "the same text twice: nothing to compare, or nothing new"),
    (r"empty_step", "an answer in steps of which one has no text"),
    (r"(dropped|answers|revisions|critiques)_empty", "an answer without text or without a token to learn from"),
    (r"unmarkable", "the chat template does not let the assistant's tokens be marked exactly"),
    (r"unsupervised", "nothing in it is trained on"),
    (r"dropped_wrong", "judged wrong, so not imitated"),
    (r"cut_off|over_length", "hit its length limit before it ended"),
    (r"below_min_reward", "its reward is below min_reward"),
    (r"not_best|not_accepted", "others of the same prompt were better, or it was not drawn"),
    (r"control_tokens", "holds control tokens of the model, with which nothing can be trained"),
    (r"unchanged", "the revision says the same as before"),
    (r"(^|/)prompts_without", "prompts of which nothing could be used"),
    (r"solutions_without_scores", "the reference was an annotation, which scores no benchmark: no solution is shown"),
    (r"too_long", "longer than the model's context"),
    (r"truncated|mismatched_cut", "cut at the context's length"),
    (r"tokens_lost|steps_lost", "read, and then cut or dropped"),
    (r"tokens_unknown", "unknown to the tokenizer"),
    (r"media", "refers to an image or a sound, which a text model cannot read"),
    (r"contaminated", "overlaps with a benchmark, so taken out"),
    (r"ties|tied", "judged equally good: no preference"),
    (r"left_over", "kept, and never drawn for the mixture"),
    (r"not_reached", "not read before the last update"),
    (r"dropped: ", "left out for the reason that the count names"),
    (r"dropped", "left out as a whole"),
)


@dataclass(frozen=True)
class Loss:
    """A count of what was left out, over all stages of one name (`leaf`)."""

    leaf: str
    name: str
    count: float
    num_stages: int
    meaning: str


def find_meaning(name: str) -> str:
    """What a ledger's count means; empty for one that counts no loss."""
    return next((words for pattern, words in MEANINGS if re.search(pattern, name)), "")


def list_losses(run: Run) -> list[Loss]:
    """Every loss of the finished stages that is not zero, summed over seeds, cycles and arms."""
    found: dict[tuple[str, str], tuple[float, int]] = {}
    for node in run.nodes:
        if node.manifest is None or node.status != "done":
            continue
        for name, count in node.manifest.ledger.items():
            if count and find_meaning(name):
                total, num = found.get((node.leaf, name), (0.0, 0))
                found[node.leaf, name] = total + count, num + 1
    return [Loss(leaf, name, total, num, find_meaning(name)) for (leaf, name), (total, num) in found.items()]
