"""From users' files to a data set folder, with the ledger counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polm.data.build import ROLES, build_files_dataset
from polm.data.readers import write_jsonl
from polm.errors import DataError
from polm.recipe_data import FilesData, FileSource, MixedSource

QUESTION = "how many eggs do sixteen ducks lay in a week if each lays two a day ?"


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def source(path: Path, rows: list[Any], **more: Any) -> MixedSource:
    write_jsonl(path, rows)
    return MixedSource(path=str(path), **more)


def chat(question: str, answer: str = "a") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def build(out: Path, **sections: Any) -> dict[str, Any]:
    return build_files_dataset(FilesData(source="files", **sections), out)


def test_every_role_is_written_in_canonical_form(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "pretrain": {"text": "a", "weight": 0.5},
        "midtrain": {"text": "b"},
        "sft": {"instruction": "q", "output": "a"},
        "preferences": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "feedback": {"messages": chat("q")["messages"], "label": True},
        "stepwise": {"prompt": "q", "completions": ["a"], "labels": [True]},
        "prompts": {"prompt": "q", "answer": "#### 3"},
    }
    prompt = [{"role": "user", "content": "q"}]
    expected: dict[str, dict[str, Any]] = {
        "pretrain": {"text": "a", "weight": 0.5},
        "midtrain": {"text": "b"},
        "sft": chat("q"),
        "preferences": {"prompt": prompt, "chosen": "a", "rejected": "b"},
        "feedback": {"prompt": prompt, "completion": "a", "label": True},
        "stepwise": {"prompt": prompt, "completions": ["a"], "labels": [1.0]},
        "prompts": {"prompt": "q", "answer": "3", "verifier": "math"},
    }
    assert set(rows) == set(ROLES)
    sections = {role: (source(tmp_path / f"{role}.jsonl", [row]),) for role, row in rows.items()}
    summary = build(tmp_path / "out", **sections)
    for role, row in expected.items():
        assert read(tmp_path / "out" / ROLES[role][0]) == [row], role
        assert summary["files"][ROLES[role][0]]["num_records"] == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*(file for file, _ in ROLES.values()), "summary.json"]
    )
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["ledger"]["prompts/verifier_chosen"] == 1


def test_duplicates_contamination_and_media_are_counted(tmp_path: Path) -> None:
    first = [
        chat("x"),
        chat(" x "),
        chat("so, " + QUESTION),
        {**chat("y"), "images": ["a.jpg"]},
        {**chat("z"), "id": 1},
    ]
    second = [chat("x"), chat("w", "what is 1 + 1 ?"), chat("v")]
    (tmp_path / "marks").mkdir()
    item = {"id": "1", "prompt": QUESTION, "answer": "224", "solution": "", "verifier": "number"}
    write_jsonl(tmp_path / "marks" / "ducks.jsonl", [item])
    write_jsonl(tmp_path / "sums.jsonl", [{"question": "What is 1 + 1?"}])
    sections: dict[str, Any] = {
        "sft": (source(tmp_path / "a.jsonl", first), source(tmp_path / "b.jsonl", second)),
        "benchmarks": tmp_path / "marks",
        "decontaminate": {"sums": FileSource(path=str(tmp_path / "sums.jsonl"), columns={"text": "question"})},
    }
    summary = build(tmp_path / "out", media="drop", **sections)
    assert [row["messages"][0]["content"] for row in read(tmp_path / "out" / "sft.jsonl")] == ["x", "z", "v"]
    assert summary["ledger"] == {
        "sft/read": 8,
        "sft/kept": 3,
        "sft/duplicates": 2,
        "sft/media_dropped": 1,
        "sft/contaminated": 2,
        "sft/contaminated/ducks": 1,
        "sft/contaminated/sums": 1,
        "sft/columns_ignored/id": 1,
    }
    assert summary["files"]["sft.jsonl"]["sources"] == [
        {"path": str(tmp_path / "a.jsonl"), "format": "messages", "num_kept": 2},
        {"path": str(tmp_path / "b.jsonl"), "format": "messages", "num_kept": 1},
    ]
    assert summary["files"]["benchmarks/ducks.jsonl"] == {"num_records": 1}
    assert read(tmp_path / "out" / "benchmarks" / "ducks.jsonl") == [item]
    kept = build(tmp_path / "all", media="drop", deduplicate=False, ngram=15, **sections)["ledger"]
    assert "sft/duplicates" not in kept
    assert kept["sft/contaminated/ducks"] == 1  # the question has sixteen words and signs: still found
    with pytest.raises(
        DataError, match=r"data\.sft: record 4 of .*a\.jsonl refers to images: a\.jpg.*data\.media=drop"
    ):
        build(tmp_path / "no", **sections)


def test_published_benchmarks_are_read_in_their_own_layout(tmp_path: Path) -> None:
    """SVAMP's question stands in two columns, and only both together are asked."""
    (tmp_path / "word_problems").mkdir()
    item = {
        "Body": "Ann has three pears",
        "Question": "How many pears does Ann have?",
        "Equation": "3.0",
        "Answer": 3.0,
    }
    write_jsonl(tmp_path / "word_problems" / "svamp.jsonl", [item])
    asked = "Ann has three pears. How many pears does Ann have?"
    rows = [chat(asked), chat("How many pears does Ann have?")]
    sections: dict[str, Any] = {"sft": (source(tmp_path / "a.jsonl", rows),)}
    published = FileSource(path=str(tmp_path), format="published")
    summary = build(tmp_path / "out", decontaminate={"svamp": published}, **sections)
    assert (summary["ledger"]["sft/contaminated/svamp"], summary["ledger"]["sft/kept"]) == (1, 1)
    with pytest.raises(DataError, match="unknown benchmark 'exam'; known are asdiv, gsm8k, math, mawps, svamp"):
        build(tmp_path / "no", decontaminate={"exam": published}, **sections)


@pytest.mark.parametrize("stop", ["first", "all"])
def test_a_mixture_is_counted(tmp_path: Path, stop: Any) -> None:
    small = source(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(4)], weight=1)
    large = source(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(30)], weight=2)
    summary = build(tmp_path / "out", midtrain=(small, large), stop=stop, seed=5)
    texts = [row["text"] for row in read(tmp_path / "out" / "midtrain.jsonl")]
    ledger = summary["ledger"]
    assert ledger["midtrain/mixed"] == len(texts) == summary["files"]["midtrain.jsonl"]["num_records"]
    assert ledger["midtrain/repeated"] if stop == "all" else "midtrain/repeated" not in ledger
    assert ledger["midtrain/left_over"] == 34 - len(set(texts))
    assert (len(set(texts)) == 34) == (stop == "all")
    again = build(tmp_path / "again", midtrain=(small, large), stop=stop, seed=5)
    assert again == summary
    assert (tmp_path / "again" / "midtrain.jsonl").read_bytes() == (tmp_path / "out" / "midtrain.jsonl").read_bytes()
    build(tmp_path / "other", midtrain=(small, large), stop=stop, seed=6)
    assert (tmp_path / "other" / "midtrain.jsonl").read_bytes() != (tmp_path / "out" / "midtrain.jsonl").read_bytes()


def test_mistakes_name_the_role_and_the_cure(tmp_path: Path) -> None:
    texts = source(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="names no file; give a list of sources for some of pretrain, midtrain, sft"):
        build(tmp_path / "out")
    with pytest.raises(
        DataError, match=r"data\.sft: .*a\.jsonl has the format text .*; sft takes messages, sharegpt, al"
    ):
        build(tmp_path / "out", sft=(texts,))
    half = (texts, MixedSource(path=texts.path, weight=1))
    with pytest.raises(DataError, match=r"data\.midtrain: 1 of 2 sources have a weight; give all or none"):
        build(tmp_path / "out", midtrain=half)
    with pytest.raises(DataError, match=r"data\.midtrain: no record of .*a\.jsonl is left; .*duplicates 1"):
        build(tmp_path / "out", midtrain=(texts, texts))
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        build(tmp_path / "out", midtrain=(MixedSource(path=str(tmp_path / "gone.jsonl")),))
    broken = source(tmp_path / "b.jsonl", [{"text": "a"}] * 70 + [{"body": "a"}])
    with pytest.raises(DataError, match=r"b\.jsonl:71: no column text; found body"):
        build(tmp_path / "out", midtrain=(broken,), deduplicate=False)
    assert not (tmp_path / "out" / "midtrain.jsonl").exists()
