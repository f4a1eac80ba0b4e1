"""What stands in a record beside its text is used, carried on, counted or refused; it is never lost without a word."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polm.data.build import build_files_dataset
from polm.data.formats import FORMATS, build_records, detect_row, open_source
from polm.data.inspection import inspect_source
from polm.data.readers import (
    is_feedback,
    iterate_feedback,
    iterate_preferences,
    read_any_prompts,
    read_conversations,
    read_preferences,
    read_prompt_messages,
    read_prompts,
    read_stepwise,
    write_jsonl,
)
from polm.data.records import Conversation, Feedback, Preference, Prompt, Record, Stepwise
from polm.errors import BadRecordError, DataError, MediaError
from polm.recipe_data import FilesData, FileSource, MixedSource

USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
SEEN = {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "x"}}]}
DRAWN = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "x"}]}

PAIR: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": "b"}
JUDGED: dict[str, Any] = {"prompt": "q", "completion": "a", "label": True}
STEPS: dict[str, Any] = {"prompt": "q", "completions": ["a"], "labels": [True]}
QUESTION: dict[str, Any] = {"prompt": "q", "answer": "3", "verifier": "math"}
TRANSCRIPTS = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
ROLES: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "preferences": (PAIR, read_preferences),
    "feedback": (JUDGED, lambda path: list(iterate_feedback(path))),
    "stepwise": (STEPS, read_stepwise),
    "prompts": (QUESTION, read_prompts),
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    write_jsonl(path, rows)
    return path


def read(source: Path, **options: Any) -> tuple[list[Record], Counter[str]]:
    ledger: Counter[str] = Counter()
    detection, rows = open_source(str(source), **options)
    return list(build_records(detection.format, rows, ledger)), ledger


def convert(path: Path, role: str, **more: Any) -> tuple[list[Any], dict[str, int]]:
    """The lines that `polm data` writes from a file, and its ledger."""
    settings = FilesData(source="files", **{role: (MixedSource(path=str(path)),)}, **more)  # type: ignore[arg-type]
    ledger = build_files_dataset(settings, path.parent / "out")["ledger"]
    return [json.loads(line) for line in (path.parent / "out" / f"{role}.jsonl").read_text().splitlines()], ledger


def save_csv(path: Path, row: dict[str, Any]) -> Path:
    """One row; what is no string is written as JSON."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return path


# ---- media -----------------------------------------------------------------------------------------------------------

MEDIA = [
    ("preferences", {**PAIR, "image": "a.png"}, "image: a.png"),
    ("preferences", {**PAIR, "images": ["a.png"]}, "images: a.png"),
    ("preferences", {**PAIR, "prompt": [SEEN]}, "image_url"),
    ("preferences", {**PAIR, "chosen": [DRAWN]}, "image"),
    ("preferences", {"chosen": [SEEN, BOT], "rejected": [SEEN, OTHER]}, "image_url"),
    ("preferences", {"messages": [SEEN], "chosen": BOT, "rejected": DRAWN}, "image_url"),
    ("preferences", {**TRANSCRIPTS, "video": "a.mp4"}, "video: a.mp4"),
    ("feedback", {**JUDGED, "image": "a.png"}, "image: a.png"),
    ("feedback", {"messages": [SEEN, BOT], "label": True}, "image_url"),
    ("feedback", {"messages": json.dumps([SEEN, BOT]), "label": True}, "image_url"),
    ("feedback", {**JUDGED, "completion": [DRAWN]}, "image"),
    ("stepwise", {**STEPS, "video": "a.mp4"}, "video: a.mp4"),
    ("stepwise", {**STEPS, "prompt": [SEEN]}, "image_url"),
    ("prompts", {**QUESTION, "audio": "a.wav"}, "audio: a.wav"),
    ("prompts", {**QUESTION, "prompt": [SEEN]}, "image_url"),
]


@pytest.mark.parametrize(("role", "row", "what"), MEDIA)
def test_media_stop_the_conversion_or_are_left_out_and_counted(
    tmp_path: Path, role: str, row: dict[str, Any], what: str
) -> None:
    good, _ = ROLES[role]
    path = write(tmp_path / "a.jsonl", *[good] * ("chosen" not in row or "prompt" in row), row)
    if path.read_text().count("\n") == 1:  # a pair without a prompt is a format of its own: another good one beside it
        more = TRANSCRIPTS if detect_row(row) == "transcripts" else {"chosen": [USER, BOT], "rejected": [USER, OTHER]}
        write(path, more, row)
    with pytest.raises(MediaError, match=rf"data\.{role}: record 2 of .*a\.jsonl refers to {what}.*data\.media=drop"):
        convert(path, role)
    rows, ledger = convert(path, role, media="drop")
    assert len(rows) == 1
    counted = {name.partition("/")[2]: count for name, count in ledger.items()}
    assert counted == {"read": 2, "media_dropped": 1, "kept": 1}
    assert inspect_source(str(path)).counts["records with media"] == 1


@pytest.mark.parametrize(("role", "row", "what"), MEDIA)
def test_a_stage_that_reads_a_folder_refuses_media(tmp_path: Path, role: str, row: dict[str, Any], what: str) -> None:
    path = write(tmp_path / "a.jsonl", ROLES[role][0], row)
    with pytest.raises(MediaError, match=rf"a\.jsonl:2: the record refers to {what}"):
        ROLES[role][1](path)


def test_media_of_prompts_without_answers_and_of_conversations(tmp_path: Path) -> None:
    for row in ({"prompt": [SEEN]}, {"prompt": "q", "image": "a.png"}):
        path = write(tmp_path / "a.jsonl", row)
        for reader in (read_prompt_messages, read_any_prompts, lambda p: read_prompts(p, judged=False)):
            with pytest.raises(MediaError, match=r"a\.jsonl:1: the record refers to image"):
                reader(path)
    with pytest.raises(MediaError, match=r"a\.jsonl:1: the record refers to image_url"):
        read_conversations(write(tmp_path / "a.jsonl", {"messages": [SEEN, BOT]}))
    shared = {"conversations": [{"from": "human", "value": SEEN["content"]}, {"from": "gpt", "value": "a"}]}
    with pytest.raises(MediaError, match=r"a\.jsonl:1: the record refers to image_url"):
        read_conversations(write(tmp_path / "a.jsonl", shared))


def test_pairs_with_media_go_the_way_of_bad_records(tmp_path: Path) -> None:
    found: list[BadRecordError] = []
    path = write(tmp_path / "a.jsonl", PAIR, {**PAIR, "image": "a.png"})
    assert len(list(iterate_preferences(path, found.append))) == 1
    assert [error.reason for error in found] == ["media"]


def test_no_media_are_meant_by_empty_columns_and_benchmarks_may_have_some(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**PAIR, "image": None, "images": [], "video": "", "audios": "[]"})
    assert read_preferences(path) == [Preference([USER], "a", "b")]
    assert convert(path, "preferences")[1] == {"preferences/read": 1, "preferences/kept": 1}
    exam = FileSource(path=str(write(tmp_path / "exam.jsonl", {**QUESTION, "prompt": "a b c", "image": "a.png"})))
    pairs = write(tmp_path / "b.jsonl", PAIR, {**PAIR, "prompt": "a b c"})
    assert convert(pairs, "preferences", decontaminate={"exam": exam})[1]["preferences/contaminated/exam"] == 1


# ---- cells of a CSV --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [SYSTEM, USER], "completion": [BOT]}, Conversation([SYSTEM, USER, BOT])),
        ({"prompt": [USER], "completion": "a"}, Conversation([USER, BOT])),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]}, Preference([USER], "a", "b")),
        ({"prompt": "q", "chosen": BOT, "rejected": OTHER}, Preference([USER], "a", "b")),
        ({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, Preference([USER], "a", "b")),
        ({"prompt": [USER], "completion": [BOT], "label": "1"}, Feedback([USER], "a", True)),
        ({"prompt": [USER], "completions": ["a"], "labels": [True]}, Stepwise([USER], ("a",), (1.0,))),
        ({"prompt": [{"from": "human", "value": "q"}], "answer": "3"}, Prompt("q", "3", "math")),
    ],
)
def test_messages_in_the_cells_of_a_csv(tmp_path: Path, row: dict[str, Any], expected: Record) -> None:
    assert read(save_csv(tmp_path / "a.csv", row))[0] == [expected]


@pytest.mark.parametrize("prompt", ["[1]", "[]", '[{"role": "admin"}]', '{"role": "user", "content": "q"}', "[{"])
def test_other_json_in_a_cell_is_text(tmp_path: Path, prompt: str) -> None:
    (record,) = read(save_csv(tmp_path / "a.csv", {"prompt": prompt, "completion": "a"}))[0]
    assert record == Conversation([{"role": "user", "content": prompt}, BOT])
    assert type(record.messages[0]["content"]) is str
    as_text = {"prompt": json.dumps([USER]), "completion": "a"}  # where a list could have been written, text is text
    assert read_conversations(write(tmp_path / "a.jsonl", as_text))[0].messages[0]["content"] == as_text["prompt"]


def test_cells_with_other_names_and_with_media(tmp_path: Path) -> None:
    talk = [{"speaker": "user", "said": "q"}]
    path = save_csv(tmp_path / "a.csv", {"question": talk, "completion": "a"})
    columns = {"prompt": "question", "role": "speaker", "content": "said"}
    assert read(path, columns=columns)[0] == [Conversation([USER, BOT])]
    path = save_csv(tmp_path / "b.csv", {"prompt": [SEEN], "chosen": "a", "rejected": "b"})
    with pytest.raises(MediaError, match=r"b\.csv:2: the record refers to image_url"):
        read_preferences(path)
    assert read(save_csv(tmp_path / "c.csv", {"prompt": [{**USER, "id": 1}], "completion": "a"}))[1] == {
        "columns_ignored/prompt[].id": 1
    }
    assert "completion (a string)" in open_source(str(tmp_path / "c.csv"))[0].evidence


# ---- system prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
        TRANSCRIPTS,
        {"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, OTHER]},
        {"prompt": "q", "chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, OTHER]},
        {"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"},
    ],
)
def test_the_system_prompt_of_a_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", {**row, "system": "s"})
    assert read_preferences(path) == [Preference([SYSTEM, USER], "a", "b")]
    assert read(path) == ([Preference([SYSTEM, USER], "a", "b")], {})


def test_the_system_prompt_of_both_sides(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, OTHER]}
    assert read_preferences(write(tmp_path / "a.jsonl", row)) == [Preference([SYSTEM, USER], "a", "b")]
    with pytest.raises(DataError, match="system says 't' and the first message 's'"):
        read_preferences(write(tmp_path / "a.jsonl", {**row, "system": "t"}))
    with pytest.raises(DataError, match="chosen must end in exactly one assistant message"):
        read_preferences(write(tmp_path / "a.jsonl", {**row, "rejected": [USER, OTHER]}))


def test_a_pair_without_a_prompt_is_not_given_one_by_its_system_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"chosen": [BOT], "rejected": [OTHER], "system": "s"})
    with pytest.raises(DataError, match="no common beginning"):
        read_preferences(path)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [SYSTEM, USER, BOT]}),
        ("feedback", {"messages": [SYSTEM, USER, BOT], "label": True}),
        ("preference", {"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"}),
        ("preference", {"chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, OTHER]}),
        ("stepwise", {**STEPS, "prompt": [SYSTEM, USER]}),
    ],
)
def test_two_system_prompts(name: str, row: dict[str, Any]) -> None:
    build = FORMATS[name].build
    assert build("f:1", {**row, "system": "s"}) == build("f:1", {**row, "system": ""}) == build("f:1", row)
    with pytest.raises(DataError, match=r"f:1: system says 't' and the first message 's'"):
        build("f:1", {**row, "system": "t"})
    with pytest.raises(DataError, match=r"f:1: system must be a string, found a list"):
        build("f:1", {**row, "system": ["s"]})


# ---- several columns that hold the prompt, and null ------------------------------------------------------------------


def test_pairs_whose_row_repeats_a_conversation_as_messages(tmp_path: Path) -> None:
    """The layout of ultrafeedback_binarized."""
    row = {"prompt": "q", "prompt_id": "7", "chosen": [USER, BOT], "rejected": [USER, OTHER], "messages": [USER, BOT]}
    path = write(tmp_path / "a.jsonl", {**row, "score_chosen": 8.0})
    rows, ledger = convert(path, "preferences")
    assert rows == [{"prompt": [USER], "chosen": "a", "rejected": "b"}]
    assert {name for name in ledger if "ignored" in name} == {
        "preferences/columns_ignored/prompt_id",
        "preferences/columns_ignored/score_chosen",
    }
    assert read_prompt_messages(path) == [[USER]]


def test_a_prompt_that_is_not_that_of_the_messages() -> None:
    build = FORMATS["preference"].build
    assert build("f:1", {**PAIR, "messages": [SYSTEM, USER]}) == Preference([SYSTEM, USER], "a", "b")
    assert build("f:1", {**PAIR, "prompt": "", "messages": [USER]}) == Preference([USER], "a", "b")
    for messages in ([{**USER, "content": "r"}], [USER, BOT, USER], [USER, BOT, USER, OTHER]):
        with pytest.raises(DataError, match=r"f:1: prompt and messages say different things"):
            build("f:1", {**PAIR, "messages": messages})


def test_an_implicit_prompt_is_cut_off_once(tmp_path: Path) -> None:
    row = {"chosen": [USER, USER, BOT], "rejected": [USER, OTHER]}
    with pytest.raises(DataError, match="chosen must end in exactly one assistant message"):
        read_preferences(write(tmp_path / "a.jsonl", row))


NULLS: list[tuple[dict[str, Any], Record]] = [
    ({**TRANSCRIPTS, "prompt": None, "messages": None}, Preference([USER], "a", "b")),
    ({**JUDGED, "messages": None, "conversations": None}, Feedback([USER], "a", True)),
    ({"messages": None, "conversations": [USER, BOT], "label": True}, Feedback([USER], "a", True)),
    ({"messages": None, "conversations": [USER, BOT]}, Conversation([USER, BOT])),
    ({"instruction": "q", "output": "a", "input": None, "history": None}, Conversation([USER, BOT])),
    ({**STEPS, "system": None, "tools": None}, Stepwise([USER], ("a",), (1.0,))),
    ({"prompt": "q", "answer": "3", "task": None, "solution": None, "verifier": None}, Prompt("q", "3", "math")),
]


@pytest.mark.parametrize(("row", "expected"), NULLS)
def test_null_is_absent(tmp_path: Path, row: dict[str, Any], expected: Record) -> None:
    assert read(write(tmp_path / "a.jsonl", row)) == ([expected], {})
    if isinstance(expected, Conversation):
        assert read_conversations(tmp_path / "a.jsonl") == [expected]


def test_null_does_not_say_what_a_file_is(tmp_path: Path) -> None:
    assert not is_feedback(write(tmp_path / "a.jsonl", {**PAIR, "label": None}))
    path = write(tmp_path / "b.jsonl", {"prompt": "q", "answer": None, "verifier": None})
    assert read_any_prompts(path) == [[USER]]
    assert read_prompts(path, judged=False) == [Prompt("q", "", "")]
    _, ledger = convert(write(tmp_path / "c.jsonl", {"prompt": "q", "answer": "3", "verifier": None}), "prompts")
    assert ledger["prompts/verifier_chosen"] == 1


# ---- columns -------------------------------------------------------------------------------------------------------


def test_columns_of_prompts_go_through_the_data_stage(tmp_path: Path) -> None:
    row = {"prompt": "q", "answer": "3", "verifier": "math", "level": 4, "tests": ["x"], "note": None}
    path = write(tmp_path / "a.jsonl", row)
    rows, ledger = convert(path, "prompts")
    assert rows == [row]
    assert ledger == {"prompts/read": 1, "prompts/kept": 1}
    (prompt,) = read_prompts(tmp_path / "out" / "prompts.jsonl")
    assert [prompt] == read_prompts(path)
    assert prompt.columns == {"level": 4, "tests": ["x"], "note": None}


def test_columns_of_prompts_that_are_counted(tmp_path: Path) -> None:
    """What would change the question, and what no line of JSON can hold."""
    line = json.dumps({**QUESTION, "system": "s", "tools": [{"name": "f"}], "score": float("nan"), "level": 4})
    (tmp_path / "a.jsonl").write_text(line + "\n")
    rows, ledger = convert(tmp_path / "a.jsonl", "prompts")
    assert rows == [{**QUESTION, "level": 4}]
    assert {name: count for name, count in ledger.items() if "ignored" in name} == {
        "prompts/columns_ignored/system": 1,
        "prompts/columns_ignored/tools": 1,
        "prompts/columns_ignored/score": 1,
    }


def test_a_question_beside_another_conversation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**QUESTION, "messages": [USER, BOT, USER, BOT], "level": 4})
    ((record,), ledger) = read(path, format="prompts")
    assert record == Prompt("q", "3", "math", columns={"level": 4})
    assert ledger == {"columns_ignored/messages": 1}


def test_alpaca_reads_its_tools(tmp_path: Path) -> None:
    tool = {"name": "add", "description": "adds", "parameters": {}}
    path = write(tmp_path / "a.jsonl", {"instruction": "q", "output": "a", "tools": [tool]})
    ((record,), ledger) = read(path)
    assert isinstance(record, Conversation)
    assert len(record.tools) == 1
    assert ledger == {}


@pytest.mark.parametrize("role", ["preferences", "feedback", "stepwise"])
def test_weights_that_no_loss_reads(tmp_path: Path, role: str) -> None:
    row, reader = ROLES[role]
    for name, value in (("weight", 0.5), ("weights", [1, 2])):
        path = write(tmp_path / "a.jsonl", row, {**row, name: value})
        with pytest.raises(DataError, match=rf"a\.jsonl:2: {name} is not read: only documents and conversations"):
            reader(path)
        _, ledger = convert(path, role)
        assert ledger[f"{role}/columns_ignored/{name}"] == 1
    path = write(tmp_path / "a.jsonl", {**row, "weight": 1, "weights": None})
    assert len(list(reader(path))) == 1
