"""Reads users' data files into plain records, and writes JSON lines that are either whole or absent.

Formats: `.json` (one list of objects), `.jsonl` and `.jsonl.gz` (one object a line), `.txt` (documents with blank
lines between them). Every mistake in a file is a `DataError` that names the file and the line.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polm.errors import DataError, StoreError

Row = dict[str, Any]
Message = dict[str, str]

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".txt")
# Columns that carry what a text-only model would silently lose.
UNSUPPORTED_COLUMNS = ("images", "videos", "audios", "tools")

CONVERSATION_FORMATS = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."}, {"instruction": "...", "input": "...", "output": "..."}, '
    'or {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}'
)
PREFERENCE_FORMATS = (
    '{"prompt": "...", "chosen": "...", "rejected": "..."}, the same with lists of messages, chosen and rejected alone '
    'as lists of messages or as "Human: ... Assistant: ..." transcripts with a common beginning, '
    'or {"conversations": [...], "chosen": {"from": "gpt", "value": "..."}, "rejected": {...}}'
)
PROMPT_FORMATS = '{"prompt": "...", "answer": "...", "verifier": "number"}, and optionally task, solution, numbers'
DOCUMENT_FORMATS = '{"text": "..."}'


@dataclass(frozen=True)
class Preference:
    """One comparison: the messages so far, the preferred reply and the other one."""

    prompt: list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Prompt:
    """One question whose reply a verifier can judge; `numbers` fills N0, N1, ... for the verifier "expression"."""

    prompt: str
    answer: str
    verifier: str
    task: str = ""
    solution: str = ""
    numbers: tuple[float, ...] | None = None


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (line number from 1, object) of a `.jsonl` or `.jsonl.gz` file; blank lines are skipped.

    Raises:
        DataError: a missing, unreadable or empty file, a line that is not JSON, or one that is not an object.
    """
    num_rows = 0
    for line, text in _read_lines(path):
        if not text.strip():
            continue
        num_rows += 1
        yield line, _parse_object(text, path, line)
    if num_rows == 0:
        raise DataError(f"{path} holds no rows; expected one JSON object a line")


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (line, row) of a `.json` list, `.jsonl`, `.jsonl.gz` or `.txt` file.

    For `.json` the line is the position in the list, from 1. A document of a `.txt` file becomes {"text": document},
    with the line where it begins.
    """
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(path)
    if name.endswith(".json"):
        return _read_json_list(path)
    if name.endswith(".txt"):
        return _read_text_documents(path)
    raise DataError(f"{path} has an unknown ending; expected one of {', '.join(SUFFIXES)}")


def require_columns(path: Path, line: int, row: Mapping[str, Any], columns: Sequence[str], formats: str = "") -> None:
    """Raises a DataError that names what was found and which formats exist, if a column is missing."""
    missing = [column for column in columns if column not in row]
    if not missing:
        return
    found = ", ".join(row) or "no columns"
    cure = f" Formats for this use: {formats}." if formats else ""
    raise DataError(f"{path}:{line}: no column {', '.join(missing)}; found {found}.{cure}")


def read_documents(path: Path) -> list[str]:
    """Reads plain documents: {"text": ...} rows, or a `.txt` file with blank lines between documents."""
    documents = []
    for line, row in read_rows(path):
        require_columns(path, line, row, ["text"], DOCUMENT_FORMATS)
        documents.append(_require_string(path, line, row, "text"))
    return documents


def read_conversations(path: Path) -> list[list[Message]]:
    """Reads conversations in the four common layouts (see CONVERSATION_FORMATS) as lists of {"role", "content"}.

    Raises:
        DataError: an unknown layout, an unknown role, contents that are not text, columns that a text-only model
            would lose (images, tools), or a conversation in which the assistant says nothing.
    """
    return [build_conversation(path, line, row) for line, row in read_rows(path)]


def read_preferences(path: Path) -> list[Preference]:
    """Reads preference pairs (see PREFERENCE_FORMATS).

    Without a prompt, the prompt is what the two conversations have in common at their beginning. An empty reply is
    kept: it means that the model ends its turn at once.

    Raises:
        DataError: an unknown layout, or replies of more than one message.
    """
    return [_build_preference(path, line, row) for line, row in read_rows(path)]


def read_prompts(path: Path) -> list[Prompt]:
    """Reads prompts with verifiable answers (see PROMPT_FORMATS)."""
    return [_build_prompt(path, line, row) for line, row in read_rows(path)]


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


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, text); every way in which a file can be unreadable becomes a DataError."""
    line = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; give the path of a {', '.join(SUFFIXES)} file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; give the path of one file in it") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file after line {line}: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse_object(text: str, path: Path, line: int) -> Row:
    value = _parse_json(text, f"{path}:{line}")
    if not isinstance(value, dict):
        raise DataError(f"{path}:{line}: expected a JSON object {{...}}, found {_name_type(value)}")
    return value


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: not valid JSON: {error.msg} at {place}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        raise DataError(f"{where}: JSON that cannot be read: {error}") from error


def _read_json_list(path: Path) -> Iterator[tuple[int, Row]]:
    value = _parse_json("".join(text for _, text in _read_lines(path)), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of JSON objects, found {_name_type(value)}; one a line is .jsonl")
    if not value:
        raise DataError(f"{path} holds no rows; expected a list of JSON objects")
    for position, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{position}: expected a JSON object {{...}}, found {_name_type(row)}")
        yield position, row


def _read_text_documents(path: Path) -> Iterator[tuple[int, Row]]:
    lines: list[str] = []
    begin, num_documents = 1, 0
    for line, text in _read_lines(path):
        if text.strip():
            begin = begin if lines else line
            lines.append(text.rstrip("\r\n"))
        elif lines:
            num_documents += 1
            yield begin, {"text": "\n".join(lines)}
            lines = []
    if lines:
        num_documents += 1
        yield begin, {"text": "\n".join(lines)}
    if num_documents == 0:
        raise DataError(f"{path} holds no text; expected documents with blank lines between them")


def _name_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number" if isinstance(value, float) else "a value")


def _require_string(path: Path, line: int, row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{path}:{line}: {column} must be a string, found {_name_type(value)}")
    return value


def _build_messages(path: Path, line: int, value: object, column: str) -> list[Message]:
    """Checks a list of {"role", "content"} or {"from", "value"} messages and returns it in the first form."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}:{line}: {column} must be a list of messages with at least one, found {value!r:.80}")
    return [_build_message(path, line, message, f"{column}[{index}]") for index, message in enumerate(value)]


def _build_message(path: Path, line: int, message: object, where: str) -> Message:
    if isinstance(message, dict) and {"role", "content"} <= message.keys():
        role, content, roles = message["role"], message["content"], {role: role for role in ROLES}
    elif isinstance(message, dict) and {"from", "value"} <= message.keys():
        role, content, roles = message["from"], message["value"], SHAREGPT_ROLES
    else:
        found = ", ".join(message) if isinstance(message, dict) else _name_type(message)
        raise DataError(f"{path}:{line}: {where} needs role and content (or from and value), found {found}")
    if not isinstance(role, str) or role not in roles:
        raise DataError(f"{path}:{line}: {where} has the role {role!r:.40}; allowed: {', '.join(roles)}")
    if not isinstance(content, str):
        raise DataError(f"{path}:{line}: {where} has {_name_type(content)} as its content; only a string is read")
    return {"role": roles[role], "content": content}


def _refuse_unsupported(path: Path, line: int, row: Mapping[str, Any]) -> None:
    for column in UNSUPPORTED_COLUMNS:
        if row.get(column):
            raise DataError(f"{path}:{line}: column {column} is not supported: only text is read. Remove such rows.")


def build_conversation(path: Path, line: int, row: Row) -> list[Message]:
    """One row as messages, in any of CONVERSATION_FORMATS; errors as `read_conversations` has them."""
    _refuse_unsupported(path, line, row)
    if "messages" in row:
        messages = _build_messages(path, line, row["messages"], "messages")
    elif "conversations" in row:
        messages = _build_messages(path, line, row["conversations"], "conversations")
    elif "instruction" in row:
        messages = _build_alpaca(path, line, row)
    else:
        require_columns(path, line, row, ["prompt", "completion"], CONVERSATION_FORMATS)
        messages = [
            {"role": "user", "content": _require_string(path, line, row, "prompt")},
            {"role": "assistant", "content": _require_string(path, line, row, "completion")},
        ]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row["system"]}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{path}:{line}: no assistant message, so there is nothing to learn in this conversation")
    return messages


def _build_alpaca(path: Path, line: int, row: Row) -> list[Message]:
    """An Alpaca row: earlier turns from `history` ([[question, reply], ...]), then instruction (+ input) and output."""
    require_columns(path, line, row, ["instruction", "output"], CONVERSATION_FORMATS)
    messages = []
    for index, turn in enumerate(row.get("history") or []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataError(f"{path}:{line}: history[{index}] must be a [question, reply] pair of strings")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _require_string(path, line, row, "instruction")
    if row.get("input"):
        question = f"{question}\n{_require_string(path, line, row, 'input')}"
    output = _require_string(path, line, row, "output")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _build_preference(path: Path, line: int, row: Row) -> Preference:
    _refuse_unsupported(path, line, row)
    require_columns(path, line, row, ["chosen", "rejected"], PREFERENCE_FORMATS)
    prompt = row.get("conversations", row.get("prompt"))
    sides = [_build_side(path, line, row[column], column, prompt is None) for column in ("chosen", "rejected")]
    if isinstance(prompt, str):
        begin = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        begin = _build_messages(path, line, prompt, "conversations" if "conversations" in row else "prompt")
    else:
        num_common = _count_common_messages(*sides)
        begin, sides = sides[0][:num_common], [side[num_common:] for side in sides]
    for column, side in zip(("chosen", "rejected"), sides, strict=True):
        # A full conversation beside an explicit prompt repeats that prompt; what follows it is the reply.
        reply = side[len(begin) :] if len(side) > 1 and side[: len(begin)] == begin else side
        if len(reply) != 1 or reply[0]["role"] != "assistant":
            raise DataError(
                f"{path}:{line}: {column} must end in exactly one assistant message after the common prompt, "
                f"found {len(reply)} ({', '.join(message['role'] for message in reply)}). "
                f"Formats for this use: {PREFERENCE_FORMATS}."
            )
    if not begin:
        raise DataError(f"{path}:{line}: chosen and rejected have no common beginning, so there is no prompt")
    return Preference(begin, sides[0][-1]["content"], sides[1][-1]["content"])


def _build_side(path: Path, line: int, value: object, column: str, holds_prompt: bool) -> list[Message]:
    """One side of a pair as messages; `holds_prompt`: its beginning is the prompt."""
    if isinstance(value, str) and holds_prompt:
        return _split_transcript(path, line, value, column)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [_build_message(path, line, value, column)]
    return _build_messages(path, line, value, column)


def _split_transcript(path: Path, line: int, text: str, column: str) -> list[Message]:
    """Splits a "\\n\\nHuman: ...\\n\\nAssistant: ..." transcript, as the HH-RLHF files hold it, into messages.

    Paragraphs that belong to the speaker before, and a speaker who speaks twice, are joined.
    """
    messages: list[Message] = []
    for paragraph in ("\n\n" + text.lstrip("\n")).split("\n\n")[1:]:
        speaker, colon, content = paragraph.partition(":")
        role = HH_ROLES.get(speaker) if colon else None
        if role is not None and (not messages or messages[-1]["role"] != role):
            messages.append({"role": role, "content": content.strip()})
        elif messages:
            addition = content.strip() if role is not None else paragraph
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{addition}".strip()
        else:
            raise DataError(
                f"{path}:{line}: {column} is a string without a prompt beside it and does not begin with "
                f'"Human:". Formats for this use: {PREFERENCE_FORMATS}.'
            )
    return messages


def _count_common_messages(first: list[Message], second: list[Message]) -> int:
    """Number of equal messages at the beginning, leaving each side at least its last one."""
    count = 0
    while count < min(len(first), len(second)) - 1 and first[count] == second[count]:
        count += 1
    return count


def _build_prompt(path: Path, line: int, row: Row) -> Prompt:
    require_columns(path, line, row, ["prompt", "answer", "verifier"], PROMPT_FORMATS)
    texts = {column: _require_string(path, line, row, column) for column in ("prompt", "answer", "verifier")}
    optional = {column: _require_string(path, line, row, column) for column in ("task", "solution") if column in row}
    return Prompt(**texts, **optional, numbers=read_numbers(path, line, row))


def read_numbers(path: Path, line: int, row: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The optional column `numbers` as floats; None where it is absent."""
    values = row.get("numbers")
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise DataError(f"{path}:{line}: numbers must be a list of numbers, found {values!r:.80}")
    return tuple(float(value) for value in values)
