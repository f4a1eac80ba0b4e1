"""Benchmarks: the published layouts of five mathematical ones, and our own `benchmarks/NAME.jsonl`.

An answer stands after the marker `#### ` (GSM8K) or in `\\boxed{}` (MATH); the two extractors here are what the
verifiers use as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from polm.data.files import read_jsonl
from polm.data.normalise import ANSWER_MARKER as ANSWER_MARKER
from polm.data.normalise import read_numbers, require_columns
from polm.data.records import Row
from polm.errors import DataError

BENCHMARK_FORMATS = (
    '{"id": "...", "prompt": "...", "answer": "...", "solution": "...", "verifier": "number"}, and optionally numbers'
)

_PLAIN_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|-?\.[0-9]+")
_BOXED = re.compile(r"\\f?box(?:ed)?\s*")
# A value, perhaps with its unit in brackets: "9 (apples)", "5/2", "-(1/3)".
_ASDIV_NUMBER = re.compile(r"(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*(?:\([^()]*\))?")
_ASDIV_FRACTION = re.compile(r"-?\(?[0-9]+/[0-9]+\)?")
_CALCULATION = re.compile(r"<<.*?>>")


@dataclass(frozen=True)
class BenchmarkItem:
    """One question; a base model is given `prompt` and its continuation is judged by `verifier` against `answer`."""

    id: str
    prompt: str
    answer: str
    solution: str
    verifier: str
    numbers: tuple[float, ...] | None = None


def extract_marked(text: str) -> str | None:
    """The rest of the line after the last `####`, stripped; None where there is no marker."""
    _, marker, after = text.rpartition(ANSWER_MARKER)
    if not marker:
        return None
    return next((line.strip() for line in after.splitlines() if line.strip()), "")


def extract_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` (or `\\fbox{...}`, `\\boxed 5`) with its braces balanced; None without."""
    closing = _match_braces(text)
    for match in reversed(list(_BOXED.finditer(text))):
        begin = match.end()
        if begin in closing:
            return text[begin + 1 : closing[begin]].strip()
        if match[0][-1].isspace() and text[begin : begin + 1] not in ("", "{"):
            return text[begin]
    return None


def parse_plain_number(text: str) -> float | None:
    """The value of text that is nothing but a number ("1,200", "$45", "-3.5."); None for anything else."""
    stripped = text.strip().strip("$").rstrip(".").replace("\\$", "").replace("\\!", "").strip()
    return float(stripped.replace(",", "")) if _PLAIN_NUMBER.fullmatch(stripped) else None


def format_number(value: float) -> str:
    """A number as answers hold it: 43 rather than 43.0, otherwise up to twelve significant digits."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.12g}"


def read_benchmark(name: str, data: Path) -> list[BenchmarkItem]:
    """Reads a published benchmark (see BENCHMARKS) below the folder `data`, each in the layout it is published in.

    The verifier is "math" (plain numbers are compared by value, everything else by math-verify), and "exact" for the
    few answers that are words, times or ratios.

    Raises:
        DataError: an unknown name, or a missing or damaged file.
    """
    if name not in BENCHMARKS:
        raise DataError(f"unknown benchmark {name!r}; known are {', '.join(sorted(BENCHMARKS))}")
    file, build = BENCHMARKS[name]
    path = data / file
    return [build(path, line, row) for line, row in read_jsonl(path)]


def read_benchmark_file(path: Path) -> list[BenchmarkItem]:
    """Reads one of our own benchmark files (see BENCHMARK_FORMATS); an id that occurs twice is a DataError."""
    items: list[BenchmarkItem] = []
    seen: dict[str, int] = {}
    columns = ["id", "prompt", "answer", "solution", "verifier"]
    for line, row in read_jsonl(path):
        require_columns(f"{path}:{line}", row, columns, BENCHMARK_FORMATS)
        texts = {column: _get_string(path, line, row, column) for column in columns}
        if texts["id"] in seen:
            raise DataError(f"{path}:{line}: the id {texts['id']!r} occurs already in line {seen[texts['id']]}")
        seen[texts["id"]] = line
        items.append(BenchmarkItem(**texts, numbers=read_numbers(f"{path}:{line}", row)))
    return items


def read_benchmark_folder(path: Path) -> dict[str, list[BenchmarkItem]]:
    """Reads every `NAME.jsonl` of a folder of our own benchmarks; the result is in the order of the names."""
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; expected one that holds a NAME.jsonl for each benchmark")
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise DataError(f"{path} holds no benchmark; expected at least one NAME.jsonl")
    return {file.stem: read_benchmark_file(file) for file in files}


def _match_braces(text: str) -> dict[int, int]:
    """Position of each opening brace -> position of the one that closes it, in one pass over hostile text."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _get_string(path: Path, line: int, row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise DataError(f"{path}:{line}: {column} must be a string, found {row[column]!r:.40}")
    return str(row[column])


def _get_number(path: Path, line: int, row: Row, column: str) -> float:
    if type(row[column]) not in (int, float):
        raise DataError(f"{path}:{line}: {column} must be a number, found {row[column]!r:.40}")
    return float(row[column])


def _build_gsm8k(path: Path, line: int, row: Row) -> BenchmarkItem:
    """Layout: question; answer = steps with <<calculations>> and "#### value"."""
    require_columns(f"{path}:{line}", row, ["question", "answer"])
    worked = _get_string(path, line, row, "answer")
    value = parse_plain_number(extract_marked(worked) or "")
    if value is None:
        raise DataError(f"{path}:{line}: expected a number after {ANSWER_MARKER!r} at the end of answer")
    question = _get_string(path, line, row, "question").strip()
    return BenchmarkItem(f"gsm8k-{line}", question, format_number(value), _CALCULATION.sub("", worked), "math")


def _build_math(path: Path, line: int, row: Row) -> BenchmarkItem:
    """Layout: problem, level, type; solution with the answer in \\boxed{}."""
    require_columns(f"{path}:{line}", row, ["problem", "solution"])
    solution = _get_string(path, line, row, "solution")
    answer = extract_boxed(solution)
    if not answer:
        raise DataError(f"{path}:{line}: expected \\boxed{{...}} in solution")
    return BenchmarkItem(f"math-{line}", _get_string(path, line, row, "problem").strip(), answer, solution, "math")


def _build_svamp(path: Path, line: int, row: Row) -> BenchmarkItem:
    """Layout: Body, Question, Equation such as "( 290.0 / 2.0 )", Answer as a number, ID."""
    require_columns(f"{path}:{line}", row, ["Body", "Question", "Equation", "Answer"])
    answer = format_number(_get_number(path, line, row, "Answer"))
    equation = re.sub(r"\.0\b", "", _get_string(path, line, row, "Equation")).strip()
    prompt = join_sentences(_get_string(path, line, row, "Body"), _get_string(path, line, row, "Question"))
    solution = f"{equation} = {answer}\n{ANSWER_MARKER} {answer}"
    return BenchmarkItem(f"svamp-{line}", prompt, answer, solution, "math")


def _build_asdiv(path: Path, line: int, row: Row) -> BenchmarkItem:
    """Layout: body, question, formula such as "7+2=9", answer such as "9 (apples)", solution_type."""
    require_columns(f"{path}:{line}", row, ["body", "question", "formula", "answer"])
    answer = _get_string(path, line, row, "answer").strip()
    if match := _ASDIV_NUMBER.fullmatch(answer):
        answer, verifier = format_number(float(match[1].replace(",", ""))), "math"
    else:
        verifier = "math" if _ASDIV_FRACTION.fullmatch(answer) else "exact"
    prompt = join_sentences(_get_string(path, line, row, "body"), _get_string(path, line, row, "question"))
    solution = f"{_get_string(path, line, row, 'formula').strip()}\n{ANSWER_MARKER} {answer}"
    return BenchmarkItem(f"asdiv-{line}", prompt, answer, solution, verifier)


def _build_mawps(path: Path, line: int, row: Row) -> BenchmarkItem:
    """Layout: input, target as a number, type (the collection that the question comes from)."""
    require_columns(f"{path}:{line}", row, ["input", "target"])
    answer = format_number(_get_number(path, line, row, "target"))
    prompt = _get_string(path, line, row, "input").strip()
    return BenchmarkItem(f"mawps-{line}", prompt, answer, f"{ANSWER_MARKER} {answer}", "math")


def join_sentences(body: str, question: str) -> str:
    """Body and question as one text; a body that ends without punctuation gets a full stop."""
    body, question = body.strip(), question.strip()
    if body and body[-1] not in ".?!,;:":
        body += "."
    return f"{body} {question}".strip()


BENCHMARKS: dict[str, tuple[str, Callable[[Path, int, Row], BenchmarkItem]]] = {
    "asdiv": ("word_problems/asdiv.jsonl", _build_asdiv),
    "gsm8k": ("gsm8k/test.jsonl", _build_gsm8k),
    "math": ("math/test.jsonl", _build_math),
    "mawps": ("word_problems/mawps.jsonl", _build_mawps),
    "svamp": ("word_problems/svamp.jsonl", _build_svamp),
}
