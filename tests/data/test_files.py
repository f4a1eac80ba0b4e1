"""Every kind of file gives the same rows; what is broken is named by file and line; memory stays flat."""

from __future__ import annotations

import csv
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polm.data import files
from polm.data.files import iterate_source, read_rows
from polm.data.formats import build_records, open_source
from polm.data.hub import parse_hub_id
from polm.data.records import Conversation
from polm.errors import DataError

ROWS = [
    {"prompt": 'größe "a",\nb', "completion": "x"},
    {"prompt": "二", "completion": ""},
    {"prompt": " ", "completion": "\\"},
]


def dump_lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_plain(path: Path) -> None:
    path.write_bytes(dump_lines())


def write_list(path: Path) -> None:
    path.write_text("\n" + json.dumps(ROWS, ensure_ascii=False, indent=1))


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra parquet)")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(dump_lines()))


def write_zstd(path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed (the extra zstd)")
    half = len(json.dumps(ROWS[0])) + 1
    pack = zstandard.ZstdCompressor().compress
    path.write_bytes(pack(dump_lines()[:half]) + pack(dump_lines()[half:]))  # two frames, as parallel writers make


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_plain,
    "lines.json": write_plain,
    "a.json": write_list,
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.parquet": write_parquet,
    "a.jsonl.gz": write_gzip,
    "A.JSON.GZ": write_gzip,
    "a.jsonl.zst": write_zstd,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


def test_places(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    assert [line for line, _ in read_rows(tmp_path / "a.csv")] == [2, 4, 5]  # the first row has two lines
    write_plain(tmp_path / "b.jsonl")
    expected = [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:4", f"{tmp_path}/a.csv:5"]
    expected += [f"{tmp_path}/b.jsonl:{line}" for line in (1, 2, 3)]
    (tmp_path / "README.md").write_text("no data")
    assert [place for place, _ in iterate_source(str(tmp_path))] == expected


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"holds no data file; expected some of \.json.*found notes\.md"):
        list(iterate_source(str(tmp_path)))


def test_null_fields_of_parquet_are_absent(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra parquet)")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"m": [{"role": "user", "weight": None}, {"role": "assistant", "weight": 0.5}], "x": None},
        {"m": [], "x": 1},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet")] == [
        {"m": [{"role": "user"}, {"role": "assistant", "weight": 0.5}], "x": None},
        {"m": [], "x": 1},
    ]


def test_columns_that_are_null_in_some_rows_can_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Parquet and on the hub every row has every column and every object every field."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra parquet)")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets", reason="datasets is not installed (the extra hub)")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "mine").mkdir()
    functions = [{"name": "f", "parameters": {"a": {"kind": "int"}}}, {"name": "g", "parameters": {"b": {"x": 1}}}]
    rows = [
        {"talk": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "note": "s", "tools": None},
        {"talk": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": functions},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mine" / "train.parquet")
    for source in (str(tmp_path / "mine" / "train.parquet"), f"hub:{tmp_path}/mine:train"):
        detection, found = open_source(source, columns={"messages": "talk", "system": "note"})
        first, second = build_records(detection.format, found, Counter())
        assert isinstance(first, Conversation)
        assert isinstance(second, Conversation)
        assert [message["role"] for message in first.messages] == ["system", "user", "assistant"]
        assert [message["role"] for message in second.messages] == ["user", "assistant"]
        assert [tool["function"] for tool in second.tools] == functions


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a\.csv holds no rows; expected a header line"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: 3 cells, and the header has 2 \(a, b\)"),
        ("a.csv", b"a,a\n1,2\n", "the header must name each column once"),
        ("a.csv", b'a\n"x" y\n', r"a\.csv:2: not valid CSV"),
        ("a.csv", b"a\n\xff\n", r"a\.csv:2: not UTF-8"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable Parquet file"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst cannot be read .*damaged zstd"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: damaged gzip"),
        ("a.json", b"", r"expected a list of JSON objects, found nothing"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'[{"a": 1}', r"not valid JSON: Expecting ',' delimiter at column 10"),
        ("a.json", b'[{"a": 1}]]', "not valid JSON: Extra data at column 11"),
        ("a.json", b'[{"a": 1},]', r"a\.json: not valid JSON"),
        ("a.json", b'[{"a": "x', "not valid JSON: Unterminated string"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json: not UTF-8"),
        ("a.json", b"[" + b'{"a":' * 100_000, r"a\.json:1: JSON that cannot be read"),
        ("a.parquet.gz", b"x", "unknown ending"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    for package, suffix in (("pyarrow", ".parquet"), ("zstandard", ".zst")):
        if name.endswith(suffix):
            pytest.importorskip(package, reason=f"{package} is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "a.csv", "a.json"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} does not exist"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")])
def test_a_missing_package_names_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"need {package}, which is not installed: pip install 'polm\["):
        list(read_rows(tmp_path / name))


def test_a_json_list_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks cut through, the rows are the same, and so are the places of mistakes."""
    text = json.dumps([{"text": "é" * n, "n": [n, {"a": "]},{"}]} for n in range(40)], ensure_ascii=False, indent=1)
    path = tmp_path / "a.json"
    path.write_text(text)
    expected = json.loads(text)
    for block in (1, 2, 3, 7, 64, 1 << 16):
        monkeypatch.setattr(files, "BLOCK", block)
        assert [row for _, row in read_rows(path)] == expected
    path.write_text(text[:-10] + "?" + text[-9:])
    messages = set()
    for block in (1, 64, 1 << 16):
        monkeypatch.setattr(files, "BLOCK", block)
        with pytest.raises(DataError) as caught:
            list(read_rows(path))
        messages.add(str(caught.value))
    assert len(messages) == 1
    with pytest.raises(json.JSONDecodeError) as reference:
        json.loads(path.read_text())
    assert f"line {reference.value.lineno}, column {reference.value.colno}" in messages.pop()


MEASURE = """
import resource, sys
from pathlib import Path
from polm.data.formats import open_source, build_records
from collections import Counter
def count(path):
    detection, rows = open_source(path)
    return sum(1 for _ in build_records(detection.format, rows, Counter()))
count(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
number = count(sys.argv[2])
print(number, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """200 MB on one line (a list) or in many; the peak grows by less than 16 MB over that of a small file."""
    row = json.dumps({"text": "word " * 2000})
    separator, begin, end = ("\n", "", "\n") if name.endswith("l") else (", ", "[", "]")
    small, large = tmp_path / f"small-{name}", tmp_path / name
    small.write_text(begin + separator.join([row] * 20) + end)
    with large.open("w") as file:
        file.write(begin)
        file.writelines(separator.join([row] * 200) + separator for _ in range(100))
        file.write(row + end)
    assert large.stat().st_size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True, check=True
    )
    number, kilobytes = map(int, done.stdout.split())
    assert number == 20_001
    assert kilobytes < 16_000


# ---- the hub, as far as a local folder goes ------------------------------------------------------------------------


def test_hub_ids() -> None:
    assert parse_hub_id("hub:a/b") == ("a/b", None, "train")
    assert parse_hub_id("hub:a/b:test") == ("a/b", None, "test")
    assert parse_hub_id("hub:a/b:main:test") == ("a/b", "main", "test")
    for wrong in ("hub:", "hub:a/b:", "hub:a:b:c:d"):
        with pytest.raises(DataError, match="is not hub:OWNER/NAME"):
            parse_hub_id(wrong)


def test_a_local_folder_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed (the extra hub)")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "mine").mkdir()
    write_plain(tmp_path / "mine" / "train.jsonl")
    rows: list[Any] = list(iterate_source(f"hub:{tmp_path}/mine:train"))
    assert [row for _, row in rows] == ROWS
    assert rows[1][0] == f"hub:{tmp_path}/mine:train row 2"
    with pytest.raises(DataError, match=r"cannot be read .*Check the name, the config and the split"):
        list(iterate_source(f"hub:{tmp_path}/mine:absent"))


def test_without_datasets_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'polm\[hub\]'"):
        list(iterate_source("hub:a/b"))


def test_optional_packages_are_imported_in_one_place_each() -> None:
    package = Path(files.__file__).parents[1]
    sources = {str(p.relative_to(package)): p.read_text(encoding="utf-8") for p in package.rglob("*.py")}
    for name, place in (("pyarrow", "parquet"), ("zstandard", "zstd"), ("datasets", "hub")):
        found = {
            path for path, text in sources.items() if re.search(rf"^\s*(import|from) {name}\b", text, re.MULTILINE)
        }
        assert found == {f"data/{place}.py"}
