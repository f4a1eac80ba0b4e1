"""From records to trees: documents, conversations and preference pairs, with every loss of tokens counted.

The ledger is a counter of what happened: `read`, `kept`, `split`, `truncated`, `dropped`, and in tokens
`tokens_read`, `tokens_lost`, `tokens_supervised`, `tokens_unknown`, `tokens_weighted` (a weight of the user's other
than 0 and 1). The weights that a record has for itself, its messages or its tokens become the stream `weights`.

With `folder` the trees of a data set are kept in a scratch file there (`tree_store`), and records are taken one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from polm.data.records import Conversation, Document, Feedback, Message, Preference
from polm.data.tree_store import TreeWriter
from polm.errors import BadRecordError, DataError, UserError
from polm.text.chat import RenderedChat, render_chat, render_prompt
from polm.text.tokenizer import unknown_id
from polm.tokens import Array, Segment, Tree, build_completions, build_document

Policy = Literal["error", "truncate", "drop", "split"]
BadRecords = Literal["error", "drop"]
Ledger = Counter[str]


def encode_document(tokenizer: PreTrainedTokenizerFast, text: str) -> Array:
    """Token ids of a plain document: begin token where the tokenizer has one, the text, the end token."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return np.array([*start, *ids, tokenizer.eos_token_id], dtype=np.int64)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> Array:
    """Token ids of a plain prompt for a base model: a document without its end."""
    return encode_document(tokenizer, text)[:-1]


def build_document_trees(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str | Document],
    *,
    context: int,
    too_long: Policy,
    ledger: Ledger,
    folder: Path | None = None,
) -> Sequence[Tree]:
    """A root per document; documents over `context` tokens go by the policy. A plain string is of weight 1."""
    trees = KeptTrees(folder, ledger)
    for number, given in enumerate(texts):
        document = Document(given) if isinstance(given, str) else given
        ids = encode_document(tokenizer, document.text)
        weights = weigh_document(tokenizer, document, ids, f"document {number}")
        count_read(tokenizer, ids, ledger)
        for tree in cut_document(ids, context, too_long, f"document {number}", ledger, weights):
            trees.append(tree)
    return trees.finish()


def cut_document(
    ids: Array, context: int, too_long: Policy, what: str, ledger: Ledger, weights: Array | None = None
) -> list[Tree]:
    """One document as roots of at most `context` tokens, by the policy; none when it is dropped.

    `weights` [T] float32 multiply the losses of the tokens (None = 1); a piece whose weights are all 0 is dropped.
    """
    if len(ids) > context and too_long == "split":
        ledger["split"] += 1
        pieces = [ids[a : a + context] for a in range(0, len(ids), context)]
    else:
        fitted = fit_context(ids, context, too_long, what, ledger)
        pieces = [fitted] if fitted is not None else []
    # A piece of one token has nothing to predict.
    ledger["tokens_lost"] += sum(len(p) for p in pieces if len(p) < 2)
    trees = []
    for first, piece in zip(range(0, len(ids), context), pieces, strict=False):
        if len(piece) < 2:
            continue
        own = None if weights is None else weights[first : first + len(piece)]
        if own is not None and not own[1:].any():
            _drop_unsupervised(piece, ledger)
            continue
        tree = build_document(piece)
        trees.append(tree if own is None else _weigh_tree(tree, own))
    return trees


def weigh_document(tokenizer: PreTrainedTokenizerFast, document: Document, ids: Array, what: str) -> Array:
    """The weight of each token [T] of an encoded document, float32; the end token counts as much as the document."""
    weights = np.full(len(ids), document.weight, dtype=np.float32)
    if document.token_weights is not None:
        first = 1 if tokenizer.bos_token_id is not None else 0
        num_text = len(ids) - first - 1
        if len(document.token_weights) != num_text:
            raise _mismatch(tokenizer, what, ids[first:-1], len(document.token_weights))
        weights[first:-1] *= np.array(document.token_weights, dtype=np.float32)
    return weights


def weigh_conversation(tokenizer: PreTrainedTokenizerFast, record: Conversation, rendered: RenderedChat) -> Array:
    """The weight of each token [T] of a rendered conversation, float32; 0 = not trained on."""
    weights = np.zeros(len(rendered.token_ids), dtype=np.float32)
    for index in range(len(record.messages)):
        places = np.flatnonzero(rendered.message_index == index)
        weights[places] = record.weight_of(index)
        given = record.token_weights.get(index)
        if given is None or not len(places):
            continue
        if len(places) - len(given) not in (0, 1):
            raise _mismatch(tokenizer, f"message {index}", rendered.token_ids[places], len(given))
        weights[places[: len(given)]] *= np.array(given, dtype=np.float32)
    return weights


def render_conversation(
    tokenizer: PreTrainedTokenizerFast, record: Conversation, train_on: Literal["all", "last"]
) -> RenderedChat:
    """A conversation through the chat template, with its tools where it has some."""
    tools = {"tools": record.tools} if record.tools else None
    return render_chat(tokenizer, record.messages, train_on=train_on, template_kwargs=tools)


def _mismatch(tokenizer: PreTrainedTokenizerFast, what: str, ids: Array, found: int) -> DataError:
    tokens = " ".join(map(str, tokenizer.convert_ids_to_tokens(ids[:40].tolist())))
    return DataError(
        f"{what} has {found} token_weights and {len(ids)} tokens with this tokenizer ({tokens:.200}); give one number "
        "for each token (that of the end of turn may be left out), made with the tokenizer of the model"
    )


def _weigh_tree(tree: Tree, weights: Array) -> Tree:
    (root,) = tree
    return (Segment(root.tokens, streams={"weights": root.streams["weights"] * weights}),)


def _drop_unsupervised(ids: Array, ledger: Ledger) -> None:
    ledger["dropped"] += 1
    ledger["dropped_unsupervised"] += 1
    ledger["tokens_lost"] += len(ids)


def fit_context(ids: Array, context: int, too_long: Policy, what: str, ledger: Ledger) -> Array | None:
    """`ids` within `context` tokens by the policy, or None when the example is dropped."""
    if len(ids) <= context:
        return ids
    if too_long == "truncate":
        ledger["truncated"] += 1
        ledger["tokens_lost"] += len(ids) - context
        return ids[:context]
    if too_long == "drop":
        ledger["dropped"] += 1
        ledger["tokens_lost"] += len(ids)
        return None
    raise DataError(
        f"{what} has {len(ids)} tokens, and the context is {context}; "
        "set too_long: truncate or too_long: drop (both are counted), or raise bin_tokens or the model's context"
    )


def build_conversation_trees(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Iterable[Conversation],
    *,
    context: int,
    too_long: Policy,
    train_on: Literal["all", "last"],
    ledger: Ledger,
    folder: Path | None = None,
    bad_records: BadRecords = "error",
) -> Sequence[Tree]:
    """A root per conversation whose targets are the assistant's tokens, tool calls among them."""
    trees = KeptTrees(folder, ledger)
    for number, conversation in enumerate(conversations):
        try:
            rendered = render_conversation(tokenizer, conversation, train_on)
            weights = weigh_conversation(tokenizer, conversation, rendered)
        except BadRecordError as error:
            drop_bad_record(bad_records, ledger, error, f"conversation {number}")
            continue
        except UserError as error:
            raise type(error)(f"conversation {number}: {error}") from error
        count_read(tokenizer, rendered.token_ids, ledger)
        ids = fit_context(rendered.token_ids, context, too_long, f"conversation {number}", ledger)
        if ids is None:
            continue
        weights = weights[: len(ids)]
        if not weights.any():
            _drop_unsupervised(ids, ledger)
            continue
        trees.append((Segment(ids, streams={"weights": weights}),))
    return trees.finish()


def build_preference_trees(
    tokenizer: PreTrainedTokenizerFast,
    preferences: Iterable[Preference],
    *,
    context: int,
    too_long: Policy,
    ledger: Ledger,
    folder: Path | None = None,
    supervise: Literal["all", "end"] = "all",
    bad_records: BadRecords = "error",
) -> Sequence[Tree]:
    """A prompt with two children for each pair: chosen (mark sign = 1) and rejected (sign = -1).

    supervise   "all": each token of an answer is a target. "end": the token at which a reward model is read, its last
                (of those that are not padding). The margin of a pair is the mark `margin` of its chosen child.
    """
    trees = KeptTrees(folder, ledger)
    for number, pair in enumerate(preferences):
        try:
            prompt, answers = encode_answers(tokenizer, pair.prompt, (pair.chosen, pair.rejected), f"pair {number}")
        except BadRecordError as error:
            drop_bad_record(bad_records, ledger, error)
            continue
        count_read(tokenizer, np.concatenate([prompt, *answers]), ledger)
        if pair.margin:
            ledger["margins"] += 1
        kept = fit_answers(prompt, answers, context, too_long, f"pair {number}", ledger)
        if kept is not None and supervise == "end":
            kept, whole = [cut_padding(tokenizer, ids) for ids in kept], kept
            ledger["tokens_lost"] += sum(map(len, whole)) - sum(map(len, kept))
        if kept is None:
            continue
        reason = "equal" if np.array_equal(kept[0], kept[1]) else "empty" if not all(map(len, kept)) else None
        if reason is not None:  # equal answers say nothing, and an empty one has no token to be judged at
            ledger["dropped"] += 1
            ledger[f"dropped_{reason}"] += 1
            ledger["tokens_lost"] += len(prompt) + sum(len(a) for a in kept)
            continue
        streams = [{"weights": weigh_end(ids)} for ids in kept] if supervise == "end" else None
        margin = {"margin": pair.margin} if pair.margin else {}
        trees.append(build_completions(prompt, kept, streams, marks=[{"sign": 1.0, **margin}, {"sign": -1.0}]))
    return trees.finish()


def weigh_end(ids: Array) -> Array:
    """Weights [T] that make the last token the only target: where a reward model's score of an answer is read."""
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[-1:] = 1.0
    return weights


def cut_padding(tokenizer: PreTrainedTokenizerFast, ids: Array) -> Array:
    """`ids` without padding tokens at the end, which a sequence classifier skips.

    Tokenizers whose end-of-text token is the padding token end an answer with one.
    """
    places = np.flatnonzero(ids != tokenizer.pad_token_id)
    return ids[: places[-1] + 1] if len(places) else ids[:0]


def build_feedback_trees(
    tokenizer: PreTrainedTokenizerFast,
    feedback: Iterable[Feedback],
    *,
    context: int,
    too_long: Policy,
    ledger: Ledger,
    folder: Path | None = None,
    bad_records: BadRecords = "error",
) -> Sequence[Tree]:
    """A prompt with one child for each judged answer: mark sign = 1 (label true) or -1 (false).

    Raises DataError where all the answers that are kept have one label: then there is nothing to tell apart.
    """
    trees = KeptTrees(folder, ledger)
    signs: Counter[float] = Counter()
    for number, record in enumerate(feedback):
        try:
            prompt, answers = encode_answers(tokenizer, record.prompt, (record.completion,), f"record {number}")
        except BadRecordError as error:
            drop_bad_record(bad_records, ledger, error)
            continue
        count_read(tokenizer, np.concatenate([prompt, *answers]), ledger)
        kept = fit_answers(prompt, answers, context, too_long, f"record {number}", ledger)
        if kept is not None:
            sign = 1.0 if record.label else -1.0
            signs[sign] += 1
            trees.append(build_completions(prompt, kept, marks=[{"sign": sign}]))
    if len(signs) == 1:
        raise DataError(
            f"feedback: {signs[1.0]} answers labelled true and {signs[-1.0]} labelled false are left of "
            f"{ledger['read']}; kto and bco need both labels: add answers of the other one, or use the sft stage"
        )
    return trees.finish()


def add_mismatched(trees: Sequence[Tree], *, context: int, ledger: Ledger) -> list[Tree]:
    """Give each prompt the answers of the last tree before it (cyclic) that has another prompt, marked `mismatched`.

    Their tokens are targets, so that they are scored, but no objective pushes them: KTO estimates a divergence from
    them. An answer that does not fit behind the prompt is cut (`mismatched_cut` in the ledger). Enters
    `tokens_mismatched` into the ledger, and counts them as kept and masked. Raises DataError where all prompts are
    the same.
    """
    prompts = [trees[i][0].tokens.tobytes() for i in range(len(trees))]
    if len(set(prompts)) < 2:
        raise DataError("loss: kto compares answers across prompts, and all of the data has one prompt; add others")
    before = 0  # the last tree of another prompt, for the first tree: from the end of the data
    while prompts[before - 1] == prompts[0]:
        before -= 1
    before = before - 1 + len(trees)
    out: list[Tree] = []
    for i, tree in enumerate(trees):
        if i and prompts[i] != prompts[i - 1]:
            before = i - 1
        room = max(1, context - len(tree[0]))
        whole = [segment.tokens for segment in trees[before] if "sign" in segment.marks]
        others = [ids[:room] for ids in whole]
        ledger["mismatched_cut"] += sum(len(ids) > room for ids in whole)
        marks = [{"mismatched": 1.0}] * len(others)
        added = build_completions(tree[0].tokens, others, marks=marks)[1:]
        ledger["tokens_mismatched"] += sum(len(s) for s in added)
        out.append((*tree, *added))
    ledger["tokens_kept"] += ledger["tokens_mismatched"]
    ledger["tokens_masked"] += ledger["tokens_mismatched"]
    return out


def encode_answers(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], answers: Sequence[str], what: str
) -> tuple[Array, list[Array]]:
    """Token ids of the prompt, and of each answer behind it.

    Raises as `render_chat` does, with `what` in front: where the template writes nothing for an answer, or does not
    begin the conversation with the prompt.
    """
    try:
        prompt = render_prompt(tokenizer, messages)
        whole = [[*messages, {"role": "assistant", "content": text}] for text in answers]
        rendered = [render_chat(tokenizer, conversation, train_on="last") for conversation in whole]
    except DataError as error:
        raise type(error)(f"{what}: {error}") from error
    return prompt, [conversation.token_ids[len(prompt) :] for conversation in rendered]


def fit_answers(
    prompt: Array, answers: Sequence[Array], context: int, too_long: Policy, what: str, ledger: Ledger
) -> list[Array] | None:
    """All answers to a prompt within the context, or None where the example is dropped, which it is as a whole."""
    room = context - len(prompt)
    longest = max(answers, key=len)
    if len(longest) > room and too_long == "drop":
        ledger["dropped"] += 1
        ledger["tokens_lost"] += len(prompt) + sum(len(a) for a in answers)
        return None
    if room < 1 or (len(longest) > room and too_long != "truncate"):
        # A prompt that fills the context leaves nothing to compare, and to truncate it would change the question.
        what = f"{what} (its prompt: {len(prompt)} tokens)"
        fit_context(np.concatenate([prompt, longest]), context, "error", what, ledger)
    fitted = [a if len(a) <= room else fit_context(a, room, "truncate", what, ledger) for a in answers]
    return [a for a in fitted if a is not None]


def drop_bad_record(bad_records: BadRecords, ledger: Ledger, error: BadRecordError, what: str = "") -> None:
    """Enter a record that cannot be learned from as read and dropped, by its reason; or raise `error` with the cure.

    Its tokens are not counted: there is no example to count them of.
    """
    if bad_records == "error":
        where = f"{what}: " if what else ""
        cure = "Correct it, or set bad_records: drop, which leaves such records out and counts them"
        raise type(error)(f"{where}{error}. {cure}") from error
    ledger["read"] += 1
    ledger["dropped"] += 1
    ledger[f"dropped_{error.reason}"] += 1


def count_read(tokenizer: PreTrainedTokenizerFast, ids: Array, ledger: Ledger) -> None:
    """Enter an example as it was read, with the tokens that stand for text which the tokenizer cannot spell."""
    ledger["read"] += 1
    ledger["tokens_read"] += len(ids)
    unknown = unknown_id(tokenizer)
    if unknown is not None:
        ledger["tokens_unknown"] += int((ids == unknown).sum())


class KeptTrees:
    """Where the trees of a data set are appended, a scratch file in `folder` or memory; each is entered as kept."""

    def __init__(self, folder: Path | None, ledger: Ledger):
        self._trees: list[Tree] | TreeWriter = [] if folder is None else TreeWriter(folder)
        self._ledger = ledger

    def append(self, tree: Tree) -> None:
        """Keep a tree."""
        ledger = self._ledger
        ledger["kept"] += 1
        for segment in tree:
            ledger["tokens_kept"] += len(segment)
            weights = segment.streams.get("weights")
            if weights is None:
                continue
            ledger["tokens_supervised"] += int(np.count_nonzero(weights))
            num_weighted = int(np.count_nonzero((weights != 0) & (weights != 1)))
            if num_weighted:
                ledger["tokens_weighted"] += num_weighted
        self._trees.append(tree)

    def finish(self) -> Sequence[Tree]:
        """Close the ledger, and give the trees for reading; nothing to learn from is an error."""
        ledger = self._ledger
        ledger["tokens_masked"] = ledger["tokens_kept"] - ledger["tokens_supervised"]
        if ledger["tokens_supervised"] == 0:
            raise DataError(
                f"no token is supervised ({ledger['read']} examples read, {ledger['dropped']} dropped); "
                "check the roles of the messages, the chat template and too_long"
            )
        return self._trees if isinstance(self._trees, list) else self._trees.close()
