"""The ten tasks: answers computed a second way, steps that hold, slips that show, and the limits on the text."""

from __future__ import annotations

import re
from random import Random

import pytest

from polm.demo.corpus import ASSISTANT_MARK, USER_MARK, count_tokens
from polm.demo.pen import Pen
from polm.demo.prose import generate_prose
from polm.demo.tasks import TASKS, Item, Task, build_direct_solution, corrupt

NUM_ITEMS = 500
# What a tokenizer may add to the words of the demo: end, padding, unknown, and a few to spare.
NUM_OTHER_SPECIALS = 8


def draw(task: str, num_items: int = NUM_ITEMS) -> list[Item]:
    rng = Random(f"test/{task}")
    return [TASKS[task].generate(rng) for _ in range(num_items)]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def answer_count(prompt: str) -> str:
    words = prompt.split()
    start = words.index("in")
    return str(sum(words[start:].count(wanted) for wanted in set(words[1:start]) - {"or"}))


def answer_clock(prompt: str) -> str:
    hour, minute, delta = numbers(prompt)
    total = (60 * hour + minute + (delta if " plus " in prompt else -delta)) % (24 * 60)
    return f"{total // 60} : {total % 60:02d}"


def answer_bits(prompt: str) -> str:
    ((left, name, right),) = re.findall(r"^bits (\d+) (\w+) (\d+) in decimal \.$", prompt)
    a, b = int(left, 2), int(right, 2)
    return str({"and": a & b, "or": a | b, "xor": a ^ b}[name])


def answer_code(prompt: str) -> str:
    values: dict[str, int] = {}
    for target, left, sign, right in re.findall(r"(\w) = (\w+)(?: ([-+*]) (\w+))?", prompt):
        a, b = (values.get(word, word) for word in (left, right or "0"))
        values[target] = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "": int(a)}[sign]
    return str(values[prompt.split()[-2]])


def answer_word(prompt: str) -> str:
    if two := re.match(r"(\w+) has (\d+) \w+ and (\w+) has (\d+) \. (\w+) gives (\d+) to (\w+) \.", prompt):
        owner, start, other, other_start, giver, num_given, receiver = two.groups()
        assert (giver, receiver) == (owner, other)
        held = {owner: int(start) - int(num_given), other: int(other_start) + int(num_given)}
        return str(held[prompt.split()[-2]])
    total = int(re.match(r"\w+ has (\d+) ", prompt)[1])  # type: ignore[index]
    total += sum(int(found) for found in re.findall(r"finds (\d+)", prompt))
    total -= sum(int(lost) for lost in re.findall(r"(?:loses|gives) (\d+)", prompt))
    total += sum(int(num) * int(size) for num, size in re.findall(r"buys (\d+) boxes of (\d+)", prompt))
    return str(total)


ANSWERS = {
    "add": lambda prompt: str(sum(numbers(prompt))),
    "sub": lambda prompt: str(numbers(prompt)[1] - numbers(prompt)[0]),
    "mul": lambda prompt: str(numbers(prompt)[0] * numbers(prompt)[1]),
    "max": lambda prompt: str(max(numbers(prompt))),
    "sort": lambda prompt: " , ".join(str(number) for number in sorted(numbers(prompt))),
    "count": answer_count,
    "clock": answer_clock,
    "word": answer_word,
    "bits": answer_bits,
    "code": answer_code,
}

WORKED = [
    ("add", "add 147 and 85 .", "7 + 5 = 12 , 4 + 8 + 1 = 13 , 1 + 1 = 2", "232"),
    ("add", "add 905 and 94 .", "5 + 4 = 9 , 0 + 9 = 9 , 9", "999"),
    ("sub", "subtract 85 from 342 .", "12 - 5 = 7 , 14 - 8 - 1 = 5 , 3 - 1 = 2", "257"),
    ("sub", "subtract 93 from 102 .", "12 - 3 = 9 , 10 - 9 - 1 = 0 , 1 - 1 = 0", "9"),
    ("mul", "multiply 4375 by 3 .", "5 * 3 = 15 , 7 * 3 + 1 = 22 , 3 * 3 + 2 = 11 , 4 * 3 + 1 = 13", "13125"),
    ("max", "largest of 47 , 12 , 85 .", "47 > 12 , 47 < 85", "85"),
    ("sort", "sort 47 , 12 , 85 , 30 .", "12 , 47 ; 12 , 47 , 85", "12 , 30 , 47 , 85"),
    ("count", "count red in blue , red , red .", "blue 0 red 1 red 2", "2"),
    ("count", "count red or blue in blue , white , red .", "blue 1 white 1 red 2", "2"),
    ("clock", "clock 9 : 47 plus 30 minutes .", "47 + 30 = 77 , 77 - 60 = 17 , 9 + 1 = 10", "10 : 17"),
    ("clock", "clock 23 : 55 plus 10 minutes .", "55 + 10 = 65 , 65 - 60 = 5 , 23 + 1 = 24 , 24 - 24 = 0", "0 : 05"),
    ("clock", "clock 0 : 05 minus 10 minutes .", "5 + 60 = 65 , 65 - 10 = 55 , 0 + 24 = 24 , 24 - 1 = 23", "23 : 55"),
    ("word", "ben has 14 books and omar has 5 . ben gives 3 to omar . how many books has omar ?", "5 + 3 = 8", "8"),
    ("word", "ben has 14 books , buys 2 boxes of 3 . how many books has ben ?", "2 * 3 = 6 , 14 + 6 = 20", "20"),
    ("bits", "bits 1011 xor 0110 in decimal .", "1101 : 1 , 3 , 6 , 13", "13"),
    ("code", "code x = 4 ; y = 2 ; y = x + y ; print y .", "y = 4 + 2 = 6", "6"),
]


@pytest.mark.parametrize(("task", "prompt", "steps", "answer"), WORKED)
def test_worked_by_hand(task: str, prompt: str, steps: str, answer: str) -> None:
    assert TASKS[task].work(prompt, Pen()) == (steps, answer)


def test_there_are_ten_tasks_in_three_groups() -> None:
    assert list(TASKS) == list(ANSWERS)
    assert {task.group for task in TASKS.values()} == {"math", "reasoning", "code"}
    assert all(TASKS[name].name == name for name in TASKS)


@pytest.mark.parametrize("task", ANSWERS)
def test_answer_is_right(task: str) -> None:
    for item in draw(task):
        assert item.task == task
        assert item.answer == ANSWERS[task](item.prompt), item
        assert item.solution.startswith("steps ")
        assert item.solution.endswith(f" #### {item.answer}")
        assert item.solution.count("####") == 1
        assert build_direct_solution(item.solution) == f"#### {item.answer}"


@pytest.mark.parametrize("task", ANSWERS)
def test_every_step_holds(task: str) -> None:
    """Each `a op b (op c) = d` of a correct solution is true arithmetic, each `a < b` a true comparison."""
    num_steps = 0
    for item in draw(task):
        for a, sign, b, sign_2, c, d in re.findall(r"(\d+) ([-+*]) (\d+)(?: ([-+]) (\d+))? = (\d+)", item.solution):
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            value += int(sign_2 + c) if c else 0
            assert value == int(d), item
            num_steps += 1
        for a, sign, b in re.findall(r"(\d+) ([<>]) (\d+)", item.solution):
            assert (int(a) < int(b)) == (sign == "<"), item
            num_steps += 1
    assert num_steps >= (0 if task in ("sort", "count", "bits") else NUM_ITEMS)


@pytest.mark.parametrize("task", ANSWERS)
def test_corrupt_gives_a_wrong_answer_at_the_end_of_steps(task: str) -> None:
    rng = Random("corrupt")
    solutions = set()
    for item in draw(task):
        solution = corrupt(item, rng)
        steps, answer = solution.split(" #### ")
        assert answer != item.answer, item
        assert steps.startswith("steps ")
        assert not re.search(r"-\d", solution), "no negative numbers"
        solutions.add(solution)
    assert len(solutions) > NUM_ITEMS / 2


def test_corrupt_carries_the_slip_through() -> None:
    """In every corrupted sum the answer follows from the columns: the wrong step, not the last line, is at fault."""
    rng = Random("carried")
    for item in draw("add"):
        steps, answer = corrupt(item, rng).removeprefix("steps ").split(" #### ")
        units, tens, hundreds = (int(step.split()[-1]) for step in steps.split(" , "))
        assert int(answer) == 100 * hundreds + 10 * (tens % 10) + units % 10


def test_corrupt_slips_at_every_kind_of_place() -> None:
    rng = Random("places")
    item = Item("add", "add 147 and 85 .", "", "232")
    solutions = {corrupt(item, rng) for _ in range(300)}
    assert "steps 7 + 5 = 12 , 4 + 8 = 12 , 1 + 1 = 2 #### 222" in solutions, "the forgotten carry"
    assert "steps 7 + 5 = 13 , 4 + 8 + 1 = 13 , 1 + 1 = 2 #### 233" in solutions, "a wrong first column"
    assert "steps 7 + 5 = 12 , 4 + 8 + 1 = 13 , 1 + 1 = 3 #### 332" in solutions, "a wrong last column"


def test_corrupt_refuses_a_task_whose_slips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Task("faulty", "math", lambda rng: f"faulty {rng.random()} .", lambda _, pen: (str(pen.number(1)), "1"))
    monkeypatch.setitem(TASKS, "faulty", faulty)
    with pytest.raises(AssertionError, match="faulty"):
        corrupt(faulty.generate(Random(0)), Random(0))


@pytest.mark.parametrize("task", ANSWERS)
def test_prompt_space_is_large(task: str) -> None:
    rng = Random(task)
    assert len({TASKS[task].ask(rng) for _ in range(20_000)}) >= 5_000


@pytest.mark.parametrize("task", ANSWERS)
def test_guessing_one_answer_does_not_pay(task: str) -> None:
    answers = [item.answer for item in draw(task)]
    assert max(answers.count(answer) for answer in set(answers)) / len(answers) < 0.25


@pytest.mark.parametrize("task", ANSWERS)
def test_documents_are_short(task: str) -> None:
    rng = Random("length")
    items = draw(task)
    lengths = [count_tokens(f"{item.prompt} {item.solution}") for item in items]
    assert 20 <= sum(lengths) / len(lengths) <= 60
    longest = max(count_tokens(f"{USER_MARK} {i.prompt} {ASSISTANT_MARK} {corrupt(i, rng)}") for i in items)
    assert max(longest, *lengths) + 1 <= 96, "with one token to end the document"


def test_prose_is_short_and_varied() -> None:
    rng = Random("prose")
    documents = [generate_prose(rng) for _ in range(2_000)]
    lengths = [count_tokens(document) for document in documents]
    assert 20 <= sum(lengths) / len(lengths) <= 60
    assert max(lengths) + 1 <= 96
    assert len(set(documents)) >= 1_990
    assert not any(re.search(r"\d", document) for document in documents)
    assert all(document.endswith(" .") for document in documents)


def all_texts() -> list[str]:
    rng = Random("texts")
    texts = [generate_prose(rng) for _ in range(1_000)]
    for task in TASKS:
        for item in draw(task):
            texts += [f"{item.prompt} {item.solution}", f"{item.prompt} {corrupt(item, rng)}"]
    return texts


def test_texts_are_plain() -> None:
    """Single spaces, single lines, and never two numbers side by side: digits may be split and joined again."""
    for text in all_texts():
        assert text == " ".join(text.split())
        assert not re.search(r"\d \d", text), text
        assert all(word.isdigit() or not re.search(r"\d", word) for word in text.split()), text
        assert text == text.lower()


def test_vocabulary_is_small() -> None:
    words = {part for text in all_texts() for word in text.split() for part in (word if word.isdigit() else [word])}
    assert set("0123456789") <= words
    assert 100 <= len(words | {USER_MARK, ASSISTANT_MARK}) + NUM_OTHER_SPECIALS <= 150


def test_generation_is_deterministic() -> None:
    for task in TASKS:
        assert draw(task, 20) == draw(task, 20)
        item = draw(task, 1)[0]
        assert corrupt(item, Random(3)) == corrupt(item, Random(3))
    assert generate_prose(Random(5)) == generate_prose(Random(5))


def test_pen_slips_once_and_only_when_told() -> None:
    honest = Pen()
    assert [honest.number(n) for n in (4, 5, 6)] == [4, 5, 6]
    assert honest.choose("a", []) == "a"
    assert honest.num_choices == 3, "a choice without alternatives does not count"
    slipping = Pen(1, Random(0))
    values = [slipping.number(n, high=9) for n in (4, 5, 6)]
    assert values[0] == 4
    assert values[1] in {3, 4, 6, 7}, "ten less is below 0, ten more above 9"
    assert values[2] == 6
