"""The canonical records: what every format of a user's data is turned into, and nothing else is read by a stage.

A message is a plain object as chat templates take it: `role`, `content`, and for tools `tool_calls` (assistant),
`name` and `tool_call_id` (tool). Weights stand beside the messages, never in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """Plain text. `weight` multiplies the loss of its tokens; `token_weights` has one number a token of the text."""

    text: str
    weight: float = 1.0
    token_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages of which the assistant's are learned.

    weights        one a message (those of other roles are 0); empty = 1 for each of the assistant's
    token_weights  message index -> one number for each token of that answer, and perhaps one for its end of turn
    tools          the functions that the assistant may call, as {"type": "function", "function": {...}}
    media          what the record refers to that a text model cannot see, such as "images: a.jpg"
    """

    messages: list[Message]
    weights: tuple[float, ...] = ()
    token_weights: dict[int, tuple[float, ...]] = field(default_factory=dict)
    tools: list[Row] = field(default_factory=list)
    media: tuple[str, ...] = ()

    def weight_of(self, index: int) -> float:
        """The weight of a message."""
        if self.weights:
            return self.weights[index]
        return 1.0 if self.messages[index]["role"] == "assistant" else 0.0


@dataclass(frozen=True)
class Preference:
    """One comparison: the messages so far, the preferred reply and the other one.

    `margin` says how much better the preferred one is, at least 0 (0 = not said); reward models read it. `media` is as
    in a conversation, here and in the records below.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float = 0.0
    media: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feedback:
    """One reply and whether it was wanted (KTO's unpaired feedback)."""

    prompt: list[Message]
    completion: str
    label: bool
    media: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stepwise:
    """A reply in steps, each with a label from 0 (wrong) to 1 (right): what process reward models learn from."""

    prompt: list[Message]
    completions: tuple[str, ...]
    labels: tuple[float, ...]
    media: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One question whose reply a verifier can judge; `numbers` fills N0, N1, ... for the verifier "expression".

    `columns` is what else its row holds, for reward functions.
    """

    prompt: str
    answer: str
    verifier: str
    task: str = ""
    solution: str = ""
    numbers: tuple[float, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    media: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """The row as whoever judges an answer reads it."""
        own = {"prompt": self.prompt, "answer": self.answer, "verifier": self.verifier}
        return {**own, "task": self.task, "solution": self.solution, "numbers": self.numbers, **self.columns}


PROMPT_COLUMNS = frozenset(field.name for field in fields(Prompt)) - {"columns", "media"}
Record = Document | Conversation | Preference | Feedback | Stepwise | Prompt


def build_row(record: Record) -> Row:
    """The record as an object of a data set folder's JSON lines; reading it again gives the same record."""
    match record:
        case Document():
            row: Row = {"text": record.text}
            if record.weight != 1.0:
                row["weight"] = record.weight
            if record.token_weights is not None:
                row["token_weights"] = list(record.token_weights)
            return row
        case Conversation():
            return _build_conversation_row(record)
        case Preference():
            row = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
            return {**row, "margin": record.margin} if record.margin else row
        case Feedback():
            return {"prompt": record.prompt, "completion": record.completion, "label": record.label}
        case Stepwise():
            labels = list(record.labels)
            return {"prompt": record.prompt, "completions": list(record.completions), "labels": labels}
        case Prompt():
            row = {"prompt": record.prompt, "answer": record.answer, "verifier": record.verifier}
            row |= {name: value for name in ("task", "solution") if (value := getattr(record, name))}
            numbers = {} if record.numbers is None else {"numbers": list(record.numbers)}
            return {**row, **numbers, **record.columns}


def _build_conversation_row(record: Conversation) -> Row:
    messages = []
    for index, message in enumerate(record.messages):
        out = dict(message)
        if message["role"] == "assistant" and record.weight_of(index) != 1.0:
            out["weight"] = record.weight_of(index)
        if index in record.token_weights:
            out["token_weights"] = list(record.token_weights[index])
        messages.append(out)
    row: Row = {"messages": messages}
    return {**row, "tools": record.tools} if record.tools else row


def list_texts(record: Record) -> list[str]:
    """Every text of a record in order, tool calls as JSON: what duplicates and benchmarks are looked for in."""
    match record:
        case Document():
            return [record.text]
        case Conversation():
            return _list_message_texts(record.messages)
        case Preference():
            return [*_list_message_texts(record.prompt), record.chosen, record.rejected]
        case Feedback():
            return [*_list_message_texts(record.prompt), record.completion]
        case Stepwise():
            return [*_list_message_texts(record.prompt), *record.completions]
        case Prompt():
            return [text for text in (record.prompt, record.answer, record.solution) if text]


def _list_message_texts(messages: Sequence[Message]) -> list[str]:
    out = []
    for message in messages:
        out.append(message["content"])
        out += [json.dumps(call["function"], sort_keys=True) for call in message.get("tool_calls", ())]
    return out
