"""The formats that users bring: what each looks like, and which one a file has.

A format is told by the names of its columns and, where those are shared, by the kind of their values.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice

from polm.data.files import iterate_source, join_names, name_type
from polm.data.messages import FIELDS, MESSAGE_COLUMNS, WEIGHT_FIELDS, prepare_row
from polm.data.normalise import (
    build_alpaca,
    build_chat,
    build_completion,
    build_document,
    build_feedback,
    build_preference,
    build_prompt,
    build_stepwise,
    rename_columns,
)
from polm.data.records import (
    Conversation,
    Document,
    Feedback,
    Preference,
    Prompt,
    Record,
    Row,
    Stepwise,
)
from polm.errors import BadRecordError, DataError

ASKING = ("system", "tools", "messages", "conversations")  # beside the prompt of a question they would change it
NUM_PROBED = 64  # rows that the format is told from
Rows = Iterator[tuple[str, Row]]
OnBad = Callable[[BadRecordError], None]  # counts a bad record, or raises


@dataclass(frozen=True)
class Format:
    """One layout of rows. `columns` are all that it reads: others are counted as ignored; `example` is a row."""

    name: str
    kind: type[Record]
    needs: tuple[str, ...]
    columns: frozenset[str]
    build: Callable[[str, Row], Record]
    example: str


def _format(
    name: str,
    kind: type[Record],
    build: Callable[[str, Row], Record],
    needs: str,
    optional: str,
    example: str,
) -> Format:
    return Format(name, kind, tuple(needs.split()), frozenset((needs + " " + optional).split()), build, example)


MEDIA = "images image videos video audios audio"
_ALL = (
    _format(
        "messages",
        Conversation,
        build_chat,
        "messages",
        f"system tools weight {MEDIA}",
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    ),
    _format(
        "sharegpt",
        Conversation,
        build_chat,
        "conversations",
        f"system tools weight {MEDIA}",
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    ),
    _format(
        "alpaca",
        Conversation,
        build_alpaca,
        "instruction output",
        f"input history system tools weight {MEDIA}",
        '{"instruction": "...", "input": "...", "output": "..."}',
    ),
    _format(
        "completion",
        Conversation,
        build_completion,
        "prompt completion",
        f"system tools weight {MEDIA}",
        '{"prompt": "...", "completion": "..."}',
    ),
    _format("text", Document, build_document, "text", "weight token_weights", '{"text": "..."}'),
    _format(
        "preference",
        Preference,
        build_preference,
        "chosen rejected",
        f"prompt conversations messages instruction input history system margin tools {MEDIA}",
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    ),
    _format(
        "transcripts",
        Preference,
        build_preference,
        "chosen rejected",
        f"system margin tools {MEDIA}",
        '{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "\\n\\nHuman: ...\\n\\nAssistant: ..."}',
    ),
    _format(
        "feedback",
        Feedback,
        build_feedback,
        "label",
        f"prompt completion messages conversations system tools {MEDIA}",
        '{"prompt": "...", "completion": "...", "label": true}',
    ),
    _format(
        "stepwise",
        Stepwise,
        build_stepwise,
        "prompt completions labels",
        f"system tools {MEDIA}",
        '{"prompt": "...", "completions": ["...", "..."], "labels": [true, false]}',
    ),
    _format(
        "prompts",
        Prompt,
        build_prompt,
        "prompt answer",
        f"verifier task solution numbers {MEDIA}",
        '{"prompt": "...", "answer": "...", "verifier": "math"}',
    ),
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
# Names that other people give to our columns, for the cure in an error.
ALIASES = {
    "prompt": ("question", "problem", "query", "input"),
    "completion": ("response", "reply", "output", "target"),
    "answer": ("final_answer", "target", "ground_truth", "solution"),
    "text": ("content", "document", "body"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "chosen": ("preferred", "accepted", "response_chosen"),
    "rejected": ("dispreferred", "response_rejected"),
}


@dataclass(frozen=True)
class Detection:
    """The format of a file, and what it was told from, in words."""

    format: Format
    evidence: str


def detect_row(row: Row) -> str | None:
    """The name of the format that a row has, or None. Formats that need more columns come before those they hold."""
    row = prepare_row(row)
    names = set(row)
    if {"chosen", "rejected"} <= names:
        alone = names.isdisjoint(("prompt", "conversations", "messages", "instruction"))
        texts = isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
        return "transcripts" if alone and texts else "preference"
    if {"prompt", "completions", "labels"} <= names:
        return "stepwise"
    if "label" in names and (not names.isdisjoint(("messages", "conversations")) or {"prompt", "completion"} <= names):
        return "feedback"
    order = ("messages", "sharegpt", "alpaca", "completion", "prompts", "text")
    return next((name for name in order if names.issuperset(FORMATS[name].needs)), None)


def detect_format(rows: Iterable[tuple[str, Row]]) -> Detection:
    """The one format of the given rows (the first of a file), as (place, row).

    Raises:
        DataError: no format, or more than one; it lists what was found and what was expected.
    """
    probed = list(rows)
    if not probed:
        raise DataError("there is no row to tell a format from; expected at least one")
    votes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for place, row in probed:
        name = detect_row(row)
        if name is None:
            raise _describe_unknown(place, row)
        votes[name] += 1
        first.setdefault(name, place)
    if len(votes) > 1:
        found = ", ".join(f"{name} ({count} rows, first {first[name]})" for name, count in votes.most_common())
        raise DataError(
            f"the first {len(probed)} rows have {len(votes)} formats: {found}. Cure: split the file, or say which one "
            "holds for all rows with format: NAME"
        )
    (name,) = votes
    columns = join_names(f"{key} ({name_type(value)})" for key, value in probed[0][1].items())
    return Detection(FORMATS[name], f"each of the first {len(probed)} rows has {', '.join(_seen(name))}; {columns}")


def find_format(name: str) -> Format:
    """A format by its name."""
    if name not in FORMATS:
        raise DataError(f"unknown format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def open_source(
    source: str, format: str | None = None, columns: Mapping[str, str] | None = None
) -> tuple[Detection, Rows]:
    """The format of a source, told from its first rows or as named, and all of its rows under our column names."""
    renamed = columns or {}
    rows: Rows = ((place, rename_columns(place, row, renamed)) for place, row in iterate_source(source))
    if format is not None:
        return Detection(find_format(format), "as named"), rows
    head = list(islice(rows, NUM_PROBED))
    return detect_format(head), chain(head, rows)


def build_records(format: Format, rows: Rows, ledger: Counter[str], on_bad: OnBad | None = None) -> Iterator[Record]:
    """Rows as canonical records; what the format does not read is counted as `columns_ignored/NAME`.

    A field of messages is NAME = "messages[].field", once a row. A pair whose prompts differ is handed to `on_bad` and
    left out; without one it is an error. Of a question, columns that the format does not read are carried along for
    reward functions; those that would change the question, or that JSON cannot hold, are left out and counted.
    """
    fields = FIELDS | WEIGHT_FIELDS if format.kind is Conversation else FIELDS
    for place, row in rows:
        try:
            record = format.build(place, row)
        except BadRecordError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        row = prepare_row(row)
        ignored = row.keys() - format.columns
        if isinstance(record, Prompt):
            carried = {name: value for name, value in record.columns.items() if _is_carried(name, value)}
            record = replace(record, columns=carried)
            ignored -= carried.keys()
        yield record
        ledger.update(f"columns_ignored/{name}" for name in ignored)
        for name in format.columns.intersection(MESSAGE_COLUMNS, row):
            messages = row[name] if isinstance(row[name], list) else ()
            pairs = [pair for message in messages if isinstance(message, dict) for pair in message.items()]
            found = {field for field, value in pairs if value is not None}
            ledger.update(f"columns_ignored/{name}[].{field}" for field in found - fields)


def _is_carried(name: str, value: object) -> bool:
    """Whether a column of a question goes on: it is no other question, and JSON can hold its value (no NaN)."""
    if name in ASKING:
        return False
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _seen(name: str) -> tuple[str, ...]:
    return (*FORMATS[name].needs, "no prompt beside them") if name == "transcripts" else FORMATS[name].needs


def _describe_unknown(place: str, row: Row) -> DataError:
    hints = [
        f"{ours}: {theirs}"
        for ours, others in ALIASES.items()
        if ours not in row
        for theirs in others
        if theirs in row and name_type(row[theirs]) != "null"
    ]
    hint = f" (here perhaps columns: {{{', '.join(hints[:3])}}})" if hints else ""
    known = "; ".join(f"{format.name}: {format.example}" for format in _ALL)
    return DataError(
        f"{place}: the columns {join_names(row) or '(none)'} fit no known format. Cure: map your columns to ours with "
        f"columns: {{ours: theirs}}{hint}. Known formats: {known}"
    )
