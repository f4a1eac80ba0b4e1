"""`polm data`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from polm.data.readers import read_conversations, read_documents, read_prompts, write_jsonl
from polm.errors import DataError
from polm.flywheel.store import compute_key
from polm.recipe import DPOSettings
from polm.recipe_data import DataStage, FilesData, FolderData, MixedSource
from polm.stages.common import Context
from polm.stages.data import STAGE, run

FILES = ("pretrain.jsonl", "midtrain.jsonl", "sft.jsonl", "prompts.jsonl")


def test_the_demo(artifact: Any, read_manifest: Any) -> None:
    folder = artifact("data")
    summary = json.loads((folder / "summary.json").read_text())
    settings = artifact.spec("data")[1].data
    assert len(read_documents(folder / "pretrain.jsonl")) == settings.num_pretrain_docs
    assert len(read_documents(folder / "midtrain.jsonl")) == settings.num_midtrain_docs
    assert len(read_conversations(folder / "sft.jsonl")) == settings.num_sft
    assert len(read_prompts(folder / "prompts.jsonl")) == settings.num_prompts
    assert len(list((folder / "benchmarks").glob("*.jsonl"))) == 10
    manifest = read_manifest(folder)
    assert manifest["ledger"] == summary["ledger"]
    assert manifest["ledger"]["contaminated"] == 0
    # The manifest says how many records each file has.
    assert {name: manifest["summary"][f"records/{name}"] for name in FILES} == {
        "pretrain.jsonl": settings.num_pretrain_docs,
        "midtrain.jsonl": settings.num_midtrain_docs,
        "sft.jsonl": settings.num_sft,
        "prompts.jsonl": settings.num_prompts,
    }


def copy(source: Path, out: Path) -> Any:
    out.mkdir()
    return run(DataStage(data=FolderData(source="folder", path=source)), Context(out, {}))


def test_a_folder_of_ones_own(tiny_data: Path, tmp_path: Path) -> None:
    result = copy(tiny_data, tmp_path / "out")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tiny_data / name).read_bytes()
    names = sorted(p.name for p in (tiny_data / "benchmarks").iterdir())
    assert sorted(p.name for p in (tmp_path / "out" / "benchmarks").iterdir()) == names
    assert result.summary["records/sft.jsonl"] == 24
    assert result.ledger["records"] == 240 + 40 + 24 + 16 + 10


def test_a_folder_with_a_broken_line(tiny_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(tiny_data, source)
    lines = (source / "sft.jsonl").read_text().splitlines()
    lines[4] = lines[4][:-7]
    (source / "sft.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"mine/sft.jsonl:5: not valid JSON"):
        copy(source, tmp_path / "out")


def test_a_folder_with_a_part_only(tiny_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    shutil.copy(tiny_data / "sft.jsonl", source)
    result = copy(source, tmp_path / "out")
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["sft.jsonl", "summary.json"]
    assert dict(result.ledger) == {"records": 24}


def test_a_folder_whose_pairs_refer_to_images(artifact: Any, tmp_path: Path) -> None:
    """It is copied and counted; the stage that learns from it refuses them, or leaves them out."""
    pairs = [{"prompt": f"add {i} and 1 .", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(4)]
    write_jsonl(tmp_path / "mine" / "preferences.jsonl", [*pairs, {**pairs[0], "image": "a.png"}])
    result = copy(tmp_path / "mine", tmp_path / "out")
    assert dict(result.ledger) == {"records": 4, "pairs_media": 1}
    inputs = {"base": str(artifact("sft")), "data": str(tmp_path / "out")}
    settings = DPOSettings(bin_tokens=192, precision="fp32", updates=1)
    with pytest.raises(DataError, match=r"preferences.jsonl:5: the record refers to image: a.png.*bad_records: drop"):
        artifact.run("dpo", settings, inputs, tmp_path / "refused")
    dropping = settings.model_copy(update={"bad_records": "drop"})
    ledger = artifact.run("dpo", dropping, inputs, tmp_path / "dpo")["ledger"]
    assert (ledger["read"], ledger["kept"], ledger["dropped"], ledger["dropped_media"]) == (5, 4, 1, 1)


def test_columns_of_prompts_reach_the_folder(tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1", "answer": "2", "level": 3, "verifier": "math"}]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    data = FilesData(source="files", prompts=(MixedSource(path=str(tmp_path / "mine.jsonl")),))
    result = run(DataStage(data=data), Context(_new(tmp_path / "out"), {}))
    assert dict(result.ledger) == {"prompts/read": 1, "prompts/kept": 1}
    (prompt,) = read_prompts(tmp_path / "out" / "prompts.jsonl")
    assert prompt.fields["level"] == 3


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set folder at .*nowhere; it should hold pretrain.jsonl"):
        copy(tmp_path / "nowhere", tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"holds none of pretrain.jsonl.*\(found: train.jsonl\)"):
        copy(tmp_path / "mine", tmp_path / "b")


def test_a_folder_that_later_stages_cannot_use_is_refused_at_once(tmp_path: Path) -> None:
    """Hours before the stage that would trip over it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "midtrain.jsonl").write_text('{"text": "a b c"}\n')
    settings = DataStage(data=FolderData(source="folder", path=folder), needs=("midtrain.jsonl", "sft.jsonl"))
    with pytest.raises(DataError, match=r"lacks sft\.jsonl, which later stages read"):
        run(settings, Context(_new(tmp_path / "a"), {}))
    prompt = {"prompt": "1 + 1", "answer": "2", "verifier": "exactt"}
    (folder / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    plain = DataStage(data=FolderData(source="folder", path=folder))
    with pytest.raises(DataError, match=r"prompts\.jsonl: question 1 names the verifier 'exactt'; there are exact"):
        run(plain, Context(_new(tmp_path / "b"), {}))
    (folder / "prompts.jsonl").write_text(json.dumps({**prompt, "verifier": "number", "answer": "two"}) + "\n")
    with pytest.raises(DataError, match=r"question 1: the verifier 'number' needs a number as the answer, found 'two'"):
        run(plain, Context(_new(tmp_path / "c"), {}))


def _new(path: Path) -> Path:
    path.mkdir()
    return path


# ---- files of the user's own ---------------------------------------------------------------------------------------


def files(path: Path, **more: Any) -> DataStage:
    return DataStage(data=FilesData(source="files", sft=(MixedSource(path=str(path)),), **more))


def test_files_become_a_folder_that_later_stages_read(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i % 3}", "input": "", "output": "a"} for i in range(4)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    result = run(files(tmp_path / "alpaca.json"), Context(_new(tmp_path / "out"), {}))
    assert dict(result.summary) == {"records/sft.jsonl": 3}
    assert dict(result.ledger) == {"sft/read": 4, "sft/kept": 3, "sft/duplicates": 1}
    chats = read_conversations(tmp_path / "out" / "sft.jsonl")
    assert [chat.messages[0]["content"] for chat in chats] == ["q0", "q1", "q2"]
    needs = files(tmp_path / "alpaca.json").model_copy(update={"needs": ("midtrain.jsonl",)})
    with pytest.raises(DataError, match=r"lacks midtrain\.jsonl, which later stages read"):
        run(needs, Context(_new(tmp_path / "b"), {}))


def test_files_with_a_verifier_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "q", "answer": "a", "verifier": "oracle"}) + "\n")
    data = FilesData(source="files", prompts=(MixedSource(path=str(tmp_path / "p.jsonl")),))
    with pytest.raises(DataError, match="names the verifier 'oracle'"):
        run(DataStage(data=data), Context(_new(tmp_path / "out"), {}))


def test_the_key_follows_the_content_of_files_and_not_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    key = compute_key(STAGE, files(tmp_path / "a.jsonl"), {})
    assert compute_key(STAGE, files(tmp_path / "b.jsonl"), {}) == key
    assert compute_key(STAGE, files(tmp_path / "a.jsonl", seed=1), {}) != key
    marks = _new(tmp_path / "marks")
    (marks / "x.jsonl").write_text("{}")
    with_marks = compute_key(STAGE, files(tmp_path / "a.jsonl", benchmarks=marks), {})
    (marks / "x.jsonl").write_text("{ }")
    assert len({key, with_marks, compute_key(STAGE, files(tmp_path / "a.jsonl", benchmarks=marks), {})}) == 3
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "b"}\n')
    assert compute_key(STAGE, files(tmp_path / "a.jsonl"), {}) != key
    gone = compute_key(STAGE, files(tmp_path / "gone.jsonl"), {})
    assert gone != compute_key(STAGE, files(tmp_path / "lost.jsonl"), {})


def test_prompts_that_a_model_judges_need_no_answers(artifact: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "prompts.jsonl", [{"prompt": "Say something kind."}, {"prompt": "And funny."}])
    settings = DataStage(data=FolderData(source="folder", path=tmp_path / "in"), needs=("prompts.jsonl",))
    manifest = artifact.run("data", settings, {}, tmp_path / "out")
    assert manifest["summary"]["records/prompts.jsonl"] == 2
    write_jsonl(
        tmp_path / "in" / "prompts.jsonl", [{"prompt": "1+1?", "answer": "2", "verifier": "exact"}, {"prompt": "2"}]
    )
    with pytest.raises(DataError, match=r"prompts.jsonl:2: no column answer, verifier"):
        artifact.run("data", settings, {}, tmp_path / "mixed")
