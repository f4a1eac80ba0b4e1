from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from polm.data.benchmarks import (
    BenchmarkItem,
    extract_boxed,
    extract_marked,
    format_number,
    join_sentences,
    parse_plain_number,
    read_benchmark,
    read_benchmark_file,
    read_benchmark_folder,
)
from polm.errors import DataError

REAL_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a #### 18", "18"),
        ("#### 1 then #### 2 \nmore", "2"),
        ("####\n\n 7\n8", "7"),
        ("####", ""),
        ("no marker", None),
    ],
)
def test_extract_marked(text: str, answer: str | None) -> None:
    assert extract_marked(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{10}$.", "10"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 5.", "5"),
        (r"\fbox{x}", "x"),
        (r"\boxed{3} but \boxed{never closed", "3"),
        ("\\boxed{" * 20_000, None),
        ("none", None),
    ],
)
def test_extract_boxed(text: str, answer: str | None) -> None:
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("45", 45),
        (" $1,200.50. ", 1200.5),
        ("-3", -3),
        (".5", 0.5),
        ("$7$", 7),
        (r"\$5", 5),
        ("1,2", None),
        ("1/2", None),
        ("5 apples", None),
        ("", None),
        ("50%", None),
        ("1e5", None),
    ],
)
def test_parse_plain_number(text: str, value: float | None) -> None:
    assert parse_plain_number(text) == value


def test_format_number() -> None:
    assert [format_number(value) for value in (43.0, -2.0, 0.25, 1 / 3, 1200)] == [
        "43",
        "-2",
        "0.25",
        "0.333333333333",
        "1200",
    ]


def test_join_sentences() -> None:
    assert join_sentences("He has 2 ", " How many?") == "He has 2. How many?"
    assert join_sentences("He has 2.", "How many?") == "He has 2. How many?"
    assert join_sentences("", "How many?") == "How many?"


def test_published_layouts(tmp_path: Path) -> None:
    write(
        tmp_path / "gsm8k" / "test.jsonl",
        {"question": " How much? ", "answer": "It is 2*600 = <<2*600=1200>>1,200.\n#### 1,200"},
    )
    write(
        tmp_path / "math" / "test.jsonl",
        {"problem": "Half of 1?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac{1}{2}}$."},
    )
    problems = tmp_path / "word_problems"
    write(
        problems / "svamp.jsonl",
        {"Body": "He has 290", "Question": "Each?", "Equation": "( 290.0 / 2.0 )", "Answer": 145.0, "ID": "chal-1"},
    )
    write(
        problems / "asdiv.jsonl",
        {"body": "Red.", "question": "How many?", "formula": "7+2=9", "answer": "9 (apples)"},
        {"body": "", "question": "When?", "formula": "x", "answer": "3:30 p.m."},
        {"body": "", "question": "Which part?", "formula": "x", "answer": "5/2"},
    )
    write(problems / "mawps.jsonl", {"input": "Joan found 70.", "target": 43.0, "type": "singleeq"})
    assert read_benchmark("gsm8k", tmp_path) == [
        BenchmarkItem("gsm8k-1", "How much?", "1200", "It is 2*600 = 1,200.\n#### 1,200", "math")
    ]
    assert read_benchmark("math", tmp_path) == [
        BenchmarkItem("math-1", "Half of 1?", r"\frac{1}{2}", r"It is $\boxed{\frac{1}{2}}$.", "math")
    ]
    assert read_benchmark("svamp", tmp_path) == [
        BenchmarkItem("svamp-1", "He has 290. Each?", "145", "( 290 / 2 ) = 145\n#### 145", "math")
    ]
    assert [(item.prompt, item.answer, item.verifier) for item in read_benchmark("asdiv", tmp_path)] == [
        ("Red. How many?", "9", "math"),
        ("When?", "3:30 p.m.", "exact"),
        ("Which part?", "5/2", "math"),
    ]
    assert read_benchmark("mawps", tmp_path) == [BenchmarkItem("mawps-1", "Joan found 70.", "43", "#### 43", "math")]


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        ("gsm8k", "gsm8k/test.jsonl", {"question": "q"}, "no column answer; found question"),
        ("gsm8k", "gsm8k/test.jsonl", {"question": "q", "answer": "a"}, "expected a number after '####'"),
        ("math", "math/test.jsonl", {"problem": "q", "solution": "a"}, r"expected \\boxed"),
        ("mawps", "word_problems/mawps.jsonl", {"input": "q", "target": "3"}, "target must be a number"),
        ("mawps", "word_problems/mawps.jsonl", {"input": 1, "target": 3}, "input must be a string"),
    ],
)
def test_damaged_rows_name_file_and_line(
    tmp_path: Path, name: str, file: str, row: dict[str, object], message: str
) -> None:
    write(tmp_path / file, row)
    with pytest.raises(DataError, match=r"\.jsonl:1: .*" + message):
        read_benchmark(name, tmp_path)


def test_unknown_benchmark_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown benchmark 'gsm9k'; known are asdiv, gsm8k, math, mawps, svamp"):
        read_benchmark("gsm9k", tmp_path)
    with pytest.raises(DataError, match=r"test\.jsonl does not exist"):
        read_benchmark("gsm8k", tmp_path)


def test_own_benchmark_folder(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "N0 + N1 ?", "answer": "3", "solution": "#### N0 + N1", "verifier": "expression"}
    write(tmp_path / "two.jsonl", {**row, "numbers": [1, 2]})
    write(tmp_path / "one.jsonl", {**row, "id": "b"}, {**row, "id": "c"})
    folder = read_benchmark_folder(tmp_path)
    assert list(folder) == ["one", "two"]
    assert folder["two"] == [BenchmarkItem("a", "N0 + N1 ?", "3", "#### N0 + N1", "expression", (1.0, 2.0))]
    assert [item.id for item in folder["one"]] == ["b", "c"]
    assert folder["one"][0].numbers is None


def test_own_benchmark_mistakes(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "p", "answer": "3", "solution": "s", "verifier": "number"}
    with pytest.raises(DataError, match=r"a\.jsonl:2: the id 'a' occurs already in line 1"):
        read_benchmark_file(write(tmp_path / "a.jsonl", row, row))
    with pytest.raises(DataError, match="answer must be a string, found 3"):
        read_benchmark_file(write(tmp_path / "a.jsonl", {**row, "answer": 3}))
    with pytest.raises(DataError, match=r"no column prompt, answer, solution, verifier; found id\. Formats"):
        read_benchmark_file(write(tmp_path / "a.jsonl", {"id": "a"}))
    with pytest.raises(DataError, match="holds no benchmark"):
        read_benchmark_folder(write(tmp_path / "empty" / "x.txt", 1).parent)
    with pytest.raises(DataError, match="is not a folder"):
        read_benchmark_folder(tmp_path / "absent")


def test_real_benchmarks_are_read_whole() -> None:
    if not REAL_DATA.exists():
        pytest.skip("the real data files are not beside the project (../shared/data)")
    sizes = {"gsm8k": 1319, "math": 5000, "svamp": 1000, "asdiv": 2215, "mawps": 2065}
    for name, size in sizes.items():
        items = read_benchmark(name, REAL_DATA)
        assert len(items) == size
        assert all(item.prompt and item.answer for item in items)
        verifiers = Counter(item.verifier for item in items)
        if name == "asdiv":
            assert verifiers["math"] > 2000
            assert set(verifiers) == {"math", "exact"}
        else:
            assert set(verifiers) == {"math"}
