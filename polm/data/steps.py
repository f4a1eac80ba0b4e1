"""From answers in labelled steps to trees: what process reward models learn from, and how they read an answer.

Each step and the separator behind it are tokenised on their own, so that a step ends with a token of its own whatever
the tokenizer merges; the step is judged at the separator's last token. TRL's PRM trainer had the same layout. The
answer stands behind the chat template's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from polm.data.examples import BadRecords, KeptTrees, Ledger, Policy, count_read, drop_bad_record, fit_answers
from polm.data.records import Stepwise
from polm.errors import BadRecordError, DataError, EmptyStepError, UserError
from polm.text.chat import find_control_tokens, render_prompt
from polm.tokens import Array, Segment, Tree


def encode_separator(tokenizer: PreTrainedTokenizerFast, separator: str) -> list[int]:
    """Token ids of the separator; UserError where the tokenizer has none for it (white space, in a word tokenizer)."""
    ids: list[int] = tokenizer(separator, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(
            f"the separator {separator!r} has no token with this tokenizer (in a word tokenizer white space has none); "
            "give another, for example separator=';'"
        )
    return ids


def encode_steps(
    tokenizer: PreTrainedTokenizerFast, steps: Sequence[str], separator: Sequence[int]
) -> tuple[Array, Array]:
    """(token ids [T] of all steps, each with the separator behind it; place [steps] of the last token of each).

    Raises EmptyStepError for an empty step, and DataError for one that holds a control token.
    """
    ids: list[int] = []
    ends = []
    for index, step in enumerate(steps):
        if not step.strip():
            raise EmptyStepError(f"completions[{index}] is an empty step; remove it and its label")
        if found := find_control_tokens(tokenizer, step, role="assistant"):
            raise DataError(f"completions[{index}] holds the control token {found[0]}; remove it from the text")
        ids += [*tokenizer(step, add_special_tokens=False, verbose=False)["input_ids"], *separator]
        ends.append(len(ids) - 1)
    return np.array(ids, dtype=np.int64), np.array(ends, dtype=np.int64)


def split_steps(answer: str, separator: str) -> list[str]:
    """The steps of an answer that a model wrote; those that are empty are left out."""
    return [step for step in answer.split(separator) if step.strip()]


def build_step_tree(prompt: Array, ids: Array, ends: Array, labels: Sequence[float] | None = None) -> Tree:
    """A prompt and one child whose targets are the ends of its steps; their labels are the stream `labels`."""
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[ends] = 1.0
    streams: dict[str, Array] = {"weights": weights}
    if labels is not None:
        streams["labels"] = np.zeros(len(ids), dtype=np.float32)
        streams["labels"][ends] = labels
    return (Segment(prompt), Segment(ids, parent=0, streams=streams))


def build_step_trees(
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Stepwise],
    *,
    separator: str,
    context: int,
    too_long: Policy,
    ledger: Ledger,
    last_only: bool = False,
    bad_records: BadRecords = "error",
) -> Sequence[Tree]:
    """A tree for each record, its steps' labels from 0 (wrong) to 1 (right) as targets.

    last_only   only the last step is a target

    Truncation loses whole steps: one whose end does not fit is no target (`steps_lost`), and a record of which none is
    left is dropped. Steps that hold the separator are counted (`steps_with_separator`): an answer would be cut there.
    Raises DataError for what `encode_steps` refuses, naming the record; with bad_records: drop an empty step leaves its
    record out.
    """
    separator_ids = encode_separator(tokenizer, separator)
    trees = KeptTrees(None, ledger)
    for number, record in enumerate(records):
        what = f"record {number}"
        try:
            prompt = render_prompt(tokenizer, record.prompt)
            ids, ends = encode_steps(tokenizer, record.completions, separator_ids)
        except BadRecordError as error:
            drop_bad_record(bad_records, ledger, error, what)
            continue
        except DataError as error:
            raise DataError(f"{what}: {error}") from error
        count_read(tokenizer, np.concatenate([prompt, ids]), ledger)
        ledger["steps_read"] += len(ends)
        if within := sum(separator in step for step in record.completions):
            ledger["steps_with_separator"] += within
        kept = fit_answers(prompt, [ids], context, too_long, what, ledger)
        num_whole = 0 if kept is None else int((ends < len(kept[0])).sum())
        chosen = range(len(ends) - 1, len(ends)) if last_only else range(len(ends))
        targets = [i for i in chosen if i < num_whole]
        if num_whole < len(ends):
            ledger["steps_lost"] += len(ends) - num_whole
        if kept is not None and targets:
            labels = [record.labels[i] for i in targets]
            trees.append(build_step_tree(prompt, kept[0], ends[targets], labels))
        elif kept is not None:
            ledger["dropped"] += 1
            ledger["dropped_unsupervised"] += 1
            ledger["tokens_lost"] += len(prompt) + len(kept[0])
    return trees.finish()
