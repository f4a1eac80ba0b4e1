from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from polm.data.benchmarks import read_benchmark_folder
from polm.data.readers import read_conversations, read_documents, read_prompts
from polm.data.word_problem_sources import Problem, find_equations, read_problems, reduce_calculations
from polm.data.word_problem_text import (
    collect_common_words,
    mask_question,
    normalise_question,
    render_problem,
    renumber,
    split_words,
    stem,
)
from polm.data.word_problems import (
    build_word_problems_dataset,
    find_similar_pairs,
    group_families,
    hash_share,
    learn_operator_cues,
    split_problems,
)
from polm.errors import DataError
from polm.text.arithmetic import evaluate, extract_numbers, format_expression, parse_expression

REAL_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
COMMON = frozenset(re.findall(r"\w+", "there are red and green apples how many does have left he she gave each"))
VERBS = [("ate", "-"), ("sold", "-"), ("lost", "-"), ("found", "+"), ("bought", "+"), ("earned", "+")]
THINGS = ["apples", "books", "coins", "dolls", "eggs", "flags", "gloves", "hats", "jars", "kites", "lamps", "maps"]


def build_problem(question: str, expression: str, source: str = "asdiv", part: str = "train") -> Problem:
    masked, numbers = extract_numbers(question)
    tree = parse_expression(expression)
    answer = evaluate(expression, numbers)
    return Problem(source, question[:9], question, masked, tuple(numbers), answer, (tree,), part)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the published layouts: 72 different questions for asdiv, svamp and mawps, 3 for gsm8k."""
    data = tmp_path_factory.mktemp("data")
    asdiv, svamp, mawps = [], [], []
    for index, thing in enumerate(THINGS):
        for number, (verb, symbol) in enumerate(VERBS):
            first, second = 40 + 3 * index + number, 5 + index
            value = first + second if symbol == "+" else first - second
            # Each verb brings its own words, so that few questions are nearly the same.
            body = f"In room {verb}{index} a {thing} {verb} shop {thing}{verb} had {first} {thing} when she {verb}"
            if number % 3 == 0:
                row: dict[str, Any] = {"body": f"{body} {second}.", "question": f"How many {thing} are {verb} there?"}
                asdiv.append({**row, "formula": f"{first}{symbol}{second}={value}", "answer": f"{value} ({thing})"})
            elif number % 3 == 1:
                row = {"Body": f"{body} {second}", "Question": f"Count {thing} {verb} now?", "Answer": float(value)}
                svamp.append({**row, "Equation": f"( {first}.0 {symbol} {second}.0 )"})
            else:
                text = f"{body} {second}. What number of {thing} is {verb} so far?"
                mawps.append({"input": text, "target": float(value), "type": "addsub"})
    asdiv.append({"body": "", "question": "Who has 5?", "formula": "x", "answer": "Bob"})
    mawps.append(dict(mawps[0]))
    write_lines(data / "word_problems" / "asdiv.jsonl", asdiv)
    write_lines(data / "word_problems" / "svamp.jsonl", svamp)
    write_lines(data / "word_problems" / "mawps.jsonl", mawps)
    clips = "sold clips to 48 friends in April and half as many in May; how many clips altogether"
    steps = "48/2 = <<48/2=24>>24. 48+24 = <<48+24=72>>72.\n#### 72"
    pens = {"question": "A pen costs 3 dollars; what do 4 pens cost?", "answer": "3*4=<<3*4=12>>12\n#### 12"}
    write_lines(data / "gsm8k" / "train.jsonl", [{"question": f"Natalia {clips}?", "answer": steps}, pens])
    write_lines(data / "gsm8k" / "test.jsonl", [{"question": f"Later Natalia {clips}?", "answer": steps}])
    return data


def test_equations_are_found_once_per_function() -> None:
    def found(numbers: list[float], answer: float, operators: str, steps: int) -> list[str]:
        return [format_expression(tree) for tree in find_equations(numbers, answer, operators, steps)]

    assert found([8, 3], 5, "+-*/", 1) == ["N0 - N1"]
    assert found([3, 8], 5, "+-*/", 1) == ["N1 - N0"]
    assert found([4, 2], 2, "+-*/", 1) == ["N0 - N1", "N0 / N1"]
    assert found([4, 2], 2, "+-", 1) == ["N0 - N1"]
    assert found([6, 3, 20], 23, "+-", 2) == ["N0 + N2 - N1"]  # one of five ways to write this function
    assert found([2, 3, 4], 20, "+-*/", 2) == ["( N0 + N1 ) * N2"]
    assert found([2, 3], 99, "+-*/", 1) == []


def test_calculations_reduce_to_one_expression() -> None:
    def reduce(calculations: list[tuple[str, str]], numbers: list[float], answer: float) -> str:
        return format_expression(reduce_calculations(calculations, numbers, answer))

    assert reduce([("48/2", "24"), ("48+24", "72")], [48], 72) == "N0 + N0 / 2"
    assert reduce([("16-3-4", "9"), ("9*2", "18")], [16, 3, 4, 2], 18) == "( N0 - N1 - N2 ) * N3"
    # A result that equals a number of the question: each is used once before either is used twice.
    assert reduce([("5*4", "20"), ("20+20", "40")], [5, 4, 20], 40) == "N0 * N1 + N2"
    for calculations, reason in [
        ([("5*17", "85")], "an operand that is not in the question"),
        ([("5*4", "21")], "a calculation with another result"),
        ([("5+4", "9")], "no calculation gives the answer"),
        ([("x*4", "20")], "a calculation that is no expression"),
        ([], "no calculation gives the answer"),
    ]:
        with pytest.raises(ValueError, match=reason):
            reduce_calculations(calculations, [5, 4], 20)


def test_sources_are_read_and_counted(small_data: Path) -> None:
    problems, ledger = read_problems(small_data)
    counts = Counter((problem.source, problem.part) for problem in problems)
    assert counts == {
        ("asdiv", "train"): 24,
        ("svamp", "train"): 24,
        ("mawps", "train"): 25,
        ("gsm8k", "train"): 2,
        ("gsm8k", "test"): 1,
    }
    assert ledger["asdiv/read"] == 25
    assert ledger["asdiv/used"] == 24
    assert ledger["asdiv/dropped: an answer that is no number"] == 1
    assert all(evaluate(format_expression(p.equation), p.numbers) == pytest.approx(p.answer) for p in problems)
    assert {p.id for p in problems if p.source == "gsm8k"} == {"gsm8k-1", "gsm8k-2", "gsm8k_test-1"}


def test_split_words() -> None:
    assert split_words("Mr. Lee\u2019s N0mm rope, $N1.") == ["Mr", "Lee", "'s", "N0", "mm", "rope", ",", "$", "N1", "."]
    assert split_words("didn't 3rd 2.5%") == ["didn't", "3", "rd", "2.5", "%"]
    assert [stem(word) for word in ("apples", "cherries", "boxes", "glass", "bus", "dishes")] == [
        "apple",
        "cherry",
        "box",
        "glass",
        "bus",
        "dish",
    ]


def test_common_words_tell_names_from_first_words() -> None:
    words = collect_common_words(
        ["How many did Tom eat? Then Tom left.", "If so, how did rose win? In May Rose and Rose."]
    )
    assert {"how", "did", "so", "then"} - words == {"then"}  # "then" was never seen in lower case
    assert not {"tom", "rose", "may"} & words


def test_rendering() -> None:
    problem = build_problem(
        "Mary Lee gave 3 red apples to Tom. Tom has 12 green pears. How many pears does Tom have than Lee has apples?",
        "N1 - N0",
    )
    rendered = render_problem(problem, COMMON | {"to", "has", "pears", "than"})
    assert rendered.prompt == (
        "name1 gave N1 red thing1 to name0 . name0 has N0 green thing0 . "
        "how many thing0 does name0 have than name1 has thing1 ?"
    )
    assert rendered.solution == "#### N0 - N1"
    assert rendered.numbers == (12, 3)


def test_rendering_sorts_operands_but_not_what_may_not_be_swapped() -> None:
    def solve(question: str, expression: str) -> str:
        return render_problem(build_problem(question, expression), COMMON).solution

    assert solve("3 and 8 and 5", "N2 + N0 + N1") == "#### N0 + N1 + N2"
    assert solve("3 and 8 and 5", "N2 * (N0 + N1)") == "#### ( N0 + N2 ) * N1"
    assert solve("3 and 8 and 5", "N1 - N0 - N2") == "#### N0 - N2 - N1"
    assert solve("3 and 8", "2 * N1") == "#### N0 * 2"
    assert solve("4 and 4", "N1 - N0") == "#### N1 - N0"  # equal numbers keep their order


def test_renumbering_keeps_the_kind_of_every_step() -> None:
    rng = Random(0)
    problem = build_problem("Ann had 12 pens, gave 3 away; 5 caps", "N0 - N1")
    orders = set()
    for _ in range(40):
        variant = renumber(problem, rng)
        assert variant is not None
        assert variant.masked == problem.masked
        assert variant.numbers[0] - variant.numbers[1] == variant.answer >= 1
        assert len(set(variant.numbers)) == 3
        orders.add(render_problem(variant, COMMON).solution)
    assert orders == {"#### N0 - N1", "#### N0 - N2", "#### N1 - N2"}
    assert renumber(build_problem("7 minus 7", "N0 - N1"), rng) is None  # different numbers have a difference


def test_normalised_questions_ignore_numbers_names_and_things() -> None:
    first, second = (
        build_problem("Ann has 3 cats, 2 cats left", "N0 - N1"),
        build_problem("Ann has 9 cats, 4 cats left", "N0"),
    )
    third = build_problem("Bob has 9 dogs, 4 dogs left", "N0")
    assert normalise_question(first) == normalise_question(second) == "ann has N cats , N cats left"
    assert normalise_question(third) != normalise_question(first)
    assert mask_question(third, COMMON | {"has"}) == mask_question(first, COMMON | {"has"})


def test_similar_pairs_by_each_of_the_three_rules() -> None:
    base = "a b c d e f g h i j"
    questions = [
        base,
        "a b c d e f g h i j k",  # 10 of 11 words in common
        "a b c d e f g h x y",  # 8 of 12
        "m1 m2 m3 m4 m5 m6 m7 m8 m9 m10 m11 m12 m13 n1 n2 n3 n4 n5 n6 n7",
        "o1 o2 o3 o4 o5 o6 o7 m1 m2 m3 m4 m5 m6 m7 m8 m9 m10 m11 m12 m13",  # 13 words in a row
        "p q r",
        "s t u",
    ]
    masked = [*questions[:5], "same", "same"]
    assert sorted(find_similar_pairs(questions, masked)) == [(0, 1), (3, 4), (5, 6)]
    assert group_families(7, [(0, 1), (3, 4), (5, 6), (1, 4)]) == [[0, 1, 3, 4], [2], [5, 6]]


def test_overlap_is_found_exactly() -> None:
    rng = Random(1)
    questions = [" ".join(rng.sample("abcdefghijklmn", rng.randint(6, 12))) for _ in range(150)]
    sets = [set(question.split()) for question in questions]
    expected = {(i, j) for j in range(150) for i in range(j) if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) > 0.8}
    found = set(find_similar_pairs(questions, [str(index) for index in range(150)]))
    assert found == expected
    assert len(expected) > 10


def test_split_keeps_families_together_and_drops_what_resembles_the_published_test() -> None:
    def write(tag: str) -> str:
        return " ".join(f"{letter}{tag}" for letter in "stuvwxyz") + " 3"

    tags = [f"{first}{second}" for first in "abcdefghijklmn" for second in "abcdefghijklmn"]
    problems = [build_problem(write(tag), "N0 + 1") for tag in tags]
    problems += [build_problem(write(tag) + " extra", "N0 + 1", "svamp") for tag in tags]
    problems.append(build_problem(write("zz"), "N0 + 1", "gsm8k", "test"))
    problems.append(build_problem(write("zz") + " extra", "N0 + 1", "gsm8k"))
    ledger: Counter[str] = Counter()
    split = split_problems(problems, COMMON, 0.2, 0.25, ledger)
    sides = (split.supervised, split.prompts, split.held_out)
    stems = [{problem.question.removesuffix(" extra") for problem in side} for side in sides]
    assert not any(stems[i] & stems[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    assert ledger["families"] == len(tags) + 1
    assert ledger["training/dropped: nearly the same as a held-out question"] == 1
    assert [p.part for p in split.held_out if p.source == "gsm8k"] == ["test"]
    assert len(split.supervised) + len(split.prompts) + len(split.held_out) == 2 * len(tags) + 1
    assert 0.1 < len(split.held_out) / len(problems) < 0.3
    assert 0.1 < len(split.prompts) / len(problems) < 0.3


def test_hash_is_fixed() -> None:
    assert hash_share("polm") == pytest.approx(0.10152063662893544, abs=1e-12)


def test_cues_decide_between_equations() -> None:
    cues = learn_operator_cues(
        [build_problem(f"They share {n} pies among {n - 2} friends", "N0 / N1") for n in (8, 9)]
        + [build_problem(f"He had {n} pies and ate {n - 2} pies", "N0 - N1") for n in (8, 9)]
    )
    problem = build_problem("Ann will share 4 nuts among 2 birds", "N0 / N1")
    assert cues(problem, parse_expression("N0 / N1")) > cues(problem, parse_expression("N0 - N1"))


def test_dataset_folder(small_data: Path, tmp_path: Path) -> None:
    summary = build_word_problems_dataset(small_data, tmp_path / "a", seed=0, holdout_share=0.3, num_variants=2)
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == summary
    documents = read_documents(tmp_path / "a" / "pretrain.jsonl")
    conversations = read_conversations(tmp_path / "a" / "sft.jsonl")
    prompts = read_prompts(tmp_path / "a" / "prompts.jsonl")
    benchmarks = read_benchmark_folder(tmp_path / "a" / "benchmarks")
    assert set(benchmarks) >= {"asdiv", "mawps", "svamp", "gsm8k"}
    assert summary["files"]["pretrain.jsonl"]["num_records"] == len(documents)
    for prompt in prompts:
        assert evaluate(prompt.solution.removeprefix("#### "), prompt.numbers or ()) == pytest.approx(
            float(prompt.answer)
        )
        assert prompt.verifier == "expression"
    held_out = [item for items in benchmarks.values() for item in items]
    for item in held_out:
        assert evaluate(item.solution.removeprefix("#### "), item.numbers or ()) == pytest.approx(float(item.answer))
    shown = [*documents, *(prompt.prompt for prompt in prompts)]
    shown += [message["content"] for chat in conversations for message in chat.messages]
    shown = [re.sub(r"\bN[0-9]", "N", text) for text in shown]
    assert not any(re.sub(r"\bN[0-9]", "N", item.prompt) in text for item in held_out for text in shown)
    solved = {chat.messages[0]["content"] for chat in conversations}
    assert not solved & {prompt.prompt for prompt in prompts}
    assert not any(prompt.prompt + " ####" in document for prompt in prompts for document in documents)
    assert any(document.startswith("<|user|> ") and " <|assistant|> #### " in document for document in documents)
    # The training question that is nearly the same as GSM8K's test question is gone, the other one is not.
    assert summary["ledger"]["training/dropped: nearly the same as a held-out question"] == 1
    assert summary["ledger"]["mawps/dropped: a repeated question"] == 1


def test_seed_changes_the_order_and_not_the_benchmarks(small_data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_word_problems_dataset(small_data, tmp_path / name, seed=seed, num_items=2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl"))
    content = {name: {str(file): (tmp_path / name / file).read_bytes() for file in files} for name in "abc"}
    assert len(files) >= 8
    assert content["a"] == content["b"]
    changed = {file for file in content["a"] if content["a"][file] != content["c"][file]}
    assert changed == {"pretrain.jsonl", "midtrain.jsonl", "sft.jsonl", "prompts.jsonl"}
    assert all(len(items) <= 2 for items in read_benchmark_folder(tmp_path / "a" / "benchmarks").values())


def test_settings_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"chat_share is a share between 0 and 1, found 1\.5"):
        build_word_problems_dataset(tmp_path, tmp_path, seed=0, chat_share=1.5)
    with pytest.raises(DataError, match="num_items must be at least 1, found 0"):
        build_word_problems_dataset(tmp_path, tmp_path, seed=0, num_items=0)
    with pytest.raises(DataError, match=r"asdiv\.jsonl does not exist"):
        build_word_problems_dataset(tmp_path, tmp_path, seed=0)


def test_real_dataset(tmp_path: Path) -> None:
    if not REAL_DATA.exists():
        pytest.skip("the real data files are not beside the project (../shared/data)")
    summary = build_word_problems_dataset(REAL_DATA, tmp_path, seed=0)
    benchmarks = read_benchmark_folder(tmp_path / "benchmarks")
    assert set(benchmarks) == {"asdiv", "gsm8k", "mawps", "svamp", "two_step"}
    assert all(len(items) > 100 for items in benchmarks.values())
    for items in benchmarks.values():
        for item in items:
            value = evaluate(item.solution.removeprefix("#### "), item.numbers or ())
            assert value == pytest.approx(float(item.answer), rel=1e-6, abs=1e-6)
    assert summary["files"]["prompts.jsonl"]["num_records"] > 1000
    assert summary["ledger"]["gsm8k_test/read"] == 1319
    patterns = {re.sub(r"\bN[0-9]", "N", item.prompt) for items in benchmarks.values() for item in items}
    questions = [document.partition(" ####")[0] for document in read_documents(tmp_path / "pretrain.jsonl")]
    questions = [question.removeprefix("<|user|> ").removesuffix(" <|assistant|>") for question in questions]
    assert len(patterns) > 1000
    assert not patterns.intersection(re.sub(r"\bN[0-9]", "N", question) for question in questions)
