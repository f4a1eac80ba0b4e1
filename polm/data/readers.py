"""Reads the files of a data set folder into canonical records, and writes JSON lines that are whole or absent.

Every mistake in a file is a `DataError` that names the file and the line. `docs/data.md` shows each format.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from polm.data.files import join_names, read_jsonl, read_rows
from polm.data.formats import FORMATS, OnBad, detect_row
from polm.data.messages import prepare_row, read_media
from polm.data.normalise import (
    PROMPT_FORMATS,
    build_document,
    build_feedback,
    build_preference,
    build_prompt,
    build_prompt_messages,
    build_stepwise,
    require_columns,
)
from polm.data.records import Conversation, Document, Feedback, Row, Stepwise
from polm.data.records import Message as Message
from polm.data.records import Preference as Preference
from polm.data.records import Prompt as Prompt
from polm.errors import BadRecordError, DataError, MediaError, StoreError

Judged = TypeVar("Judged", Preference, Feedback, Stepwise)
Built = TypeVar("Built")
CONVERSATION_FORMATS = ", ".join(format.example for format in FORMATS.values() if format.kind is Conversation)


def iterate_documents(path: Path) -> Iterator[Document]:
    """Reads plain documents: {"text": ...} rows, or a `.txt` file with blank lines between documents."""
    return (build_document(f"{path}:{line}", row) for line, row in read_rows(path))


def read_weighted_documents(path: Path) -> list[Document]:
    """All of `iterate_documents`."""
    return list(iterate_documents(path))


def read_documents(path: Path) -> list[str]:
    """The texts of `iterate_documents`."""
    return [document.text for document in iterate_documents(path)]


def iterate_conversations(path: Path, on_bad: OnBad | None = None) -> Iterator[Conversation]:
    """Reads conversations; each row may have a format of its own (see CONVERSATION_FORMATS).

    One that refers to images or other media is handed to `on_bad` and left out.

    Raises:
        DataError: an unknown layout, an unknown role, contents that are not text, or a conversation in which the
            assistant says nothing; without `on_bad` also one that would be left out.
    """
    return _build_good(path, _build_conversation, on_bad)


def read_conversations(path: Path) -> list[Conversation]:
    """All of `iterate_conversations`."""
    return list(iterate_conversations(path))


def iterate_preferences(path: Path, on_bad: OnBad | None = None) -> Iterator[Preference]:
    """Reads preference pairs (see `normalise.PREFERENCE_FORMATS`).

    Without a prompt, the prompt is what the two conversations have in common at their beginning. An empty reply is
    kept: it means that the model ends its turn at once. A pair whose prompts differ, or that refers to images or other
    media, is handed to `on_bad` and left out.

    Raises:
        DataError: an unknown layout, weights; without `on_bad` also a pair that would be left out.
    """
    return _build_good(path, lambda place, row: _check(place, row, build_preference(place, row)), on_bad)


def read_preferences(path: Path, on_bad: OnBad | None = None) -> list[Preference]:
    """All of `iterate_preferences`."""
    return list(iterate_preferences(path, on_bad))


def iterate_feedback(path: Path, on_bad: OnBad | None = None) -> Iterator[Feedback]:
    """Reads replies with a label each: {"prompt", "completion", "label"}, or messages and a label.

    One that refers to images or other media is handed to `on_bad` and left out, or raises its error without.
    """
    return _build_good(path, lambda place, row: _check(place, row, build_feedback(place, row)), on_bad)


def read_feedback(path: Path, on_bad: OnBad | None = None) -> list[Feedback]:
    """All of `iterate_feedback`."""
    return list(iterate_feedback(path, on_bad))


def is_feedback(path: Path) -> bool:
    """Whether the first row of a data file is a judged answer: it has a column `label`."""
    return any(row.get("label") is not None for _, row in islice(read_rows(path), 1))


def read_stepwise(path: Path, on_bad: OnBad | None = None) -> list[Stepwise]:
    """Reads replies in steps with a label a step: {"prompt", "completions", "labels"}.

    One that refers to images or other media is handed to `on_bad` and left out, or raises its error without.
    """
    return list(_build_good(path, lambda place, row: _check(place, row, build_stepwise(place, row)), on_bad))


def read_prompts(path: Path, *, judged: bool = True) -> list[Prompt]:
    """Reads prompts with verifiable answers (see PROMPT_FORMATS); here each must name its verifier.

    Without `judged` a prompt is enough: answer and verifier may be missing, and are then empty.
    """
    prompts = []
    for line, row in read_rows(path):
        place = f"{path}:{line}"
        if judged:
            require_columns(place, prepare_row(row), ["prompt", "answer", "verifier"], PROMPT_FORMATS)
        empty = {} if judged else {name: "" for name in ("answer", "verifier") if row.get(name) is None}
        prompt = build_prompt(place, {**row, **empty})
        _refuse_media(place, prompt.media)
        prompts.append(prompt)
    return prompts


def read_prompt_messages(path: Path) -> list[list[Message]]:
    """Reads prompts that nobody needs to verify: {"prompt": a string or messages}; other columns are not read.

    Raises:
        DataError: no prompt, or one in which the user does not speak last.
    """
    prompts = []
    for line, row in read_rows(path):
        messages = build_prompt_messages(f"{path}:{line}", row)
        _refuse_media(f"{path}:{line}", read_media(prepare_row(row)))
        if messages is None:
            require_columns(f"{path}:{line}", row, ["prompt"], '{"prompt": "..."} or {"prompt": [messages]}')
            raise AssertionError("a column prompt is a prompt")
        if messages[-1]["role"] != "user":
            raise DataError(
                f"{path}:{line}: a prompt must end with the user's message, found {messages[-1]['role']}; take the "
                "last message out"
            )
        prompts.append(messages)
    return prompts


def has_answers(path: Path) -> bool:
    """Whether the first row of a prompts file has an answer or a verifier; if not, a model or a function judges."""
    return any({"answer", "verifier"} & prepare_row(row).keys() for _, row in islice(read_rows(path), 1))


def read_any_prompts(path: Path) -> Sequence[Prompt | list[Message]]:
    """`read_prompts` of a file with answers, `read_prompt_messages` of one without."""
    return read_prompts(path) if has_answers(path) else read_prompt_messages(path)


def _build_good(path: Path, build: Callable[[str, Row], Built], on_bad: OnBad | None) -> Iterator[Built]:
    """The records of a file; what cannot be learned from is handed to `on_bad` and left out, or raised without."""
    for line, row in read_rows(path):
        try:
            record = build(f"{path}:{line}", row)
        except BadRecordError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield record


def _build_conversation(place: str, row: Row) -> Conversation:
    row = prepare_row(row)
    name = detect_row(row)
    # Feedback beside messages, or an answer beside a prompt and a completion, does not make it another use.
    found = next((f for f in FORMATS.values() if f.kind is Conversation and row.keys() >= set(f.needs)), None)
    if name is not None and FORMATS[name].kind is Conversation:
        found = FORMATS[name]
    if found is None:
        require_columns(place, row, ["prompt", "completion"], CONVERSATION_FORMATS)
        raise AssertionError("prompt and completion are a format")
    record = found.build(place, row)
    assert isinstance(record, Conversation)
    _refuse_media(place, record.media)
    return record


def _check(place: str, row: Row, record: Judged) -> Judged:
    """The record; refused where it refers to media, or has a weight that no loss would read."""
    _refuse_media(place, record.media)
    for name in ("weight", "weights"):
        if row.get(name) is not None and str(row[name]) not in ("", "1", "1.0"):
            raise DataError(
                f"{place}: {name} is not read: only documents and conversations have weights. Remove the column, or "
                "convert the file with `polm data`, which leaves it out and counts it"
            )
    return record


def _refuse_media(place: str, media: Sequence[str]) -> None:
    if media:
        raise MediaError(
            f"{place}: the record refers to {media[0]}, which is not supported: only text is read. Remove such rows, "
            "or let `polm data` do so (media: drop)"
        )


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as JSON lines and returns their number; the file appears whole or not at all.

    Raises:
        StoreError: the file cannot be written (a full disk is said so); nothing is left behind.
        DataError: a row holds something that JSON cannot, such as NaN.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    num_rows = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for row in rows:
                file.write(_dump_row(row, path, num_rows + 1))
                num_rows += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove_quietly(temporary)
        raise _describe_write_error(error, path) from error
    except BaseException:
        _remove_quietly(temporary)
        raise
    return num_rows


def read_back(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Reads the rows that `write_jsonl` left for a stage that goes on. Only "\\n" ends a line of it: `str.splitlines`
    also cuts at U+2028, U+0085 and others, which JSON lets stand inside a text.

    Raises:
        StoreError: a line that is torn, is no object or lacks a column; `write_jsonl` leaves none, so the file is
            damaged or somebody else's.
    """
    if path.is_file() and path.stat().st_size == 0:
        return  # no rows are a result too
    cure = "the file is damaged or was changed; remove it and run the same command again, which makes it anew"
    try:
        for line, row in read_jsonl(path):
            missing = [name for name in columns if name not in row]
            if missing:
                raise DataError(f"{path}:{line}: no {', '.join(missing)}, found {join_names(row) or 'nothing'}")
            yield row
    except DataError as error:
        raise StoreError(f"{error}: {cure}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value, whole or not at all; DataError for NaN and the like, StoreError where it cannot write."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except ValueError as error:
        raise DataError(f"{path} cannot be written as JSON: {error}") from error
    except OSError as error:
        _remove_quietly(temporary)
        raise _describe_write_error(error, path) from error


def _remove_quietly(path: Path) -> None:
    """Removes a temporary file; the error that led here matters more than one while removing."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _dump_row(row: Mapping[str, Any], path: Path, line: int) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}:{line}: this row cannot be written as JSON: {error}") from error


def _describe_write_error(error: OSError, path: Path) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"{path} was not written: no space is left on the disk. Free some and run again.")
    return StoreError(f"{path} was not written: {error.strerror or error}. Check the path and its permissions.")


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system lets a folder be opened for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
