"""From a user's data file to rows, one after another: memory does not grow with the file.

By its ending: `.json` (a list of objects, or an object a line), `.jsonl`, `.csv`, `.tsv`, `.txt` (documents with blank
lines between them), each also with `.gz` or `.zst` behind it, and `.parquet`. A folder is all such files in it, by
name; `hub:OWNER/NAME` is a data set of the hub. Every mistake in a file is a `DataError` that names file and line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from polm.data.hub import HUB_PREFIX, read_hub
from polm.data.parquet import read_parquet
from polm.data.records import Row
from polm.data.zstd import open_zstd
from polm.errors import DataError

COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
BLOCK = 1 << 16  # characters that are read at once from a JSON list
MAX_CELL = 1 << 30  # characters of a CSV cell


class Cell(str):
    """A cell of a CSV. It is text, in which a list has to be written as JSON."""

    __slots__ = ()


def iterate_source(source: str) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) of a file, a folder of files or a `hub:` id; a place is "file:line"."""
    if source.startswith(HUB_PREFIX):
        yield from ((f"{source} row {number}", row) for number, row in read_hub(source))
        return
    for path in list_source_files(Path(source)):
        yield from ((f"{path}:{line}", row) for line, row in read_rows(path))


def list_source_files(path: Path) -> list[Path]:
    """The file itself, or a folder's data files sorted by name."""
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and _ending(p) in SUFFIXES)
    if not files:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
        raise DataError(f"the folder {path} holds no data file; expected some of {_describe_suffixes()}, found {found}")
    return files


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (line, row) of a data file.

    For `.json` lists and Parquet the line is the position from 1. A document of a `.txt` file becomes
    {"text": document}, with the line where it begins. The cells of a CSV row are strings (`Cell`).
    """
    readers = {
        ".jsonl": read_jsonl,
        ".json": _read_json,
        ".txt": _read_text_documents,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": read_parquet,
    }
    ending = _ending(path)
    if ending not in readers or (ending == ".parquet" and path.suffix.lower() != ".parquet"):
        raise DataError(f"{path} has an unknown ending; expected one of {_describe_suffixes()}")
    return readers[ending](path)


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (line number from 1, object) of JSON lines; blank lines are skipped.

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


def name_type(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    kind = str if isinstance(value, str) else type(value)
    return "null" if value is None else names.get(kind, "a number" if isinstance(value, float) else "a value")


def join_names(names: Iterable[object]) -> str:
    """Names of columns for a message; what a terminal would obey is shown as an escape."""
    return ", ".join(name if name.isprintable() else repr(name) for name in map(str, names))


def parse_json(text: str, where: str) -> Any:
    """The JSON value in `text`; a DataError that names `where` for anything else."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: not valid JSON: {error.msg} at {place}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        raise DataError(f"{where}: JSON that cannot be read: {error}") from error


def _ending(path: Path) -> str:
    """The ending that says what a file holds: `.jsonl` of `a.jsonl.gz`."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _describe_suffixes() -> str:
    return f"{', '.join(SUFFIXES)} ({' or '.join(COMPRESSIONS)} may follow all but .parquet)"


def _open(path: Path) -> BinaryIO:
    name = path.name.lower()
    if name.endswith(".zst"):
        return open_zstd(path)
    return gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, text)."""
    line = 0
    with _explain(path, lambda: f"line {line}"), _open(path) as file:
        for line, raw in enumerate(file, start=1):
            try:
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {error.start} of the line"
                raise DataError(f"{path}:{line}: not UTF-8 text ({where})") from error


def _read_blocks(path: Path) -> Iterator[str]:
    """Yields the text in pieces, however long its lines are."""
    num_bytes = 0
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _explain(path, lambda: f"byte {num_bytes}"), _open(path) as file:
        while block := file.read(BLOCK):
            try:
                yield decoder.decode(block)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 text ({error.reason} after byte {num_bytes})") from error
            num_bytes += len(block)
        if decoder.getstate()[0]:
            raise DataError(f"{path}: not UTF-8 text (it ends within a character)")


@contextlib.contextmanager
def _explain(path: Path, place: Callable[[], str]) -> Iterator[None]:
    """Every way in which a file can be unreadable becomes a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; give the path of a file: {_describe_suffixes()}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; give the path of one file in it") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file after {place()}: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read (after {place()}): {error.strerror or error}") from error


def _parse_object(text: str, path: Path, line: int) -> Row:
    value = parse_json(text, f"{path}:{line}")
    if not isinstance(value, dict):
        raise DataError(f"{path}:{line}: expected a JSON object {{...}}, found {name_type(value)}")
    return value


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    """A list of objects, or, as many `.json` files are, an object a line."""
    first = next((stripped[0] for text in _read_blocks(path) if (stripped := text.lstrip())), "")
    if first == "{":
        with contextlib.suppress(DataError):  # no object a line: the reader of lists says what is wrong
            if len(list(islice(read_jsonl(path), 2))) == 2:  # one object alone is more often a mistake than a row
                return read_jsonl(path)
    return _JsonList(path).read()


class _JsonList:
    """Reads a list of objects, holding one object and the text read ahead of it in memory."""

    def __init__(self, path: Path):
        self.path, self.text, self.at, self.ended = path, "", 0, False
        self.line, self.column = 1, 0  # of self.text[0], as a reader counts them
        self.blocks = _read_blocks(path)

    def read(self) -> Iterator[tuple[int, Row]]:
        position = 0
        first = self._peek()
        if first != "[":
            found = name_type({"{": {}, '"': ""}.get(first, 0)) if first else "nothing"
            raise DataError(f"{self.path}: expected a list of JSON objects, found {found}; one a line is .jsonl")
        self.at += 1
        while (mark := self._peek()) != "]":
            if position:
                if mark != ",":
                    raise self._describe("Expecting ',' delimiter", self.at)
                self.at += 1
                self._peek()
            position += 1
            yield position, self._parse(position)
        self.at += 1
        if self._peek():
            raise self._describe("Extra data", self.at)
        if position == 0:
            raise DataError(f"{self.path} holds no rows; expected a list of JSON objects")

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            rest = self.text[self.at : self.at + BLOCK]
            stripped = rest.lstrip()
            self.at += len(rest) - len(stripped)
            if stripped:
                return stripped[0]
            if self.at >= len(self.text) and not self._more():
                return ""

    def _more(self) -> bool:
        """Forget what is read and read on; False at the end of the file."""
        if self.ended:
            return False
        gone = self.text[: self.at]
        if "\n" in gone:
            self.line, self.column = self.line + gone.count("\n"), len(gone) - gone.rfind("\n") - 1
        else:
            self.column += len(gone)
        # What is left is doubled at least, so that an object of n characters is tried log(n) times, not n times.
        parts, size, wanted = [self.text[self.at :]], 0, max(BLOCK, len(self.text) - self.at)
        for text in self.blocks:
            parts.append(text)
            size += len(text)
            if size >= wanted:
                break
        else:
            self.ended = True
        self.text, self.at = "".join(parts), 0
        return size > 0

    def _parse(self, position: int) -> Row:
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if unfinished and self._more():
                    continue
                raise self._describe(error.msg, min(error.pos, len(self.text))) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}:{position}: JSON that cannot be read: {error}") from error
            if not isinstance(value, dict):
                raise DataError(f"{self.path}:{position}: expected a JSON object {{...}}, found {name_type(value)}")
            self.at = end
            return value

    def _describe(self, message: str, at: int) -> DataError:
        before = self.text[:at]
        line = self.line + before.count("\n")
        column = at - before.rfind("\n") if "\n" in before else self.column + at + 1
        place = f"line {line}, column {column}" if line > 1 else f"column {column}"
        return DataError(f"{self.path}: not valid JSON: {message} at {place}")


# ---- text and tables -----------------------------------------------------------------------------------------------


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


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """A header line, then a row a record; cells in double quotes may hold line breaks. `.tsv` is split at tabs."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(
        (text for _, text in _read_lines(path)), delimiter="\t" if _ending(path) == ".tsv" else ",", strict=True
    )
    header: list[str] | None = None
    num_rows, line = 0, 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _check_header(path, cells)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{begin}: {len(cells)} cells, and the header has {len(header)} ({join_names(header)}); "
                    "a comma, a quote or a line break inside a cell needs double quotes around the cell"
                )
            num_rows += 1
            yield begin, dict(zip(header, map(Cell, cells), strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error
    if num_rows == 0:
        raise DataError(f"{path} holds no rows; expected a header line and a row a record")


def _check_header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not all(names) or len(set(names)) < len(names):
        raise DataError(f"{path}:1: the header must name each column once, found {', '.join(map(repr, names))}")
    return names
