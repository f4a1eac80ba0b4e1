"""What is in a user's file: format, counts, lengths, what a context would cut off, and one example as it is trained on.

Shape suffix: T tokens of a part of an example.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from polm.data.clean import fingerprint_record
from polm.data.examples import (
    encode_document,
    encode_prompt,
    render_conversation,
    weigh_conversation,
    weigh_document,
)
from polm.data.formats import Detection, build_records, open_source
from polm.data.records import (
    Conversation,
    Document,
    Feedback,
    Message,
    Preference,
    Prompt,
    Record,
    Stepwise,
    list_texts,
)
from polm.data.steps import encode_separator, encode_steps
from polm.errors import DataError, UserError
from polm.recipe import ProcessRewardModelSettings
from polm.text.chat import render_prompt
from polm.tokens import Array

MAX_REASONS = 3
NUM_BINS = 10
# What stands behind each step: as stages/process_reward_model.py has it, or where the tokenizer has no token for that.
SEPARATOR: str = ProcessRewardModelSettings.model_fields["separator"].default
OTHER_SEPARATOR = ";"
REPLACEMENT = "\ufffd"  # what half of a character decodes to


@dataclass(frozen=True)
class Part:
    """A stretch of an example: its name ("chosen"), token ids and weights [T] (0 = context only)."""

    name: str
    ids_T: Array
    weights_T: Array


@dataclass(frozen=True)
class Piece:
    """Text that is shown as one: one supervised token (or several that only together are text), or a run of context."""

    text: str
    weight: float
    num_tokens: int = 1


@dataclass
class Inspection:
    """What was found. Lengths are in `unit`, one a record that could be read and encoded."""

    source: str
    detection: Detection
    unit: str
    context: int = 0
    num_rows: int = 0
    num_refused: int = 0
    reasons: list[str] = field(default_factory=list)
    num_duplicates: int = 0
    num_over: int = 0
    units_over: int = 0
    num_unsupervised: int = 0
    units_supervised: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    example: list[tuple[str, list[Piece]]] = field(default_factory=list)
    example_place: str = ""

    @property
    def num_read(self) -> int:
        return self.num_rows - self.num_refused


def inspect_source(
    source: str,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    context: int = 0,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    example: int = 1,
) -> Inspection:
    """Reads all of a source. Lengths are in tokens, or without a tokenizer in words; `context` = 0 cuts nothing.

    `example` is the row, from 1, from which on the first usable record is shown. A row that cannot be used is counted
    and its reason kept; a file of which no row can be used is an error.

    Raises:
        DataError: a file that cannot be read, of no known format, or without a usable row; a context without a
            tokenizer.
    """
    if context and tokenizer is None:
        raise DataError("a context is counted in tokens: give the tokenizer of the model as well (--tokenizer PATH)")
    detection, rows = open_source(source, format, columns)
    found = Inspection(source, detection, "tokens" if tokenizer is not None else "words", context)
    seen: set[bytes] = set()
    for place, row in rows:
        found.num_rows += 1
        try:
            (record,) = build_records(detection.format, iter([(place, row)]), found.counts)
            _enter(found, record, tokenizer, seen, place, show=found.num_rows >= example and not found.example)
        except UserError as error:
            found.num_refused += 1
            if len(found.reasons) < MAX_REASONS:
                text = str(error)
                found.reasons.append(text if text.startswith(place) else f"{place}: {text}")
    if found.num_read == 0:
        raise DataError(f"none of the {found.num_rows} rows can be used. {found.reasons[0]}")
    return found


def encode_record(tokenizer: PreTrainedTokenizerFast, record: Record) -> list[Part]:
    """A record as the parts that a model sees, with the weight of each token. Replies of a pair follow its prompt."""
    match record:
        case Document():
            ids = encode_document(tokenizer, record.text)
            weights = weigh_document(tokenizer, record, ids, "the document")
            weights[:1] = 0.0  # nothing predicts the first token
            return [Part("document", ids, weights)]
        case Conversation():
            rendered = render_conversation(tokenizer, record, "all")
            return [Part("conversation", rendered.token_ids, weigh_conversation(tokenizer, record, rendered))]
        case Preference():
            prompt = render_prompt(tokenizer, record.prompt)
            replies = {"chosen": record.chosen, "rejected": record.rejected}
            out = [Part("prompt", prompt, np.zeros(len(prompt), dtype=np.float32))]
            for name, text in replies.items():
                ids = _encode_reply(tokenizer, record.prompt, text).ids_T[len(prompt) :]
                out.append(Part(name, ids, np.ones(len(ids), dtype=np.float32)))
            return out
        case Feedback():
            return [_encode_reply(tokenizer, record.prompt, record.completion, f"label {record.label}".lower())]
        case Stepwise():
            return _encode_stepwise(tokenizer, record)
        case Prompt():
            chat = [{"role": "user", "content": record.prompt}]
            template = tokenizer.chat_template is not None
            ids = render_prompt(tokenizer, chat) if template else encode_prompt(tokenizer, record.prompt)
            return [Part("prompt", ids, np.zeros(len(ids), dtype=np.float32))]


def split_pieces(tokenizer: PreTrainedTokenizerFast, part: Part) -> list[Piece]:
    """The part as pieces to show: each supervised token on its own, context in runs."""
    pieces: list[Piece] = []
    held: list[int] = []
    ids, weights = part.ids_T.tolist(), part.weights_T.tolist()
    for place, (token, weight) in enumerate(zip(ids, weights, strict=True)):
        held.append(token)
        ends = place + 1 == len(ids) or weights[place + 1] != weight
        text = tokenizer.decode(held, skip_special_tokens=False)
        # A token may be a part of a character; up to four bytes belong together.
        whole = weight != 0 and (REPLACEMENT not in text or len(held) == 4)
        if ends or whole:
            pieces.append(Piece(text, weight, len(held)))
            held = []
    return pieces


def compute_histogram(lengths: array[int]) -> list[tuple[int, int, int]]:
    """(first, last, count) of at most NUM_BINS bins of equal width from the shortest to the longest."""
    values = np.array(lengths, dtype=np.int64)
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // NUM_BINS))
    counts = np.bincount((values - low) // width)
    return [(low + i * width, low + (i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]


def _encode_stepwise(tokenizer: PreTrainedTokenizerFast, record: Stepwise) -> list[Part]:
    """The prompt and the steps, each judged at the last token of the separator behind it."""
    try:
        separator = encode_separator(tokenizer, SEPARATOR)
    except UserError:  # as the stage does, which names the cure: another separator
        separator = encode_separator(tokenizer, OTHER_SEPARATOR)
    prompt = render_prompt(tokenizer, record.prompt)
    ids, ends = encode_steps(tokenizer, record.completions, separator)
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[ends] = 1.0
    labels = ", ".join(f"{label:g}" for label in record.labels)
    return [
        Part("prompt", prompt, np.zeros(len(prompt), dtype=np.float32)),
        Part(f"steps, labels {labels}", ids, weights),
    ]


def _encode_reply(tokenizer: PreTrainedTokenizerFast, prompt: list[Message], text: str, name: str = "reply") -> Part:
    record = Conversation([*prompt, {"role": "assistant", "content": text}], weights=(*(0.0 for _ in prompt), 1.0))
    rendered = render_conversation(tokenizer, record, "last")
    return Part(name, rendered.token_ids, weigh_conversation(tokenizer, record, rendered))


def _enter(
    found: Inspection,
    record: Record,
    tokenizer: PreTrainedTokenizerFast | None,
    seen: set[bytes],
    place: str,
    *,
    show: bool,
) -> None:
    """Count one record, and keep it as the example."""
    parts = encode_record(tokenizer, record) if tokenizer is not None else None
    _count_contents(found.counts, record)
    key = fingerprint_record(record)
    found.num_duplicates += key in seen
    seen.add(key)
    if parts is None:
        found.lengths.append(sum(len(text.split()) for text in list_texts(record)))
        pieces = _list_plain_pieces(record)
        found.counts["characters"] += sum(map(len, list_texts(record)))
        found.units_supervised += sum(len(piece.text.split()) for _, own in pieces for piece in own if piece.weight)
    else:
        assert tokenizer is not None
        length = _measure(parts)
        found.lengths.append(length)
        supervised = sum(int(np.count_nonzero(part.weights_T)) for part in parts)
        found.units_supervised += supervised
        found.num_unsupervised += supervised == 0
        if found.context and length > found.context:
            found.num_over += 1
            found.units_over += length - found.context
        pieces = [(part.name, split_pieces(tokenizer, part)) for part in parts] if show else []
    if show:
        found.example, found.example_place = pieces, place


def _measure(parts: list[Part]) -> int:
    """The length that must fit the context: a pair's prompt with the longer reply."""
    if len(parts) == 1:
        return len(parts[0].ids_T)
    return len(parts[0].ids_T) + max(len(part.ids_T) for part in parts[1:])


def _count_contents(counts: Counter[str], record: Record) -> None:
    messages: list[Message] = []
    counts["records with media"] += not isinstance(record, Document) and bool(record.media)
    if isinstance(record, Conversation):
        messages = record.messages
        counts["records with tools"] += bool(record.tools)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        counts["answers of weight 0"] += sum(record.weight_of(i) == 0 for i in answers)
        counts["answers of another weight than 0 and 1"] += sum(record.weight_of(i) not in (0, 1) for i in answers)
        counts["answers with token weights"] += len(record.token_weights)
    elif isinstance(record, Preference | Feedback | Stepwise):
        messages = record.prompt
    for message in messages:
        counts[f"messages of {message['role']}"] += 1
        counts["tool calls"] += len(message.get("tool_calls", ()))
    if isinstance(record, Document):
        counts["documents with weights"] += record.weight != 1.0 or record.token_weights is not None
    elif isinstance(record, Preference):
        counts["pairs of equal replies"] += record.chosen == record.rejected
    elif isinstance(record, Feedback):
        counts[f"label {str(record.label).lower()}"] += 1
    elif isinstance(record, Stepwise):
        counts["steps"] += len(record.labels)
        counts["steps with a label below 1"] += sum(label < 1 for label in record.labels)
    elif isinstance(record, Prompt):
        counts[f"verifier {record.verifier}"] += 1


def _list_plain_pieces(record: Record) -> list[tuple[str, list[Piece]]]:
    """The texts of a record by role, whole, where there is no tokenizer; templates add their own tokens to this."""
    match record:
        case Document():
            return [("document", [Piece(record.text, record.weight)])]
        case Conversation():
            return [
                (str(message["role"]), [Piece(_describe(message), record.weight_of(index))])
                for index, message in enumerate(record.messages)
            ]
        case Preference():
            replies = {"chosen": record.chosen, "rejected": record.rejected}
            return [*_list_context(record.prompt), *((name, [Piece(text, 1.0)]) for name, text in replies.items())]
        case Feedback():
            name = f"label {str(record.label).lower()}"
            return [*_list_context(record.prompt), (name, [Piece(record.completion, 1.0)])]
        case Stepwise():
            steps = zip(record.completions, record.labels, strict=True)
            return [
                *_list_context(record.prompt),
                *((f"step, label {label:g}", [Piece(text, 0.0), Piece("<separator>", 1.0)]) for text, label in steps),
            ]
        case Prompt():
            return [("prompt", [Piece(record.prompt, 0.0)]), ("answer", [Piece(record.answer, 0.0)])]


def _list_context(messages: list[Message]) -> list[tuple[str, list[Piece]]]:
    return [(str(message["role"]), [Piece(_describe(message), 0.0)]) for message in messages]


def _describe(message: Mapping[str, Any]) -> str:
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", ())]
    return "\n".join([text for text in (message["content"], *calls) if text])
