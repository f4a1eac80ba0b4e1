from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from polm.data.files import read_jsonl, read_rows
from polm.data.normalise import require_columns
from polm.data.readers import (
    read_back,
    read_conversations,
    read_documents,
    read_preferences,
    read_prompts,
    write_jsonl,
)
from polm.data.records import Conversation, Preference, Prompt
from polm.errors import DataError, StoreError

REAL_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_jsonl_gives_line_numbers_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": 2}', encoding="utf-8")
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert read_documents(path) == ["one", "two"]


def test_damaged_gzip_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n' * 100)[:-12])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: damaged gzip"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.jsonl holds no rows"),
        (b"\n\n", r"bad\.jsonl holds no rows"),
        (b'{"a": 1}\n{"a": }\n', r"bad\.jsonl:2: not valid JSON: Expecting value at column 7"),
        (b'{"a": 1}\n[1]\n', r"bad\.jsonl:2: expected a JSON object \{\.\.\.\}, found a list"),
        (b"null\n", r"bad\.jsonl:1: .* found null"),
        (b'{"a": "\xff"}\n', r"bad\.jsonl:1: not UTF-8"),
        (b"[" * 100_000 + b"\n", r"bad\.jsonl:1: "),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_jsonl(path))


def test_missing_file_folder_and_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        list(read_jsonl(tmp_path / "folder.jsonl"))
    with pytest.raises(DataError, match=r"unknown ending; expected one of \.json"):
        read_rows(tmp_path / "a.xml")


def test_json_list_and_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n {"a": 2}]')
    assert list(read_rows(path)) == [(1, {"a": 1}), (2, {"a": 2})]
    path.write_text('[{"a": 1}, 7]')
    with pytest.raises(DataError, match=r"a\.json:2: .*found a number"):
        list(read_rows(path))
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a list of JSON objects, found an object"):
        list(read_rows(path))
    path.write_text('[{"a": 1},\n{"b" 2}]')
    with pytest.raises(DataError, match="at line 2, column 6"):
        list(read_rows(path))


def test_text_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\nfirst\nsame\n\n\n  \nsecond\n")
    assert list(read_rows(path)) == [(2, {"text": "first\nsame"}), (7, {"text": "second"})]


def test_require_columns_names_what_was_found() -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:4: no column text; found body, id\. Formats for this use: F\."):
        require_columns("x.jsonl:4", {"body": 1, "id": 2}, ["text"], "F")


def test_conversation_layouts_agree(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"messages": [user("hi"), assistant("yo")]},
        {"prompt": "hi", "completion": "yo"},
        {"instruction": "hi", "input": "", "output": "yo"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    )
    assert read_conversations(path) == [Conversation([user("hi"), assistant("yo")])] * 4


def test_alpaca_input_history_and_system(tmp_path: Path) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "history": [["q", "r"]], "system": "be short"}
    assert read_conversations(write(tmp_path / "a.jsonl", row)) == [
        Conversation(
            [{"role": "system", "content": "be short"}, user("q"), assistant("r"), user("add\n1 2"), assistant("3")]
        )
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"no column prompt, completion; found text\. Formats for this use: \{\"messages\""),
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\] has the role 'bot'; allowed: system"),
        ({"messages": [{"role": "user", "content": [1]}]}, "has a list as its content"),
        ({"messages": [{"who": "user"}]}, "needs role and content .* found who"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"has the role \['user'\]"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "has the role 'narrator'"),
        ({"messages": [{"role": "user", "content": "x"}], "images": ["a.jpg"]}, "no assistant message"),
        ({"prompt": 3, "completion": "x"}, "prompt must be a string, found a number"),
    ],
)
def test_conversation_mistakes(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"}, row)
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*" + message):
        read_conversations(path)


def test_preference_layouts_agree(tmp_path: Path) -> None:
    begin = [user("hi"), assistant("yo"), user("more")]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": begin, "chosen": "good", "rejected": "bad"},
        {"chosen": [*begin, assistant("good")], "rejected": [*begin, assistant("bad")]},
        {"prompt": begin, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": begin, "chosen": [*begin, assistant("good")], "rejected": [*begin, assistant("bad")]},
        {
            "conversations": [{"from": m["role"], "value": m["content"]} for m in begin],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: more\n\nAssistant: good",
            "rejected": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: more\n\nAssistant: bad",
        },
    )
    assert read_preferences(path) == [Preference(begin, "good", "bad")] * 6


def test_preference_string_prompt_and_transcript_paragraphs(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "hi", "chosen": "good", "rejected": ""},
        {
            "chosen": "\n\nHuman: a\n\nb: c\n\nAssistant: d\n\ne\n\nAssistant: f",
            "rejected": "\n\nHuman: a\n\nb: c\n\nAssistant:",
        },
        {"chosen": [user("q"), assistant("same")], "rejected": [user("q"), assistant("same")]},
    )
    assert read_preferences(path) == [
        Preference([user("hi")], "good", ""),
        Preference([user("a\n\nb: c")], "d\n\ne\n\nf", ""),
        Preference([user("q")], "same", "same"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "no column rejected; found prompt, chosen"),
        ({"chosen": "c", "rejected": "r"}, "chosen is a string without a prompt"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            r"exactly one assistant message .* found 2 \(user, assistant\)",
        ),
        ({"chosen": [assistant("b")], "rejected": [assistant("d")]}, "no common beginning"),
    ],
)
def test_preference_mistakes(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*" + message):
        read_preferences(write(tmp_path / "a.jsonl", row))


def test_prompts(tmp_path: Path) -> None:
    row = {"prompt": "N0 and N1 ?", "answer": "3", "verifier": "expression", "task": "add", "numbers": [1, 2.0]}
    path = write(tmp_path / "a.jsonl", row, {"prompt": "p", "answer": "a", "verifier": "exact"})
    assert read_prompts(path) == [
        Prompt("N0 and N1 ?", "3", "expression", "add", "", (1.0, 2.0)),
        Prompt("p", "a", "exact"),
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:1: numbers must be a list of numbers, found \[True\]"):
        read_prompts(write(tmp_path / "a.jsonl", {**row, "numbers": [True]}))
    with pytest.raises(DataError, match="answer must be a string, found a list"):
        read_prompts(write(tmp_path / "a.jsonl", {**row, "answer": [3]}))


def test_write_then_read_is_the_same(tmp_path: Path) -> None:
    rows = [{"text": "größe \u2028 x"}, {"text": 'a "b"\n'}]
    path = tmp_path / "deep" / "a.jsonl"
    assert write_jsonl(path, rows) == 2
    assert [row for _, row in read_jsonl(path)] == rows
    assert [entry.name for entry in path.parent.iterdir()] == ["a.jsonl"]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    """The characters at which str.splitlines cuts, each inside a text."""
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"a{cut}b"} for cut in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"]
    write_jsonl(path, rows)
    assert len(path.read_text(encoding="utf-8").splitlines()) > len(rows)
    assert list(read_back(path, ["text"])) == rows
    write_jsonl(path, [])
    assert list(read_back(path, ["text"])) == []


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        ('{"text": "a', r"not valid JSON: Unterminated string.* at column 10"),
        ("[1]\n", r"expected a JSON object \{\.\.\.\}, found a list"),
        ('{"texts": "a"}\n', r"no text, found texts"),
    ],
)
def test_a_damaged_file_is_not_read_back(tmp_path: Path, last: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + last)
    with pytest.raises(StoreError, match=rf"a\.jsonl:2: {problem}: the file is damaged .*remove it and run the same"):
        list(read_back(path, ["text"]))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": 1}])

    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("polm.data.readers.os.fsync", fail)
    with pytest.raises(StoreError, match=r"a\.jsonl was not written: no space is left on the disk"):
        write_jsonl(path, [{"a": 2}])
    assert path.read_text() == '{"a": 1}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full to write to")
def test_a_really_full_device_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: real(Path("/dev/full") if "tmp" in self.suffix else self, *a, **k)
    )
    with pytest.raises(StoreError, match="no space is left"):
        write_jsonl(path, [{"a": 1}])
    assert not path.exists()


def test_an_unwritable_place_and_an_unwritable_row(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="was not written"):
        write_jsonl(tmp_path / "file" / "a.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: this row cannot be written as JSON"):
        write_jsonl(tmp_path / "b.jsonl", [{"a": 1}, {"a": float("nan")}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: this row cannot be written as JSON"):
        write_jsonl(tmp_path / "b.jsonl", [{"a": "\ud800"}])
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_real_files_are_read() -> None:
    if not REAL_DATA.exists():
        pytest.skip("the real data files are not beside the project (../shared/data)")
    preferences = read_preferences(REAL_DATA / "hh_rlhf" / "harmless-base-test.jsonl.gz")
    assert len(preferences) == 2312
    assert all(preference.prompt[-1]["role"] == "user" for preference in preferences)
    assert sum(preference.chosen == preference.rejected for preference in preferences) < 10
    demos = REAL_DATA / "demo_formats"
    assert len(read_conversations(demos / "alpaca_en_demo.json")) > 90
    assert len(read_preferences(demos / "dpo_en_demo.json")) == 300
    assert len(read_documents(REAL_DATA / "text" / "c4_demo.jsonl")) == 300
    assert len(read_documents(REAL_DATA / "text" / "tinyshakespeare.txt")) > 1000
    with pytest.raises(DataError, match=r"mllm_demo\.json:1: the record refers to images: mllm_demo_data/1\.jpg"):
        read_conversations(demos / "mllm_demo.json")
    assert len(read_conversations(demos / "glaive_toolcall_en_demo.json")) == 300
