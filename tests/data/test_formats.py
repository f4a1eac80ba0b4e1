"""Each format, with the canonical record that it must become written out by hand."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from polm.data.formats import FORMATS, build_records, detect_format, detect_row, open_source
from polm.data.readers import write_jsonl
from polm.data.records import (
    Conversation,
    Document,
    Feedback,
    Preference,
    Prompt,
    Record,
    Stepwise,
    build_row,
)
from polm.errors import DataError
from polm.recipe_data import FilesData

REAL_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def human(text: str) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
SUM = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
SPOKEN = Conversation(
    [user("1+2?"), bot("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, bot("3.")], tools=[WRAPPED]
)

# (format, row, record)
CASES: list[tuple[str, dict[str, Any], Record]] = [
    ("messages", {"messages": [user("q"), bot("a")]}, Conversation([user("q"), bot("a")])),
    (
        "messages",
        {
            "messages": [user("q"), bot("a", weight=0), user("r"), bot("b", weight=0.5, token_weights=[1, 0])],
            "weight": 2,
        },
        Conversation([user("q"), bot("a"), user("r"), bot("b")], (0.0, 0.0, 0.0, 1.0), {3: (1.0, 0.0)}),
    ),
    (
        "messages",
        {"messages": [{"role": "developer", "content": "d"}, user("q"), bot("a", token_weights=[0.5])], "system": "s"},
        Conversation([system("s"), {"role": "developer", "content": "d"}, user("q"), bot("a")], (), {3: (0.5,)}),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                bot("c"),
            ]
        },
        Conversation([user("ab"), bot("c")]),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "b"}]},
                bot("c"),
            ],
            "images": ["a.jpg"],
        },
        Conversation([user("b"), bot("c")], media=("images: a.jpg", "image_url")),
    ),
    (
        "messages",  # OpenAI's calls: arguments are JSON in a string, content is null
        {
            "messages": [
                user("1+2?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "3"},
                bot("3."),
            ],
            "tools": [WRAPPED],
        },
        Conversation(
            [
                user("1+2?"),
                bot("", tool_calls=[{"id": "c1", **CALL}]),
                {"role": "tool", "content": "3", "tool_call_id": "c1"},
                bot("3."),
            ],
            tools=[WRAPPED],
        ),
    ),
    (
        "messages",  # the older form of calls
        {
            "messages": [
                user("1+2?"),
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "add", "arguments": '{"a": 1, "b": [2]}'},
                },
                {"role": "function", "name": "add", "content": "3"},
                bot("3."),
            ]
        },
        Conversation(
            [
                user("1+2?"),
                bot("", tool_calls=[CALL]),
                {"role": "tool", "content": "3", "name": "add"},
                bot("3."),
            ]
        ),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "s"}, human("q"), gpt("a")]},
        Conversation([system("s"), user("q"), bot("a")]),
    ),
    (
        "sharegpt",  # as Glaive's files: calls and results as turns, tools as JSON in a string
        {
            "conversations": [
                human("1+2?"),
                {"from": "function_call", "value": SUM},
                {"from": "observation", "value": "3"},
                gpt("3."),
            ],
            "tools": json.dumps([TOOL]),
        },
        SPOKEN,
    ),
    (
        "sharegpt",
        {"conversations": [human("q"), {"from": "function_call", "value": f"[{SUM}, {SUM}]"}], "tools": "[]"},
        Conversation([user("q"), bot("", tool_calls=[CALL, CALL])]),
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, Conversation([user("q"), bot("a")])),
    (
        "alpaca",
        {"instruction": "q", "input": "i", "output": "a", "history": [["x", "y"]], "system": "s"},
        Conversation([system("s"), user("x"), bot("y"), user("q\ni"), bot("a")]),
    ),
    ("completion", {"prompt": "q", "completion": "a"}, Conversation([user("q"), bot("a")])),
    (
        "completion",
        {"prompt": [system("s"), user("q")], "completion": [bot("a")], "weight": 0.25},
        Conversation([system("s"), user("q"), bot("a")], (0.0, 0.0, 0.25)),
    ),
    ("text", {"text": "a\nb"}, Document("a\nb")),
    ("text", {"text": "a b", "weight": 0.5, "token_weights": [1, 0]}, Document("a b", 0.5, (1.0, 0.0))),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, Preference([user("q")], "a", "b")),
    (
        "preference",
        {"prompt": "q", "system": "s", "chosen": [bot("a")], "rejected": [bot("b")]},
        Preference([system("s"), user("q")], "a", "b"),
    ),
    (
        "preference",
        {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        Preference([user("q")], "a", "b"),
    ),
    (
        "preference",
        {"conversations": [human("q"), gpt("r"), human("s")], "chosen": gpt("a"), "rejected": gpt("b")},
        Preference([user("q"), bot("r"), user("s")], "a", "b"),
    ),
    (
        "preference",
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"},
        Preference([user("q\ni")], "a", "b"),
    ),
    (
        "transcripts",
        {
            "chosen": "\n\nHuman: q\n\nmore\n\nAssistant: r\n\nHuman: s\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nmore\n\nAssistant: r\n\nHuman: s\n\nAssistant: b",
        },
        Preference([user("q\n\nmore"), bot("r"), user("s")], "a", "b"),
    ),
    ("feedback", {"prompt": "q", "completion": "a", "label": True}, Feedback([user("q")], "a", True)),
    ("feedback", {"prompt": [user("q")], "completion": [bot("a")], "label": 0}, Feedback([user("q")], "a", False)),
    (
        "feedback",
        {"messages": [user("q"), bot("r"), user("s"), bot("a")], "label": False},
        Feedback([user("q"), bot("r"), user("s")], "a", False),
    ),
    (
        "stepwise",
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, 0.25]},
        Stepwise([user("q")], ("a", "b"), (1.0, 0.25)),
    ),
    (
        "prompts",
        {"prompt": "q", "answer": "3", "verifier": "number", "task": "t", "numbers": [1]},
        Prompt("q", "3", "number", "t", "", (1.0,)),
    ),
    ("prompts", {"prompt": [user("q")], "answer": 3}, Prompt("q", "3", "math")),
    ("prompts", {"prompt": "q", "answer": "Paris"}, Prompt("q", "Paris", "exact")),
    ("prompts", {"prompt": "q", "answer": "1+2=3\n#### 3"}, Prompt("q", "3", "math", "", "1+2=3\n#### 3")),
]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_a_row_becomes_its_record(name: str, row: dict[str, Any], expected: Record) -> None:
    assert detect_row(row) == name
    before = json.dumps(row)
    assert FORMATS[name].build("f:1", row) == expected
    assert json.dumps(row) == before  # the row is left as it was
    # Written as a line of a data set folder and read again it is the same record, but for media, which no line keeps.
    again = json.loads(json.dumps(build_row(expected)))
    found = detect_row(again)
    assert found is not None
    assert FORMATS[found].kind is type(expected)
    if not getattr(expected, "media", ()):
        assert FORMATS[found].build("f:1", again) == expected


def test_every_format_has_a_case_and_its_example_is_of_it() -> None:
    assert {name for name, _, _ in CASES} == set(FORMATS)
    for name, format in FORMATS.items():
        row = json.loads(format.example)
        assert detect_row(row) == name
        assert isinstance(format.build("f:1", row), format.kind)
        assert row.keys() <= format.columns


WRONG = [
    ("messages", {"messages": "hi"}, "messages: not valid JSON"),
    ("messages", {"messages": {"role": "user"}}, "messages must be a list, found an object"),
    (
        "messages",
        {"messages": [user("q"), bot("a", weight=-1)]},
        r"messages\[1\]: weight must be a number of at least 0",
    ),
    ("messages", {"messages": [user("q"), bot("a", weight=True)]}, r"found True"),
    ("messages", {"messages": [{**user("q"), "weight": 1}, bot("a")]}, r"messages\[0\] has the role user and a weight"),
    ("messages", {"messages": [user("q"), bot("a", token_weights=[1, "x"])]}, r"token_weights\[1\]"),
    ("messages", {"messages": [user("q"), bot("a", token_weights=3)]}, "must be a list with a number for each token"),
    ("messages", {"messages": [user("q"), bot("a")], "weight": float("nan")}, "weight must be a number"),
    ("messages", {"messages": [user("q"), {"role": "assistant", "content": None}]}, "has null as its content"),
    ("messages", {"messages": [{**user("q"), "tool_calls": [CALL]}, bot("a")]}, "only the assistant calls tools"),
    ("messages", {"messages": [user("q"), bot("", tool_calls=[{"name": 3}])]}, 'call 0 needs {"name"'),
    ("messages", {"messages": [user("q"), bot("", tool_calls="x")]}, "tool_calls must be a list"),
    (
        "messages",
        {"messages": [user("q"), bot("", tool_calls=[{"name": "f", "arguments": "{"}])]},
        r"messages\[1\]: arguments of f: not valid JSON",
    ),
    ("messages", {"messages": [user("q"), bot("", tool_calls=[{"name": "f", "arguments": 3}])]}, "must be an object"),
    ("messages", {"messages": [user("q"), bot("a")], "tools": [{"x": 1}]}, r"tools\[0\] needs a name"),
    ("messages", {"messages": [user("q"), bot("a")], "tools": {}}, "tools must be a list"),
    ("sharegpt", {"conversations": [human("q"), {"from": "function_call", "value": "add(1)"}]}, "not valid JSON"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, r"history\[0\] must be a \[question, reply\]"),
    ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "input must be a string, found a number"),
    ("text", {"text": ["a"]}, "text must be a string, found a list"),
    ("text", {"text": "a", "weight": "heavy"}, "weight: not valid JSON"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "rejected must be a list of messages"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": None}, "no column rejected; found prompt, chosen"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "tools": ["x"]}, "column tools is not supported"),
    ("transcripts", {"chosen": "a", "rejected": "b"}, 'does not begin with "Human:"'),
    ("feedback", {"prompt": "q", "completion": "a", "label": "good"}, "label must be true or false, found 'good'"),
    ("feedback", {"messages": [user("q")], "label": True}, "must be the assistant's text after a prompt; found user"),
    ("stepwise", {"prompt": "q", "completions": ["a"], "labels": []}, "1 completions and 0 labels"),
    ("stepwise", {"prompt": "q", "completions": [], "labels": []}, "at least one"),
    ("stepwise", {"prompt": "q", "completions": ["a"], "labels": [-1]}, r"labels\[0\] must be true, false or a number"),
    ("prompts", {"prompt": [user("a"), bot("b")], "answer": "3"}, "a string or one user message, found 2"),
    ("prompts", {"prompt": "q", "answer": "3", "numbers": 3}, "numbers must be a list of numbers"),
]


@pytest.mark.parametrize(("name", "row", "message"), WRONG)
def test_mistakes_name_the_place_and_the_field(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"^mine\.jsonl:7: .*" + message):
        FORMATS[name].build("mine.jsonl:7", row)


# ---- detection -----------------------------------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> str:
    write_jsonl(path, rows)
    return str(path)


def read(source: str, **options: Any) -> tuple[list[Record], Counter[str]]:
    ledger: Counter[str] = Counter()
    detection, rows = open_source(source, **options)
    return list(build_records(detection.format, rows, ledger)), ledger


def test_detection_says_what_it_saw(tmp_path: Path) -> None:
    detection, _ = open_source(write(tmp_path / "a.jsonl", *[{"instruction": "q", "output": "a", "id": 3}] * 70))
    assert detection.format.name == "alpaca"
    assert detection.evidence == (
        "each of the first 64 rows has instruction, output; instruction (a string), output (a string), id (a number)"
    )


def test_columns_that_are_not_read_are_counted(tmp_path: Path) -> None:
    records, ledger = read(write(tmp_path / "a.jsonl", {"text": "a", "url": "u"}, {"text": "b", "url": "u", "n": 1}))
    assert records == [Document("a"), Document("b")]
    assert ledger == {"columns_ignored/url": 2, "columns_ignored/n": 1}
    messages = [user("q"), bot("a", thinking="hm", weight=1), bot("b", thinking="hm")]
    _, ledger = read(write(tmp_path / "b.jsonl", {"messages": messages}))
    assert ledger == {"columns_ignored/messages[].thinking": 1}
    _, ledger = read(write(tmp_path / "c.jsonl", {"messages": messages, "label": True}))  # pairs and labels: no weights
    assert ledger == {"columns_ignored/messages[].thinking": 1, "columns_ignored/messages[].weight": 1}


def test_an_unknown_layout_names_the_columns_the_cure_and_every_format(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(write(tmp_path / "a.jsonl", {"question": "q", "response": "a"}))
    message = str(caught.value)
    assert "a.jsonl:1: the columns question, response fit no known format" in message
    assert "columns: {prompt: question, completion: response}" in message
    assert all(f"{name}: {format.example}" in message for name, format in FORMATS.items())


def test_names_of_columns_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    for row in ({"\x1b[2J": 1}, {"messages": [{"\x1b[2J": 1}]}, {"prompt": "q", "completion": "a", "\x1b[2J": 1}):
        with pytest.raises(DataError) as caught:
            read(write(tmp_path / "a.jsonl", row), columns={"chosen": "x"} if "prompt" in row else {})
        assert "\x1b" not in str(caught.value)
        assert "'\\x1b[2J'" in str(caught.value)


def test_a_mixed_file_is_refused_with_the_first_of_each(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"prompt": "q", "completion": "a"})
    with pytest.raises(DataError, match=r"the first 3 rows have 2 formats: text \(2 rows, first .*a\.jsonl:1\), compl"):
        open_source(path)
    with pytest.raises(DataError, match=r"a\.jsonl:3: no column text; found prompt, completion"):
        read(path, format="text")
    with pytest.raises(DataError, match=r"unknown format 'chatml'; there are messages, sharegpt"):
        read(path, format="chatml")
    with pytest.raises(DataError, match="no row to tell a format from"):
        detect_format([])


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "final": "7", "answer": "long"})
    assert read(path, columns={"prompt": "question", "answer": "final"})[0] == [Prompt("q", "7", "math")]
    talk = {"dialog": [{"speaker": "user", "said": "q"}, {"speaker": "assistant", "said": "a", "weight": 0.5}]}
    columns = {"messages": "dialog", "role": "speaker", "content": "said"}
    assert read(write(tmp_path / "b.jsonl", talk), columns=columns)[0] == [
        Conversation([user("q"), bot("a")], (0.0, 0.5))
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:1: columns says text: body, and there is no column body; found que"):
        read(path, columns={"text": "body"})


def test_cells_of_a_csv_hold_lists_as_json(tmp_path: Path) -> None:
    def save(name: str, row: dict[str, str]) -> str:
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
        return str(tmp_path / name)

    chat = {"messages": json.dumps([user("q"), bot("a")]), "tools": json.dumps([TOOL]), "weight": "0.5"}
    assert read(save("a.csv", chat))[0] == [Conversation([user("q"), bot("a")], (0.0, 0.5), tools=[WRAPPED])]
    steps = {"prompt": "q", "completions": '["a", "b"]', "labels": "[true, false]"}
    assert read(save("b.csv", steps))[0] == [Stepwise([user("q")], ("a", "b"), (1.0, 0.0))]
    feedback = {"prompt": "[1]", "completion": "a", "label": "False"}
    assert read(save("c.csv", feedback))[0] == [Feedback([user("[1]")], "a", False)]
    alpaca = {"instruction": "q", "input": "", "output": "a", "history": "", "system": ""}
    assert read(save("d.csv", alpaca))[0] == [Conversation([user("q"), bot("a")])]
    assert read(save("e.csv", {"prompt": "q", "answer": "3", "numbers": ""}))[0] == [Prompt("q", "3", "math")]


# ---- published files -----------------------------------------------------------------------------------------------

PUBLISHED = {
    "demo_formats/alpaca_en_demo.json": ("alpaca", 999),
    "demo_formats/alpaca_zh_demo.json": ("alpaca", 1000),
    "demo_formats/dpo_en_demo.json": ("preference", 300),
    "demo_formats/glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "demo_formats/identity.json": ("alpaca", 91),
    "demo_formats/kto_en_demo.json": ("feedback", 300),
    "demo_formats/mllm_demo.json": ("messages", 6),
    "hh_rlhf/harmless-base-test.jsonl.gz": ("transcripts", 2312),
    "text/c4_demo.jsonl": ("text", 300),
    "text/tinyshakespeare.txt": ("text", 7222),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_load(name: str) -> None:
    if not (REAL_DATA / name).exists():
        pytest.skip("the published data files are not beside the project (../shared/data)")
    format, count = PUBLISHED[name]
    detection, rows = open_source(str(REAL_DATA / name))
    records = list(build_records(detection.format, rows, Counter()))
    assert (detection.format.name, len(records)) == (format, count)
    if "glaive" in name:
        chats = [record for record in records if isinstance(record, Conversation)]
        calls = [call for chat in chats for message in chat.messages for call in message.get("tool_calls", ())]
        assert len(calls) == sum(m["role"] == "tool" for chat in chats for m in chat.messages) == 211
        assert calls[0]["function"]["arguments"] == {"ingredients": ["chicken", "bell peppers", "rice"]}
        assert sum(bool(chat.tools) for chat in chats) == 191
    if "mllm" in name:
        assert all(isinstance(record, Conversation) and record.media for record in records)


def test_all_of_the_demo_formats_are_in_the_list() -> None:
    if not (REAL_DATA / "demo_formats").exists():
        pytest.skip("the published data files are not beside the project (../shared/data)")
    found = {f"demo_formats/{p.name}" for p in (REAL_DATA / "demo_formats").iterdir()}
    assert found == {name for name in PUBLISHED if name.startswith("demo_formats/")}


# ---- the document --------------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_examples_of_the_document_hold() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`.*\| (\w+) \|$", DOCUMENT, re.MULTILINE)
    kinds = {"conversation": Conversation, "document": Document, "pair": Preference, "feedback": Feedback}
    kinds |= {"steps": Stepwise, "question": Prompt}
    assert [name for name, _, _ in rows] == list(FORMATS)
    for name, example, kind in rows:
        row = json.loads(example)
        assert detect_row(row) == name
        assert isinstance(FORMATS[name].build("docs/data.md", row), kinds[kind])
    section = DOCUMENT[DOCUMENT.index("    data:\n") :].split("\n\n")[0]
    FilesData.model_validate(yaml.safe_load(section)["data"])
