"""The demo dataset: formats, shares, the held-out split, determinism, and errors that name the cure."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from polm.demo.corpus import (
    TRAINING_FILES,
    build_benchmark,
    build_demo_dataset,
    count_tokens,
    find_contaminated,
    is_held_out,
)
from polm.demo.pen import Pen
from polm.demo.tasks import TASKS, Task
from polm.errors import DataError

SETTINGS: dict[str, Any] = {
    "seed": 0,
    "num_pretrain_docs": 4_000,
    "num_midtrain_docs": 1_000,
    "num_sft": 400,
    "num_prompts": 600,
    "num_items": 200,
    "prose_share": 0.25,
    "direct_share": 0.3,
    "corrupted_share": 0.12,
    "chat_share": 0.1,
    "midtrain_prose_share": 0.5,
    "midtrain_corrupted_share": 0.3,
}
SMALL = {**SETTINGS, "num_pretrain_docs": 60, "num_midtrain_docs": 20, "num_sft": 20, "num_prompts": 20, "num_items": 5}

# Of the benchmark files with 200 items a task. It changes only when tasks change, and then old scores are void.
BENCHMARK_DIGEST = "88d3f0fddb57e55a"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def get_prompt(text: str) -> str:
    """The prompt of a question document, plain or chat."""
    return re.split(r" (?:<\|assistant\|>|steps|####) ", text.removeprefix("<|user|> "))[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("data") / "new" / "folder"
    return folder, build_demo_dataset(folder, **SETTINGS)


def test_files_have_the_agreed_format(dataset: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = dataset
    names = {*TRAINING_FILES, "summary.json", *(f"benchmarks/{task}.jsonl" for task in TASKS)}
    assert set(read_all(folder)) == names, "and no temporary file is left"
    assert json.loads((folder / "summary.json").read_text()) == summary
    for name in ("pretrain.jsonl", "midtrain.jsonl"):
        assert all(set(record) == {"text", "source"} for record in read(folder / name))
    for record in read(folder / "sft.jsonl"):
        user, assistant = record["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert re.fullmatch(r"steps .+ #### .+", assistant["content"])
    for record in read(folder / "prompts.jsonl"):
        assert list(record) == ["prompt", "answer", "verifier", "task", "solution"]
        assert record["verifier"] == "exact"
        assert record["solution"].split("#### ")[1] == record["answer"]
    for task in TASKS:
        records = read(folder / "benchmarks" / f"{task}.jsonl")
        assert [list(record) for record in records] == [["id", "prompt", "answer", "solution", "verifier"]] * 200
        assert [record["id"] for record in records] == [f"{task}-{i:04d}" for i in range(200)]
        assert len({record["prompt"] for record in records}) == 200
        assert all(TASKS[task].work(record["prompt"], Pen())[1] == record["answer"] for record in records)


def test_summary_counts_what_is_in_the_files(dataset: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = dataset
    counts = summary["files"]
    assert counts["sft.jsonl"]["num_records"] == 400
    assert counts["prompts.jsonl"]["num_records"] == 600
    assert counts["benchmarks/sort.jsonl"]["num_records"] == 200
    assert summary["settings"] == SETTINGS
    for name in ("pretrain.jsonl", "midtrain.jsonl"):
        records = read(folder / name)
        assert counts[name]["num_records"] == len(records) == SETTINGS[f"num_{name.removesuffix('.jsonl')}_docs"]
        assert counts[name]["num_tokens"] == sum(count_tokens(record["text"]) for record in records)
        by_source = counts[name]["sources"]
        assert by_source["prose"]["num_records"] == sum(record["source"] == "prose" for record in records)
        assert sum(count["num_records"] for count in by_source.values()) == len(records)
        assert sum(count["num_tokens"] for count in by_source.values()) == counts[name]["num_tokens"]


def test_shares_are_kept_and_sources_tell_the_truth(dataset: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = dataset
    for name, prose_share, corrupted_share in (("pretrain", 0.25, 0.12), ("midtrain", 0.5, 0.3)):
        records = read(folder / f"{name}.jsonl")
        questions = [record for record in records if record["source"] != "prose"]
        num_direct = num_corrupted = num_chat = 0
        num_of_task = dict.fromkeys(TASKS, 0)
        for record in questions:
            task, form = record["source"].split("/")
            prompt, answer = get_prompt(record["text"]), record["text"].split("#### ")[1]
            is_direct = " steps " not in record["text"]
            num_of_task[task] += 1
            num_direct += is_direct
            num_corrupted += form == "corrupted"
            num_chat += record["text"].startswith("<|user|> ")
            assert (answer != TASKS[task].work(prompt, Pen())[1]) == (form == "corrupted")
            assert form == "corrupted" or is_direct == (form == "direct")
            assert record["text"].startswith("<|user|> ") == (" <|assistant|> " in record["text"])
        # At least three standard errors at the 500 questions of the smaller file.
        assert 1 - len(questions) / len(records) == pytest.approx(prose_share, abs=0.05)
        assert num_direct / len(questions) == pytest.approx(0.3, abs=0.06)
        assert num_corrupted / len(questions) == pytest.approx(corrupted_share, abs=0.06)
        assert num_chat / len(questions) == pytest.approx(0.1, abs=0.04)
        assert all(0.06 < num / len(questions) < 0.14 for num in num_of_task.values())


def test_no_training_prompt_is_held_out(dataset: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = dataset
    benchmark = {record["prompt"] for task in TASKS for record in read(folder / "benchmarks" / f"{task}.jsonl")}
    prompts = [record["prompt"] for record in read(folder / "prompts.jsonl")]
    prompts += [record["messages"][0]["content"] for record in read(folder / "sft.jsonl")]
    assert len(set(prompts)) == 1_000, "distinct, also across SFT and RL"
    for name in ("pretrain", "midtrain"):
        prompts += [get_prompt(r["text"]) for r in read(folder / f"{name}.jsonl") if r["source"] != "prose"]
    assert not any(is_held_out(prompt) for prompt in prompts)
    assert not benchmark & set(prompts)
    assert all(is_held_out(prompt) for prompt in benchmark)
    assert summary["ledger"]["contaminated"] == 0
    assert summary["ledger"]["checked_for_contamination"] == 6_000
    assert summary["ledger"]["prompts_shared_with_sft"] == 0
    # A tenth of the draws is turned away: of n kept, n / 9.
    assert summary["ledger"]["held_out_redrawn"] == pytest.approx((6_000 - 1_500) / 9, rel=0.2)


def test_find_contaminated_sees_prompts_anywhere_but_only_whole() -> None:
    prompts = ["add 47 and 38 .", "ben has 2 coins ?"]
    texts = [
        "add 47 and 38 . #### 85",
        "add 47 and 39 . #### 86",
        "<|user|> add 47 and 38 . <|assistant|> #### 85",
        "add 147 and 38 . #### 185",
        "add add 47 and 38 .",
        "add 47 and 38",
        "ben sees anna . ben has 2 coins ? 2",
        "",
    ]
    assert find_contaminated(texts, prompts) == [0, 2, 4, 6]
    assert find_contaminated(texts, []) == []


def test_split_puts_a_tenth_aside() -> None:
    rng = Random(0)
    prompts = {task.ask(rng) for task in TASKS.values() for _ in range(1_000)}
    assert sum(is_held_out(prompt) for prompt in prompts) / len(prompts) == pytest.approx(0.1, abs=0.01)
    digest = hashlib.blake2b(b". 147 85 add and", digest_size=8).hexdigest()
    assert is_held_out("add 147 and 85 .") == (int(digest, 16) % 10 == 0)


def test_reordered_twins_are_on_the_same_side() -> None:
    """The same question in another order is no other question: `bits a or b`, a count over the same things."""
    rng = Random(0)
    for _ in range(300):
        words = TASKS["count"].ask(rng).split()
        things = words.index("in") + 1
        shuffled = [word for word in words[things:] if word not in ",."]
        rng.shuffle(shuffled)
        twin = " ".join([*words[:things], " , ".join(shuffled), "."])
        assert sorted(twin.split()) == sorted(words)
        assert is_held_out(twin) == is_held_out(" ".join(words))
    assert find_contaminated(["bits 001 or 110 in decimal . steps"], ["bits 110 or 001 in decimal ."]) == [0]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_demo_dataset(tmp_path / name, **SMALL)
    assert read_all(tmp_path / "one") == read_all(tmp_path / "two")
    before = read_all(tmp_path / "one")
    build_demo_dataset(tmp_path / "one", **SMALL)
    assert read_all(tmp_path / "one") == before, "a second build replaces the first"


def test_seeds_differ_in_training_and_agree_in_benchmarks(tmp_path: Path) -> None:
    build_demo_dataset(tmp_path / "0", **SMALL)
    build_demo_dataset(tmp_path / "1", **{**SMALL, "seed": 1, "num_items": 7})
    zero, one = read_all(tmp_path / "0"), read_all(tmp_path / "1")
    assert all(zero[name] != one[name] for name in TRAINING_FILES)
    for name in (name for name in zero if name.startswith("benchmarks/")):
        assert one[name].startswith(zero[name]), "more items continue the same list"


def test_files_do_not_disturb_each_other(tmp_path: Path) -> None:
    build_demo_dataset(tmp_path / "0", **SMALL)
    build_demo_dataset(tmp_path / "1", **{**SMALL, "num_sft": 30, "num_pretrain_docs": 70})
    zero, one = read_all(tmp_path / "0"), read_all(tmp_path / "1")
    assert zero["midtrain.jsonl"] == one["midtrain.jsonl"]
    assert one["pretrain.jsonl"].startswith(zero["pretrain.jsonl"])
    assert one["sft.jsonl"].startswith(zero["sft.jsonl"])


def test_benchmarks_are_the_same_on_every_machine() -> None:
    items = [item for task in TASKS for item in build_benchmark(task, 200)]
    text = "\n".join(f"{item.prompt} {item.solution}" for item in items)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == BENCHMARK_DIGEST


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("prose_share", 1.5, r"prose_share is 1\.5.*between 0 and 1"),
        ("midtrain_corrupted_share", -0.1, "midtrain_corrupted_share is -0.1"),
        ("chat_share", float("nan"), "chat_share is nan"),
        ("num_sft", 0, "num_sft is 0.*at least 1"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, setting: str, value: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_demo_dataset(tmp_path / "data", **{**SMALL, setting: value})
    assert not (tmp_path / "data").exists()


def build_tiny_task(num_prompts: int) -> Task:
    """`tiny 0 .` to `tiny N-1 .`, each number its own answer."""
    return Task(
        "tiny",
        "math",
        lambda rng: f"tiny {rng.randrange(num_prompts)} .",
        lambda prompt, pen: (f"{(value := pen.number(int(prompt.split()[1])))}", str(value)),
    )


@pytest.fixture
def only_tiny_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(TASKS):
        monkeypatch.delitem(TASKS, name)
    monkeypatch.setitem(TASKS, "tiny", build_tiny_task(100))


@pytest.mark.usefixtures("only_tiny_task")
def test_too_many_items_are_refused_with_the_cure(tmp_path: Path) -> None:
    num_held_out = sum(is_held_out(f"tiny {i} .") for i in range(100))
    assert 0 < num_held_out < 100
    assert len(build_benchmark("tiny", num_held_out)) == num_held_out
    with pytest.raises(DataError, match=f"'tiny'.*set num_items to {num_held_out} or less"):
        build_benchmark("tiny", num_held_out + 1)
    with pytest.raises(DataError, match=r"'tiny'.*lower num_sft or num_prompts"):
        build_demo_dataset(tmp_path, **{**SMALL, "num_items": 1, "num_prompts": 101 - num_held_out})


@pytest.mark.usefixtures("only_tiny_task")
def test_prompts_are_shared_with_sft_only_when_there_are_no_others(tmp_path: Path) -> None:
    num_free = sum(not is_held_out(f"tiny {i} .") for i in range(100))
    settings = {**SMALL, "num_items": 1, "num_sft": 20}
    enough = build_demo_dataset(tmp_path, **{**settings, "num_prompts": num_free - 20})
    assert enough["ledger"]["prompts_shared_with_sft"] == 0
    short = build_demo_dataset(tmp_path, **{**settings, "num_prompts": num_free - 17})
    assert short["ledger"]["prompts_shared_with_sft"] == 3
    assert short["files"]["prompts.jsonl"]["num_records"] == num_free - 17
