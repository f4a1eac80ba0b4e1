"""Read JSON and JSON lines into checked records; what is damaged is named with its file and line."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from polm.errors import StoreError

T = TypeVar("T")

# What json turns into half of a surrogate pair unless it comes in twos; such text cannot be written as UTF-8.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_replace_surrogates(element) for element in value]
    if isinstance(value, dict):
        return {_replace_surrogates(key): _replace_surrogates(element) for key, element in value.items()}
    return value


def parse(kind: TypeAdapter[T], text: str, where: str) -> T:
    """The text as a record; `where` names it in the StoreError for what is damaged."""
    try:
        value = json.loads(text)
        if _SURROGATE_ESCAPE.search(text):
            value = _replace_surrogates(value)
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the top level"
        raise StoreError(
            f"{where}: {first['msg'].lower()} at {place}. The file does not have the format of a run; "
            "delete the artifact and run the recipe again, or use the version of polm that wrote it"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise StoreError(
            f"{where}: expected JSON, found something else ({error}). "
            "Delete the artifact and run the recipe again: what is missing is computed anew"
        ) from error


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check that it is a file you may read") from error


def read_json(kind: TypeAdapter[T], path: Path) -> T:
    return parse(kind, read_text(path), str(path))


def read_first_lines(kind: TypeAdapter[T], path: Path, limit: int) -> tuple[T, ...]:
    """The first `limit` lines of a finished file, without reading the rest of it."""
    try:
        # A text file with newline="\n" is cut at \n alone, as in read_jsonl.
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            found = [(number, line) for number, line in enumerate(islice(lines, limit), 1) if line.strip()]
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check that it is a file you may read") from error
    return tuple(parse(kind, line, f"{path}:{number}") for number, line in found)


def read_jsonl(kind: TypeAdapter[T], path: Path, *, finished: bool) -> tuple[T, ...]:
    """All lines; the last one is left out if it is torn (no newline at its end) and the stage is still running."""
    # Only \n separates lines: str.splitlines would also cut at characters that may stand inside a text.
    lines = read_text(path).split("\n")
    if not finished:
        lines = lines[:-1]
    return tuple(parse(kind, line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
