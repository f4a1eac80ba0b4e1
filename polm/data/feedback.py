"""Reads judged answers: a prompt, one answer to it, and whether it was wanted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polm.data.readers import Message, Row, build_conversation, read_rows, require_columns
from polm.errors import DataError

FEEDBACK_FORMATS = (
    '{"prompt": "...", "completion": "...", "label": true}, the same with a list of messages as the prompt, '
    'or {"messages": [..., {"role": "assistant", "content": "..."}], "label": false}'
)


@dataclass(frozen=True)
class Feedback:
    """One judged answer: the messages so far, the reply, and whether it was wanted."""

    prompt: list[Message]
    completion: str
    label: bool


def is_feedback(path: Path) -> bool:
    """Whether the first row of a data file is a judged answer: it has a column `label`."""
    return any("label" in row for _, row in _first(path))


def _first(path: Path) -> list[tuple[int, Row]]:
    for line, row in read_rows(path):
        return [(line, row)]
    return []


def read_feedback(path: Path) -> list[Feedback]:
    """Reads judged answers (see FEEDBACK_FORMATS).

    Raises:
        DataError: an unknown layout, a label that is neither true nor false, or a conversation that does not end
            with a reply of the assistant.
    """
    return [_build_feedback(path, line, row) for line, row in read_rows(path)]


def _build_feedback(path: Path, line: int, row: Row) -> Feedback:
    require_columns(path, line, row, ["label"], FEEDBACK_FORMATS)
    label = row["label"]
    if not isinstance(label, bool):
        raise DataError(f"{path}:{line}: label must be true or false, found {label!r:.40}")
    if isinstance(row.get("prompt"), list) and "messages" not in row:
        require_columns(path, line, row, ["completion"], FEEDBACK_FORMATS)
        reply = row["completion"]
        replies = reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}]
        row = {**row, "messages": [*row["prompt"], *replies]}
    if "messages" not in row:
        require_columns(path, line, row, ["prompt", "completion"], FEEDBACK_FORMATS)
    messages = build_conversation(path, line, row)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        found = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{path}:{line}: judged messages must be a prompt and then one assistant message, found {found}. "
            f"Formats for this use: {FEEDBACK_FORMATS}."
        )
    return Feedback(messages[:-1], messages[-1]["content"], label)
